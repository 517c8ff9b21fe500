"""Processes that work beside this one, and end with it."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from moss_audio_jax.errors import MossAudioError


def prepare_worker(*_: int) -> None:
    """Prepares a worker process: it ignores signals and exits when its parent exits, however that ends.

    A terminal or a shutdown signals all processes, while the run still needs batches until it has saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(message)s")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end with parent", daemon=True).start()


@contextmanager
def worker_pool(workers: int, work: str) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of processes. After an error no further work begins.

    work: what they do, in the error for processes that end. Raises MossAudioError if one does.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise MossAudioError(
            f"a process that {work} has ended: if memory ran out, use fewer processes; if a script of yours calls "
            'this, put its code below `if __name__ == "__main__":`, as worker processes read the script too'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
