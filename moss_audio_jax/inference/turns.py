"""Engines on the same devices, one at a time."""

import collections
import threading
from typing import Self


class Turns:
    """A lock that threads get in the order in which they ask for it, so that none waits for long.

    Two programs with collectives, launched at the same time from two threads, could wait for each other for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: collections.deque[threading.Event] = collections.deque()  # the first one's turn it is

    def __enter__(self) -> Self:
        mine = threading.Event()
        with self._lock:
            self._queue.append(mine)
            if self._queue[0] is mine:
                mine.set()
        mine.wait()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._queue.popleft()
            if self._queue:
                self._queue[0].set()
