"""The model, or the engine, of a command: a checkpoint, loaded as the command's options say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moss_audio_jax.commands.progress import waiting
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.inference.engine import Engine
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor, load_processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import AnyPath
from moss_audio_jax.weights.checkpoint import load_adapter, load_model
from moss_audio_jax.weights.locate import locate


@dataclass(frozen=True)
class Loading:
    """Options about the model.

    mesh: sizes of `make_mesh`. slots: answers that are generated at the same time. kv_int8: see `Engine`.
    verify: see `load_model`; of adapters too.
    """

    checkpoint: AnyPath
    adapter: AnyPath | None
    dtype: str | None
    int8: Sequence[str]
    mesh: Mapping[str, Any]
    slots: int
    kv_int8: bool = False
    verify: bool = False

    def __post_init__(self):
        if self.slots < 1:
            raise MossAudioError(f"--slots must be 1 or more, not {self.slots}")

    def processor(self) -> Processor:
        return load_processor(self.checkpoint)

    def model(self) -> MossAudio:
        for name in filter(None, (self.checkpoint, self.adapter)):
            locate(name)  # fetches a model of the hub, whose progress is shown
        with waiting("loading the weights"):
            mesh = make_mesh(**self.mesh)
            model = load_model(self.checkpoint, dtype=self.dtype, mesh=mesh, int8=self.int8, verify=self.verify)
            return model if self.adapter is None else self.adapted(model, self.adapter)

    def adapted(self, model: MossAudio, adapter: AnyPath) -> MossAudio:
        return load_adapter(model, adapter, verify=self.verify)

    def engine(self, processor: Processor, requests: int, length: int) -> Engine:
        """Loads the model. requests: their number. length: tokens of a prompt and its answer, at most."""
        slots = min(self.slots, requests)
        return Engine(self.model(), processor, slots=slots, max_length=length, kv_int8=self.kv_int8)
