"""From manifests and audio to batches of packed sequences; start at `pipeline`.

manifest   JSON lines -> checked examples           shards    the same out of a few large files
objectives an example -> question and answer        samples   that -> token ids, mel chunks
mixture    sources -> one endless order             packing   samples -> sequences within a budget
lanes      one row of the batch                     pipeline  all rows, by workers and hosts
augment    audio that varies in training
"""

from train.data.lanes import DataConfig, Interrupted
from train.data.manifest import Clip, Example, Manifest, Message, TimedText
from train.data.mixture import ExampleOrder, Group, Source
from train.data.objectives import OBJECTIVES
from train.data.packing import TrainingBatch, balanced_chunks
from train.data.pipeline import Prefetched, TrainingData, merge_states
from train.data.samples import SampleMaker
from train.data.shards import Shards, prepare

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
