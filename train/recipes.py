"""Recipes: configurations that give the options of a run their defaults. `--recipe NAME --help` shows a docstring.

A docstring gives the launch line, chips, time and expected result. "Estimated" figures are of `moss-audio-train plan`:
programs compiled for the TPU, time by a roofline model. "Measured" ones are of runs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moss_audio_jax.config import LoraConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.sampling_config import Sampling
from train.config import Config, LoopConfig, ModelSource, OptimizerConfig, RunConfig, StepConfig, ValidationConfig
from train.data.config import DataConfig, SceneConfig
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.reinforce.config import QuestionsConfig, ReinforceConfig, RolloutConfig
from train.running.config_file import read_config

# Batch sizes, lengths and rates were not published; these are ours.
_DATA = DataConfig(batch_size=64, tokens=4096, chunks=64)
_FINETUNE_DATA = DataConfig(batch_size=8, tokens=4096, chunks=64)
_EASY_SCENES = 12_800  # 400 steps


def pretrain_stage1() -> RunConfig:
    """Stage 1 of pretraining: trains the adapter and the DeepStack mergers; encoder and language model are frozen.

    Launch: moss-audio-train run --recipe pretrain_stage1 --out runs/stage1 --model.checkpoint moss-4b
    --mixture.speech.paths train.jsonl. Give it no text-only data, which teaches these parts nothing.

    Chips: v5e:4x4, where stage 2 of the 4B takes 14.02 GiB a chip (estimated) and stage 1 less. Time: below 13 hours
    for 10,000 steps, by stage 2's step of 4.51 s (estimated). Result: not measured at 4B or 8B.
    """
    frozen = ("audio_encoder.*", "language_model.*", "lm_head.*")
    return RunConfig(data=_DATA, optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=10_000, freeze=frozen))


def pretrain_stage2() -> RunConfig:
    """Stage 2 of pretraining: trains everything, text included.

    Launch: moss-audio-train run --recipe pretrain_stage2 --out runs/stage2 --model.checkpoint runs/stage1
    --mixture.speech.paths speech.jsonl --mixture.captions.paths captions.jsonl --mixture.text.paths text.jsonl

    Chips: v5e:4x4 for the 4B, 14.02 of 15.75 GiB a chip (estimated). Time: 4.51 s a step, 125 hours for 100,000 steps
    (estimated). Result: not measured at 4B or 8B.
    """
    optimizer = OptimizerConfig(learning_rate=1e-4, total_steps=100_000, warmup_steps=1000)
    return RunConfig(data=_DATA, optimizer=optimizer)


def finetune() -> RunConfig:
    """Fine-tunes all parameters of a released model on conversations. The learning rate is a tenth of LoRA's.

    Launch: moss-audio-train run --recipe finetune --out runs/mine --init moss-4b --data train.jsonl
    --eval-data test.jsonl

    Chips: v5e:2x4 for the 4B, 12.14 of 15.75 GiB a chip; v6e:2x4 for the 8B, 19.14 of 31.24 GiB (estimated). Time:
    1.35 s and 0.61 s a step, 11 and 5 minutes for 500 steps (estimated). Result: not measured at 4B or 8B.
    """
    return RunConfig(
        data=_FINETUNE_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-5, total_steps=500, warmup_steps=20, weight_decay=0.0),
        loop=LoopConfig(checkpoint_every=100, check_data=True),
    )


def finetune_lora() -> RunConfig:
    """Fine-tunes a LoRA adapter of the language model. The authors' example has this rate and a 16th of the scale.

    Launch: moss-audio-train run --recipe finetune_lora --out runs/mine --init moss-8b --data train.jsonl
    --eval-data test.jsonl

    Chips: v5e:2x4 for the 8B, 5.05 of 15.75 GiB a chip (estimated). Time: 1.52 s a step, 13 minutes for 500 steps
    (estimated). Result: not measured at 4B or 8B; docs/finetune.md measures it on a small model.
    """
    return RunConfig(
        data=_FINETUNE_DATA,
        optimizer=OptimizerConfig(learning_rate=2e-4, total_steps=500, warmup_steps=20, weight_decay=0.0),
        lora=LoraConfig(),
        loop=LoopConfig(checkpoint_every=100, check_data=True),
    )


def time_events() -> RunConfig:
    """Trains a model of half a million parameters from scratch to tell what sounds in a scene, and when.

    Launch: moss-audio-train run --recipe time_events --out runs/events

    Chips: none, two CPU cores. Time: 5 min 12 s (measured). Result: event F1 93.7% to 98.5% on held-out scenes of
    8 s (measured, nine runs; docs/training.md). Short scenes come first, then long ones among them: long ones alone
    train it far more slowly.
    """
    return RunConfig(
        model=ModelSource(preset="small", tokenizer="learned"),
        data=DataConfig(batch_size=16, tokens=208, chunks=2, open_bins=8),
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(0.2, SceneConfig(seconds=(4.0, 4.0), events=(1, 2))),
            scenes=SceneGroupConfig(0.5, SceneConfig(seconds=(6.0, 8.0), events=(1, 4)), begin=_EASY_SCENES),
            # Only a scene of 8 s has the time marker "8".
            full_scenes=SceneGroupConfig(0.5, SceneConfig(seconds=(8.0, 8.0), events=(1, 4)), begin=_EASY_SCENES),
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            schedule="wsd",
            total_steps=1280,
            warmup_steps=50,
            decay_steps=550,
            b2=0.98,
            weight_decay=0.01,
            final_fraction=0.05,
        ),
        step=StepConfig(compute_dtype="float32", remat="none", loss_chunk=208, audio_label_weight=0.5, spike_sigma=0.0),
        loop=LoopConfig(checkpoint_every=400),
        microbatches=2,
    )


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_DIGITS = "*_[0-4].wav"  # the data set's own split


def digit_strings() -> SceneConfig:
    """Strings of spoken digits of the Free Spoken Digit Dataset, without its test recordings."""
    return SceneConfig(
        clips="free-spoken-digit-dataset/recordings",
        label_from="{label}_{voice}_*",
        label_names=tuple(f"{digit}={word}" for digit, word in enumerate(DIGITS)),
        clips_except=(TEST_DIGITS, "7_theo_36.wav", "9_theo_16.wav"),  # the last two are 2 s long, mostly noise
        seconds=(2.0, 12.0),
        events=(1, 8),
        pause=(0.05, 0.7),
        speed=(0.9, 1.1),
        level_db=(-18.0, -3.0),
        background_db=(-60.0, -40.0),
        tasks=("words",),
    )


def spoken_digits() -> RunConfig:
    """Trains the small model from scratch to transcribe strings of 1 to 8 spoken digits, with the times of each word.

    Launch: git clone https://github.com/Jakobovski/free-spoken-digit-dataset, then
    moss-audio-train run --recipe spoken_digits --out runs/digits. Recordings elsewhere: --mixture.clips.

    Chips: none, two CPU cores. Time: 18 min (measured). Result: WER 2.7% on 300 strings of the test recordings, times
    of words 37 ms from the true ones (measured; docs/speech.md).
    """
    strings = digit_strings()
    single = dataclasses.replace(strings, seconds=(2.0, 4.0), events=(1, 3))
    return RunConfig(
        model=ModelSource(preset="small", tokenizer="learned"),
        data=DataConfig(batch_size=16, tokens=320, chunks=4, open_bins=8),
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(0.3, single),
            scenes=SceneGroupConfig(1.0, strings, begin=16_000),
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            schedule="wsd",
            total_steps=2300,
            warmup_steps=50,
            decay_steps=1000,
            b2=0.98,
            weight_decay=0.01,
            final_fraction=0.05,
        ),
        step=StepConfig(compute_dtype="float32", remat="none", loss_chunk=320, audio_label_weight=0.5, spike_sigma=0.0),
        loop=LoopConfig(checkpoint_every=500),
        microbatches=2,
    )


def cold_start() -> RunConfig:
    """Fine-tunes a released model on answers with thoughts, so that it thinks before it answers; `dapo` follows.

    Launch: moss-audio-train run --recipe cold_start --out runs/cold --init runs/mine --data thoughts.jsonl
    --eval-data test.jsonl. Answers of the data begin with <think>...</think>; the thoughts are learned, in the last
    answer of each conversation, since earlier ones are not in a prompt at inference.

    Chips and time: those of `finetune` with sequences of twice the length. Result: not measured at 4B or 8B.
    """
    recipe = finetune()
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(_FINETUNE_DATA, tokens=8192, answers="last", thoughts="learn"),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e-5, total_steps=1000, warmup_steps=50),
    )


def dapo() -> ReinforceConfig:
    """Trains by reward with DAPO at the authors' published settings; rates and lengths of sequences are ours.

    Launch: moss-audio-train reinforce --recipe dapo --out runs/dapo --init runs/cold --data questions.jsonl
    --eval-data test.jsonl --rewards correct=1 format=0.2 overlong=0.5

    16 answers to each of 128 questions at temperature 1, top-p 1 and top-k 50, of at most 2048 tokens; groups of equal
    rewards are replaced; clips of 0.2 and 0.28; the ratio to the rollout's probabilities is cut at 2.

    Chips: v5p:4x4x4, 22.12 of 95.73 GiB a chip; v6e:8x8, 22.13 of 31.24 GiB (estimated, 8B). Time: 97 s and 220 s a
    step whose answers all have 2048 tokens (estimated). Result: not measured at 4B or 8B; docs/reinforce.md measures
    the same code on a small model.
    """
    return ReinforceConfig(
        data=DataConfig(batch_size=64, tokens=4096, chunks=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, total_steps=500, warmup_steps=10, weight_decay=0.0, final_fraction=1.0
        ),
        step=StepConfig(spike_sigma=0.0),
        loop=LoopConfig(checkpoint_every=20, log_every=1),
        rollout=RolloutConfig(
            prompts=128, samples=16, max_new_tokens=2048, slots=2048, sampling=Sampling(1.0, 50, 1.0)
        ),
        rewards=("correct=1", "format=0.2", "overlong=0.5"),
    )


def reward_times() -> ReinforceConfig:
    """Trains a small model by reward to tell when a sound begins, in scenes of 4 s: DAPO on two CPU cores.

    Launch: moss-audio-train reinforce --recipe reward_times --out runs/rewarded --init CHECKPOINT, of a model that
    answers some of these questions, as benchmarks/reinforce_proof.py trains one. Questions of your own:
    --data questions.jsonl --questions.scenes 0 --rewards correct=1, as in runs/reinforce.sh.

    Chips: none, two CPU cores. Time: 18 to 23 min on one core (measured beside other work). Result: held-out answers
    within 0.2 s rise from 40-45% to 62-74% (measured, three seeds; docs/reinforce.md).
    """
    held_out = 400
    return ReinforceConfig(
        data=DataConfig(batch_size=4, tokens=1024, chunks=8),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, total_steps=150, warmup_steps=5, weight_decay=0.0, final_fraction=0.1
        ),
        loop=LoopConfig(checkpoint_every=50, log_every=10),
        validation=ValidationConfig(
            every=50, count=held_out, max_new_tokens=8, batch_size=held_out // 2, show_samples=1
        ),
        step=StepConfig(compute_dtype="float32", remat="none", loss_chunk=1024, spike_sigma=0.0),
        questions=QuestionsConfig(
            scenes=1_000_000, scene=SceneConfig(seconds=(4.0, 4.0), events=(1, 2), tasks=("start",))
        ),
        rollout=RolloutConfig(
            prompts=32, samples=8, max_new_tokens=8, slots=256, length=128, sampling=Sampling(1.0, 50, 1.0), overlong=1
        ),
        rewards=("seconds=1",),
    )


_FUNCTIONS: tuple[Callable[[], RunConfig], ...] = (
    pretrain_stage1,
    pretrain_stage2,
    finetune,
    finetune_lora,
    time_events,
    spoken_digits,
    cold_start,
)
_BY_REWARD: tuple[Callable[[], ReinforceConfig], ...] = (dapo, reward_times)
RECIPES: dict[str, RunConfig] = {
    recipe.__name__: dataclasses.replace(recipe(), recipe=recipe.__name__) for recipe in _FUNCTIONS
}
REINFORCE_RECIPES: dict[str, ReinforceConfig] = {
    recipe.__name__: dataclasses.replace(recipe(), recipe=recipe.__name__) for recipe in _BY_REWARD
}
DOCSTRINGS: dict[str, str] = {recipe.__name__: recipe.__doc__ or "" for recipe in (*_FUNCTIONS, *_BY_REWARD)}


def read_recipe(name: str) -> RunConfig:
    """Returns the recipe of a name, or the configuration in a config.json; raises MossAudioError if it is neither."""
    return _read(name, RECIPES, REINFORCE_RECIPES, "reinforce", RunConfig)


def read_reinforce_recipe(name: str) -> ReinforceConfig:
    """Does the same for recipes of `reinforce`."""
    return _read(name, REINFORCE_RECIPES, RECIPES, "run", ReinforceConfig)


def _read(
    name: str, known: Mapping[str, Config], others: Mapping[str, Any], command: str, kind: type[Config]
) -> Config:
    if name in known:
        return known[name]
    if name in others:
        raise MossAudioError(
            f"--recipe {name} is of `{command}`: give it to that command, or one of {', '.join(known)}"
        )
    if not name.endswith(".json"):
        raise MossAudioError(f"--recipe must be one of {', '.join(known)}, or a run's config.json, not {name!r}")
    return dataclasses.replace(read_config(name, kind), recipe=name)
