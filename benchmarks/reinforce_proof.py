"""Post-training by reward lifts the held-out accuracy of a small model, and shuffled rewards do not.

    python -m benchmarks.reinforce_proof proof            # three seeds and a control of each, 80 min (estimated)
    python -m benchmarks.reinforce_proof proof --seeds 0  # one of them

For each seed: a model of half a million parameters is trained on timelines, and on few questions of when a sound
begins, until it answers 40% to 60% of held-out questions to 0.2 s; from there `reinforce` alone trains it, once by the
reward `seconds` and once by the same rewards shuffled among the answers to each question. Writes proof/proof.md and
proof/proof.png. The same command, started again, resumes what was stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np

from moss_audio_jax.errors import MossAudioError
from train.config import LoopConfig, ModelSource, RunConfig, ValidationConfig
from train.data.mixture_config import MixtureConfig, SceneGroupConfig
from train.loop import train
from train.recipes import RECIPES, REINFORCE_RECIPES
from train.reinforce.config import ObjectiveConfig, ReinforceConfig
from train.reinforce.loop import reinforce
from train.reinforce.rewards import seconds

SCENES = REINFORCE_RECIPES["reward_times"].questions.scene
# The supervised start learns to hear from timelines, and what the questions mean from few of them.
TIMELINES = dataclasses.replace(SCENES, tasks=("timeline",))
SHARE = 0.1  # of questions
HELD_OUT = REINFORCE_RECIPES["reward_times"].validation.count
SUPERVISED_EVERY = 50  # steps between evaluations of the supervised start
BEGIN_AT = 0.40  # share of right answers from which the supervised start is enough
SCORE = "eval/share_within"


def shuffled(questions, answers):
    """The rewards of `seconds`, exchanged among the answers to each question."""
    return exchanged(seconds, questions, answers)


shuffled.batched = True


def exchanged(reward, questions, answers):
    """Returns a reward of each answer, exchanged among the answers to each question by a generator of the batch."""
    found = np.array([reward(question, answer) for question, answer in zip(questions, answers, strict=True)])
    rng = np.random.default_rng(len(answers) + sum(answer.tokens for answer in answers))
    names = np.array([question.name for question in questions])
    for name in dict.fromkeys(names):
        here = np.flatnonzero(names == name)
        found[here] = found[rng.permutation(here)]
    return found.tolist()


def supervised_config(seed: int) -> RunConfig:
    recipe = RECIPES["time_events"]
    return dataclasses.replace(
        recipe,
        mixture=MixtureConfig(
            easy_scenes=SceneGroupConfig(1 - SHARE, TIMELINES), scenes=SceneGroupConfig(SHARE, SCENES)
        ),
        optimizer=dataclasses.replace(recipe.optimizer, schedule="cosine", total_steps=10_000, final_fraction=1.0),
        loop=LoopConfig(checkpoint_every=SUPERVISED_EVERY, log_every=SUPERVISED_EVERY),
        validation=ValidationConfig(
            every=SUPERVISED_EVERY, count=HELD_OUT, max_new_tokens=8, batch_size=HELD_OUT // 2, show_samples=0
        ),
        seed=seed,
    )


def supervised(out: pathlib.Path, seed: int) -> float | None:
    """Trains until enough held-out questions are answered; returns their share, or None if SIGTERM stopped it."""
    config = supervised_config(seed)
    while not (found := scores(out)) or found[-1][1] < BEGIN_AT:
        steps = (found[-1][0] if found else 0) + SUPERVISED_EVERY
        if train(dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps)), out).preempted:
            return None
    return found[-1][1]


def reinforce_config(start: pathlib.Path, seed: int, reward: str, args: argparse.Namespace) -> ReinforceConfig:
    recipe = REINFORCE_RECIPES["reward_times"]
    return dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=args.rate, total_steps=args.steps),
        model=ModelSource(checkpoint=str(start)),
        rollout=dataclasses.replace(
            recipe.rollout, prompts=args.prompts, samples=args.samples, slots=args.prompts * args.samples
        ),
        rewards=(f"{reward}=1",),
        objective=ObjectiveConfig(minibatches=args.minibatches),
        seed=1000 + seed,
    )


def scores(run: pathlib.Path) -> list[tuple[int, float]]:
    """Returns (step, share of right answers) of each evaluation of a run."""
    lines = (run / "scores.jsonl").read_text().splitlines() if (run / "scores.jsonl").exists() else []
    return [(line["step"], line[SCORE]) for line in map(json.loads, lines)]


def proof(args: argparse.Namespace) -> None:
    out = pathlib.Path(args.out)
    rows = []
    for seed in args.seeds:
        start = out / f"supervised-{seed}"
        before = supervised(start, seed)
        if before is None:
            return
        rewards = {"reward": "seconds", "shuffled": f"{pathlib.Path(__file__)}:shuffled"}
        for name, reward in list(rewards.items())[: 1 if args.no_control else 2]:
            run = out / f"{name}-{seed}"
            began = time.time()
            try:
                if reinforce(reinforce_config(start, seed, reward, args), run).preempted:
                    return
            except MossAudioError as error:
                if name == "reward":
                    raise
                # Shuffled rewards can end with one answer to everything, from which nothing is learned.
                print(f"{run}: {error}", flush=True)
            took = sum(json.loads(line)["step_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines())
            rows.append((seed, name, before, scores(run)[-1][1], took / 60))
            print(rows[-1], f"{time.time() - began:.0f} s", flush=True)
            report(out, rows)


def report(out: pathlib.Path, rows: list[tuple[int, str, float, float, float]]) -> None:
    """Writes the table and the picture of all runs so far."""
    lines = ["| seed | rewards | before | after | points | minutes |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {seed} | {name} | {before:.1%} | {after:.1%} | {100 * (after - before):+.1f} | {minutes:.1f} |"
        for seed, name, before, after, minutes in rows
    ]
    (out / "proof.md").write_text("\n".join(lines) + "\n")
    from matplotlib.figure import Figure

    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    for seed, name, before, *_ in rows:
        steps, shares = zip((0, before), *scores(out / f"{name}-{seed}"), strict=True)
        color = "C0" if name == "reward" else "0.6"
        axes.plot(
            steps, 100 * np.array(shares), "o-", color=color, markersize=3, label=name if seed == rows[0][0] else None
        )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out answers within 0.2 s, %")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.savefig(out / "proof.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="directory of all runs, the table and the picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run by reward")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--prompts", type=int, default=32, help="questions of a step")
    parser.add_argument("--samples", type=int, default=8, help="answers to a question")
    parser.add_argument("--minibatches", type=int, default=1, help="updates of a step")
    parser.add_argument("--no-control", action="store_true", help="leave out the runs with shuffled rewards")
    proof(parser.parse_args())


if __name__ == "__main__":
    main()
