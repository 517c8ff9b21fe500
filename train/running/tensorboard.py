"""Event files for TensorBoard: metrics, scores and samples of a run."""

import os
import struct
import time
from collections.abc import Sequence

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import text as text_summary

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import GrowingFile, Path, read_bytes
from moss_audio_jax.storage.retries import retried
from train.running.directory import TENSORBOARD
from train.running.sink import ShownSample, Sink, Values


class _EventFiles:
    """Opens event files on gs://. The writer's own class would upload the whole file at every step."""

    open = staticmethod(GrowingFile)


register_writer_factory("gs", _EventFiles())


class TensorBoard(Sink):
    """TensorBoard event file, written in this thread: tensorboardX's writer thread would hang if the disk is full."""

    def __init__(self, out: Path, start: int):
        directory = out / TENSORBOARD
        retried(directory, lambda: directory.mkdir(parents=True, exist_ok=True))
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{start}")
        # Makes TensorBoard drop events from this step on in older event files of the directory.
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def write(self, step: int, line: Values) -> None:
        self.write_scores(step, {_tag(name): value for name, value in line.items()})

    def write_scores(self, step: int, scores: Values) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in scores.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[ShownSample]) -> None:
        for sample in samples:
            tag = f"samples/{sample.name}"
            fields = (("Question", sample.question), ("Expected", sample.reference), ("Answer", sample.prediction))
            text = "\n\n".join(f"**{title}**\n\n{_as_code(field)}" for title, field in fields)
            self._write(Event(step=step, summary=text_summary(tag, text)))
            if sample.figure is not None:
                value = Summary.Value(tag=tag, image=_png(sample.figure))
                self._write(Event(step=step, summary=Summary(value=[value])))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(name: str) -> str:
    """Adds a prefix to names without one: TensorBoard groups by the part before the first slash."""
    return name if "/" in name else f"train/{name}"


def _as_code(text: str) -> str:
    """Returns Markdown that shows a text literally."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def _png(path: Path) -> Summary.Image:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise MossAudioError(f"{path} can't be read ({error}): give the PNG file of a figure") from error
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 26:
        raise MossAudioError(f"{path} must be a PNG image, not another file: give the PNG file of a figure")
    # The IHDR chunk: width, height, bits per channel, colour type (0 grey, 4 grey and alpha, 2 RGB, 6 RGBA).
    width, height, _, kind = struct.unpack(">IIBB", content[16:26])
    channels = {0: 1, 4: 2, 6: 4}.get(kind, 3)
    return Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
