"""Random PyTorch models and their released files, for tests; the model itself is convert.pytorch_reference."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from convert.pytorch_reference import ReferenceModel

IGNORED_LABEL = -100


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [1, S, vocab]: position t predicts labels[t + 1]; -100 is skipped."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)


def random_reference(config: Mapping[str, Any], seed: int) -> ReferenceModel:
    """Random weights that let every term show in the outputs: biases vary around 0, norm scales around 1."""
    model = ReferenceModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.2 * noise
            elif parameter.ndim == 1:  # a norm's scale
                value = 1 + 0.2 * noise
            elif "embed_tokens" in name:
                value = 0.7 * noise
            else:  # keeps the size of what passes through; the stem's GELUs halve it
                gain = 2.0 if ".conv" in name else 1.0
                value = noise * math.sqrt(gain / parameter[0].numel())
            parameter.copy_(value)
    return model


def save_released(model: ReferenceModel, directory: Path, shards: int = 1) -> None:
    """Writes config.json and safetensors in the released layout: one file, or `shards` and their index.

    Tensors are dealt to the shards in turn, so that those of one layer lie in different files.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config_text = json.dumps({**model.config, "dtype": dtype}, indent=2)
    (directory / "config.json").write_text(config_text + "\n", "utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items())}
    if model.tied:
        del tensors["lm_head.weight"]
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(1, shards + 1):
        file_name = f"model-{number:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number - 1 :: shards]}
        save_file(part, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index_text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / "model.safetensors.index.json").write_text(index_text + "\n", "utf-8")
