"""The machine the tests run on, the recorded checkpoint, and where their data is."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal

# Before JAX starts: eight devices on the CPU, for meshes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test asks the real hub: nothing listens there, and `hub` starts a stand-in.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# The user's own compiled programs are left alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# XLA runs those devices on one pool of threads. A collective blocks one, and independent ones wait for each other: with
# as few threads as cores they can block for good, until XLA aborts the process.
os.environ.setdefault("NPROC", "32")

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore as ts
from fake_gcs import FakeGcs
from fake_hub import FakeHub
from flax import nnx

from convert.rehearse import rehearse
from moss_audio_jax import ModelInputs, MossAudio, MossAudioConfig, load_model, make_inputs
from moss_audio_jax.tree import dotted
from moss_audio_jax.weights.locate import forget_names
from moss_audio_jax.weights.names import released_leaves

TESTS = Path(__file__).parent
# So that neither of two workers is left alone with one of them.
LONGEST = (
    "test_loop.py",
    "test_lora.py",
    "test_processes.py",
    "test_reinforce_processes.py",
    "test_ablation.py",
    "test_finetune.py",
    "test_step.py",
)
TINY_AUDIO_ID = 511  # tests/data/tiny has no processor_config.json to say so
THINK, THOUGHT = 259, 260  # ids of <think> and </think> after `add_thinking_tokens`
# A whole prompt about one clip, which ends in an open thought.
OPENED = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>\nHm?<|im_end|>\n<|im_start|>assistant\n<think>\n"
_TINY = MossAudioConfig.preset("tiny")
# The preset with fewer layers: each scan over them takes seconds to compile.
SMALL_MODEL = dataclasses.replace(
    _TINY,
    audio_config=dataclasses.replace(_TINY.audio_config, encoder_layers=2, deepstack_encoder_layer_indexes=(0,)),
    language_config=dataclasses.replace(_TINY.language_config, num_hidden_layers=2),
)

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Long files come first; tests that load libtpu last, as JAX's profiler crashes in a process that has."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.get_closest_marker("tpu") is not None, first.get(item.path.name, len(first))))


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and so would the processes that tests run as one start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def without_the_programs_of_other_modules() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process may have 65,530: past them XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def storage() -> Iterator[FakeGcs]:
    """gs:// in memory, for this process and those it starts."""
    with FakeGcs() as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        yield storage


@pytest.fixture
def bucket(storage: FakeGcs, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    return f"gs://{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The only hub that this process, and those it starts, can reach; with an empty cache below `tmp_path`/home."""
    constants = pytest.importorskip("huggingface_hub.constants")
    forget_names()
    with FakeHub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # What huggingface_hub made of the environment when it was imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        for module in ("constants", "file_download"):  # before and since huggingface_hub 1
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        yield hub
    forget_names()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that failed is tried again without a pause: by us, by gcsfs and by TensorStore."""
    monkeypatch.setenv("MOSS_AUDIO_STORAGE_BACKOFF", "0")

    async def sleep(seconds: float) -> None: ...

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=sleep))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return TESTS / "data"


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Recordings too large for the repository: $MOSS_AUDIO_GOLDENS or else ../shared/goldens beside it."""
    directory = Path(os.environ.get("MOSS_AUDIO_GOLDENS", TESTS.parents[1] / "shared" / "goldens"))
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent: set MOSS_AUDIO_GOLDENS to the recorded outputs")
    return directory


@pytest.fixture(scope="session")
def tiny(data_dir: Path) -> MossAudio:
    """The recorded small checkpoint, in float32."""
    return load_model(data_dir / "tiny")


@pytest.fixture
def order_of_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs compute in the order of operations that a TPU gets, though they are compiled for the CPU."""
    for module in ("encoder", "generation", "language_model", "layers"):
        monkeypatch.setattr(f"moss_audio_jax.{module}.on_cpu", lambda: False)
    monkeypatch.setattr("moss_audio_jax.encoder.PRODUCT_CHANNELS", math.inf)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Lists the programs that JAX compiles meanwhile, or takes from its cache, by the names of their functions."""
    names = []

    def listen(event: str, duration: float, fun_name: str = "", **others: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit_").removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def random_mel(frames: int, seed: int = 0) -> np.ndarray:
    """A mel [128, frames] in the range of real ones."""
    return np.random.default_rng(seed).uniform(-1.0, 1.5, (128, frames)).astype(np.float32)


def question(model: MossAudio, clips: list[int], text: int = 5, seed: int = 0) -> ModelInputs:
    """One sequence: `text` random ids, random clips with these numbers of frames, and as many ids again."""
    ids, mels = question_parts(clips, text, seed)
    return make_inputs([ids], [mels], config=model.config, audio_token_id=TINY_AUDIO_ID)


def question_parts(clips: list[int], text: int = 5, seed: int = 0) -> tuple[list[int], list[np.ndarray]]:
    """The ids and mels of `question`, to be batched with others."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 500, text).tolist()
    for frames in clips:
        ids += [509, *[TINY_AUDIO_ID] * -(-frames // 8), 510]
    ids += rng.integers(0, 500, text).tolist()
    return ids, [random_mel(frames, seed + i) for i, frames in enumerate(clips)]


def change_one_bit(tree: Path, name: str) -> None:
    """Flips the lowest bit of the last element of a leaf of an Orbax tree, whose files stay whole."""
    store = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{tree}/"}, "path": name}
    leaf = ts.open(store).result()
    array = np.array(leaf.read().result())
    array.view(np.uint8).reshape(-1)[-array.itemsize] ^= 1
    leaf.write(array).result()


def released_tensors(config: MossAudioConfig, parameters: nnx.State) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, by released name and in the released layout."""
    tensors = {}
    leaves = released_leaves(config)
    for path, parameter in nnx.to_flat_state(parameters):
        leaf, array = leaves[dotted(path)], np.asarray(parameter[...])
        for index, name in enumerate(leaf.names):
            tensors[name] = leaf.layout.to_released(array[index] if leaf.stacked else array)
    return tensors


def add_thinking_tokens(directory: Path) -> None:
    """Gives the tokenizer of a small checkpoint the tokens of a Thinking one."""
    added = {"<think>": THINK, "</think>": THOUGHT}
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    flags = config["added_tokens_decoder"]["256"] | {"special": False}
    config["added_tokens_decoder"] |= {str(id): flags | {"content": token} for token, id in added.items()}
    path.write_text(json.dumps(config))
    path = directory / "added_tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | added))


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> Path:
    """Random bfloat16 weights with configuration and tokenizer, in the released layout."""
    directory = tmp_path_factory.mktemp("checkpoints") / "released"
    rehearse("tiny", directory, seed=1)
    return directory


@pytest.fixture(scope="session")
def digits_dir() -> Path:
    """Recordings of spoken digits: $MOSS_AUDIO_DIGITS or else ../shared/audio/free-spoken-digit-dataset."""
    shared = Path(__file__).parents[2] / "shared" / "audio" / "free-spoken-digit-dataset"
    directory = Path(os.environ.get("MOSS_AUDIO_DIGITS", shared)) / "recordings"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent: set MOSS_AUDIO_DIGITS to a clone of free-spoken-digit-dataset")
    return directory
