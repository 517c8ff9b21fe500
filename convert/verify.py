"""Verifies that two checkpoints are equal: their tensors, and with PyTorch also the models' computations.

Of one checkpoint alone, and of both, also that they are as they were written.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, Literal

from convert import PYTORCH_INSTALL
from convert.check_checksums import ChecksumReport, check_checksums
from convert.compare_models import TOP_K, ModelComparison, Sound, compare_models
from convert.compare_tensors import (
    TensorComparison,
    companion_differences,
    compare_tensors,
    tensor_set_differences,
)
from convert.memory import available_memory
from convert.tensor_source import Checkpoint, open_checkpoint
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.text_table import align
from moss_audio_jax.weights.checksums import none_in
from moss_audio_jax.weights.locate import locate

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Limits of the differences between two models: relative errors of stages, KL in nats, shares of positions."""

    relative_error: float
    kl: float
    top_1_agreement: float
    top_k_overlap: float


# Measured between equal random weights, from the tiny preset to the 4B's full size (docs/conversion.md): errors up to
# 2e-6 and KL 3e-12 in float32; 0.04, 1e-3, agreement and overlap down to 0.94 in bfloat16, among near ties.
THRESHOLDS: dict[str, Thresholds] = {
    "float32": Thresholds(relative_error=1e-4, kl=1e-6, top_1_agreement=0.99, top_k_overlap=0.99),
    "bfloat16": Thresholds(relative_error=0.1, kl=0.05, top_1_agreement=0.9, top_k_overlap=0.9),
    "int8": Thresholds(relative_error=0.1, kl=0.05, top_1_agreement=0.9, top_k_overlap=0.9),
}
# The extras lack PyTorch on versions of Python for which its tested release has no wheel.


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`, or of `verify_alone`, whose `target` is None.

    differences: in files and sets of tensors. note: the reason for comparing no models. checksums: of those that have
    some.
    """

    source: str
    target: str | None
    differences: list[str]
    tensors: list[TensorComparison]
    models: ModelComparison | None
    thresholds: Thresholds | None
    exceeded: list[str]
    note: str
    checksums: list[ChecksumReport]

    @property
    def passed(self) -> bool:
        damaged = any(report.damaged for report in self.checksums)
        return not (self.differences or self.exceeded or damaged) and all(tensor.equal for tensor in self.tensors)


def verify_alone(source: AnyPath) -> Verification:
    """Compares a checkpoint with the checksums that it was written with; raises MossAudioError if it has none."""
    location = locate(source)
    if not location.is_adapter:
        location.layout()  # raises what is there instead of a checkpoint
    report = check_checksums(source)
    if report is None:
        raise none_in(location.path)
    return Verification(str(source), None, [], [], None, None, [], "", [report])


def verify(
    source: AnyPath,
    target: AnyPath,
    *,
    pytorch: bool = True,
    audio: AnyPath | None = None,
    dtype: Dtype = "float32",
    int8: tuple[str, ...] = (),
    limits: dict[str, float | None] | None = None,
) -> Verification:
    """Compares two checkpoints of either layout.

    pytorch: also run both models on a sound, if possible. dtype: of those runs. int8: as `load_model` takes it, of
    JAX's. audio: the sound file, by default a synthetic clip. limits: thresholds by name that replace those of
    THRESHOLDS.
    """
    sound = Sound.load(audio)
    sides = open_checkpoint(source), open_checkpoint(target)
    pair = pytorch_pair(source, target)
    reason = unavailable_pytorch(pair is not None) if pytorch else "switched off"
    if pair is not None and not reason:
        require_memory(sides[0], dtype)
    checked = [report for side in (source, target) if (report := check_checksums(side)) is not None]
    set_differences = tensor_set_differences(*sides)
    differences = companion_differences(sides[0].directory, sides[1].directory) + set_differences
    tensors = list(compare_tensors(*sides))
    if not reason and set_differences:
        reason = "the two are different models"
    if pair is None or reason:
        return Verification(str(source), str(target), differences, tensors, None, None, [], reason, checked)

    models = compare_models(*pair, sound, dtype, int8)
    rounded = any(tensor.max_abs_error > 0 for tensor in tensors)
    thresholds = THRESHOLDS["int8" if int8 else "bfloat16" if rounded else dtype]
    thresholds = dataclasses.replace(
        thresholds, **{name: value for name, value in (limits or {}).items() if value is not None}
    )
    exceeded = beyond(models, thresholds)
    return Verification(str(source), str(target), differences, tensors, models, thresholds, exceeded, "", checked)


def pytorch_pair(source: AnyPath, target: AnyPath) -> tuple[Path, AnyPath] | None:
    """Returns the checkpoint for PyTorch and the one for JAX: PyTorch needs a released directory. None without one."""
    locations = locate(source), locate(target)
    if locations[0].layout() == "released":
        return Path(locations[0].path), target
    return (Path(locations[1].path), source) if locations[1].layout() == "released" else None


def unavailable_pytorch(has_released: bool) -> str:
    """Says why the models can't be compared; empty if they can."""
    if not has_released:
        return "PyTorch reads released directories, and neither is one"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: {PYTORCH_INSTALL}"
    version = importlib.metadata.version("transformers")
    # Later major versions call Whisper's layers differently.
    return (
        "" if version.startswith("4.") else f"transformers {version} is installed, 4.57.1 is needed: {PYTORCH_INSTALL}"
    )


def require_memory(checkpoint: Checkpoint, dtype: Dtype) -> None:
    """Prints the memory that a run of the model needs; raises MossAudioError if less is available."""
    parameters = sum(math.prod(leaf.shape) for leaf in checkpoint.leaves.values())
    # Beside the weights: activations, logits, and slices of the encoder's stacks. 4B in bfloat16: 14.3 GB measured.
    needed = parameters * {"float32": 4, "bfloat16": 2}[dtype] * 1.1 + 3e9
    available = available_memory()
    known = "" if available is None else f" ({available / 1e9:.1f} GB are available)"
    print(f"running the model in {dtype} needs about {needed / 1e9:.1f} GB of memory{known}", file=sys.stderr)
    if available is not None and needed > available:
        raise MossAudioError(
            f"running the model in {dtype} needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB "
            "are available: compare in --dtype bfloat16, or the tensors alone with --no-torch"
        )


def beyond(models: ModelComparison, thresholds: Thresholds) -> list[str]:
    """Lists the values beyond their thresholds; NaN is beyond every threshold."""
    errors = {f"relative error of {stage.stage}": stage.relative_error for stage in models.stages}
    at_most = {name: (error, thresholds.relative_error) for name, error in errors.items()}
    at_most["KL"] = (models.max_kl, thresholds.kl)
    at_least = {
        "top-1 agreement": (models.top_1_agreement, thresholds.top_1_agreement),
        f"top-{TOP_K} overlap": (models.top_k_overlap, thresholds.top_k_overlap),
    }
    above = [f"{name} {value:.3g} > {limit:g}" for name, (value, limit) in at_most.items() if not value <= limit]
    return above + [
        f"{name} {value:.3g} < {limit:g}" for name, (value, limit) in at_least.items() if not value >= limit
    ]


def as_json(report: Verification) -> dict[str, Any]:
    """Returns the report as JSON, with infinity and NaN as text."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {"passed": report.passed} | finite(dataclasses.asdict(report))


def report_table(report: Verification) -> str:
    """Returns the report as text: tensors that differ, and the number of those that don't."""
    lines = [report.source if report.target is None else f"{report.source} -> {report.target}"]
    for checked in report.checksums:
        lines.append(f"{checked.directory}: {checked.sound} arrays have the checksums they were written with")
        lines += [f"  damaged: {one}" for one in checked.damaged[:50]]
    lines += [f"  {difference}" for difference in report.differences]
    differing = [tensor for tensor in report.tensors if not tensor.equal]
    shown = [("tensor that differs", "source", "target", "max abs error", "max relative error")]
    shown += [
        (t.name, t.source_dtype, t.target_dtype, f"{t.max_abs_error:.3g}", f"{t.max_relative_error:.3g}")
        for t in differing[:50]
    ]
    if differing:
        lines += [
            align(shown),
            f"{len(differing)} tensors differ" + ("; the first 50 are shown" * (len(differing) > 50)),
        ]
    for dtypes in sorted({(t.source_dtype, t.target_dtype) for t in report.tensors if t.equal}):
        equal = [t for t in report.tensors if t.equal and (t.source_dtype, t.target_dtype) == dtypes]
        what = (
            f"equal bit by bit ({dtypes[0]})"
            if dtypes[0] == dtypes[1]
            else f"converted from {dtypes[0]} to {dtypes[1]} exactly as expected, errors up to "
            f"{max(t.max_abs_error for t in equal):.3g} absolute, "
            f"{max(t.max_relative_error for t in equal):.3g} relative"
        )
        lines.append(f"{len(equal)} tensors {what}")
    infinite = [tensor.name for tensor in report.tensors if not tensor.finite]
    if infinite:
        more = f" and {len(infinite) - 1} tensors more hold" if len(infinite) > 1 else " holds"
        lines.append(f"{infinite[0]}{more} NaN or infinity: no answer of such a model means anything")
    if report.target is not None:
        lines += _model_lines(report)
    return "\n".join([*lines, "PASSED" if report.passed else "FAILED"])


def _model_lines(report: Verification) -> list[str]:
    if report.models is None:
        return [f"the computations were not compared: {report.note}"]
    models = report.models
    stages = [(stage.stage, f"{stage.max_abs_error:.3g}", f"{stage.relative_error:.3g}") for stage in models.stages]
    return [
        f"PyTorch and JAX in {models.dtype} on {models.audio}, {models.positions} positions:",
        align([("stage", "max abs error", "relative to its maximum"), *stages]),
        f"next token: KL at most {models.max_kl:.3g} (mean {models.mean_kl:.3g}) nats, top-1 agreement "
        f"{models.top_1_agreement:.2%}, top-{TOP_K} overlap {models.top_k_overlap:.2%}",
        *(f"past its threshold: {exceeded}" for exceeded in report.exceeded),
    ]
