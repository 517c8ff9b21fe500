"""A run by reward: what it writes, that it resumes bit for bit, and that several processes have its curve."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

from moss_audio_jax import MossAudioError
from moss_audio_jax.config import LoraConfig
from moss_audio_jax.inference.requests import Handle
from moss_audio_jax.sampling_config import Sampling
from tests.train.training_runs import one_device
from train.config import LoopConfig, ModelSource, OptimizerConfig, StepConfig, ValidationConfig
from train.data.config import DataConfig, SceneConfig
from train.reinforce.config import ObjectiveConfig, QuestionsConfig, ReinforceConfig, RolloutConfig
from train.reinforce.loop import reinforce
from train.running.beginning import saved_part
from train.running.between_steps import Outcome
from train.running.checkpoints import Checkpoints
from train.running.config import ResumeConfig
from train.state import TrainState, abstract_state

# A random model writes no answer that is right: any difference of answers is a reward.
REWARDS = """
from benchmarks.reinforce_proof import exchanged

def bytes_of(question, answer):
    return sum(answer.text.encode("utf-8", "replace")) % 7 / 7

def fails_later(question, answer):
    fails_later.calls += 1
    if fails_later.calls > 2 * 3 * 4:
        raise ValueError("no judge")
    return bytes_of(question, answer)

fails_later.calls = 0

def share_of_ascii(question, answer):
    text = answer.text
    return sum(character.isascii() for character in text) / max(len(text), 1)

def shuffled(questions, answers):
    return exchanged(share_of_ascii, questions, answers)

shuffled.batched = True
"""
STEPS = 3


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ReinforceConfig:
    rewards = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    rewards.write_text(REWARDS)
    return ReinforceConfig(
        data=DataConfig(batch_size=2, tokens=256, chunks=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, total_steps=20),
        loop=LoopConfig(steps=STEPS, checkpoint_every=2, log_every=1),
        validation=ValidationConfig(every=2, count=2, max_new_tokens=4, batch_size=2),
        model=ModelSource(checkpoint=str(corpus / "model")),
        step=StepConfig(compute_dtype="float32", remat="none", loss_chunk=256, spike_sigma=0),
        questions=QuestionsConfig(scenes=50, scene=SceneConfig(seconds=(2, 2), tasks=("start",))),
        rollout=RolloutConfig(
            prompts=3, samples=4, max_new_tokens=6, slots=8, length=128, sampling=Sampling(0.8), overlong=2
        ),
        rewards=(f"{rewards}:bytes_of", "overlong=0.1"),
        objective=ObjectiveConfig(minibatches=2, kl=0.01),
    )


@pytest.fixture(scope="module")
def straight(config: ReinforceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert reinforce(config, out, mesh=one_device()) == Outcome(STEPS, preempted=False)
    return out


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def end_of(out: Path, config: ReinforceConfig) -> tuple[TrainState, dict]:
    model = dataclasses.replace(config, model=ModelSource(checkpoint=str(out))).model_config()
    with Checkpoints(out, read_only=True) as checkpoints:
        found = checkpoints.restore(saved_part(abstract_state(model, config.optimizer, mesh=one_device()), model))
    assert found is not None
    return found


def test_a_run_tells_what_was_drawn_and_learned(straight: Path, config: ReinforceConfig):
    found = lines(straight)
    assert [line["step"] for line in found] == [1, 2, 3]
    for line in found:
        assert 0 < line["reward"] < 1 and line["groups_kept"] > 0 and line["groups_trained"] <= 3
        assert np.isfinite([line[name] for name in ("loss", "grad_norm", "entropy", "kl")]).all()
        assert line["answer_tokens"] <= line["longest_answer"] <= 6
        # Answers that are packed have the log-probabilities that the engine drew them with, one by one.
        assert line["rollout_gap"] < 1e-4 and line["rollout_ratio"] == pytest.approx(1, abs=1e-4)
    assert 0 <= found[0]["kl"] < found[-1]["kl"]
    groups = lines(straight, "rollouts.jsonl")
    assert len(groups) == 2 * STEPS and all(len(group["answers"]) == 4 for group in groups)
    for group in groups:
        total = np.sum([found for found in group["rewards"].values()] * np.array([[1], [0.1]]), axis=0)
        np.testing.assert_allclose(group["reward"], total)
    assert [line["step"] for line in lines(straight, "scores.jsonl")] == [2, 3]


def test_the_curves_of_a_run_have_its_rewards(straight: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from train.running import curves

    shown = curves._draw([curves.read_curves(straight, "by reward")])
    labels = [axes.get_ylabel() for axes in shown.axes]
    assert labels[2:6] == ["reward", "groups kept", "tokens of an answer", "entropy"] and "eval/loss" in labels


def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(straight: Path, config: ReinforceConfig, tmp_path: Path):
    """After the first step, of which there is no regular checkpoint."""
    out = tmp_path / "run"
    first = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=1))
    assert reinforce(first, out, mesh=one_device()).step == 1
    assert reinforce(config, out, mesh=one_device()).step == STEPS
    (state, place), (expected, expected_place) = end_of(out, config), end_of(straight, config)
    assert place == expected_place
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    drawn = [line for line in lines(out, "rollouts.jsonl") if line["step"] == STEPS]
    assert drawn == [line for line in lines(straight, "rollouts.jsonl") if line["step"] == STEPS]


def test_a_signal_while_answers_are_drawn_drops_them(
    straight: Path, config: ReinforceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run ends after the last whole step. Started again it draws the same answers, and ends with the same bits."""
    out, calls = tmp_path / "run", []
    result = Handle.result

    def interrupted(handle: Handle, timeout: float | None = None) -> Any:
        calls.append(handle)
        if len(calls) > config.rollout.prompts:  # in the second step at the latest
            os.kill(os.getpid(), signal.SIGTERM)
            raise TimeoutError
        return result(handle, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(Handle, "result", interrupted)
        outcome = reinforce(config, out, mesh=one_device())
    assert outcome.preempted and outcome.step < 2
    assert reinforce(config, out, mesh=one_device()) == Outcome(STEPS, preempted=False)
    jax.tree.map(np.testing.assert_array_equal, end_of(out, config)[0], end_of(straight, config)[0])
    assert lines(out, "rollouts.jsonl") == lines(straight, "rollouts.jsonl")


def test_an_adapter_alone_is_trained(config: ReinforceConfig, tmp_path: Path):
    """And the answers are those of the model with its adapter: the trainer finds the probabilities they have."""
    adapted = dataclasses.replace(config, lora=LoraConfig(rank=4, alpha=64.0))
    assert reinforce(adapted, tmp_path, mesh=one_device()).step == STEPS
    found = lines(tmp_path)
    assert all(line["rollout_gap"] < 1e-4 for line in found) and 0 <= found[0]["kl"] < found[-1]["kl"]
    state, _ = end_of(tmp_path, adapted)
    assert state.trainable and all("lora" in path for path in state.trainable)
    assert any(np.asarray(value).any() for path, value in state.trainable.items() if path.endswith("lora_b"))


def test_questions_that_cannot_be_asked_are_left_out(config: ReinforceConfig, tmp_path: Path, caplog: Any):
    """One whose audio can't be read, and one that is too long; of these alone nothing is left to ask."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "good.wav", np.full(16000, 0.1), 16000)
    soundfile.write(tmp_path / "long.wav", np.full(40 * 16000, 0.1), 16000)
    names = ("broken", "good", "long")
    manifest = tmp_path / "questions.jsonl"
    manifest.write_text("\n".join(json.dumps({"audio": f"{name}.wav", "text": "Hello."}) for name in names))
    asking = dataclasses.replace(
        config,
        questions=QuestionsConfig(data=(str(manifest),)),
        validation=ValidationConfig(),
        loop=LoopConfig(steps=1),
        rollout=dataclasses.replace(config.rollout, prompts=2),
    )
    reinforce(asking, tmp_path / "run", mesh=one_device())
    (line,) = lines(tmp_path / "run")
    assert line["groups"] >= 2 and line["unreadable"] >= 1 and line["too_long"] >= 1
    assert "skipped (unreadable)" in caplog.text and "broken.wav" in caplog.text
    assert "raise --data.tokens, --rollout.length or --data.chunks" in caplog.text
    manifest.write_text(json.dumps({"audio": "broken.wav", "text": "Hello."}))
    with pytest.raises(MossAudioError, match=r"none of 1 questions in a row could be used; the last: .*broken\.wav"):
        reinforce(asking, tmp_path / "nothing", mesh=one_device())


def test_rewards_rise_and_shuffled_ones_do_not(config: ReinforceConfig, tmp_path: Path):
    """The control gets the same updates: only which answer a reward belongs to is lost."""
    steps, rise = 15, {}
    for name in ("share_of_ascii", "shuffled"):
        reward = config.rewards[0].replace("bytes_of", name)
        learning = dataclasses.replace(
            config,
            rewards=(reward,),
            loop=LoopConfig(steps=steps, checkpoint_every=steps, log_every=steps),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, total_steps=steps, weight_decay=0.0),
            validation=ValidationConfig(),
            rollout=dataclasses.replace(config.rollout, prompts=4, samples=8, slots=32),
            objective=ObjectiveConfig(),
        )
        reinforce(learning, tmp_path / name, mesh=one_device())
        rewards = [line["reward"] for line in lines(tmp_path / name)]
        rise[name] = np.mean(rewards[-5:]) - np.mean(rewards[:5])
    assert rise["share_of_ascii"] > 0.2 and rise["shuffled"] < 0.1, rise


def test_a_reward_that_fails_ends_a_run_whose_steps_are_saved(config: ReinforceConfig, tmp_path: Path):
    name = config.rewards[0].replace("bytes_of", "fails_later")
    failing = dataclasses.replace(config, rewards=(name,), objective=ObjectiveConfig())
    failing = dataclasses.replace(failing, validation=ValidationConfig())
    with pytest.raises(MossAudioError, match=r"fails_later of 'scene .* raised ValueError: no judge"):
        reinforce(failing, tmp_path, mesh=one_device())
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps[-1] >= 1


def test_steps_of_data_cannot_be_skipped(config: ReinforceConfig, tmp_path: Path):
    with pytest.raises(MossAudioError, match="--skip-steps is for `run`"):
        reinforce(config, tmp_path / "run", mesh=one_device(), resume=ResumeConfig(skip_steps="3:4"))
    assert not (tmp_path / "run").exists()
