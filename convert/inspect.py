"""What a checkpoint directory holds, read from its headers alone."""

import math
from typing import Any

from convert.tensor_source import open_checkpoint
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.checkpoint import layout_of
from moss_audio_jax.weights.info import align


def contents(path: AnyPath) -> dict[str, Any]:
    """Layout, parameters as this port stacks them, and totals; fit for JSON."""
    checkpoint = open_checkpoint(path)
    parameters = []
    for leaf in checkpoint.leaves.values():
        dtypes = [checkpoint.dtype(name) for name in leaf.names]
        count = math.prod(leaf.tensor_shape)
        parameters.append(
            {
                "path": leaf.path,
                "released_name": _common_name(leaf.names) if leaf.stacked else leaf.names[0],
                "shape": list(leaf.shape),
                "dtype": "/".join(sorted({str(dtype) for dtype in dtypes})),
                "count": count * len(leaf.names),
                "bytes": sum(count * dtype.itemsize for dtype in dtypes),
            }
        )
    return {
        "path": str(path),
        "layout": layout_of(path),
        "model_type": checkpoint.config.model_type,
        "tensors": sum(len(leaf.names) for leaf in checkpoint.leaves.values()),
        "total_parameters": sum(parameter["count"] for parameter in parameters),
        "total_bytes": sum(parameter["bytes"] for parameter in parameters),
        "parameters": parameters,
    }


def _common_name(names: tuple[str, ...]) -> str:
    """`language_model.layers.{0..35}.mlp.up_proj.weight` for the names of a stack."""
    first, last = names[0].split("."), names[-1].split(".")
    return ".".join(a if a.isalpha() or not a.isdigit() else f"{{{a}..{b}}}" for a, b in zip(first, last, strict=True))


def table(found: dict[str, Any]) -> str:
    """`contents` for the eye."""
    layout = {"orbax": "Orbax", "released": "released PyTorch layout"}[found["layout"]]
    rows: list[tuple[str, ...]] = [("released name", "stored here as", "shape", "dtype", "parameters", "bytes")]
    for parameter in found["parameters"]:
        shape = "x".join(map(str, parameter["shape"]))
        numbers = f"{parameter['count']:,}", f"{parameter['bytes']:,}"
        rows.append((parameter["released_name"], parameter["path"], shape, parameter["dtype"], *numbers))
    rows.append(("all", "", "", "", f"{found['total_parameters']:,}", f"{found['total_bytes']:,}"))
    return f"{found['path']}: {found['model_type']}, {layout}, {found['tensors']} released tensors\n{align(rows)}"
