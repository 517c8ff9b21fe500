"""Data of other kinds, written by the libraries that people write it with, is read as from a manifest."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import datasets
import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset

from moss_audio_jax.errors import MossAudioError
from tests.train.data.conftest import write_lines
from train.data.config import ColumnsConfig, DataConfig
from train.data.manifest import Example
from train.data.mixture import ExampleOrder, Group, Source
from train.data.pipeline import TrainingData
from train.data.samples import SampleMaker
from train.data.shard_writing import prepare
from train.data.shards import Shards, open_examples

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


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for number in range(COUNT):
        (tmp_path / "clips" / f"{number}.wav").write_bytes(wav(number))
    return tmp_path


def test_parquet_of_datasets(tmp_path: Path):
    data_set().to_parquet(tmp_path / "x.parquet", batch_size=4)
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    require_numbers(open_examples(tmp_path / "x.parquet"))
    (report, *_) = prepare(tmp_path / "x.parquet", tmp_path / "out", 3)
    assert report.unreadable == 0
    require_numbers(Shards(tmp_path / "out"))
    assert open_examples(tmp_path / "x.parquet")[3].clip.name.endswith("x.parquet row 3: 3.wav")


def test_batches_are_those_of_the_manifest(clips: Path, maker: SampleMaker):
    rows = [{"audio": f"clips/{number}.wav", "text": f"number {number}"} for number in range(COUNT)]
    write_lines(clips / "m.jsonl", rows)
    data_set().to_parquet(clips / "x.parquet", batch_size=4)
    for_both = []
    for path in ("m.jsonl", "x.parquet"):
        order = ExampleOrder([Group("all", 1, (Source("clips", open_examples(clips / path)),))], seed=2)
        data = TrainingData(order, maker, DataConfig(batch_size=2, tokens=200, chunks=2))
        for_both.append([next(data) for _ in range(6)])
    jax.tree.map(np.testing.assert_array_equal, *for_both)


def test_directories_of_datasets(tmp_path: Path):
    """`save_to_disk`, and the layout of a repository on the Hub."""
    whole = data_set()
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    require_numbers(open_examples(tmp_path / "saved"))
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "dict")
    require_numbers(open_examples(tmp_path / "dict" / "test"))
    with pytest.raises(MossAudioError, match=r"dict has several splits: give one of them, .*/test or .*/train"):
        open_examples(tmp_path / "dict")
    (hub := tmp_path / "hub" / "data").mkdir(parents=True)
    for number in range(2):
        whole.shard(2, number, contiguous=True).to_parquet(hub / f"train-0000{number}-of-00002.parquet")
    require_numbers(open_examples(tmp_path / "hub"))
    whole.to_parquet(hub / "test-00000-of-00001.parquet")
    with pytest.raises(MossAudioError, match=r"several splits: .* such as '.*/test-\*.parquet' or '.*/train-\*.parqu"):
        open_examples(tmp_path / "hub")
    require_numbers(open_examples(hub / "train-*.parquet"))
    require_numbers(open_examples(f"{hub}/train-{{00000..00001}}-of-00002.parquet"))
    pa.feather.write_feather(pa.table({"text": ["a", "b"]}), str(tmp_path / "plain.feather"), "uncompressed")
    assert [example.text for example in open_examples(tmp_path / "plain.feather")] == ["a", "b"]


@pytest.mark.parametrize("form", ["datasets", "manifest", "lists", "json"])
def test_words(tmp_path: Path, form: str):
    """Words with times, as a list of structs, a struct of lists, or JSON; blank words are silence."""
    words = [{"word": "number", "start": 0.0, "end": 0.2}, {"word": "", "start": 0.2, "end": 0.3}]
    words.append({"word": "one", "start": 0.3, "end": 0.5})
    if form == "manifest":
        words = [{"text" if key == "word" else key: value for key, value in word.items()} for word in words]
    column = {
        "json": json.dumps(words),
        "lists": {key: [word[key] for word in words] for key in words[0]},
    }.get(form, words)
    data_set(1, aligned=[column]).save_to_disk(tmp_path / "saved")
    (example,) = open_examples(tmp_path / "saved", ColumnsConfig(words="aligned"))
    assert [(word.text, word.start, word.end) for word in example.words] == [("number", 0, 0.2), ("one", 0.3, 0.5)]


def test_paths_in_parquet(clips: Path):
    """A column of paths, or a struct without bytes; relative to the directory of the file."""
    paths = [f"clips/{number}.wav" for number in range(COUNT)]
    texts = [f"number {number}" for number in range(COUNT)]
    datasets.Dataset.from_dict({"wav": paths, "said": texts}).to_parquet(clips / "named.parquet")
    require_numbers(open_examples(clips / "named.parquet", ColumnsConfig(audio="wav", text="said")))
    structs = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"audio": structs, "transcription": texts}), clips / "struct.parquet")
    require_numbers(open_examples(clips / "struct.parquet"))


def test_nemo(clips: Path):
    rows = [
        {"audio_filepath": f"clips/{number}.wav", "text": f"number {number}", "duration": 0.5, "lang": "en"}
        for number in range(COUNT)
    ]
    (clips / "train.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    require_numbers(open_examples(clips / "train.json"))
    cut = {"audio_filepath": "clips/3.wav", "text": "a cut", "offset": 0.25, "duration": 0.125}
    (clips / "cut.json").write_text(json.dumps(cut))
    (example,) = open_examples(clips / "cut.json")
    assert example.clip.num_samples() == 2000
    renamed = [{"wav" if key == "audio_filepath" else key: value for key, value in row.items()} for row in rows]
    (clips / "named.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    require_numbers(open_examples(clips / "named.jsonl", ColumnsConfig(audio="wav")))


def cut(number: int, start: float, duration: float, supervision: float) -> dict:
    """A cut as Lhotse 1.33 writes it, by `truncate` if it is shorter than its supervision."""
    words = [["number", 0.1, 0.2, None], [str(number), 0.3, 0.1, None]]
    said = {"id": "0", "recording_id": "0", "start": supervision, "duration": 0.5, "channel": 0}
    said |= {"text": f"number {number}", "alignment": {"word": words}}
    recording = {"id": "0", "sources": [{"type": "file", "channels": [0], "source": f"clips/{number}.wav"}]}
    recording |= {"sampling_rate": 16000, "num_samples": 8000, "duration": 0.5, "channel_ids": [0]}
    times = {"start": start, "duration": duration, "channel": 0}
    return {"id": "0", **times, "supervisions": [said], "recording": recording, "type": "MonoCut"}


def test_cuts_of_lhotse(clips: Path):
    path = write_lines(clips / "cuts.jsonl", [cut(number, 0, 0.5, 0.0) for number in range(COUNT)])
    require_numbers(open_examples(path))
    assert [(word.text, word.start) for word in open_examples(path)[3].words] == [("number", 0.1), ("3", 0.3)]
    mixed = cut(0, 0, 0.5, 0.0) | {"type": "MixedCut"}
    silent = cut(2, 0.25, 0.25, 0.0) | {"supervisions": []}
    parts = write_lines(clips / "parts.jsonl", [silent, mixed, cut(2, 0.2, 0.25, -0.2)])
    for index, found in enumerate(("text that is not blank", "a MonoCut of Lhotse .*a MixedCut", "leaves the cut")):
        with pytest.raises(MossAudioError, match=f"parts.jsonl line {index + 1}.*expected .*{found}"):
            open_examples(parts)[index]
    later = cut(2, 0.1, 0.3, 0.0)
    later["supervisions"][0]["duration"] = 0.3
    (example,) = open_examples(write_lines(clips / "later.jsonl", [later]))
    assert example.clip.num_samples() == 4800 and not example.words


def test_common_voice(clips: Path):
    header = "client_id\tpath\tsentence\tup_votes\n"
    rows = [f"id\t{number}.wav\tnumber {number}\t2\n" for number in range(COUNT)]
    (clips / "train.tsv").write_text(header + "".join(rows))
    require_numbers(open_examples(clips / "train.tsv"))
    prepare(clips / "train.tsv", clips / "shards", 2)
    require_numbers(Shards(clips / "shards"))
    (clips / "quotes.tsv").write_text(header + 'id\t0.wav\t"Hm," he said\t2\nid\t0.wav\tshort\n')
    quoted, short = open_examples(clips / "quotes.tsv"), 1
    assert quoted[0].text == '"Hm," he said'
    with pytest.raises(MossAudioError, match=r"quotes.tsv line 3: expected 4 cells between tabs, .* found 3"):
        quoted[short]


def test_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pattern = str(tmp_path / "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for number in range(COUNT):
            writer.write({"__key__": f"a/{number:05d}", "wav": wav(number), "txt": f"number {number}"})
    require_numbers(open_examples(tmp_path / "{0000..0002}.tar"))
    require_numbers(open_examples(tmp_path))
    prepare(tmp_path / "*.tar", tmp_path / "shards", 2)
    require_numbers(Shards(tmp_path / "shards"))
    with webdataset.TarWriter(str(tmp_path / "json.tar")) as writer:
        for number in range(COUNT):
            content = {"said": f"number {number}", "speaker": 1}
            writer.write({"__key__": f"{number}", "json": content, "x.pyd": [1], "wav": wav(number)})
    require_numbers(open_examples(tmp_path / "json.tar", ColumnsConfig(text="said")))
    assert f"json.tar: members that are not read: {COUNT} that may be pickled" in caplog.text
    assert open_examples(tmp_path / "json.tar", ColumnsConfig(text="said"))[7].clip.name.endswith("json.tar 7: 7.wav")


def test_links_of_a_tar_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("0.wav", wav(0)), ("0.txt", b"number 0"), ("1.wav", wav(1))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    examples = open_examples(tmp_path / "x.tar")
    assert len(examples) == 2 and examples[0].text == "number 0"
    with pytest.raises(MossAudioError, match=r"x.tar 1, column 'txt': expected text that is not blank, found None"):
        examples[1]
    assert "1 links" in caplog.text


BROKEN = {  # columns of a table, and what is said of its first row or of the file
    "blank text": (
        {"text": [" "]},
        "row 0, column 'text': expected text that is not blank, found ' '; correct",
    ),
    "null audio": (
        {"audio": [None]},
        "row 0, column 'audio': expected a path, or bytes of an audio .* found None",
    ),
    "words of no list": ({"words": ["hm"]}, "row 0, column 'words': expected a list of {word, start, end}, found 'hm'"),
    "a time below 0": (
        {"words": [[{"word": "a", "start": -1.0, "end": 1.0}]]},
        r"row 0: expected 'start' in words\[1\] to be a time of 0 s or more, found -1.0; correct the row",
    ),
    "numbers as text": ({"text": [1]}, ", column 'text': expected text for --columns.text, found int64"),
    "a URL": ({"audio": ["https://a/b.wav"]}, "row 0: expected the path of a file or gs://bucket/file"),
    "lists of two lengths": (
        {"words": [{"word": ["a"], "start": [0.0, 1.0], "end": [1.0]}]},
        "row 0, column 'words': expected lists of one length, found {'end': 1, 'start': 2, 'word': 1}",
    ),
    "no text": (
        {"text": None, "label": [1]},
        "must have a column of text, not only audio, label: name it by",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_mistakes_in_a_table_are_named_by_file_row_and_column(tmp_path: Path, kind: str):
    columns, sentence = BROKEN[kind]
    columns = {"audio": [wav(0)], "text": ["hm"]} | columns
    pq.write_table(pa.table({name: values for name, values in columns.items() if values}), tmp_path / "x.parquet")
    with pytest.raises(MossAudioError, match=f"x.parquet.*{sentence}"):
        open_examples(tmp_path / "x.parquet")[0]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "not a Git LFS pointer: fetch the file with"),
        ("x.parquet", b"PAR1 and no more", "expected Parquet, found damaged data .*; download it again"),
        ("x.parquet", b"hello", "must be Parquet, not b'hello' at its beginning: download it again"),
        ("x.arrow", b"\xff\xff\xff\xff\x08", "expected Arrow, found damaged data"),
        ("x.tar.gz", b"\x1f\x8b\x08\x00", "must be tar, not .* at its beginning: decompress it"),
        ("x.tar", b"0.wav".ljust(257, b"\0") + b"ustar\x0000", "expected a tar file, found '.*'; download it again"),
        ("x.tsv", b"path\tsentence\tpath\na\tb\tc\n", "must have each column once, not 'path' twice: rename one"),
        (
            "x.jsonl",
            b'{"audio_filepath": "a.wav", "duration": 1}',
            "must have a column of text, not only audio_filepath",
        ),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MossAudioError, match=f"{name}.*{sentence}"):
        open_examples(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{000..002}.tar", "001.tar must exist, as the braces name it"),
        ("*.parquet", "must match a file, not none: check the pattern"),
        ("{9..1}.tar", r"must have numbers that rise to at most 100000, not 9\.\.1"),
        ("", "must be shards, or hold *.parquet, *.arrow or *.tar, not only 000.tar".replace("*", r"\*")),
    ],
)
def test_patterns_that_match_nothing(tmp_path: Path, path: str, sentence: str):
    (tmp_path / "000.tar").mkdir()
    with pytest.raises(MossAudioError, match=sentence):
        open_examples(f"{tmp_path}/{path}")


def test_a_missing_column_is_named(tmp_path: Path):
    data_set(2).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(MossAudioError, match=r"the column 'said' of --columns.text, not only audio, text: name one"):
        open_examples(tmp_path / "x.parquet", ColumnsConfig(text="said"))


def test_the_state_of_a_saved_data_set_cannot_leave_its_directory(tmp_path: Path):
    data_set(2).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(MossAudioError, match=r"state.json must name files of its directory"):
        open_examples(tmp_path / "saved")


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data_set(2).to_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MossAudioError, match=r"pip install 'moss-audio-jax\[data\]'"):
        open_examples(tmp_path / "x.parquet")


def test_bad_rows_become_records_with_the_reason(tmp_path: Path):
    texts = ["number 0", "", "number 2"]
    pq.write_table(pa.table({"audio": [wav(0), wav(1), b"no sound"], "text": texts}), tmp_path / "x.parquet")
    (report,) = prepare(tmp_path / "x.parquet", tmp_path / "out", 1)
    assert report.unreadable == 2
    shards = Shards(tmp_path / "out")
    assert shards[0].text == "number 0"
    with pytest.raises(MossAudioError, match=r"x.parquet row 1, column 'text': expected text that is not blank"):
        shards[1]
    data_set(3).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(MossAudioError, match=r"found others \(manifest_sha256 differ\)"):
        prepare(tmp_path / "x.parquet", tmp_path / "out", 1)


def test_row_groups_are_read_in_bounded_memory(tmp_path: Path):
    """100 MB in row groups of 5: in order or not, no more than one of them is in memory, compressed and not."""
    clip, noise = wav(0, seconds=16), np.random.default_rng(0).bytes(512_000)
    rows = [clip[:44] + bytes([row]) + noise[1:] for row in range(200)]
    data_set(200, audio=rows).to_parquet(tmp_path / "x.parquet", batch_size=10)
    del rows
    before = peak = pa.total_allocated_bytes()
    examples = open_examples(tmp_path / "x.parquet")
    for index in (*range(200), 150, 20, 199):
        assert examples[index].clip.audio[44] == index
        peak = max(peak, pa.total_allocated_bytes())
    assert 1e6 < peak - before < 20e6
