"""The same files on a disk and on gs://, through the libraries that read the real one."""

import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_gcs import FakeGcs

from convert.staging import check_target
from convert.tensor_source import open_checkpoint
from moss_audio_jax import MossAudio, MossAudioError, load_model, load_processor
from moss_audio_jax.audio import load_audio
from moss_audio_jax.errors import StorageError
from moss_audio_jax.small_tokenizer import write_small_tokenizer
from moss_audio_jax.storage import paths
from moss_audio_jax.storage.paths import GrowingFile, to_path
from moss_audio_jax.weights.checkpoint import save_model
from moss_audio_jax.weights.info import describe
from moss_audio_jax.weights.locate import copy_tokenizer, locate


@pytest.fixture(params=["disk", "gs"])
def root(request: pytest.FixtureRequest) -> paths.Path:
    """A directory of either kind."""
    found = request.getfixturevalue("tmp_path" if request.param == "disk" else "bucket")
    return to_path(found) / "directory"


def contents(directory: paths.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths.children(directory)}


def test_a_file_is_written_whole_or_stays_as_it_was(root: paths.Path):
    root.mkdir(parents=True)
    paths.atomic_write(root / "a.json", "first, with ä\n")
    with pytest.raises(RuntimeError), paths.atomic_file(root / "a.json") as file:
        file.write_text("half of the sec")
        raise RuntimeError
    assert contents(root) == {"a.json": "first, with ä\n".encode()}
    paths.atomic_write(root / "a.json", "second")
    assert contents(root) == {"a.json": b"second"}


def test_a_file_grows_over_several_openings(root: paths.Path):
    root.mkdir(parents=True)
    for line in (b"one\n", b"two\n"):
        file = GrowingFile(root / "lines")
        file.write(line)
        file.commit()
        assert (root / "lines").read_bytes().endswith(line)
        file.write(line)
        file.close()
        file.close()
    assert contents(root) == {"lines": b"one\none\ntwo\ntwo\n"}


def test_an_object_that_grows_is_uploaded_now_and_then(bucket: str, monkeypatch: pytest.MonkeyPatch):
    path = to_path(bucket) / "lines"
    file = GrowingFile(path)
    file.write(b"one\n")
    file.flush()
    assert path.read_bytes() == b""
    monkeypatch.setattr(paths, "UPLOAD_SECONDS", 0)
    file.flush()
    monkeypatch.setattr(paths, "UPLOAD_SECONDS", 60)
    file.write(b"two\n")
    file.flush()
    for _ in range(100):
        if path.read_bytes():
            break
        time.sleep(0.1)
    assert path.read_bytes() == b"one\n"
    file.close()
    assert contents(to_path(bucket)) == {"lines": b"one\ntwo\n"}


def test_an_object_that_grows_is_not_sent_again(bucket: str, storage: FakeGcs):
    line = b"x" * 10_000 + b"\n"
    file = GrowingFile(f"{bucket}/lines")
    before = storage.received
    for _ in range(20):
        file.write(line)
        file.commit()
    file.close()
    assert to_path(f"{bucket}/lines").read_bytes() == line * 20
    assert storage.received - before < 21 * len(line)


def test_nothing_waits_for_an_upload_before_a_commit(bucket: str, storage: FakeGcs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paths, "UPLOAD_SECONDS", 0)
    file = GrowingFile(f"{bucket}/lines")

    def add() -> None:
        for line in (b"one\n", b"two\n", b"three\n"):
            file.write(line)
            file.flush()

    with ThreadPoolExecutor(1) as step_loop, storage.lock:  # the service answers nobody
        step_loop.submit(add).result(timeout=10)
    file.close()
    assert contents(to_path(bucket)) == {"lines": b"one\ntwo\nthree\n"}


@pytest.mark.parametrize("faults", [0.1, 0.4])
def test_an_object_grows_by_each_piece_once(bucket: str, storage: FakeGcs, hasty: None, faults: float):
    """Also by those whose upload or composition was done and never answered."""
    expected = b""
    with storage.failing(faults):
        for opening in range(4):
            file = GrowingFile(f"{bucket}/lines")
            for number in range(10):
                line = f"{opening} {number} {'x' * number}\n".encode()
                expected += line
                file.write(line)
                file.commit()
            file.close()
        assert storage.injected["reset after"] > 3 and storage.injected["503"] > 3
    assert contents(to_path(bucket)) == {"lines": expected}


def test_an_upload_that_fails_ends_with_a_sentence(bucket: str, storage: FakeGcs, hasty: None, monkeypatch):
    monkeypatch.setenv("MOSS_AUDIO_STORAGE_ATTEMPTS", "2")
    monkeypatch.setattr(paths, "UPLOAD_SECONDS", 0)
    file = GrowingFile(f"{bucket}/lines")
    file.write(b"one\n")
    with storage.failing(1.0):
        file.flush()
        with pytest.raises(StorageError, match=r"gs://.*piece: storage failed in each of 2 attempts"):
            file.commit()
    file.close()


def test_what_else_writes_into_a_growing_object_is_found(bucket: str):
    file = GrowingFile(f"{bucket}/lines")
    to_path(f"{bucket}/lines").write_text("another's")
    file.write(b"one\n")
    with pytest.raises(MossAudioError, match=r"lines must have 4 bytes after an upload, not 9: end what else writes"):
        file.close()


def test_directories(root: paths.Path):
    assert paths.children(root) == []
    for name in ("b[1].txt", "a/x/deep.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert paths.children(root) == [root / "a", root / "b[1].txt"]
    local = paths.local_directory(root)
    (local / "new" / "er").mkdir(parents=True)
    (local / "new" / "er" / "file").write_bytes(b"1")
    paths.upload(local, root)
    assert (root / "new" / "er" / "file").read_bytes() == b"1"
    assert paths.local_copy(root / "b[1].txt").read_text() == "b[1].txt"


def test_what_other_processes_write_is_seen(bucket: str, storage: FakeGcs):
    directory = to_path(bucket) / "d"
    (directory / "a").write_text("a")
    assert [path.name for path in paths.children(directory)] == ["a"]
    storage.put(bucket.removeprefix("gs://"), "d/b", b"b")
    assert [path.name for path in paths.children(directory)] == ["a", "b"]


@pytest.mark.parametrize(
    ("directory", "name", "joined"),
    [
        ("/data", "a.wav", "/data/a.wav"),
        ("/data", "../b/a.wav", "/data/../b/a.wav"),  # a link may stand before the dots
        ("/data", "/b/a.wav", "/b/a.wav"),
        ("/data", "gs://b/a.wav", "gs://b/a.wav"),
        ("gs://b/data", "x/a.wav", "gs://b/data/x/a.wav"),
        ("gs://b/data", "../a.wav", "gs://b/a.wav"),
        ("gs://b/data", "/local/a.wav", "/local/a.wav"),
    ],
)
def test_names_in_a_file_are_relative_to_its_directory(directory: str, name: str, joined: str):
    assert paths.join(directory, name) == joined


def test_what_is_inside_a_directory(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    assert paths.is_inside(tmp_path / "in", tmp_path / "in" / "file")
    assert not paths.is_inside(tmp_path / "in", tmp_path / "in" / "link")
    assert not paths.is_inside(tmp_path / "in", tmp_path / "in" / ".." / "file")
    assert paths.is_inside("gs://b/d", "gs://b/d/file")
    for outside in ("gs://b/file", "gs://b/d/../file", "gs://c/d/file", "/b/d/file"):
        assert not paths.is_inside("gs://b/d", outside)


def test_other_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MossAudioError, match="s3://b/x must be a path of this machine or of gs://, not a URL of s3"):
        to_path("s3://b/x")
    with pytest.raises(MossAudioError, match="gs:/b/x lost a slash: give gs:// paths as text"):
        load_model(Path("gs://b/x"))
    with pytest.raises(MossAudioError, match="gs://b/m: weights are on a disk of this machine, not of gs://: copy"):
        paths.require_local("gs://b/m", "weights are on")
    with pytest.raises(MossAudioError, match="converted weights are written to a disk of this machine"):
        check_target("gs://b/m")
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    with pytest.raises(MossAudioError, match=r"gs://b/x needs gcsfs, .* pip install 'moss-audio-jax\[gcs\]'"):
        to_path("gs://b/x")
    assert str(paths.absolute("x")) == os.path.abspath("x")


def test_errors_name_what_can_not_be_written_or_read(bucket: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MossAudioError, match=r"must be a file that can be written .Not a directory"):
        paths.require_writable(tmp_path / "file" / "x" / "y")
    paths.require_writable(to_path(bucket) / "new" / "file")
    assert not paths.exists(to_path(bucket) / "new" / "file")
    with pytest.raises(MossAudioError, match=r"gs://.*/no\.wav must be a readable audio file \(No such file"):
        load_audio(f"{bucket}/no.wav")


def test_audio(root: paths.Path):
    root.mkdir(parents=True)
    wave = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format="WAV", subtype="FLOAT")
    (root / "a.wav").write_bytes(file.getvalue())
    np.testing.assert_array_equal(load_audio(root / "a.wav"), wave)
    np.testing.assert_array_equal(load_audio(root / "a.wav", start=0.1, end=0.2), wave[1600:3200])


def test_a_checkpoint_is_saved_and_loaded(root: paths.Path, tiny: MossAudio, tmp_path: Path):
    write_small_tokenizer(tmp_path)
    save_model(tiny, root)
    copy_tokenizer(tmp_path, root)
    assert locate(root).layout() == "orbax"
    same_model(load_model(root), tiny)
    assert load_processor(root).tokenizer.encode("12") == [16, 17]
    assert f"{root}: moss_audio, Orbax" in describe(root)
    rows = open_checkpoint(root).read("language_model.norm.weight", 1, 3)
    np.testing.assert_array_equal(rows, tiny.language_model.norm.scale[...][1:3])
    with pytest.raises(MossAudioError, match="already exists and is not an empty directory"):
        save_model(tiny, root)


def test_a_converted_checkpoint_can_be_copied_to_gs(bucket: str, tiny: MossAudio, tmp_path: Path):
    save_model(tiny, tmp_path / "model")
    copied(tmp_path / "model", f"{bucket}/model")
    same_model(load_model(f"{bucket}/model"), tiny)


def test_released_weights_are_read_from_a_disk(bucket: str, data_dir: Path):
    copied(data_dir / "tiny", f"{bucket}/tiny")
    with pytest.raises(MossAudioError, match=r"gs://.*/tiny: released weights are read .* a disk of this machine"):
        load_model(f"{bucket}/tiny")


def test_damage_and_what_is_missing_are_named(bucket: str, tiny: MossAudio, storage: FakeGcs):
    with pytest.raises(MossAudioError, match=r"gs://.*/no does not exist"):
        load_model(f"{bucket}/no")
    save_model(tiny, f"{bucket}/model")
    storage.put(bucket.removeprefix("gs://"), "model/params/manifest.ocdbt", b"damaged")
    with pytest.raises(MossAudioError, match=r"gs://.*/model/params can't be read, its files are damaged"):
        load_model(f"{bucket}/model")


def copied(directory: Path, target: str) -> None:
    """As `gcloud storage cp -r` does it."""
    local = paths.local_directory(target)
    shutil.copytree(directory, local, dirs_exist_ok=True)
    paths.upload(local, target)


def same_model(found: MossAudio, expected: MossAudio) -> None:
    from moss_audio_jax.weights.parameters import parameters_of

    parameters = parameters_of(expected)
    for path, leaf in parameters_of(found).items():
        np.testing.assert_array_equal(leaf, parameters[path], err_msg=path)


def test_an_error_leaves_nothing(tmp_path):
    new = tmp_path / "a" / "b"
    with pytest.raises(MossAudioError), paths.nothing_left(new):
        (new / "sub").mkdir(parents=True)
        (new / "sub" / "x").touch()
        raise MossAudioError("refused")
    assert not list(tmp_path.iterdir())
    new.mkdir(parents=True)
    for name in ("mine", "theirs"):
        (new / name).touch()
    with pytest.raises(MossAudioError), paths.nothing_left(new, ("mine", "made")):
        for name in ("made", "others"):
            (new / name).touch()
        raise MossAudioError("refused")
    assert {path.name for path in new.iterdir()} == {"mine", "theirs", "others"}
    with pytest.raises(MossAudioError), paths.nothing_left(new) as keep:
        (new / "kept").touch()
        keep()
        raise MossAudioError("later")
    assert (new / "kept").exists()


def test_whether_a_file_can_be_written_is_seen_without_leaving_one(tmp_path):
    paths.require_writable(tmp_path / "new" / "file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").write_text("kept")
    paths.require_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
