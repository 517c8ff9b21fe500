"""Checkpoints by their names on the Hugging Face hub, which a stand-in on loopback plays."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fake_hub import FakeHub
from safetensors.numpy import load_file, save_file

from moss_audio_jax import LoraConfig, MossAudioConfig, MossAudioError, load_model, load_processor
from moss_audio_jax.__main__ import main as ask
from moss_audio_jax.errors import StorageError
from moss_audio_jax.storage.hub import HubName, hub_name
from moss_audio_jax.weights.info import contents
from moss_audio_jax.weights.locate import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    forget_names,
    locate,
)
from moss_audio_jax.weights.names import adapter_leaves
from moss_audio_jax.weights.parameters import parameters_of
from moss_audio_jax.weights.peft import write_adapter_config
from train.__main__ import main as train

NAME = "Someone/tiny"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the hub are no directories below the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def published(hub: FakeHub, released: Path, tmp_path: Path) -> str:
    """A repository as people publish them, with code and pickles; returns its commit."""
    directory = Path(shutil.copytree(released, tmp_path / "published"))
    for name in ("modeling.py", "pytorch_model.bin", "chat_template.py", "README.md", "original/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("raise SystemExit")
    return hub.publish(NAME, directory)


def set_offline(monkeypatch: pytest.MonkeyPatch, *, to: bool) -> None:
    """As HF_HUB_OFFLINE, in a new process."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", to)
    # Sessions are made for the one or the other.
    new_sessions = getattr(huggingface_hub, "close_session", None) or huggingface_hub.configure_http_backend
    new_sessions()
    forget_names()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, which has the hub from its environment alone."""
    known = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | environment
    return subprocess.run([sys.executable, "-m", *arguments], env=known, capture_output=True, text=True, timeout=300)


def test_a_model_is_fetched_once_and_without_what_it_does_not_need(hub: FakeHub, published: str, released: Path):
    assert load_processor(NAME).tokenizer.encode("12") == [16, 17]
    assert SINGLE_FILE not in hub.downloaded  # 10 GB that a processor does not need
    assert contents(NAME).dtypes == contents(released).dtypes
    assert hub.downloaded == {file.name for file in released.iterdir()}
    hub.asked.clear()
    found = locate(NAME)
    assert str(found.hub) == f"{NAME}@{published}" and found.path.name == published
    assert hub.asked == []


def test_commands_take_names(hub: FakeHub, published: str, released: Path, tmp_path: Path):
    done = run("convert", "to-orbax", NAME, str(tmp_path / "orbax"))
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr and "%|" not in done.stderr  # no bars in a log
    done = run("convert", "verify", f"{NAME}@{published}", str(tmp_path / "orbax"), "--no-torch", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "159 tensors equal bit by bit" in done.stdout, done.stderr
    done = run("moss_audio_jax", "info", f"{NAME}@v2")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {NAME}@v2: {NAME} is on the hub, without a revision v2: .*\n", done.stderr)
    hub.refused["Someone/down"] = (503, "")
    done = run("moss_audio_jax", "info", "Someone/down")
    assert done.returncode == 75 and done.stderr.count("\n") == 1 and "try again later" in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("info", "published"), ("info", "Someone/tiny")])
def test_the_library_is_imported_for_names_alone(published: str, arguments: tuple[str, ...], tmp_path: Path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not today')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run("moss_audio_jax", *arguments, **environment)
    if arguments[-1] != NAME:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        expected = (
            "error: Someone/tiny does not exist on this machine: to read it from the Hugging Face hub, `pip install "
        )
        expected += "'moss-audio-jax[hub]'`, or run `hf download Someone/tiny --local-dir tiny` and give tiny\n"
        assert done.stderr == expected


def test_shards_are_those_of_the_index(hub: FakeHub, released: Path, tmp_path: Path):
    directory = Path(shutil.copytree(released, tmp_path / "shards"))
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + place % 2:05}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, directory / shard)
    save_file(tensors, directory / "consolidated.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    hub.publish(NAME, directory)
    assert contents(NAME).dtypes == contents(released).dtypes
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == set(weight_map.values())


def test_revisions_stay_apart(hub: FakeHub, published: str, released: Path, tmp_path: Path):
    directory = Path(shutil.copytree(released, tmp_path / "other"))
    (directory / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    other = hub.publish(NAME, directory, "refs/pr/1")
    hub.revisions[NAME]["v1"] = published
    commits = {name: locate(name).path.name for name in (NAME, f"{NAME}@refs/pr/1", f"{NAME}@v1", f"{NAME}@{other}")}
    assert list(commits.values()) == [published, other, published, other]
    # A branch that moves is seen by the next process, not in the middle of one.
    hub.revisions[NAME]["main"] = other
    assert locate(NAME).path.name == published
    forget_names()
    assert locate(NAME).path.name == other


def test_a_directory_comes_first(hub: FakeHub, published: str, released: Path, tmp_path: Path):
    shutil.copytree(released, tmp_path / NAME)
    assert locate(NAME).hub is None and hub.asked == []
    # The parent is there: a typing error, or the hub's.
    hub.revisions["Someone/tinny"] = hub.revisions[NAME]
    with pytest.raises(MossAudioError, match=r"in Someone: did you mean Someone/tiny. Or, .* hub's model .*tinny@main"):
        load_model("Someone/tinny")
    assert hub.asked == []
    assert locate("Someone/tinny@main").path.name == published


def test_the_names_of_the_hub():
    commit = "0123456789abcdef" * 2 + "01234567"
    assert hub_name("a/b") == HubName("a/b") and hub_name("Open-MOSS/MOSS-1.7B@v1.0") == HubName(
        "Open-MOSS/MOSS-1.7B", "v1.0"
    )
    assert hub_name(Path("a/b@refs/pr/1")) == HubName("a/b", "refs/pr/1")
    assert hub_name(f"a/b@{commit}") == HubName("a/b", commit)
    others = (
        "a",
        "/a/b",
        "../b",
        "a/..",
        "a/b/c",
        "gs://a/b",
        "a/b@",
        "a/b@../c",
        "a/b@x/../../y",
        "a--b/c",
        "a/b.git",
    )
    for other in (
        *others,
        "a/.b",
        "a/b.",
        "-a/b",
        "a b/c",
        "a/b@-x",
        "a/b@x y",
        "~/b",
        f"{'a' * 97}/b",
        f"a/{'b' * 97}",
    ):
        assert hub_name(other) is None, other


# Repository -> what the stand-in answers, the kind of the error, and its text.
REFUSALS = {
    "runs/demo": (None, MossAudioError, "runs/demo: no such directory, and no such model on the hub: .*HF_TOKEN"),
    "a/gated": (
        (403, "GatedRepo"),
        MossAudioError,
        "a/gated is gated on the hub, .*accept.*HF_TOKEN .* `hf auth login`",
    ),
    "a/token": ((401, ""), MossAudioError, r"a/token.* `hf auth login`"),
    "a/denied": ((403, ""), MossAudioError, "a/denied can't be read, .* `hf auth login`"),
    "a/broken": ((500, ""), StorageError, "a/broken: no such directory, and the hub can't be reached .*500"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_sentence(hub: FakeHub, name: str):
    answer, kind, text = REFUSALS[name]
    if answer is not None:
        hub.refused[name] = answer
    with pytest.raises(MossAudioError, match=text) as caught:
        load_processor(name)
    assert type(caught.value) is kind or (kind is MossAudioError and not isinstance(caught.value, StorageError))
    assert "\n" not in str(caught.value)


def test_a_gated_model_opens_with_a_token(hub: FakeHub, published: str, monkeypatch: pytest.MonkeyPatch):
    hub.gated[NAME] = "hf_secret"
    for token in ("", "hf_other"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(MossAudioError, match=f"{NAME} is gated on the hub"):
            locate(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert locate(NAME).path.name == published


def test_without_a_network_the_cache_is_read(
    hub: FakeHub, published: str, released: Path, monkeypatch: pytest.MonkeyPatch
):
    set_offline(monkeypatch, to=True)
    with pytest.raises(
        MossAudioError, match=r"not, or not whole, in the cache .*home/hub of the .* offline \(HF_HUB_OFFLINE\)"
    ):
        locate(NAME)
    set_offline(monkeypatch, to=False)
    load_processor(NAME)
    set_offline(monkeypatch, to=True)
    load_processor(NAME)
    with pytest.raises(
        MossAudioError, match=f"lacks {SINGLE_FILE}, or that is not in the cache|not whole, in the cache"
    ):
        load_model(NAME)
    set_offline(monkeypatch, to=False)
    load_model(NAME)
    set_offline(monkeypatch, to=True)
    hub.asked.clear()
    assert contents(NAME).dtypes == contents(released).dtypes
    assert hub.asked == []
    # Not switched off, but gone: an error of connections instead of one of huggingface_hub's own.
    set_offline(monkeypatch, to=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    forget_names()
    assert locate(NAME).path.name == published
    with pytest.raises(StorageError, match="a/b: no such directory, and the hub can't be reached"):
        locate("a/b")


def test_a_lost_download_resumes(hub: FakeHub, published: str, released: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # it writes 10 MB at a time
    half = (released / SINGLE_FILE).stat().st_size // 2
    hub.cut[SINGLE_FILE] = half
    try:  # huggingface_hub 2 resumes by itself
        load_model(NAME)
    except StorageError as error:
        assert re.search("run the same command again, which resumes", str(error))
        assert hub.ranges == []
    expected = parameters_of(load_model(released))
    for path, leaf in parameters_of(load_model(NAME)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    (begin,) = (int(re.sub(r"\D", "", wanted)) for wanted in hub.ranges)
    assert half - 1000 < begin <= half


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError(f"Data processing error: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),  # of hf_xet
    ],
    ids=repr,
)
def test_a_full_disk_is_named(hub: FakeHub, published: str, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        load_model(NAME)
    assert str(caught.value.filename).endswith("home/hub")


def test_what_is_no_checkpoint_is_said_before_its_weights_are_fetched(hub: FakeHub, released: Path, tmp_path: Path):
    directory = Path(shutil.copytree(released, tmp_path / "other"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    hub.publish("a/llama", directory)
    with pytest.raises(MossAudioError, match="a/llama on the hub holds a model of type 'llama', and not MOSS-Audio"):
        load_model("a/llama")
    (directory / "config.json").unlink()
    hub.publish("a/nothing", directory)
    with pytest.raises(MossAudioError, match=r"a/nothing on the hub holds neither config.json nor adapter_config.json"):
        load_model("a/nothing")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    hub.publish("a/pickled", directory)
    with pytest.raises(MossAudioError, match=f"a/pickled on the hub lacks {SINGLE_FILE}"):
        load_model("a/pickled")
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.downloaded)


ESCAPES = {
    "another repository": "../../../models--a--b/blobs/0",
    "the refs": "../../refs/main",
    "below the blobs": "../../blobs/below/0",
    "a file of the machine": "{outside}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_links_of_the_cache_lead_to_its_blobs_alone(hub: FakeHub, published: str, tmp_path: Path, escape: str):
    snapshot = Path(locate(NAME).path)
    assert (snapshot / "config.json").is_symlink()
    target = snapshot / ESCAPES[escape].format(outside=tmp_path / "outside.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(snapshot / "config.json", target)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    forget_names()
    with pytest.raises(MossAudioError, match=r"config\.json must be inside the directory, not a link to elsewhere"):
        load_model(NAME)


def test_blobs_that_are_a_link_are_refused(hub: FakeHub, published: str, tmp_path: Path):
    blobs = Path(locate(NAME).path).parents[1] / "blobs"
    blobs.rename(tmp_path / "outside")
    blobs.symlink_to(tmp_path / "outside")
    forget_names()
    with pytest.raises(MossAudioError, match=r"config\.json must be inside the directory, not a link to elsewhere"):
        load_model(NAME)


def test_several_processes_fetch_together(hub: FakeHub, published: str):
    command = [
        sys.executable,
        "-c",
        f"from moss_audio_jax.weights.locate import locate; print(locate('{NAME}').path.name)",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in started] == [f"{published}\n"] * 3
    weights = [path for method, path in hub.asked if method == "GET" and path.startswith("/storage/")]
    assert len(weights) == 1


@pytest.fixture
def adapter(hub: FakeHub, published: str, released: Path, tmp_path: Path) -> str:
    """An adapter as PEFT saves it, for a commit of a model of the hub."""
    (tmp_path / "adapter").mkdir()
    config = dataclasses.replace(MossAudioConfig.from_hf(released), lora=LoraConfig(rank=2))
    write_adapter_config(tmp_path / "adapter", config, NAME, published)
    shapes = {name: leaf.tensor_shape for leaf in adapter_leaves(config).values() for name in leaf.names}
    tensors = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter" / ADAPTER_FILE)
    hub.publish("Someone/adapter", tmp_path / "adapter")
    return "Someone/adapter"


def test_an_adapter_and_its_base_are_fetched(hub: FakeHub, adapter: str, published: str, tmp_path: Path):
    hub.revisions[NAME]["main"] = "0" * 40  # the adapter names its commit
    assert locate(adapter).base().path.name == published
    model = load_model(adapter)
    assert model.config.lora is not None
    assert load_processor(adapter).tokenizer.encode("12") == [16, 17]
    assert run("convert", "to-hf", adapter, str(tmp_path / "merged")).returncode == 0
    assert (tmp_path / "merged" / SINGLE_FILE).exists()
    content = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": "Gone/gone"}))
    with pytest.raises(
        MossAudioError, match=r"holds an adapter for Gone/gone@.*, which is no directory here \(.*--base"
    ):
        load_model(tmp_path / "adapter")


def test_questions_and_checks_take_names(
    hub: FakeHub, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    soundfile.write(tmp_path / "clip.wav", np.zeros(8000), 16000)
    (tmp_path / "data.jsonl").write_text('{"audio": "clip.wav", "text": "what is said"}')
    options = ("--adapter", adapter, "--max-new-tokens", "1")
    for main, *arguments in (
        (ask, "generate", NAME, "clip.wav", *options),
        (ask, "timeline", NAME, "clip.wav", *options),
        (train, "check", "data.jsonl", "--group", "speech", "--init", NAME),
    ):
        monkeypatch.setattr("sys.argv", ["command", *arguments])
        main()
    printed = capsys.readouterr()
    assert "1 examples" in printed.out + printed.err and "error" not in printed.err
