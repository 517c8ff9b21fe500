"""The line that a run opens with."""

from types import SimpleNamespace

import numpy as np

from train.recipes import RECIPES
from train.running.overview import described, overview


def test_a_run_in_a_line():
    config = RECIPES["time_events"]
    device = SimpleNamespace(device_kind="TPU v5e")
    mesh = SimpleNamespace(devices=np.array([[device, device]]))
    state = SimpleNamespace(trainable={"a": np.zeros((1000, 2))}, frozen={"b": np.zeros(500)})
    groups = list(map(described, config.mixture.groups(config.seed)))
    steps = f"{config.last_step:,} steps of 16 sequences of 208 tokens"
    begin = config.mixture.scenes.begin
    assert overview(config, groups, mesh, state, 0) == (
        "trains 2,000 of 2,500 parameters on 2 TPU v5e devices; data: scenes (made while training from example "
        f"{begin:,} on), easy_scenes (made while training), full_scenes (made while training from example {begin:,} "
        f"on); {steps}"
    )
    assert overview(config, groups, mesh, state, 7).startswith("resumes after step 7: trains 2,000 of 2,500 parameters")
