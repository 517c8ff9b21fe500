"""From manifests and audio to batches of packed sequences; start at `pipeline`.

manifest           JSON lines -> checked examples
shards             the same examples from a few large files, and writing those
objectives         an example -> question and answer
mixture            sources -> one endless order of examples
augment            random speed, level, noise and masks of training audio
samples            an example -> token ids, loss mask and mel chunks
budget             size of a packed sequence; splitting and truncation of longer examples
packing            samples -> packed sequences
lanes              examples -> packed sequences of one row of the batch, resumable
pipeline           batches of all rows, by worker processes and hosts
host_shares        rows of a batch that each process reads
scenes             synthetic sound scenes with questions, by seed and index
scene_synthesis    waves of scenes
scene_tasks        questions about scenes
scene_files        scenes written as a manifest and WAV files
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
