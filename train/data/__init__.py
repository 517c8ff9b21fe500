"""Training data, from manifests and audio to batches of packed sequences; start at `pipeline`.

manifest   JSON lines -> checked examples           shards    the same from a few large files
objectives example -> question and answer           samples   that -> token ids, mel chunks
mixture    sources -> one endless order             packing   samples -> sequences within a budget
lanes      one row of the batch                     pipeline  all rows, by workers and hosts
augment    augmentation of training audio           config    options of all of these

Names are imported on first use (PEP 562), as `config` must not import what reads data.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.config import DataConfig
    from train.data.lanes import Interrupted
    from train.data.manifest import Clip, Example, Manifest, Message, TimedText
    from train.data.mixture import ExampleOrder, Group, Source
    from train.data.objectives import OBJECTIVES
    from train.data.packing import TrainingBatch, balanced_chunks
    from train.data.pipeline import Prefetched, TrainingData, merge_states
    from train.data.samples import SampleMaker
    from train.data.shards import Shards, prepare

_MODULES = {
    "OBJECTIVES": "objectives",
    "Clip": "manifest",
    "DataConfig": "config",
    "Example": "manifest",
    "ExampleOrder": "mixture",
    "Group": "mixture",
    "Interrupted": "lanes",
    "Manifest": "manifest",
    "Message": "manifest",
    "Prefetched": "pipeline",
    "SampleMaker": "samples",
    "Shards": "shards",
    "Source": "mixture",
    "TimedText": "manifest",
    "TrainingBatch": "packing",
    "TrainingData": "pipeline",
    "balanced_chunks": "packing",
    "merge_states": "pipeline",
    "prepare": "shards",
}
__all__ = [
    "OBJECTIVES",
    "Clip",
    "DataConfig",
    "Example",
    "ExampleOrder",
    "Group",
    "Interrupted",
    "Manifest",
    "Message",
    "Prefetched",
    "SampleMaker",
    "Shards",
    "Source",
    "TimedText",
    "TrainingBatch",
    "TrainingData",
    "balanced_chunks",
    "merge_states",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
