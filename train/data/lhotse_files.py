"""Rows of Lhotse's cuts, as JSON lines; Lhotse itself is not needed."""

from collections.abc import Mapping
from typing import Any

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path
from train.data.list_files import JsonLines
from train.data.manifest import TIME_TOLERANCE

COLUMNS = ("audio", "text", "words")


class CutRows(JsonLines):
    """Cuts of one recording each, of one file: not mixed, padded, or stored in memory or as features alone."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.columns = COLUMNS

    def select(self, names: Mapping[str, str]) -> None:
        pass  # a row has these three

    def row(self, index: int) -> dict[str, Any]:
        cut, name = self.content(index), f"{self.path} {self.place(index)}"
        try:
            if cut.get("type", "MonoCut") != "MonoCut":
                raise ValueError(f"a {cut['type']}")
            (source,) = cut["recording"]["sources"]
            if source["type"] != "file":
                raise ValueError(f"a source of type {source['type']!r}")
            if len(source["channels"]) != 1:
                raise ValueError(f"{len(source['channels'])} channels")
            start, end = cut["start"], cut["start"] + cut["duration"]
            said = cut.get("supervisions") or []
            for part in said:
                if (
                    part["start"] < -TIME_TOLERANCE
                    or part["start"] + part["duration"] > cut["duration"] + TIME_TOLERANCE
                ):
                    raise ValueError("a supervision that leaves the cut")
            text = " ".join(part["text"].strip() for part in said if part.get("text"))
            # Lhotse moves supervisions when it cuts, but not their alignment: only these times are certain.
            aligned = said if start == 0 else []
            words = [
                {"word": word[0], "start": word[1], "end": min(word[1] + word[2], end)}
                for part in aligned
                for word in ((part.get("alignment") or {}).get("word") or ())
            ]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise MossAudioError(
                f"{name}: expected a MonoCut of Lhotse with a recording of one file, found none ({error!r}); leave "
                "it out."
            ) from error
        # A cut of the whole recording has no times: its last sample may be rounded away.
        is_whole = start == 0 and end >= cut["recording"].get("duration", end + 1)
        return {"audio": source["source"], "text": text, "words": words} | (
            {} if is_whole else {"start": start, "end": end}
        )
