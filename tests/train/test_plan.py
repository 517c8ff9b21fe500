"""A plan is of the real program: its memory, its FLOPs and its traffic."""

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from moss_audio_jax import MossAudioError
from moss_audio_jax.sharding import make_mesh
from train import loss
from train.__main__ import main
from train.config import ValidationConfig
from train.planning import plan, plan_evaluation
from train.planning.compilation import Compiled, largest_buffers
from train.planning.topology import topology_devices
from train.recipes import RECIPES

pytest.importorskip("libtpu", reason="compiles for TPUs")
pytestmark = pytest.mark.tpu
SIZES = ["--preset", "tiny", "--batch-size", "8", "--tokens", "256"]


@pytest.fixture(autouse=True)
def as_a_user_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not on Google Cloud, and at the default precision, which tests raise: splash attention serves no other."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with jax.default_matmul_precision("default"):
        yield


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", *arguments])
    main()
    return capsys.readouterr().out


def test_a_training_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(loss, "VOCABULARY_BLOCK", 128)  # a quarter
    out = run(["--topology", "v5e:2x2", *SIZES, "--json", "-"], monkeypatch, capsys)
    report = json.loads(out)
    assert report["fits"] and report["chips"] == 4 and report["sequences_per_chip"] == 2
    parts = report["hbm_bytes_by_kind"]
    # Masters and two moments in float32, all of them cut over the chips but for slivers, and the count of Adam's steps.
    assert parts["optimizer"] == 2 * parts["parameters"] + 4
    assert parts["parameters"] == pytest.approx(4 * report["parameters"] / 4, rel=0.1)
    assert 0 < report["hbm_bytes_per_chip"] < report["hbm_usable_bytes_per_chip"]
    assert report["model_flops"] == sum(report["model_flops_by_part"].values())
    assert report["collectives"] and 0 < report["estimated_mfu"] < 1
    arrays = [array for sums in report["collectives"].values() for array in sums["arrays"]]
    # A block of the head is gathered, and its gradient scattered; the whole never, nor the embedding.
    assert any("128" in array for array in arrays) and not any("512" in array for array in arrays), arrays
    assert dtypes_of_summed_kernels(report) == {"bf16", "f32"}  # float32: the head
    people = plan.plan_table(report)
    assert "FITS" in people and "ESTIMATE" in people and "8 sequences of 256 tokens" in people


def test_gradients_are_summed_in_float32_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = run(["--topology", "v5e:2x2", *SIZES, "--step.reduce-dtype", "float32", "--json", "-"], monkeypatch, capsys)
    assert dtypes_of_summed_kernels(json.loads(out)) == {"f32"}


def dtypes_of_summed_kernels(report: dict[str, Any]) -> set[str]:
    """Scalars and vectors are left out: they are summed in either type, and some all-reduces of vectors are gathers."""
    reduced = [report["collectives"].get(kind, {"arrays": []}) for kind in ("all-reduce", "reduce-scatter")]
    return {array.partition("[")[0] for sums in reduced for array in sums["arrays"] if "," in array}


def test_answering(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    report = json.loads(
        run(["--topology", "v5e:2x2", "--mode", "generate", *SIZES, "--json", "-"], monkeypatch, capsys)
    )
    assert report["fits"] and report["mode"] == "generate" and report["estimated_decode_seconds_per_token"] > 0


def test_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments = ["--topology", "v5e:4x4", "--mode", "load", "--preset", "8b"]
    report = json.loads(run([*arguments, "--json", "-"], monkeypatch, capsys))
    assert report["fits"] and report["hbm_bytes_per_chip"] == pytest.approx(2 * report["parameters"] / 16, rel=0.01)
    # A v5e:4x4 has four hosts.
    assert report["host_bytes"] == 4 * report["hbm_bytes_per_chip"]
    assert "pass through a host" in run(arguments, monkeypatch, capsys)


def test_an_adapter_leaves_the_base_frozen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """And where it is int8, chips send each other int8."""
    lora = ["--recipe", "finetune_lora", "--lora.rank", "4", "--lora.int8", "language_model.layers.*_proj"]
    report = json.loads(run(["--topology", "v5e:2x2", *lora, *SIZES, "--json", "-"], monkeypatch, capsys))
    parts = report["hbm_bytes_by_kind"]
    assert parts["optimizer"] < parts["parameters"] and parts["gradients"] < parts["parameters"] / 2
    gathered = report["collectives"]["all-gather"]["arrays"]
    mlp = {array for array in gathered if array.endswith(("[1,48,96]", "[1,96,48]"))}  # the kernels of the tiny model's
    assert mlp == {"s8[1,48,96]", "s8[1,96,48]"}


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_a_batch_that_chips_can_t_share_is_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = ["--preset", "tiny", "--batch-size", "6", "--tokens", "256"]
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", "--topology", "v5e:2x2", "--mode", mode, *sizes])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "can't be cut over 4 data-parallel devices: make data.batch_size a multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["generate", "load"])
def test_int8_is_for_training(mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    lora = ["--recipe", "finetune_lora", "--lora.int8", "language_model.layers.*_proj", "--preset", "tiny"]
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", "--topology", "v5e:2x2", "--mode", mode, *lora])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"lora.int8 is for training: give --int8 for --mode {mode}" in capsys.readouterr().err


def test_two_slices_hold_a_replica_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments = ["--topology", "v5litepod-4", "--slices", "2", *SIZES, "--json", "-"]
    report = json.loads(run(arguments, monkeypatch, capsys))
    assert report["topology"] == "v5e:2x2" and report["chips"] == 8
    assert report["mesh"] == {"replica": 2, "fsdp": 4, "tensor": 1}
    # Each chip sends the gradients of its part of the parameters to the other slice, once, in bfloat16 or float32.
    gradients = report["parameters"] / 4
    sent = report["collectives"]["all-reduce between slices"]["sent_bytes_per_chip"]
    assert 2 * gradients < sent < 1.2 * 4 * gradients
    assert report["estimated_seconds_between_slices"] == pytest.approx(sent / 3.125e9)
    assert report["estimated_communication_seconds"] > report["estimated_seconds_between_slices"]
    assert "v5e:2x2 (v5litepod-4), 8 chips" in plan.plan_table(report) and "between slices" in plan.plan_table(report)
    with pytest.raises(MossAudioError, match="replica=1 does not fit 2 TPU slices"):
        make_mesh(devices=topology_devices("v5e:2x2", 2))


def test_axes_may_be_parts_of_a_torus():
    devices = topology_devices("v5p:4x4x4")
    assert make_mesh(tensor=2, devices=devices).shape == {"replica": 1, "fsdp": 32, "tensor": 2}
    assert make_mesh(replica=8, tensor=4, devices=devices).shape == {"replica": 8, "fsdp": 2, "tensor": 4}


def test_unknown_topologies_are_refused():
    with pytest.raises(MossAudioError, match="--topology must name a TPU and its shape, such as v5e:2x4"):
        topology_devices("v9:2x2")
    assert len(topology_devices("v6e-8")) == 8 and len(topology_devices("v5p-64")) == 32
    assert len(topology_devices("v4-16")) == 8  # a chip of two cores is one device


@pytest.mark.parametrize(
    ("topology", "rings"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:1x1", (False, False, False)),
        ("v9:4x4x4", (False, False, False)),
    ],
)
def test_a_slice_is_compiled_for_with_its_rings(topology, rings, monkeypatch):
    given = {}

    def described(**options) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(devices=[])

    monkeypatch.setattr(topologies, "get_topology_desc", described)
    topology_devices(topology)
    assert given["wrap"] == rings


def small_step(**changes) -> dict:
    """The report of a step of the 8B's LoRA on eight v5e chips, as if it had been compiled."""
    recipe = RECIPES["finetune_lora"]
    config = plan.with_sizes(recipe, "8b", slices=1, batch=8, tokens=4096, chunks=None)
    mesh = make_mesh(devices=topology_devices("v5e:2x4"))
    compiled = Compiled(None, 10, 0, 0, (), (), 0.0)
    return plan.report_step(config, mesh, compiled, **changes)


def test_packed_clips_are_fewer_model_flops_of_the_same_step():
    whole, packed = small_step(), small_step(segments=4)
    parts = {name: packed["model_flops_by_part"][name] / flops for name, flops in whole["model_flops_by_part"].items()}
    assert parts.pop("llm_attention") == 0.25 and set(parts.values()) == {1.0}
    assert packed["estimated_step_seconds"] == whole["estimated_step_seconds"]
    assert packed["estimated_mfu"] / whole["estimated_mfu"] == pytest.approx(
        packed["model_flops"] / whole["model_flops"]
    )
    assert "4096 tokens in 4 segments" in plan.plan_table(packed | {"topology": "v5e:2x4", "chips": 8})


def test_a_batch_is_proposed_by_what_the_second_takes_more():
    asked: list[int] = []

    def compiled(limit: int, per_sequence: int = 3):
        def compiles(batch: int) -> int | None:
            asked.append(batch)
            used = 100 + per_sequence * batch
            return used if used <= limit else None

        return compiles

    config = plan.with_sizes(RECIPES["finetune"], "8b", slices=1, batch=8, tokens=None, chunks=None)
    assert plan.largest_batch(config, 124, 500, compiled(500)) == 128 and asked == [16, 128]
    assert plan.largest_batch(config, 124, 140, compiled(140)) == 8  # twice as many don't fit
    asked.clear()
    assert plan.largest_batch(config, 124, 500, compiled(300)) == 64 and asked == [
        16,
        128,
        64,
    ]  # they take more than that
    asked.clear()
    assert plan.largest_batch(config, 124, 150, compiled(150)) == 16 and asked == [16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--segments", "0"], "--segments must be from 1 to the 256 tokens of a sequence, not 0"),
        (["--mode", "load", "--propose-batch"], "are for training: leave them out of --mode load"),
        (["--kv-int8"], "--kv-int8 is for --mode serve: leave it out of --mode train"),
        (["--int8", "language_model.*"], "frozen kernels of training become int8 by --lora.int8"),
        (["--topology", "v6e-12"], "rents by, such as v6e-16, v6e-8, not 'v6e-12'"),
    ],
)
def test_mistakes_are_said_in_a_sentence(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", "--topology", "v5e:2x2", *SIZES, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_sizes_keep_the_recipe_s_chunks_to_its_tokens():
    recipe = RECIPES["pretrain_stage2"]
    longer = plan.with_sizes(recipe, "8b", slices=2, batch=24, tokens=2 * recipe.data.tokens, chunks=None)
    assert longer.data == dataclasses.replace(
        recipe.data, batch_size=24, tokens=2 * recipe.data.tokens, chunks=2 * recipe.data.chunks
    )
    assert longer.model.preset == "8b" and longer.mesh.replica == 2


def test_what_needs_less_memory_is_tried_gentlest_first():
    recipe = RECIPES["pretrain_stage2"]
    kept = dataclasses.replace(recipe, step=dataclasses.replace(recipe.step, remat="dots"))
    alternatives = dict(plan.alternatives(kept, chips=16))
    assert list(alternatives) == [
        "--step.remat full",
        "--step.remat full --microbatches 2",
        "--step.remat full --microbatches 4",
        "--step.remat full --batch-size 32",
        "--step.remat full --batch-size 16",
        "--step.remat offload --microbatches 4",
        "--step.remat full --microbatches 4 --mesh.tensor 2",
        "--step.remat full --microbatches 4 --mesh.tensor 4",
    ]
    uneven = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=24))
    assert next(plan.alternatives(uneven, chips=8))[0] == "--step.remat offload"  # 12 can't be cut over 8 chips
    offloading = dataclasses.replace(recipe, step=dataclasses.replace(recipe.step, remat="offload"))
    found = [options for options, _ in plan.alternatives(offloading, chips=16)]
    assert found[0] == "--microbatches 2" and "--step.remat" not in " ".join(found)
    smaller = alternatives["--step.remat full --batch-size 16"]
    assert smaller.data.batch_size == 16 and smaller.microbatches == 1
    for options, config in alternatives.items():  # and they say what they are
        said = dict(zip(*[iter(options.split())] * 2, strict=True))
        assert (config.step.remat, str(config.microbatches), str(config.mesh.tensor)) == tuple(
            said.get(name, "1") for name in ("--step.remat", "--microbatches", "--mesh.tensor")
        )


def test_the_largest_buffers_of_xla_s_report():
    report = """Memory Space: default (color=0)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
    2.34GiB(  5%);    2.34GiB;   4581834752;                2; 2×bf16[3,64,800,8192]
    2.84GiB( 10%);  512.00MiB;   7098417152;                1; f32[8,8192,512,4]
"""
    assert largest_buffers(report) == (
        (int(2.34 * 2**30), "2×bf16[3,64,800,8192]"),
        (512 * 2**20, "f32[8,8192,512,4]"),
    )


def test_a_run_s_own_evaluation_is_counted():
    """A larger batch needs more; where that is too much, the batch that fits is named."""
    validation = ValidationConfig(every=10, batch_size=3, max_new_tokens=16, count=8)
    recipe = dataclasses.replace(RECIPES["pretrain_stage2"], validation=validation)
    config = plan.with_sizes(recipe, "tiny", slices=1, batch=8, tokens=256, chunks=None)
    larger = dataclasses.replace(config, validation=dataclasses.replace(validation, batch_size=8))
    devices = topology_devices("v5e:2x2")
    step = {"hbm_bytes_by_kind": {"code": 0}, "hbm_usable_bytes_per_chip": 2**30}
    found = plan_evaluation.plan_evaluation(config, devices, step)
    assert found["fits"] and (found["prompts"], found["sequences"], found["new_tokens"]) == (4, 4, 16)
    state = plan.planned_state(config, make_mesh(devices=devices))
    assert min(found["hbm_bytes_by_program"].values()) > plan.bytes_on_chip(state) * 7 / 6  # copies in bfloat16

    step["hbm_usable_bytes_per_chip"] = found["hbm_bytes_per_chip"]
    too_large = plan_evaluation.plan_evaluation(larger, devices, step)
    assert (too_large["fits"], too_large["prompts"], too_large["would_fit"]) == (False, 8, "--validation.batch-size 4")
    assert too_large["hbm_bytes_per_chip"] > found["hbm_bytes_per_chip"]


def test_an_evaluation_that_does_not_fit_fails_the_plan(monkeypatch: pytest.MonkeyPatch, capsys):
    found = {"fits": False, "hbm_bytes_per_chip": 2**34, "hbm_usable_bytes_per_chip": 2**33, "would_fit": None}
    found |= {"hbm_bytes_by_program": {"decode": 2**34}, "prompts": 8, "prompt_tokens": 96, "prompt_chunks": 1}
    monkeypatch.setattr(plan, "plan_step", lambda *_: small_step())
    monkeypatch.setattr(plan_evaluation, "plan_evaluation", lambda *_: found | {"new_tokens": 16})
    monkeypatch.setattr("sys.argv", ["moss-audio-train", "plan", "--topology", "v5e:2x4", "--validation.every", "10"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "its evaluation DOES NOT FIT: 16.00 of 8.00 GiB (decode 16.00); 8 questions" in out
    assert "leave --validation.every out" in out
