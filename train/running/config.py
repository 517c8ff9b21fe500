"""Options of a start of a run: where it resumes, and its processes. Imports nothing heavy, so `--help` is fast."""

import dataclasses
import re

from moss_audio_jax.commands.options import require_positive
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, to_path


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """Options of one start of a run, which are not part of its configuration."""

    allow_change: tuple[str, ...] = ()
    """Options that may differ from the run's configuration, such as optimizer.learning_rate, or a group of options,
    such as mixture. The run records each change. docs/training.md lists which need this and which can't change."""
    from_step: int | None = None
    """Resume from the checkpoint of this step. Later ones are moved to later_checkpoints/ and their metrics are cut
    off. The same command, started again, resumes from the newest checkpoint."""
    skip_steps: str | None = None
    """FIRST:LAST: steps whose batches are read but not trained on. They count as steps. The run keeps this."""
    branch: str | None = None
    """RUN@STEP: begin a new run from a checkpoint of another run, whose configuration gives the defaults. All
    options may change except those of the model."""
    branch_optimizer: bool = True
    """Keep the optimizer's moments, the step and the position in the data in a branch. Without them it begins at step
    0, with the schedule and the data of a new run."""

    def __post_init__(self):
        if self.from_step is not None and self.from_step < 1:
            raise MossAudioError(f"--from-step must be the step of a checkpoint, 1 or more, not {self.from_step}")
        if self.from_step is not None and self.branch is not None:
            raise MossAudioError("--branch begins a new run and --from-step resumes one: give one of them")
        _ = self.skipped, self.origin  # raise MossAudioError if malformed

    @property
    def skipped(self) -> range:
        """Steps of `skip_steps`."""
        if self.skip_steps is None:
            return range(0)
        first, colon, last = self.skip_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise MossAudioError(f"--skip-steps must be FIRST:LAST, such as 1000:1200, not {self.skip_steps!r}")
        return range(int(first), int(last) + 1)

    @property
    def origin(self) -> tuple[Path, int] | None:
        """Run and step of `branch`."""
        if self.branch is None:
            return None
        run, _, step = self.branch.rpartition("@")
        if not (run and step.isdecimal()):
            raise MossAudioError(f"--branch must be RUN@STEP, such as runs/mine@1000, not {self.branch!r}")
        return to_path(run), int(step)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Processes of a run; by default there is one."""

    distributed: bool = False
    """The run has several processes. On TPU pods, Slurm and Open MPI JAX finds them; elsewhere give the next three."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    lost_after: int = 100
    """Seconds without a heartbeat after which a process counts as lost, which ends all others."""
    join_within: int = 300
    """Seconds to wait for all processes at the start."""

    def __post_init__(self):
        require_positive(self, "", "lost_after", "join_within")
        place = (self.coordinator, self.num_processes, self.process_id)
        if place == (None, None, None):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            raise MossAudioError(
                "several processes need all of --coordinator HOST:PORT, --num-processes and --process-id; "
                "on TPU pods --distributed is enough"
            )
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise MossAudioError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, not {self.coordinator!r}")
        if not 0 <= self.process_id < self.num_processes:
            raise MossAudioError(
                f"--process-id counts from 0 and must be below the {self.num_processes} of --num-processes, "
                f"not {self.process_id}"
            )
