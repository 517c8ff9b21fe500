"""Progress of a run on stderr: loss, rates, the time that is left, scores and samples."""

import datetime
import sys
from collections.abc import Mapping, Sequence

from train.planning.flops import CONVENTION
from train.running.sink import RolloutGroup, ShownSample, Sink, Values

ESTIMATED_AFTER = 5  # steps until the time that is left is estimated


class Progress(Sink):
    """Lines on stderr. Rates are over the steps since the previous line, without the first step, which compiles."""

    def __init__(
        self,
        start: int,
        last_step: int | None,
        log_every: int,
        peak_flops: float | None,
        joining: Mapping[str, int],
    ):
        self._first, self._last_step, self._log_every = start + 1, last_step, log_every
        self._peak_flops = peak_flops
        self._unprinted: list[Values] = []
        self._joining = dict(joining)
        # No separate estimate if the first lines, which have one, come soon.
        self._estimated = last_step is None or log_every <= 2 * ESTIMATED_AFTER
        if peak_flops is None:
            self._print(f"FLOP/s: {CONVENTION}; the peak of these devices is unknown")
        else:
            self._print(f"MFU: {CONVENTION}, over the bf16 peak of {peak_flops / 1e12:,.0f} TFLOP/s")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        self._print(line)

    def write(self, step: int, line: Values) -> None:
        if step != self._first:
            self._unprinted.append(line)
        for group in [name for name in self._joining if line.get(f"tokens/{name}")]:
            self._print(
                f"step {step}: group {group} joins, from example {self._joining.pop(group):,} on: if its examples are "
                "harder, the loss rises for a while"
            )
        if not self._estimated and len(self._unprinted) == ESTIMATED_AFTER:
            self._estimated = True
            seconds = sum(line["step_seconds"] for line in self._unprinted) / len(self._unprinted)
            self._print(f"{seconds:.3g} s per step: about {self._left(step, seconds)} left")
        if step % self._log_every == 0 or step == self._last_step:
            figures = self._rates(step) if self._unprinted else [f"{line['step_seconds']:.1f} s with compilation"]
            place = f"step {step}" if self._last_step is None else f"step {step}/{self._last_step}"
            epoch = [f"epoch {line['epoch']:.2f}"] if "epoch" in line else []
            epoch += [f"{line['audio_hours']:.2f} h of audio"] if line.get("audio_hours") else []
            loss, skipped = f"loss {line['loss']:.4f}", f"skipped {line['skipped_total']}"
            reward = [f"reward {line['reward']:.3f}", f"kept {line['groups_kept']:.0%}"] if "reward" in line else []
            self._print("  ".join([place, *epoch, *reward, loss, skipped, *figures]))
            self._unprinted = []

    def _rates(self, step: int) -> list[str]:
        """Returns rates over the unprinted steps: tokens/s, MFU or FLOP/s, data wait, and the time that is left."""
        seconds, wait, tokens, flops = (
            sum(line.get(name, 0.0) for line in self._unprinted)
            for name in ("step_seconds", "data_wait", "packed_tokens", "model_flops")
        )
        rates = [f"{tokens / seconds:,.0f} tokens/s"]
        if flops and self._peak_flops is None:
            rates.append(f"{flops / seconds / 1e9:,.1f} GFLOP/s")
        elif flops and self._peak_flops is not None:
            rates.append(f"MFU {flops / seconds / self._peak_flops:.1%}")
        rates.append(f"data wait {wait / seconds:.0%}")
        if self._last_step is not None:
            rates.append(f"{self._left(step, seconds / len(self._unprinted))} left")
        return rates

    def _left(self, step: int, seconds: float) -> datetime.timedelta:
        """Returns the time that the steps after this one take at `seconds` each."""
        assert self._last_step is not None
        return datetime.timedelta(seconds=round((self._last_step - step) * seconds))

    def write_scores(self, step: int, scores: Values) -> None:
        # Only overall scores: dozens of each task and class are in the file.
        overall = [f"{name} {value:.4g}" for name, value in scores.items() if name.count("/") == 1]
        self._print("  ".join([f"step {step}", *overall]))

    def write_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        for group in groups if step % self._log_every == 0 else ():
            best, worst = (group.reward.index(pick(group.reward)) for pick in (max, min))
            self._print(f"step {step}, {group.name}: {_short(group.question)}")
            self._print(f"  expected  {_short(group.reference)}")
            for at in dict.fromkeys((best, worst)):
                self._print(f"  {group.reward[at]:8.3f}  {_short(group.answers[at])}")

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        for sample in samples:
            self._print(f"step {step}, {sample.name}: {_short(sample.question)}")
            self._print(f"  expected  {_short(sample.reference)}")
            self._print(f"  answer    {_short(sample.prediction)}")


def _short(text: str, width: int = 100) -> str:
    """Shortens a text to one line of at most `width` characters, without control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."
