"""A run by reward of two processes has the curve of one."""

import os
from pathlib import Path

import numpy as np

from tests.train.test_processes import ENVIRONMENT, Run
from tests.train.training_runs import lines

OPTIONS = {
    "recipe": "dapo",
    "log-every": 1,
    "steps": 2,
    "data.batch-size": 2,
    "data.tokens": 256,
    "data.chunks": 4,
    "optimizer.learning-rate": 1e-3,
    "optimizer.warmup-steps": 1,
    "step.remat": "none",
    "step.loss-chunk": 256,
    "step.compute-dtype": "float32",
    "questions.scenes": 50,
    "rollout.prompts": 2,
    "rollout.samples": 4,
    "rollout.slots": 4,
    "rollout.length": 128,
    "rollout.max-new-tokens": 6,
    "rollout.overlong": 2,
}
REWARD = "def of_bytes(question, answer):\n    return sum(answer.text.encode('utf-8', 'replace')) % 7 / 7\n"


def test_two_processes_have_the_curve_of_one(corpus: Path, tmp_path: Path):
    """The same answers with the same rewards; losses differ by the order of sums, as in `run`."""
    (tmp_path / "my_rewards.py").write_text(REWARD)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    pairs = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    pairs += ["--init", str(corpus / "model"), "--rewards", f"{tmp_path / 'my_rewards.py'}:of_bytes"]
    pairs += ["--questions.scenes.seconds", "2", "2", "--questions.scenes.tasks", "start"]
    runs = {}
    for count in (1, 2):
        logs = tmp_path / f"logs {count}"
        logs.mkdir()
        runs[count] = Run(
            ["reinforce", *pairs], tmp_path / f"run {count}", count, os.environ | ENVIRONMENT | cache, logs
        )
    try:
        for run in runs.values():
            assert run.wait() == [0] * len(run.processes), run.log(0)
    finally:
        for run in runs.values():
            run.kill()
    one, two = (lines(tmp_path / f"run {count}") for count in runs)
    for name, tolerance in {
        "reward": 0,
        "drawn_tokens": 0,
        "packed_tokens": 0,
        "groups_kept": 0,
        "entropy": 1e-4,
    }.items():
        found, expected = ([line[name] for line in run] for run in (two, one))
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=name)
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], atol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in two], [line["grad_norm"] for line in one], rtol=2e-3)
    texts = [(path / "rollouts.jsonl").read_text() for path in (tmp_path / "run 1", tmp_path / "run 2")]
    assert texts[0] == texts[1]
