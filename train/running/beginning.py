"""Beginning of a run: its files, and the state that it starts or resumes from."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moss_audio_jax.config import MossAudioConfig
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, children, nothing_left
from moss_audio_jax.weights.locate import RUN_CHECKPOINTS, RUN_MODEL
from moss_audio_jax.weights.parameters import abstract_parameters
from train.config import ModelSource, RunConfig
from train.data import ExampleOrder
from train.initialization import first_parameters, frozen_dtypes
from train.running.checkpoints import Checkpoints
from train.running.config import ResumeConfig
from train.running.directory import CONFIG_FILE, RECORDS, is_begun
from train.running.model_directory import copy_model_files, write_model_files
from train.running.resume import Record, compare, rewinds, write_or_check_config
from train.state import TrainState, abstract_state, new_state, with_new_data


class Resumable(Protocol):
    """Data with a position, which a checkpoint holds."""

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> bool:
        """Goes to a position. Returns False for the beginning of other data, if these are allowed."""
        ...


def clean_start(out: Path) -> AbstractContextManager[Callable[[], None]]:
    """Removes the files of a start that fails before training begins. Keeps those of a run with a checkpoint."""
    if jax.process_index() or is_begun(out):
        return nullcontext(lambda: None)
    return nothing_left(out, (CONFIG_FILE, RUN_MODEL, RUN_CHECKPOINTS, *RECORDS))


def source_of(config: RunConfig, out: Path, resume: ResumeConfig) -> ModelSource:
    """Source of the model's configuration and tokenizer. A run with a checkpoint has them in its own directory."""
    if is_begun(out):
        return ModelSource(checkpoint=str(out))
    if resume.from_step is not None:
        raise MossAudioError(
            f"--from-step {resume.from_step}: {out} holds no run with a checkpoint: name another --out"
        )
    if resume.origin is not None:
        run, step = resume.origin
        there = sorted(int(path.name) for path in children(run / RUN_CHECKPOINTS) if path.name.isdecimal())
        if step not in there:
            raise MossAudioError(
                f"--branch {resume.branch}: {run} has no checkpoint of step {step}, only of "
                f"{', '.join(map(str, there)) or 'none'}: name one of these"
            )
        return ModelSource(checkpoint=str(run))
    return config.model


def write_files(
    config: RunConfig,
    resume: ResumeConfig,
    model: MossAudioConfig,
    order: ExampleOrder | None,
    checkpoints: Checkpoints,
    out: Path,
) -> None:
    """Writes config.json and model/ of the run. With `from_step` first moves later checkpoints aside."""
    begun, step = is_begun(out), max(checkpoints.steps, default=0)
    if begun and resume.from_step is not None and rewinds(Record.read(out), resume):
        step = resume.from_step
        compare(config, out, step, resume)
        checkpoints.rewind(step)
    _require_ahead(resume, step, Record.read(out) if begun else None)
    write_or_check_config(config, out, begun=begun, step=step, resume=resume)
    if not begun:
        (out / RUN_MODEL).rmtree(missing_ok=True)  # left by a start without a checkpoint, perhaps of another model
        if resume.origin is not None:
            copy_model_files(resume.origin[0] / RUN_MODEL, out / RUN_MODEL)
    write_model_files(config.model, model, order, out / RUN_MODEL)


def _require_ahead(resume: ResumeConfig, step: int, record: Record | None) -> None:
    """Raises MossAudioError if steps to skip were already trained, unless the run's record has them as skipped."""
    behind = [skipped for skipped in resume.skipped if skipped <= step]
    if behind and not (record and record.skipped_steps.issuperset(resume.skipped)):
        raise MossAudioError(
            f"--skip-steps {resume.skip_steps}: the run resumes after step {step} and has already trained on steps "
            f"of this range: give --from-step with a checkpoint before step {behind[0]}, or later steps"
        )


def saved_part(state: TrainState, model: MossAudioConfig) -> TrainState:
    """Returns the part of a state that checkpoints hold. With LoRA the frozen parameters are read from the base."""
    return state if model.lora is None else dataclasses.replace(state, frozen={})


def first_or_restored_state(
    config: RunConfig,
    source: ModelSource,
    model: MossAudioConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    data: Resumable,
    record: Record,
    resume: ResumeConfig,
) -> tuple[TrainState, int]:
    """Returns the initial or restored state and its step. Sets the position of `data` to match.

    source: source of the first parameters. With LoRA it is the base that the run began with.
    """
    # 1. Restore from the run's own checkpoints, or for a new branch from the other run.
    dtypes = frozen_dtypes(config, abstract_parameters(model, jnp.float32))
    target = abstract_state(model, config.optimizer, frozen_dtypes=dtypes, mesh=mesh)
    saved = saved_part(target, model)
    restored = checkpoints.restore(saved)
    first = functools.partial(first_parameters, dtypes=dtypes, seed=config.seed, mesh=mesh)
    is_branch = restored is None and resume.origin is not None
    if restored is None and resume.origin is not None:
        with Checkpoints(resume.origin[0], read_only=True) as others:
            restored = others.restore_step(resume.origin[1], saved)
    # 2. A new run begins at step 0 with its first parameters.
    if restored is None:
        return new_state(first(source, model), model, config.optimizer, seed=config.seed, mesh=mesh), 0
    state, data_state = restored
    if model.lora is not None:
        parameters = first(source, model)
        state = dataclasses.replace(state, frozen={path: parameters[path] for path in target.frozen})
    if is_branch and not resume.branch_optimizer:
        parameters = state.trainable | state.frozen
        del restored, state  # frees the moments
        return new_state(parameters, model, config.optimizer, seed=config.seed, mesh=mesh), 0
    # 3. Resume the data where the checkpoint was saved, unless options of the data have changed.
    step = int(state.step)
    if not data.set_state(data_state, allow_other_data=is_branch or record.has_other_data_since(step)):
        state = with_new_data(state)  # forgets statistics of the old data
    return state, step
