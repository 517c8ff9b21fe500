"""A process that gets nowhere is ended, and says what it was doing."""

import subprocess
import sys

SCRIPT = """
import threading
from train.running.watchdog import Watchdog

def get_nowhere():
    threading.Event().wait(60)

with Watchdog(1.0) as watchdog:
    for step in range(8):  # together far longer than it may be stuck
        threading.Event().wait(0.3)
        watchdog.reached(f"step {step}")
    with watchdog.long("the evaluation"):
        threading.Event().wait(1.5)
    watchdog.reached("the reading of batch 9")
    print("so far", flush=True)
    get_nowhere()
"""


def test_a_process_that_gets_nowhere_ends_with_its_stacks():
    end = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=50)
    assert (end.returncode, end.stdout) == (75, "so far\n"), end.stderr
    said, _, stacks = end.stderr.partition("Stacks of its threads:")
    assert "process 0 of 1, on " in said and "progress for 1 s (--stuck-after), doing the reading of batch 9" in said
    assert "in get_nowhere" in stacks


def test_nobody_watches_by_default_in_a_library():
    script = "import time; from train.running.watchdog import Watchdog\nwith Watchdog(None): time.sleep(0.5)"
    assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == 0
