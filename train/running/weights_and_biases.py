"""Metrics, scores and answers of a run in Weights & Biases."""

from collections.abc import Sequence

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import Path, atomic_write, exists, local_directory, read_text
from train.running.directory import CONFIG_FILE, WANDB_FILE
from train.running.sink import ANSWER_COLUMNS, ShownSample, Sink, Values, answer_row


class WeightsAndBiases(Sink):
    """Run in Weights & Biases. It ignores steps that it already has; repeated steps have the same numbers."""

    def __init__(self, out: Path, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MossAudioError(
                f"the project {project!r} asks for Weights & Biases, which is not installed: "
                "pip install 'moss-audio-jax[wandb]', or leave --wandb out"
            ) from error
        id_file = out / WANDB_FILE
        known = read_text(id_file).strip() if exists(id_file) else None
        config = read_json(out / CONFIG_FILE)
        self._run = wandb.init(project=project, id=known, resume="allow", dir=str(local_directory(out)), config=config)
        atomic_write(id_file, self._run.id + "\n")
        self._table = wandb.Table

    def write(self, step: int, line: Values) -> None:
        self._run.log(dict(line), step=step)

    def write_scores(self, step: int, scores: Values) -> None:
        self._run.log(dict(scores), step=step)

    def write_answers(self, step: int, answers: Sequence[ShownSample]) -> None:
        table = self._table(columns=list(ANSWER_COLUMNS), data=list(map(answer_row, answers)))
        self._run.log({"eval/answers": table}, step=step)

    def close(self) -> None:
        self._run.finish()
