"""Published measurements beside what is estimated of them."""

import pytest

from train.planning.calibration import (
    GEMMA_7B,
    LLAMA3_8B,
    MAXTEXT_16B,
    MAXTEXT_32B,
    MEASUREMENTS,
    QWEN3_8B,
    Measurement,
    calibrated,
    measured_over_estimated,
)
from train.planning.chips import V4, V5E, V5P, V6E


@pytest.mark.parametrize(
    ("model", "billions"),
    [(LLAMA3_8B, 7.50), (QWEN3_8B, 7.57), (GEMMA_7B, 8.54), (MAXTEXT_16B, 15.7), (MAXTEXT_32B, 31.4)],
)
def test_the_models_are_those_of_their_names(model, billions: float):
    """The matmuls' parameters: Llama 3 8B has 8.03 billion, of which 0.53 are its table of embeddings."""
    run = Measurement("", V6E, (2, 4), model, 8192, 1, "none", "", tokens_per_second=1.0)
    assert run.matmul_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_an_estimate_by_hand():
    """Llama 3 8B with everything recomputed but the down projections, four sequences a v6e of eight."""
    (run,) = [run for run in MEASUREMENTS if "NNX" in run.name]
    layers, head, down = 32 * 4096 * 53248, 4096 * 128256, 32 * 4096 * 14336
    matmuls = 2 * (3 * (layers + head) + layers - down)
    attention = 4 * 4 * 32 * 4096 * 8192 / 2
    computing = matmuls / (918e12 * 0.85) + attention / (918e12 * 0.5)
    exchanging = 3 * 2 * (layers + 2 * head) * 7 / 8 / (2 * 100e9) / (4 * 8192)
    assert run.estimated == pytest.approx(1 / (computing + exchanging), rel=1e-6)
    assert run.ratio == pytest.approx(7700 / run.estimated)


def test_a_published_mfu_in_tokens():
    """57.7% of 197 TFLOP/s at 6 FLOPs a parameter, and 12 l h d s of attention counted whole."""
    (run,) = [run for run in MEASUREMENTS if run.chip == V5E and run.model == GEMMA_7B]
    assert run.measured == pytest.approx(0.577 * 197e12 / (6 * run.matmul_parameters + 12 * 28 * 4096 * 8192))


def test_no_measurement_is_above_its_estimate():
    """A roofline is a bound. The ranges are in docs/tpu.md."""
    assert all(0.6 < run.ratio < 1 for run in MEASUREMENTS)
    ranges = {chip.name: tuple(round(100 * end) for end in measured_over_estimated(chip)) for chip in (V5E, V5P, V6E)}
    assert ranges == {"TPU v5e": (73, 94), "TPU v5p": (75, 96), "TPU v6e": (65, 74)}
    assert measured_over_estimated(V4) == (
        min(run.ratio for run in MEASUREMENTS),
        max(run.ratio for run in MEASUREMENTS),
    )
    least, most = calibrated(V6E, 0.5)["calibrated_mfu"]
    assert (least, most) == tuple(0.5 * end for end in measured_over_estimated(V6E))
