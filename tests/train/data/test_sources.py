"""Data of other kinds, written by the libraries that people write it with, is read as from a manifest."""

import io
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import soundfile

from train.data.manifest import Example
from train.data.shards import Shards, open_examples, prepare

COUNT = 10
datasets.disable_progress_bars()


def wav(number: int, seconds: float = 0.5) -> bytes:
    """A clip whose samples tell its number."""
    file = io.BytesIO()
    soundfile.write(file, np.full(int(seconds * 16000), (number + 1) / 256), 16000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def number_of(example: Example) -> int:
    assert example.clip is not None
    wave = example.clip.wave()
    assert np.all(wave == wave[0])
    return round(float(wave[0]) * 256) - 1


def data_set(count: int = COUNT, **columns: list) -> datasets.Dataset:
    rows = {
        "audio": [{"bytes": wav(number), "path": f"{number}.wav"} for number in range(count)],
        "text": [f"number {number}" for number in range(count)],
    }
    features = datasets.Dataset.from_dict(rows | columns)
    return features.cast_column("audio", datasets.Audio()) if "audio" in features.column_names else features


def require_numbers(examples, count: int = COUNT) -> None:
    """The rows are in order, also if they are read in another one, and after they were sent to a worker."""
    assert len(examples) == count
    order = [*range(count), *np.random.default_rng(0).permutation(count).tolist()]
    for opened in (examples, pickle.loads(pickle.dumps(examples))):
        for index in order:
            assert opened[index].text == f"number {index}" and number_of(opened[index]) == index


def test_parquet_of_datasets(tmp_path: Path):
    data_set().to_parquet(tmp_path / "x.parquet", batch_size=4)
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    require_numbers(open_examples(tmp_path / "x.parquet"))
    (report, *_) = prepare(tmp_path / "x.parquet", tmp_path / "out", 3)
    assert report.unreadable == 0
    require_numbers(Shards(tmp_path / "out"))
    assert open_examples(tmp_path / "x.parquet")[3].clip.name.endswith("x.parquet row 3: 3.wav")
