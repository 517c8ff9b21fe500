"""Ends a process that hangs, for example in a read or in a collective that another process does not enter."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from train.running.distributed import LOST

LONG = 4  # factor of the time limit for the start, the first step (compilation), evaluations and checkpoints


class Watchdog:
    """Thread that prints all stacks and ends the process with code 75 if `reached` is not called in time.

        with Watchdog(1800) as watchdog:
            watchdog.reached("step 7")                      # at every step
            with watchdog.long("the evaluation of step 7"):
                ...

    seconds: time limit; None never ends the process.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.reached("the start", long=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        if self._seconds is not None:
            self._thread.join()

    def reached(self, what: str, *, long: bool = False) -> None:
        """Restarts the clock: `what` begins now and may take `seconds`, or `LONG` times that if `long`."""
        limit = (self._seconds or 0) * (LONG if long else 1)
        self._doing = what, time.monotonic(), limit

    @contextmanager
    def long(self, what: str) -> Iterator[None]:
        """Allows `LONG` times the time limit inside the context."""
        before = self._doing[0]
        self.reached(what, long=True)
        yield
        self.reached(before)

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._closed.wait(min(self._seconds / 10, 10)):
            what, began, limit = self._doing
            if time.monotonic() - began > limit:
                self._end(what, limit)

    def _end(self, what: str, limit: float) -> None:
        print(
            f"error: process {jax.process_index()} of {jax.process_count()}, on {socket.gethostname()}, has made no "
            f"progress for {limit:g} s (--stuck-after), doing {what}: it ends with code {LOST}, and the same command "
            "resumes from the newest checkpoint. Stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(LOST)
