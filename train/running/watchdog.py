"""Ends a process that lives and gets nowhere: a read that hangs, a collective that not all take part in."""

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

LONG = 4  # times as long as a step may take the start, the first step, which compiles, an evaluation and a checkpoint


class Watchdog:
    """A thread that ends the process, with all threads' stacks and code 75, when nothing was reached for some time.

        with Watchdog(1800) as watchdog:
            watchdog.reached("step 7")                      # again and again
            with watchdog.long("the evaluation of step 7"):
                ...

    seconds: None watches nothing.
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
        """what: begins now, and should not take longer than `seconds`, or `LONG` times that."""
        limit = (self._seconds or 0) * (LONG if long else 1)
        self._doing = what, time.monotonic(), limit

    @contextmanager
    def long(self, what: str) -> Iterator[None]:
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
            f"progress for {limit:g} s (--stuck-after), doing {what}: it ends with code {LOST}, to be started again "
            "and resume from the newest checkpoint; what its threads are doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(LOST)
