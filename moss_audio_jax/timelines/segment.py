"""A text and its times."""

import re
from dataclasses import dataclass

_SPEAKER = re.compile(r"\s*\[(S[0-9]{1,3})\]\s*")


@dataclass(frozen=True)
class Segment:
    """A word, sentence or sound. begin, end: seconds on the recording's clock; without an end it is a point in time.

    Times are as the model gave them, so `end` may be less than `begin`.
    """

    begin: float
    end: float | None
    text: str

    @property
    def speaker(self) -> str | None:
        """Returns the speaker whose label the text begins with: "S01" of `[S01]Hello.`"""
        found = _SPEAKER.match(self.text)
        return found and found[1]

    @property
    def spoken(self) -> str:
        """Returns the text without the label of its speaker."""
        return _SPEAKER.sub("", self.text, count=1) if self.speaker else self.text

    @property
    def span(self) -> tuple[float, float]:
        """Returns the times in order. They are equal for a point."""
        end = self.begin if self.end is None else self.end
        return min(self.begin, end), max(self.begin, end)

    @property
    def is_backwards(self) -> bool:
        return self.end is not None and self.end < self.begin
