"""Training data, from manifests and audio to batches of packed sequences; start at `pipeline`.

manifest           JSON lines -> checked examples
line_index         places of the lines of a file
shards             the same examples from a few large files
shard_writing      writes those, by processes and machines
sources            data of other kinds -> the same examples
table_files        rows of Parquet and Arrow
list_files         rows of NeMo's JSON lines and of TSV
lhotse_files       rows of Lhotse's cuts
tar_files          rows of WebDataset archives
objectives         an example -> question and answer
mixture            sources -> one endless order of examples
augment            random speed, level, noise and masks of training audio
samples            an example -> token ids, loss mask and mel chunks
budget             size of a packed sequence; splitting and truncation of longer examples
packing            samples -> packed sequences
lanes              examples -> packed sequences of one row of the batch, resumable
pipeline           batches of all rows, by worker processes and hosts
worker_processes   processes beside this one
places             place of a run in its data; whether other data are the same until there
host_shares        rows of a batch that each process reads
scenes             synthetic sound scenes with questions, by seed and index
recordings         short labelled recordings that sound in scenes
scene_synthesis    waves of scenes
scene_tasks        questions about scenes
scene_files        scenes written as a manifest and WAV files
config             options of packing, augmentation and scenes
mixture_config     options of the mixture: groups and their shares

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
    from train.data.shard_writing import prepare
    from train.data.shards import Shards

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
    "prepare": "shard_writing",
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
