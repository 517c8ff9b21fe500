"""The wheel, installed into an environment of its own, works from any directory."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In which the repository is not on the path.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "moss_audio_jax", "convert", "train"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, as `python -m build` does."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory) -> Path:
    """Of an environment with the wheel, and with the other packages of this one."""
    directory = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True, timeout=120)
    found = directory / "bin" / "python"
    install = ["-m", "pip", "--python", str(found), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120, env=ENVIRONMENT)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    others = directory / "lib" / version / "site-packages" / "others.pth"
    others.write_text(sysconfig.get_path("purelib") + "\n")
    return found


def run(python: Path, where: Path, *command: str) -> str:
    done = subprocess.run(
        [str(python), *command], cwd=where, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_file_and_no_other(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    tracked = subprocess.run(LISTED, cwd=ROOT, capture_output=True)
    if tracked.returncode == 0:  # not so in a source distribution
        assert names == set(tracked.stdout.decode().split())
    assert described["Version"] == PROJECT["version"] and described["License-Expression"] == PROJECT["license"]


def test_it_answers_from_another_directory(python: Path, tmp_path: Path):
    where = run(python, tmp_path, "-c", "import moss_audio_jax; print(moss_audio_jax.__file__)").strip()
    assert Path(where).is_relative_to(python.parents[1])
    programs = python.parent
    run(python, tmp_path, str(programs / "moss-audio-convert"), "rehearse", "small", "--preset", "tiny")
    run(
        python,
        tmp_path,
        str(programs / "moss-audio"),
        "generate",
        "small",
        "--prompt",
        "Hello",
        "--max-new-tokens",
        "2",
    )
    assert "usage" in run(python, tmp_path, str(programs / "moss-audio-train"), "--help")


def test_one_version_is_named_everywhere():
    version = re.escape(PROJECT["version"])
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## {version}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
