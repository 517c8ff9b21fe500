"""Messages on stderr while a command takes long, from a separate thread."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SILENCE = 3.0  # seconds before the first message
BETWEEN_LINES = 30.0  # seconds, where stderr is no terminal; then twice as many, and so on


@contextlib.contextmanager
def waiting(what: str | Callable[[], str]) -> Iterator[None]:
    """Prints what the command waits for, and for how long: every second on a terminal, elsewhere in few lines.

    what: a text, or what returns the text of the moment.
    """
    done = threading.Event()
    show = _on_terminal if sys.stderr.isatty() else _in_lines
    text = (lambda: what) if isinstance(what, str) else what
    thread = threading.Thread(target=show, args=(text, done), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _on_terminal(what: Callable[[], str], done: threading.Event) -> None:
    """Prints one line, which is erased at the end."""
    start = time.monotonic()
    if done.wait(SILENCE):
        return
    while not done.wait(1.0):
        print(f"\r\x1b[K{what()}: {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _in_lines(what: Callable[[], str], done: threading.Event) -> None:
    start, pause = time.monotonic(), BETWEEN_LINES
    while not done.wait(pause):
        pause = time.monotonic() - start
        print(f"[{what()}: {pause:.0f} s so far]", file=sys.stderr, flush=True)
