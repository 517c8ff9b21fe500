"""Traces of a few steps of a run, for TensorBoard's profiler or XProf, planned or requested during the run."""

import contextlib
import signal
import threading
from typing import Any

import jax

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, local_directory, to_path, upload
from train.running.directory import PROFILE, PROFILE_NOW

LOOK_SECONDS = 10.0  # time between checks for PROFILE_NOW
PROFILED_ON_REQUEST = 3  # steps of a requested trace if --profile-steps is 0


class Profile:
    """Records a trace of steps first to first + count - 1 into out/profile.

        with Profile(out, first, count) as profile:
            profile.before(step)
            ... start the step ...
            profile.after(step, metrics)

    It waits for the last traced step, for no other. If the run ends earlier, the trace has the steps until then. A
    count of 0 plans no trace. A file `profile_now` in the run's directory, or SIGUSR1, requests one of the next steps.
    """

    def __init__(self, out: AnyPath, first: int, count: int):
        if first < 1 or count < 0:
            raise MossAudioError(
                f"--profile-first must be 1 or more and --profile-steps 0 or more, not {first} and {count}"
            )
        self._directory, self._steps = to_path(out) / PROFILE, range(first, first + count)
        self._request, self._count = to_path(out) / PROFILE_NOW, count or PROFILED_ON_REQUEST
        self._local = local_directory(self._directory)
        self._recording = False
        self._is_first_process = jax.process_index() == 0
        self._requested, self._closed = threading.Event(), threading.Event()

    def __enter__(self) -> "Profile":
        if self._is_first_process:
            self._handler = signal.signal(signal.SIGUSR1, lambda *_: self._requested.set())
            self._look()
            threading.Thread(target=self._keep_looking, name="profile requests", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_first_process:
            self._closed.set()
            signal.signal(signal.SIGUSR1, self._handler or signal.SIG_DFL)
        self._stop()

    def _keep_looking(self) -> None:
        """Checks for requests in a thread: on gs:// a check is a network request, and no step should wait for it."""
        while not self._closed.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # checked again later; a run must not fail because of a profile
            if self._request.exists():
                self._request.unlink()
                self._requested.set()

    def before(self, step: int) -> None:
        """Starts the trace if it begins with this step."""
        if not self._is_first_process or self._recording:
            return
        if self._requested.is_set():
            self._requested.clear()
            self._steps = range(step, step + self._count)
        if step in self._steps:
            jax.profiler.start_trace(str(self._local))
            self._recording = True

    def after(self, step: int, result: Any) -> None:
        """Stops the trace if this is its last step. result: arrays that the step computes."""
        if self._recording and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            upload(self._local, self._directory)
