"""Traces of a few steps of a run, for TensorBoard's profiler or XProf: planned, or asked for while the run trains."""

import contextlib
import signal
import threading
from typing import Any

import jax

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath, local_directory, to_path, upload
from train.running.directory import PROFILE, PROFILE_NOW

LOOK_SECONDS = 10.0  # between two looks for PROFILE_NOW
PROFILED_ON_REQUEST = 3  # steps, where no option says how many


class Profile:
    """Records a trace of the steps first..first+count-1 into out/profile, for TensorBoard's profiler or XProf.

        with Profile(out, first, count) as profile:
            profile.before(step)
            ... start the step ...
            profile.after(step, metrics)

    It waits for the last of them, and for no other step. A run that ends earlier has a trace of what there was; no
    trace is made of 0 steps. A file `profile_now` in the run's directory, and SIGUSR1, ask for one of the next steps.
    """

    def __init__(self, out: AnyPath, first: int, count: int):
        if first < 1 or count < 0:
            raise MossAudioError(
                f"a profile starts at step 1 or later and has 0 steps or more, not {first} and {count}"
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
        """In a thread: on gs:// each look is a request, for which no step should wait."""
        while not self._closed.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):  # it is looked for again; a run doesn't end for a profile
            if self._request.exists():
                self._request.unlink()
                self._requested.set()

    def before(self, step: int) -> None:
        if not self._is_first_process or self._recording:
            return
        if self._requested.is_set():
            self._requested.clear()
            self._steps = range(step, step + self._count)
        if step in self._steps:
            jax.profiler.start_trace(str(self._local))
            self._recording = True

    def after(self, step: int, result: Any) -> None:
        """result: arrays that the step computes."""
        if self._recording and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            upload(self._local, self._directory)
