"""Waits at the start of a run until all processes have joined, or names the missing ones.

When JAX waits too long for other processes it aborts and does not name them. So they meet here first, on the
coordinator's port. Process 0 listens. Each other process sends its number and its host. Process 0 then tells all that
they are complete, or which numbers are missing and on which hosts the others are.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from moss_audio_jax.errors import MossAudioError

RETRY_SECONDS = 0.5
LINE_SECONDS = 5  # time limit to connect, and for a connected process to send its line
HEARD_SECONDS = 10  # extra time to wait for the answer of process 0


def rendezvous(coordinator: str, count: int, number: int, seconds: float) -> None:
    """Waits until all processes have joined. Raises MossAudioError in those that joined if others don't in time.

    coordinator: HOST:PORT of process 0.
    count: number of processes.
    number: number of this process, from 0 to `count` - 1.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    if number == 0:
        problem = _receive(int(port), count, deadline)
    else:
        problem = _report(host.strip("[]"), int(port), _who(number, count), deadline)
    if problem:
        raise MossAudioError(
            f"the processes of the run did not meet ({seconds:g} s to wait): {problem}; start all of them with the "
            "same --coordinator and --num-processes, each with its own --process-id"
        )


def _receive(port: int, count: int, deadline: float) -> str:
    """Waits for the others, in process 0, and sends them the problem, which it returns. Empty: no problem."""
    here = socket.gethostname()
    there = {0: (here, os.getpid())}
    guests: list[socket.socket] = []
    problem = ""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        return f"process 0 can't listen on port {port} of {here} ({error.strerror})"
    with server:
        while len(there) < count and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                guest, _ = server.accept()
            except TimeoutError:
                problem = _missing({number: host for number, (host, _) in there.items()}, count)
                break
            said = _read_line(guest, LINE_SECONDS)
            if said is None or said.keys() != _who(0, 1).keys():  # not a process of a run
                guest.close()
                continue
            guests.append(guest)
            number, place = said["process"], (said["host"], said["pid"])
            if said["of"] != count:
                problem = f"process {number} on {place[0]} expects {said['of']} processes, the one on {here} {count}"
            elif there.setdefault(number, place) != place:
                problem = f"two have the number {number}, one on {there[number][0]} and one on {place[0]}"
    for guest in guests:  # the server is closed: JAX can use the port
        with guest, contextlib.suppress(OSError):  # a process that is gone needs no answer
            _write_line(guest, {"problem": problem})
    return problem


def _who(number: int, count: int) -> dict[str, Any]:
    return {"process": number, "of": count, "host": socket.gethostname(), "pid": os.getpid()}


def _report(host: str, port: int, who: dict[str, Any], deadline: float) -> str:
    """Sends `who` to process 0, in every other process, and returns the problem that process 0 found."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=LINE_SECONDS) as server:
                _write_line(server, who)
                heard = _read_line(server, max(0, deadline - time.monotonic()) + HEARD_SECONDS)
            if heard is not None and "problem" in heard:
                return str(heard["problem"])
            why = "it does not answer"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            return f"process {who['process']} on {who['host']} can't reach process 0 at {host}:{port} ({why})"
        time.sleep(RETRY_SECONDS)


def _missing(hosts: dict[int, str], count: int) -> str:
    missing = [number for number in range(count) if number not in hosts]
    came = ", ".join(f"{number} on {host}" for number, host in sorted(hosts.items()))
    return f"{_numbers(missing)} of {count} did not come, {_numbers(hosts)} did ({came})"


def _numbers(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"process{'es' * (len(found) > 1)} {', '.join(map(str, found))}"


def _write_line(connection: socket.socket, content: dict) -> None:
    connection.sendall(json.dumps(content).encode() + b"\n")


def _read_line(connection: socket.socket, seconds: float) -> dict | None:
    """Reads a line with a JSON object; None if none comes in time."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            content = json.loads(file.readline(10_000))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
