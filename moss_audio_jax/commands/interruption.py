"""Ctrl-C in a command: it ends at once with code 130, or stops where it can save or clean up.

Python raises KeyboardInterrupt in the main thread. During JAX's compilation that can crash the process; while the main
thread compiles or waits for a device, nothing is raised for minutes. So a separate thread listens for Ctrl-C.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

INTERRUPTED = 130  # exit code, as shells know it
FLUSH_SECONDS = 1.0
CLEANUP_SECONDS = 10.0  # for cleaning up after a signal, in which another one is ignored

_pipe: int | None = None  # Python writes the number of each signal into it, and the listener reads its other end
_action: Callable[[], None] | None = None  # what the listener does about Ctrl-C


def end(code: int) -> NoReturn:
    """Flushes the output and ends the process at once: Python's own shutdown can crash in threads of JAX."""
    flushing = threading.Thread(target=_flush, daemon=True)  # a pipe whose reader has stopped must not block the end
    flushing.start()
    flushing.join(FLUSH_SECONDS)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    if (paths := sys.modules.get("moss_audio_jax.storage.paths")) is not None:  # imports nothing during an import
        paths.remove_local_copies()


def _end_interrupted() -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    end(INTERRUPTED)


@contextlib.contextmanager
def ends_on_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends this process at once, whatever its main thread does. Call it from the main thread.

    A process that was started with Ctrl-C ignored, such as a background process of a script, still ignores it.
    """
    with _on_ctrl_c(_end_interrupted):
        yield


@contextlib.contextmanager
def stops_on_ctrl_c(request: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C calls `request` in another thread. A second one ends the process at once."""

    def first() -> None:
        global _action
        _action = _end_interrupted
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping; Ctrl-C again ends at once\n")
        request()

    with _on_ctrl_c(first):
        yield


@contextlib.contextmanager
def _on_ctrl_c(action: Callable[[], None]) -> Iterator[None]:
    global _pipe, _action
    handler = signal.getsignal(signal.SIGINT)
    if handler == signal.SIG_IGN:
        yield
        return
    if _pipe is None:
        read, _pipe = os.pipe()
        os.set_blocking(_pipe, False)
        threading.Thread(target=_listen, args=(read,), name="ctrl-c", daemon=True).start()
    before, _action = _action, action
    pipe = signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _leave_to_the_listener)
    try:
        yield
    finally:
        _action = before
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(pipe)


def _leave_to_the_listener(number: int, frame: Any) -> None:
    """Does nothing; Python's own handler would raise KeyboardInterrupt."""


def _listen(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 64):
            if number == signal.SIGINT and _action is not None:
                _action()


@contextlib.contextmanager
def cleans_up_on_signals() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM SystemExit, once, so that cleaning up is not interrupted.

    For commands that handle files and compile nothing. Call it from the main thread.
    """
    global _action
    raised = -CLEANUP_SECONDS

    def raise_once(number: int, frame: Any) -> None:
        nonlocal raised
        if time.monotonic() - raised < CLEANUP_SECONDS:
            return
        raised = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before, _action = _action, None
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    handlers = [(number, signal.signal(number, raise_once)) for number in numbers]
    try:
        yield
    finally:
        _action = before
        for number, handler in handlers:
            signal.signal(number, handler or signal.SIG_DFL)
