"""Where the tests find their data."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return TESTS / "data"


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Recordings too large for the repository: in $MOSS_AUDIO_GOLDENS or else ../shared/goldens, from its root."""
    directory = Path(os.environ.get("MOSS_AUDIO_GOLDENS", TESTS.parents[1] / "shared" / "goldens"))
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent: set MOSS_AUDIO_GOLDENS to the recorded outputs")
    return directory
