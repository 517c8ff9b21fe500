"""`make test-matrix`: interpreters that can't be run are passed over, and a cell that fails fails the whole."""

import os
import sys
from pathlib import Path

import pytest

from tests import matrix

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
pytestmark = pytest.mark.skipif(HERE not in matrix.PYTHONS, reason=f"no cell is of Python {HERE}")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A PATH with a stand-in for this Python that fails, as pyenv's do, and then this Python itself, and no other."""
    monkeypatch.setattr(matrix, "DIRECTORY", tmp_path / "cells")
    for name, text in (("first", "#!/bin/sh\nexit 127\n"), ("second", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"python{HERE}").write_text(text)
        (tmp_path / name / f"python{HERE}").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("first", "second")))
    return os.environ["PATH"]


def test_it_tries_every_python_of_the_project_with_tests_that_are_there(path: str, capsys):
    assert matrix.PYTHONS[0] == matrix.PROJECT["requires-python"].removeprefix(">=")
    assert [name for name in matrix.TESTS if not (matrix.ROOT / name).is_file()] == []
    found = [(cell.python, cell.packages, cell.executable) for cell in matrix.cells(path)]
    assert found == [(HERE, packages, sys.executable) for packages in ("oldest", "newest")]
    others = [version for version in matrix.PYTHONS if version != HERE]
    assert capsys.readouterr().out.splitlines() == [f"python{name} is not on the PATH: skipped" for name in others]


@pytest.mark.parametrize("code", [0, 3])
def test_a_cell_that_fails_fails_the_whole(path: str, monkeypatch, capsys, code: int):
    def commands(cell: matrix.Cell) -> list[list[str]]:
        last = f"print('{cell.packages}'); raise SystemExit({code if cell.packages == 'newest' else 0})"
        return [[sys.executable, "-c", "pass"], [sys.executable, "-c", last]]

    monkeypatch.setattr(matrix, "commands", commands)
    if code:
        with pytest.raises(SystemExit, match="some cells failed"):
            matrix.main()
    else:
        matrix.main()
    oldest, newest = capsys.readouterr().out.splitlines()[-2:]
    assert oldest.split() == [HERE, "oldest", "-", "-", "-", "-", "oldest"]
    assert newest.split() == [HERE, "newest", "-", "-", "-", "-", *(["FAILED:"] if code else []), "newest"]


def test_without_any_python_nothing_passes(path: str, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"none of python3\.11, .* is on the PATH: install one"):
        matrix.main()
