"""Checkpoints that the conversion tests share. They are read only: a test that changes one copies it first."""

from pathlib import Path

import pytest

from convert.__main__ import main
from convert.to_orbax import convert_to_orbax


@pytest.fixture(scope="session")
def orbax(released: Path) -> Path:
    """`released`, converted."""
    convert_to_orbax(released, released.parent / "orbax")
    return released.parent / "orbax"


@pytest.fixture
def invoke(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moss-audio-convert", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
