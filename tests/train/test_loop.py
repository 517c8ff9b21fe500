"""A run that was stopped, killed or damaged and started again ends where one that never stopped does, bit for bit."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert.average import average
from convert.check_checksums import check_checksums
from convert.to_hf import convert_to_hf
from moss_audio_jax import LoraConfig, MossAudioConfig, MossAudioError, load_model
from moss_audio_jax.errors import StorageError
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.sound import files
from moss_audio_jax.weights.parameters import parameters_of
from tests.conftest import SMALL_MODEL, change_one_bit
from tests.train.training_runs import (
    ENVIRONMENT,
    STEPS,
    assert_same_end,
    lines,
    one_device,
    restored,
    until,
)
from train.config import LoopConfig, ModelSource, RunConfig
from train.data.mixture_config import MixtureConfig
from train.loop import train
from train.recipes import RECIPES
from train.running.checkpoints import Checkpoints, _parts
from train.running.resume import write_or_check_config
from train.running.validation import Validation
from train.state import abstract_state


def test_a_run_leaves_checkpoints_metrics_and_its_configuration(straight: Path, config: RunConfig):
    with Checkpoints(straight) as checkpoints:
        assert checkpoints.steps == [4, 6]
    assert [line["step"] for line in lines(straight)] == list(range(1, STEPS + 1))
    for line in lines(straight):
        assert line["loss"] > 0 and line["tokens"] > 0 and line["step_seconds"] > line["data_wait"] > 0
        learned = {group: line[f"learned_tokens/{group}"] for group in ("speech", "text")}
        losses = {group: line[f"loss/{group}"] for group, tokens in learned.items() if tokens}
        assert sum(learned.values()) == line["tokens"]
        mean = sum(learned[group] * loss for group, loss in losses.items()) / line["tokens"]
        assert mean == pytest.approx(line["loss"], rel=1e-5)
        assert line["grad_norm/encoder"] > 0 and line["grad_norm/language_model"] < line["grad_norm"]
        assert line["grad_norm"] > 0 and line["learning_rate"] > 0 and line["skipped"] == 0
        assert 0 < line["token_fill"] <= 1 and 0 < line["chunk_fill"] <= 1 and line["unreadable"] == 0
    assert len({line["loss"] for line in lines(straight)}) == STEPS
    assert json.loads((straight / "config.json").read_text())["optimizer"]["total_steps"] == 20
    state, data = restored(straight, config)
    assert int(state.step) == data["batches"] == STEPS
    assert state.frozen["audio_encoder.stem_proj.kernel"].dtype == "bfloat16"
    first = parameters_of(load_model(str(config.model.checkpoint)))
    moved = [path for path, leaf in state.trainable.items() if not np.array_equal(leaf, first[path])]
    assert len(moved) > 0.9 * len(state.trainable)


def test_stopped_and_resumed_ends_with_the_same_bits(straight: Path, config: RunConfig, tmp_path: Path):
    out = tmp_path / "run"
    assert train(until(config, 3), out, mesh=one_device()).step == 3
    assert train(config, out, mesh=one_device()).step == STEPS
    assert_same_end(out, straight, config)


def test_resumed_from_a_checkpoint_made_while_training_went_on(copy: Path, straight: Path, config: RunConfig):
    """Its arrays were donated to the next step while it was written. Metrics past it are written again."""
    shutil.rmtree(copy / "checkpoints" / "6")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a kill leaves it
    assert train(config, copy, mesh=one_device()).step == STEPS
    assert_same_end(copy, straight, config)


def command(config: RunConfig, out: Path, **loop) -> list[str]:
    """The command line of a configuration."""
    options = {
        "recipe": "pretrain_stage2",
        "out": out,
        "steps": loop.get("steps", config.loop.steps),
        "checkpoint-every": loop.get("checkpoint_every", config.loop.checkpoint_every),
        "keep-last": 2,
        "log-every": 1,
        "model.checkpoint": config.model.checkpoint,
        "mixture.speech.paths": config.mixture.speech.paths[0],
        "mixture.text.paths": config.mixture.text.paths[0],
        "data.batch-size": 2,
        "data.tokens": 160,
        "data.chunks": 2,
        "data.open-bins": 2,
        "optimizer.learning-rate": 1e-3,
        "optimizer.warmup-steps": 2,
        "optimizer.total-steps": 20,
        "optimizer.freeze": config.optimizer.freeze[0],
        "step.remat": "none",
        "step.loss-chunk": 160,
        "microbatches": 2,
    }
    pairs = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "train", "run", *pairs]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Subprocesses compile once between them."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def wait_for_step(process: subprocess.Popen, step: int | None = None) -> None:
    """Until the process has reported this step, or any."""
    assert process.stderr is not None
    reports = (line for line in process.stderr if line.startswith("step " if step is None else f"step {step}/"))
    assert next(reports, None), "it ended too early"


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[[list[str]], subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    watchdogs: list[threading.Timer] = []

    def popen(arguments: list[str]) -> subprocess.Popen:
        processes.append(subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True))
        watchdogs.append(threading.Timer(240, processes[-1].kill))
        watchdogs[-1].start()
        return processes[-1]

    yield popen
    for watchdog in watchdogs:
        watchdog.cancel()
    for process in processes:
        process.kill()
        process.communicate()


def test_killed_and_preempted_ends_with_the_same_bits(config: RunConfig, tmp_path: Path, start):
    """SIGKILL at moments drawn, each perhaps with a checkpoint half written, and SIGTERM: three do the work of one.

    That one has its data made by other processes, which is another way to the same batches.
    """
    out, other = tmp_path / "run", tmp_path / "other"
    endless = command(config, out, steps=100_000, checkpoint_every=1)
    rng, step = np.random.default_rng(0), 0
    for _ in range(2):
        killed = start(endless)
        step += int(rng.integers(1, 4))
        wait_for_step(killed, step)
        threading.Event().wait(rng.uniform(0, 0.1))
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(60) == -signal.SIGKILL

    preempted = start(endless)
    wait_for_step(preempted)
    preempted.send_signal(signal.SIGTERM)
    assert preempted.wait(120) == 75
    reached = lines(out)[-1]["step"]
    assert [line["step"] for line in lines(out)] == list(range(1, reached + 1))

    unstopped = start([*command(config, other, steps=reached), "--workers", "2"])
    assert unstopped.wait(240) == 0
    assert_same_end(out, other, config)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_saves_and_a_second_one_ends_at_once(config: RunConfig, tmp_path: Path, start):
    out = tmp_path / "run"
    endless = command(config, out, steps=100_000, checkpoint_every=100_000)
    stopped = start(endless)
    wait_for_step(stopped)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(120) == 75
    assert stopped.stderr is not None and "is saved: run the same command to resume" in stopped.stderr.read()
    reached = lines(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(reached)]

    twice = start(endless)
    wait_for_step(twice)
    twice.send_signal(signal.SIGINT)
    threading.Event().wait(0.01)  # two at once are one
    twice.send_signal(signal.SIGINT)
    assert twice.wait(60) in (75, 130)  # it may have been quick enough
    rng = np.random.default_rng(0)
    for _ in range(3):  # while it imports, compiles or restores
        early = start(endless)
        threading.Event().wait(rng.uniform(0.5, 5))
        early.send_signal(signal.SIGINT)
        _, errors = early.communicate(timeout=60)
        assert early.returncode == 130 and "Traceback" not in errors, errors


def test_a_changed_bit_is_damage_and_a_checkpoint_without_checksums_is_not(copy: Path, config: RunConfig, capfd):
    checkpoints, whole = copy / "checkpoints", copy / "whole"
    shutil.copytree(checkpoints / "4", whole)
    recorded = json.loads((checkpoints / "6" / "checksums" / "metadata").read_text())["items"]
    (moment,) = [name for name in recorded["state"] if name.endswith("mu/language_model.norm.scale")]
    change_one_bit(checkpoints / "6" / "state", moment)
    change_one_bit(checkpoints / "4" / "params", "lm_head.kernel")
    with pytest.raises(
        MossAudioError, match=rf"none of .* 4, 6 can be read \(.*6/state is damaged, {moment} is float32"
    ):
        restored(copy, config)
    shutil.rmtree(checkpoints / "4")
    whole.rename(checkpoints / "4")
    shutil.rmtree(checkpoints / "4" / "checksums")
    assert int(restored(copy, config)[0].step) == 4
    assert "checkpoint 6 can't be read, 4 is restored instead" in capfd.readouterr().err
    assert f"{moment} is float32" in (copy / "damaged_checkpoints" / "6.txt").read_text()


def test_a_frozen_parameter_is_checked_as_it_is_stored_and_then_cast(copy: Path, config: RunConfig):
    """It was stored in bfloat16, the type that steps computed in."""
    state, _ = restored(copy, config)
    target = abstract_state(SMALL_MODEL, config.optimizer, mesh=one_device())
    with Checkpoints(copy) as checkpoints:
        found = checkpoints.restore(target)
    assert found is not None
    (path,) = [path for path in state.frozen if path.endswith("kernel")]
    assert state.frozen[path].dtype == "bfloat16" and found[0].frozen[path].dtype == "float32"
    np.testing.assert_array_equal(found[0].frozen[path], state.frozen[path].astype("float32"))


def test_a_checkpoint_older_than_a_part_of_the_state(
    copy: Path, straight: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    """The run resumes from it: what it lacks starts at 0."""
    shutil.rmtree(copy / "checkpoints" / "6")
    state, data = restored(copy, config)
    shutil.rmtree(copy / "checkpoints" / "4")
    parameters, rest = _parts(state)
    older = {name: leaf for name, leaf in rest.items() if name not in ("phase", "spikes_in_a_row")}
    assert len(older) == len(rest) - 2
    with monkeypatch.context() as patch, Checkpoints(copy) as checkpoints:
        patch.setattr("train.running.checkpoints._parts", lambda _: (parameters, older))
        checkpoints.save(4, state, data)
    assert train(config, copy, mesh=one_device()).step == STEPS
    assert not (copy / "damaged_checkpoints").exists()
    assert_same_end(copy, straight, config)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_resume_to_the_same_bits(name, config: RunConfig, tmp_path: Path):
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name, ema_decay=0.5))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(until(config, 4), whole, mesh=one_device())
    train(until(config, 2), parts, mesh=one_device())
    train(until(config, 4), parts, mesh=one_device())
    assert restored(whole, config)[0].ema is not None
    assert_same_end(parts, whole, config)


def test_moving_averages_are_evaluated_saved_and_loaded(
    config: RunConfig, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, asked = tmp_path / "run", {}
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.9))
    monkeypatch.setattr(Validation, "is_due", lambda validation, step: step == 2)
    monkeypatch.setattr(Validation, "ask", lambda validation, step, found: (asked.update(host(found)), ({}, []))[1])
    train(until(config, 2), out, mesh=one_device())
    state = restored(out, config)[0]
    assert state.ema is not None and state.frozen
    assert any(not np.array_equal(leaf, state.ema[path]) for path, leaf in state.trainable.items())
    averages, parameters = state.ema | state.frozen, state.trainable | state.frozen
    convert_to_hf(out / "ema", tmp_path / "hf")
    for path, expected in ((out, parameters), (out / "ema", averages), (tmp_path / "hf", averages)):
        assert_same_arrays(parameters_of(load_model(path, dtype="float32")), expected)
    checkpoint = out / "checkpoints" / "2"
    assert_same_arrays(parameters_of(load_model(checkpoint / "ema", dtype="float32", verify=True)), averages)
    assert_same_arrays(asked, averages)
    begun_without = restored(straight, config)[0]
    assert begun_without.ema is not None
    assert_same_arrays(begun_without.ema, begun_without.trainable)
    with pytest.raises(MossAudioError, match=r"holds no moving averages.*--optimizer.ema-decay"):
        load_model(straight / "ema")
    report = check_checksums(out)
    assert report is not None and report.sound > 4 * len(state.ema) and not report.damaged
    change_one_bit(checkpoint / "ema", "language_model.norm.scale")
    report = check_checksums(out)
    assert report is not None and "ema: language_model.norm.scale is" in report.damaged[0]
    with pytest.raises(MossAudioError, match=r"2/ema is damaged, language_model.norm.scale is"):
        load_model(out / "ema", verify=True)


def host(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {path: np.array(array) for path, array in arrays.items()}


def assert_same_arrays(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path], np.float32), np.asarray(array, np.float32), err_msg=path)


def test_checkpoints_are_averaged(straight: Path, copy: Path, tmp_path: Path):
    assert average(straight, tmp_path / "last", last=2) == [4, 6]
    assert average(straight, tmp_path / "steps", steps=(6, 4)) == [4, 6]
    both = [parameters_of(load_model(straight / "checkpoints" / step, dtype="float32")) for step in ("4", "6")]
    mean = {path: (np.asarray(array) + np.asarray(both[1][path])) / 2 for path, array in both[0].items()}
    for out in ("last", "steps"):
        assert_same_arrays(parameters_of(load_model(tmp_path / out, dtype="float32")), mean)
    for options, message in (
        ({"steps": (4, 5)}, r"no checkpoint of step 5: name some of those it has \(4, 6\)"),
        ({"last": 3}, r"fewer checkpoints than --last 3.*\(4, 6\), or keep more"),
        ({"steps": (6,)}, "at least 2"),
        ({}, "--last N or --steps A B"),
    ):
        with pytest.raises(MossAudioError, match=message):
            average(straight, tmp_path / "other", **options)
    (copy / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(MossAudioError, match="LoRA adapter, whose factors have no meaningful mean"):
        average(copy, tmp_path / "other", last=2)
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_put_aside(copy: Path, straight: Path, config: RunConfig, capfd):
    for file in (copy / "checkpoints" / "6").rglob("*"):
        if file.is_file() and "params" in file.parts and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    assert train(config, copy, mesh=one_device()).step == STEPS
    assert "checkpoint 6 can't be read, 4 is restored instead" in capfd.readouterr().err
    assert (copy / "damaged_checkpoints" / "6").is_dir()
    assert_same_end(copy, straight, config)


def test_a_disk_that_fails_for_a_moment_changes_nothing(
    straight: Path, config: RunConfig, tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
):
    """Half of all openings of audio fail: no example is skipped for it."""
    chance, opened = random.Random(0), files.open_binary
    failed = 0

    def open_binary(path: str):
        nonlocal failed
        if chance.random() < 0.5:
            failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opened(path)

    monkeypatch.setenv("MOSS_AUDIO_STORAGE_ATTEMPTS", "20")
    monkeypatch.setattr(files, "open_binary", open_binary)
    assert train(config, tmp_path / "run", mesh=one_device()).step == STEPS
    assert failed > 5
    assert_same_end(tmp_path / "run", straight, config)


def test_a_disk_that_stays_away_ends_the_run_to_be_tried_again(
    config: RunConfig, tmp_path: Path, hasty: None, monkeypatch
):
    def open_binary(path: str):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(files, "open_binary", open_binary)
    with pytest.raises(StorageError, match=r"\.wav: storage failed in each of 6 attempts \(.*Stale file handle"):
        train(config, tmp_path / "run", mesh=one_device())


def failing_once(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, *, always: bool = False) -> list[int]:
    """Makes a method of Orbax's manager fail; returns the steps it was called for."""
    works, steps = getattr(ocp.CheckpointManager, method), []

    def fails(self, step: int, *arguments, **options):
        steps.append(step)
        if always or len(steps) == 1:
            raise error
        return works(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, method, fails)
    return steps


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), ValueError("UNAVAILABLE: HTTP response code: 503")]
)
def test_a_checkpoint_is_read_again_before_it_is_thought_damaged(
    error: Exception, copy: Path, config: RunConfig, hasty: None, monkeypatch: pytest.MonkeyPatch
):
    steps = failing_once(monkeypatch, "restore", error)
    assert int(restored(copy, config)[0].step) == STEPS
    assert steps == [6, 6] and not (copy / "damaged_checkpoints").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MOSS_AUDIO_STORAGE_BACKOFF", "0")
    failing_once(monkeypatch, "restore", error, always=True)
    with pytest.raises(StorageError, match="checkpoints: storage failed in each of 6 attempts"):
        restored(copy, config)
    assert (copy / "checkpoints" / "6").is_dir() and not (copy / "damaged_checkpoints").exists()


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("PERMISSION_DENIED: Error reading"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        ValueError("Requested shape: (2,) is not compatible with the stored shape: (3,)"),
    ],
)
def test_what_proves_no_damage_leaves_a_checkpoint_where_it_is(
    error: Exception, copy: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    failing_once(monkeypatch, "restore", error, always=True)
    with pytest.raises(MossAudioError, match="checkpoint 6 can't be restored, and not because it is damaged"):
        restored(copy, config)
    assert (copy / "checkpoints" / "6").is_dir() and not (copy / "damaged_checkpoints").exists()


def test_what_is_whole_when_read_again_is_not_damaged(copy: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """As a file system does whose listing is behind."""
    failing_once(monkeypatch, "restore", FileNotFoundError(errno.ENOENT, "No such file", "manifest.ocdbt"))
    assert int(restored(copy, config)[0].step) == STEPS
    assert not (copy / "damaged_checkpoints").exists()


@pytest.mark.parametrize("failing", [2, 4, 6])
def test_a_checkpoint_that_storage_fails_to_take_is_written_again(
    failing: int, straight: Path, config: RunConfig, tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
):
    """In the background, where the arrays are gone already but for the last: the next one is in its place then."""
    finalize, failed = ocp.CheckpointManager._finalize_checkpoint, []

    def fails(self, step: int):
        if step == failing and not failed:
            failed.append(step)
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return finalize(self, step)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", fails)
    assert train(config, tmp_path / "run", mesh=one_device()).step == STEPS
    assert failed == [failing]
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps == [step for step in (2, 4, 6) if step != failing or step == 6][-2:]
    assert_same_end(tmp_path / "run", straight, config)


def test_a_full_disk_stops_the_run_which_then_goes_on(copy: Path, straight: Path, config: RunConfig, start):
    """Files that can't grow beyond 20 kB stand in for a disk without room."""
    shutil.rmtree(copy / "checkpoints" / "6")
    limited = start(["sh", "-c", 'ulimit -f 40; exec "$@"', "sh", *command(config, copy)])
    _, errors = limited.communicate(timeout=240)
    assert limited.returncode == 2 and "a checkpoint can't be written" in errors
    assert train(config, copy, mesh=one_device()).step == STEPS
    assert_same_end(copy, straight, config)


def test_restores_on_more_devices(straight: Path, config: RunConfig):
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    state, _ = restored(straight, config, mesh)
    expected, _ = restored(straight, config)
    kernel = state.trainable["language_model.layers.mlp.up_proj.kernel"]
    assert kernel.sharding.mesh == mesh and kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.alone
def test_runs_on_a_mesh_and_goes_on_with_one_device(config: RunConfig, tmp_path: Path):
    """Parameters cut over two axes, rows over one. Sums in another order move the curve in its last digits only."""
    wide = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=4),
        step=dataclasses.replace(config.step, compute_dtype="float32"),
    )
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    assert train(until(wide, 4), tmp_path / "mesh", mesh=mesh).step == 4
    assert train(wide, tmp_path / "mesh", mesh=one_device()).step == STEPS
    assert train(wide, tmp_path / "one", mesh=one_device()).step == STEPS
    for name, tolerance in (("loss", 2e-5), ("grad_norm", 2e-3), ("tokens", 0)):
        curves = [[line[name] for line in lines(tmp_path / run)] for run in ("mesh", "one")]
        np.testing.assert_allclose(*curves, rtol=tolerance, err_msg=name)


def test_a_batch_that_devices_can_t_share_is_refused(config: RunConfig, tmp_path: Path):
    devices = jax.devices()[:8]
    with pytest.raises(MossAudioError, match=f"of {config.data.batch_size} sequences.*over 8 data-parallel devices"):
        train(config, tmp_path, mesh=make_mesh(devices=devices))


def test_another_configuration_is_refused(config: RunConfig, tmp_path: Path):
    write_or_check_config(config, tmp_path, begun=False)
    write_or_check_config(until(config, 50, workers=2), tmp_path, begun=True)  # continues beyond its end
    changed = dataclasses.replace(config, seed=1, optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-3))
    with pytest.raises(MossAudioError, match=r"optimizer.learning_rate is 0.002 and was 0.001; seed is 1 and was 0"):
        write_or_check_config(changed, tmp_path, begun=True)
    write_or_check_config(changed, tmp_path, begun=False)


def test_an_option_that_is_newer_than_the_run(config: RunConfig, tmp_path: Path):
    config = dataclasses.replace(config, lora=LoraConfig())
    write_or_check_config(config, tmp_path, begun=False)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    del written["lora"]["int8"]
    file.write_text(json.dumps(written))
    changed = dataclasses.replace(config, lora=LoraConfig(int8=("language_model.layers.*_proj",)))
    with pytest.raises(MossAudioError, match=r"lora.int8 is .*_proj.* and was None"):
        write_or_check_config(changed, tmp_path, begun=True)
    write_or_check_config(config, tmp_path, begun=True)  # off, as it was
    del written["step"]["spike_patience"], written["optimizer"]["name"]
    file.write_text(json.dumps(written))
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    with pytest.raises(MossAudioError, match=r"optimizer.name is 'muon' and was None"):
        write_or_check_config(changed, tmp_path, begun=True)
    write_or_check_config(config, tmp_path, begun=True)  # at their defaults


def test_gives_up_after_skipped_steps_in_a_row(copy: Path, config: RunConfig):
    """A loss that is not finite is skipped; here the last checkpoint's parameters have gone bad."""
    target = abstract_state(SMALL_MODEL, config.optimizer, frozen_dtypes={"audio_encoder.stem_proj.kernel": "bfloat16"})
    with Checkpoints(copy) as checkpoints:
        found = checkpoints.restore(target)
        assert found is not None
        state, data = found
        scale = state.trainable["language_model.norm.scale"]
        bad = dataclasses.replace(state, trainable=state.trainable | {"language_model.norm.scale": scale * np.nan})
        checkpoints.save(7, bad, data)
    with pytest.raises(MossAudioError, match="2 steps in a row were skipped"):
        train(until(config, 20, max_skipped_in_a_row=2), copy, mesh=one_device())
    assert [line["skipped"] for line in lines(copy)[-2:]] == [1, 1] and lines(copy)[-1]["loss"] is None


def test_recipes_train_the_parts_they_say():
    stage1, stage2 = RECIPES["pretrain_stage1"], RECIPES["pretrain_stage2"]
    state = abstract_state(MossAudioConfig.preset("tiny"), stage1.optimizer)
    assert {path.partition(".")[0] for path in state.trainable} == {"audio_adapter", "deepstack_audio_merger_list"}
    assert not abstract_state(MossAudioConfig.preset("tiny"), stage2.optimizer).frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--optimizer.learning-rat", "1"), "learning-rat"), (("--model.checkpoint", "nowhere"), "nowhere")],
)
def test_mistakes_on_the_command_line_are_refused(tmp_path: Path, options: tuple[str, ...], message: str):
    arguments = [sys.executable, "-m", "train", "run", "--recipe", "pretrain_stage1", "--out", str(tmp_path / "run")]
    result = subprocess.run([*arguments, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_values_are_checked(config: RunConfig):
    with pytest.raises(MossAudioError, match="steps must be 1 or more, not 0"):
        LoopConfig(steps=0)
    with pytest.raises(MossAudioError, match="4b, 8b, small, deep, tiny, not '5b'"):
        ModelSource(preset="5b")
    with pytest.raises(MossAudioError, match="microbatches must divide the batch of 2 sequences, not 3"):
        dataclasses.replace(config, microbatches=3)
    with pytest.raises(MossAudioError, match="nothing to train on"):
        MixtureConfig().groups(seed=0)


def test_a_run_of_epochs_reads_each_example_as_often_and_resumes_to_the_same_bits(config: RunConfig, tmp_path: Path):
    """The schedule ends with the data; nothing is lost where the run was stopped, here within the second epoch."""
    texts = dataclasses.replace(config.mixture.text, paths=())
    config = dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, text=texts))
    epochs = until(config, None, epochs=3, checkpoint_every=2)
    whole = train(epochs, tmp_path / "whole", mesh=one_device())
    assert not whole.preempted
    stopped = train(
        dataclasses.replace(epochs, loop=dataclasses.replace(epochs.loop, steps=4)),
        tmp_path / "other",
        mesh=one_device(),
    )
    assert stopped.step == 4 < whole.step
    assert train(epochs, tmp_path / "other", mesh=one_device()).step == whole.step
    assert_same_end(tmp_path / "other", tmp_path / "whole", config)
    found = lines(tmp_path / "whole")
    assert sum(line["examples"] for line in found) == 3 * 12
    assert found[-1]["epoch"] == 3 and found[-1]["read"] == 36
    assert [line["epoch"] for line in found] == sorted(line["epoch"] for line in found)
    assert found[-1]["audio_hours"] == pytest.approx(sum(line["audio_seconds"] for line in found) / 3600)
    rates = [line["learning_rate"] for line in found]
    assert rates[-1] == pytest.approx(0.1 * max(rates), rel=0.2)  # final_fraction
    assert train(epochs, tmp_path / "whole", mesh=one_device()).step == whole.step  # has nothing left to do
