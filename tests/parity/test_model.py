"""The port equals PyTorch on random weights: every module, the logits, the loss, every gradient and greedy answers.

Both sides read one released directory, so the table of tensor names and layouts is compared too. The prompts of a case
are one batch here and run one by one in PyTorch, so padding and neighbours must change nothing.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

INSTALL = "parity with PyTorch runs on Python 3.11, after: pip install -e '.[test]'"
torch = pytest.importorskip("torch", reason=INSTALL)
pytest.importorskip("transformers", reason=INSTALL)

from moss_audio_jax import ModelInputs, generate  # noqa: E402
from moss_audio_jax.layers import map_layers  # noqa: E402
from tests.conftest import released_tensors  # noqa: E402

from .pairs import (  # noqa: E402
    Pair,
    Prompt,
    changed,
    make_batch,
    make_pair,
    make_prompt,
    move_rope_theta,
    store_sinusoid_rates,
)
from .reference import IGNORED_LABEL, loss  # noqa: E402
from .test_reference import above, relative_error  # noqa: E402

# Largest difference over largest magnitude. Measured: outputs up to 1.3e-6; gradients up to 8e-6, and 2.5e-5 where they
# nearly cancel (keys of a clip of two tokens), where PyTorch's float32 is as far from its float64.
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
NEW_TOKENS = 16
# How far apart the two likeliest tokens' logits must be so that rounding doesn't decide: far above 1e-5.
CLEAR_CHOICE = 3e-4


@dataclass(frozen=True)
class Configuration:
    """Changes to `pairs.CONFIG`, what to run through that model, and further arguments of `make_pair`."""

    changes: dict[str, Any]
    prompts: list[Prompt]
    options: dict[str, Any] = field(default_factory=dict)


CONFIGURATIONS = {
    "as released": Configuration(
        {},
        [
            *(make_prompt([frames]) for frames in (1, 5, 8, 237, 400, 403, 2998)),
            *(make_prompt([frames], time_markers=True) for frames in (801, 2998)),
            make_prompt([237, 801], time_markers=True),
            make_prompt([1, 400, 5]),
            make_prompt([]),
        ],
    ),
    "unsorted taps, one for each layer, projected": Configuration(
        {
            "deepstack_num_inject_layers": None,
            "audio_config": {"deepstack_encoder_layer_indexes": [4, 0, 2], "output_dim": 20, "layer_norm_eps": 0.1},
            "language_config": {"num_hidden_layers": 3},
        },
        [make_prompt([237]), make_prompt([403, 8], time_markers=True)],
        {"shards": 3},
    ),
    # 531 audio tokens of 107 chunks: more than one block of queries, and many groups of chunks in the stem.
    "no DeepStack, short chunks, few mel bins": Configuration(
        {"deepstack_num_inject_layers": 0, "audio_config": {"num_mel_bins": 16, "n_window": 20}},
        [make_prompt([4241], mel_bins=16), make_prompt([39, 40, 41, 3], time_markers=True, mel_bins=16)],
    ),
    "tied head, narrow attention heads, rope_parameters": Configuration(
        {"tie_word_embeddings": True, "language_config": {"head_dim": 6, "rope_theta": 300}},
        [make_prompt([237]), make_prompt([403], time_markers=True), make_prompt([])],
        {"rewrite": move_rope_theta},
    ),
    "MOSS-Music, whole clips, the first of two unsorted taps": Configuration(
        {
            "model_type": "moss_music",
            "architectures": ["MossMusicModel"],
            "deepstack_num_inject_layers": 1,
            "audio_config": {"deepstack_encoder_layer_indexes": [3, 1], "n_window": None},
        },
        [make_prompt([450]), make_prompt([801, 237], time_markers=True), make_prompt([3])],
        {"rewrite": store_sinusoid_rates},
    ),
}


def random_prompts(seed: int) -> list[Prompt]:
    """Up to three clips each, of any length or one where something changes.

    The last is always as long, which gives the batch the shape of "as released": nothing is compiled again.
    """
    rng = np.random.default_rng(seed)
    ranges = ((1, 18), (390, 411), (1, 801))
    clips = [[int(rng.integers(*ranges[rng.integers(3)])) for _ in range(rng.integers(4))] for _ in range(11)]
    prompts = [make_prompt(lengths, time_markers=bool(rng.integers(2)), seed=seed) for lengths in clips]
    return [*prompts, make_prompt([2998], seed=seed)]


# Name -> configuration and prompts.
CASES = {name: (name, configuration.prompts) for name, configuration in CONFIGURATIONS.items()}
CASES |= {f"random lengths {seed}": ("as released", random_prompts(seed)) for seed in range(3)}
CASES["no audio in the batch"] = ("as released", [make_prompt([]), make_prompt([], seed=1)])
WITH_AUDIO = [name for name, (_, prompts) in CASES.items() if any(prompt.mels for prompt in prompts)]


@dataclass(frozen=True)
class Case:
    pair: Pair
    prompts: list[Prompt]
    inputs: ModelInputs

    @functools.cached_property
    def expected(self) -> list[dict[str, np.ndarray]]:
        return [reference_modules(self.pair, prompt) for prompt in self.prompts]

    @property
    def audio_slots(self) -> list[np.ndarray]:
        """Places of each prompt's audio tokens among those that the encoder gives for its row."""
        return [slots[slots >= 0] for slots in self.inputs.audio_slots]

    @property
    def audio_positions(self) -> list[np.ndarray]:
        """Places of each prompt's audio tokens in its row of the batch."""
        return [np.flatnonzero(slots >= 0) for slots in self.inputs.audio_slots]

    @property
    def positions(self) -> list[np.ndarray]:
        return [np.arange(len(prompt.ids)) for prompt in self.prompts]

    def spread(self, stage: str, places: list[np.ndarray], length: int) -> np.ndarray:
        """PyTorch's outputs of a stage as a batch [b, length, width]: a token at each of its places, 0 elsewhere."""
        width = next(modules[stage].shape[1] for modules in self.expected if stage in modules)
        batch = np.zeros((len(self.prompts), length, width), np.float32)
        for row, modules in enumerate(self.expected):
            if stage in modules:
                batch[row, places[row]] = modules[stage]
        return batch

    def errors(self, found: dict[str, Any], places: list[np.ndarray]) -> dict[str, float]:
        """Stage and prompt -> relative error of batches [b, length, width] at the places of the prompt's tokens."""
        return {
            f"{stage}, {prompt.name}": relative_error(np.asarray(values)[row, places[row]], modules[stage])
            for stage, values in found.items()
            for row, (prompt, modules) in enumerate(zip(self.prompts, self.expected, strict=True))
            if stage in modules
        }


@functools.cache
def pair_of(name: str, directory: Path) -> Pair:
    configuration = CONFIGURATIONS[name]
    (directory / name).mkdir()
    return make_pair(changed(configuration.changes), directory / name, seed=0, **configuration.options)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    name, prompts = CASES[request.param]
    pair = pair_of(name, tmp_path_factory.getbasetemp())
    return Case(pair, prompts, make_batch(prompts, pair.model))


def reference_modules(pair: Pair, prompt: Prompt) -> dict[str, np.ndarray]:
    """Outputs of each module of the reference for one prompt.

    Encoder, taps, adapter and mergers: [audio tokens, width], absent without audio. Embeddings, the language model's
    "input" with audio in place, its "hidden" output, and the logits: [all tokens, width].
    """
    seen = {}

    def remember(_module, _arguments, keywords, output):
        seen.update(input=keywords["inputs_embeds"][0], hidden=output.last_hidden_state[0])

    language_model = pair.reference.language_model
    with torch.no_grad(), language_model.register_forward_hook(remember, with_kwargs=True):
        stages = pair.reference(*prompt.torch_inputs)
        embeddings = language_model.embed_tokens(torch.tensor(prompt.ids))
    results = {"embeddings": embeddings, **seen, "logits": stages.logits[0]}
    if stages.audio is not None:
        results |= {
            "encoder": stages.audio.encoder_last_hidden_state,
            **{f"tap {k}": tap for k, tap in enumerate(stages.audio.deepstack)},
            "adapter": stages.audio.adapter_output,
            **{f"merger {k}": merged for k, merged in enumerate(stages.audio.deepstack_merged)},
        }
    return {name: tensor.numpy() for name, tensor in results.items()}


@functools.partial(jax.jit, static_argnums=0)
def audio_modules(graphdef, state, inputs, encoded, taps):
    """The encoder from the mels; adapter and mergers from what PyTorch's encoder gave."""
    model = nnx.merge(graphdef, state)
    features, found_taps = model.audio_encoder(inputs.audio_chunks, inputs.chunk_frames, inputs.stem_frames)
    merged = map_layers(model.deepstack_audio_merger_list, taps) if len(taps) else taps
    return {
        "encoder": features,
        **{f"tap {k}": tap for k, tap in enumerate(found_taps)},
        "adapter": model.audio_adapter(encoded),
        **{f"merger {k}": values for k, values in enumerate(merged)},
    }


@pytest.mark.parametrize("case", WITH_AUDIO, indirect=True)
def test_encoder_adapter_and_mergers_equal_pytorch(case: Case):
    model = case.pair.model
    length = case.inputs.audio_chunks.shape[1] * case.inputs.audio_chunks.shape[2] // 8
    encoded = case.spread("encoder", case.audio_slots, length)
    taps = [case.spread(f"tap {k}", case.audio_slots, length) for k in range(model.config.num_deepstack)]
    found = audio_modules(*nnx.split(model), case.inputs, encoded, np.array(taps))
    assert set().union(*case.expected) == found.keys() | {"embeddings", "input", "hidden", "logits"}
    assert not above(OUTPUT_TOLERANCE, case.errors(found, case.audio_slots))


@functools.partial(jax.jit, static_argnums=0)
def language_stages(graphdef, state, inputs, x, deepstack, hidden):
    """Each stage of the language model, from what PyTorch gave for the one before it."""
    model = nnx.merge(graphdef, state)
    return {
        "embeddings": model.language_model.embed_tokens(inputs.tokens),
        "hidden": model.language_model(x, inputs.positions, inputs.segment_ids, deepstack).last,
        "logits": model.logits(hidden),
    }


def test_language_model_equals_pytorch(case: Case):
    model, length = case.pair.model, case.inputs.tokens.shape[1]
    x, hidden = (case.spread(stage, case.positions, length) for stage in ("input", "hidden"))
    injected = [stage for stage in sorted(set().union(*case.expected)) if stage.startswith("merger")]
    deepstack = [case.spread(stage, case.audio_positions, length) for stage in injected]
    found = language_stages(*nnx.split(model), case.inputs, x, np.reshape(deepstack, (-1, *x.shape)), hidden)
    assert not above(OUTPUT_TOLERANCE, case.errors(found, case.positions))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef, state, inputs, labels):
    """((loss, logits), gradients). The loss: the mean over labels that count, each predicted from the token before."""

    def objective(state):
        model = nnx.merge(graphdef, state)
        logits = model.logits(model.hidden_states(inputs).last)
        counts = labels[:, 1:] != IGNORED_LABEL
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(counts, labels[:, 1:], 0))
        return losses.mean(where=counts), logits

    return jax.value_and_grad(objective, has_aux=True)(state)


def test_logits_loss_and_every_gradient_equal_pytorch(case: Case):
    """From the mels to the loss of each prompt alone, padded to the shape of the batch: one compilation serves all."""
    reference, model, output_errors, gradient_errors = case.pair.reference, case.pair.model, {}, {}
    for row, prompt in enumerate(case.prompts):
        inputs: ModelInputs = jax.tree.map(lambda array, row=row: array[row : row + 1], case.inputs)
        length = len(prompt.ids)
        labels = np.full(inputs.tokens.shape, IGNORED_LABEL)
        labels[0, :length] = prompt.labels
        (found_loss, logits), gradients = loss_and_gradients(*nnx.split(model), inputs, labels)
        reference.zero_grad()
        expected_loss = loss(reference(*prompt.torch_inputs).logits, torch.tensor([prompt.labels]))
        expected_loss.backward()

        output_errors[f"logits, {prompt.name}"] = relative_error(logits[0, :length], case.expected[row]["logits"])
        output_errors[f"loss, {prompt.name}"] = relative_error(found_loss, expected_loss.detach())
        found, parameters = released_tensors(model.config, gradients), dict(reference.named_parameters())
        assert found.keys() == parameters.keys()
        for name, parameter in parameters.items():
            # PyTorch gives None to what the loss does not depend on, such as the encoder without audio.
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient_errors[f"{name}, {prompt.name}"] = relative_error(found[name], expected.detach())
    assert not above(OUTPUT_TOLERANCE, output_errors)
    assert not above(GRADIENT_TOLERANCE, gradient_errors)


def test_greedy_answers_equal_pytorch(case: Case):
    reference, expected, margins = case.pair.reference, [], {}
    for prompt in case.prompts:
        steps = []
        with reference.lm_head.register_forward_hook(lambda *call, steps=steps: steps.append(call[-1][0, -1])):
            expected.append(reference.generate_greedy(*prompt.torch_inputs, NEW_TOKENS))
        first, second = torch.stack(steps).topk(2).values.T
        margins[prompt.name] = float((first - second).min())
    assert min(margins.values()) > CLEAR_CHOICE, f"too close to compare, choose another seed: {margins}"
    found = generate(case.pair.model, case.inputs, max_new_tokens=NEW_TOKENS, eos_ids=())
    np.testing.assert_array_equal(found, expected)
