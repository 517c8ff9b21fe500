"""A run that is trained by reward: in each step answers are drawn from the model, judged, and learned from.

Its directory is that of any run (`train.loop`), with out/rollouts.jsonl beside: answers with their rewards. A run that
was killed and started again ends with bit-identical parameters: a step depends on the state, the seed and the place in
the order of the questions alone, and they are saved together. With several processes each has an engine, and all draw
the same.
"""

import dataclasses
import time
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.storage.paths import AnyPath, to_path
from moss_audio_jax.storage.retries import retried
from moss_audio_jax.tokenizer import Tokenizer
from moss_audio_jax.weights.locate import RUN_MODEL, locate
from moss_audio_jax.weights.parameters import abstract_parameters, build_model
from train.batch import require_even_batch
from train.data import Interrupted
from train.initialization import first_parameters, require_no_random_frozen
from train.optimizer import Parameters
from train.reinforce.config import ReinforceConfig
from train.reinforce.objective import PolicyBatch
from train.reinforce.packing import placed, policy_batch
from train.reinforce.questions import QuestionOrder
from train.reinforce.rewards import RewardError, Rewards
from train.reinforce.rollout import Rollout, Rollouts
from train.reinforce.step import policy_logprobs, policy_step
from train.running.beginning import clean_start, first_or_restored_state, saved_part, source_of, write_files
from train.running.between_steps import BetweenSteps, Outcome, Termination
from train.running.checkpoints import Checkpoints
from train.running.config import ResumeConfig
from train.running.config_file import stored_source
from train.running.directory import is_begun
from train.running.distributed import exit_if_peer_lost, on_first_process
from train.running.overview import overview
from train.running.preflight import sample_maker
from train.running.report import RunReport
from train.running.resume import Record, with_commits
from train.running.validation import Validation
from train.running.watchdog import Watchdog
from train.state import TrainState
from train.step import Metrics, in_compute_dtype


def reinforce(
    config: ReinforceConfig, out: AnyPath, *, mesh: Mesh | None = None, resume: ResumeConfig | None = None
) -> Outcome:
    """Trains by reward until `config.last_step`, from the newest checkpoint in `out` if there is one.

    Arguments and errors: those of `train.loop.train`. A reward that fails raises RewardError, after a checkpoint.
    """
    out, resume = to_path(out), resume or ResumeConfig()
    if resume.skip_steps is not None:
        raise MossAudioError("--skip-steps is for `run`, which reads its data in steps: leave it out")
    before = out if is_begun(out) else None if resume.origin is None else resume.origin[0]
    config = dataclasses.replace(config, model=with_commits(config.model, before))
    source = source_of(config, out, resume)
    model = dataclasses.replace(config, model=source).model_config()
    if source is config.model:
        if source.checkpoint is None:
            raise MossAudioError("reinforce trains a model that answers already: name its checkpoint with --init")
        require_no_random_frozen(config, model)
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    require_even_batch(config.data.batch_size, 1, mesh)
    rewards = Rewards(config.rewards, config.rollout, config.reward_seconds)
    order = QuestionOrder(config)
    rewards.require_judges(order.measures)
    with ExitStack() as stack:
        keep = stack.enter_context(clean_start(out))
        stop = stack.enter_context(Termination())
        watchdog = stack.enter_context(Watchdog(config.loop.stuck_after))
        checkpoints = Checkpoints(out, keep_last=config.loop.keep_last, keep_every=config.loop.keep_every)
        stack.enter_context(checkpoints)
        on_first_process(lambda: retried(out, lambda: write_files(config, resume, model, None, checkpoints, out)))
        checkpoints.reload()
        record = Record.read(out)
        tokenizer = Tokenizer.from_dir(out / RUN_MODEL)
        processor = Processor(tokenizer, model)
        validation = Validation(config, processor, sample_maker(config, tokenizer, model), mesh, out)
        rollouts = stack.enter_context(Rollouts(config, order, rewards, processor, mesh))
        first = stored_source(out)
        if model.lora is not None:
            first = dataclasses.replace(first, checkpoint=str(locate(out / RUN_MODEL).base().path))
        state, start = first_or_restored_state(config, first, model, mesh, checkpoints, rollouts, record, resume)
        checkpoints.prepare(saved_part(state, model))
        reference = None
        if config.objective.kl:
            dtypes = dict.fromkeys(abstract_parameters(model, jnp.float32), config.step.compute_dtype)
            reference = first_parameters(first, model, dtypes=dtypes, seed=config.seed, mesh=mesh)
        report = RunReport(
            out,
            start=start,
            last_step=config.last_step,
            log_every=config.loop.log_every,
            max_skipped_in_a_row=config.loop.max_skipped_in_a_row,
            restarts=record.starts - 1,
            wandb=config.loop.wandb,
        )
        stack.enter_context(report)
        data = [f"{order.count:,} questions" + f" (and {order.unjudged:,} without a measure)" * bool(order.unjudged)]
        answers = f"{config.rollout.samples} answers to each of {config.rollout.prompts} questions"
        report.say(overview(config, data, mesh, state, start, answers))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(exit_if_peer_lost())  # exits first: closing checkpoints would wait for the lost process
        between_steps = (rollouts.get_state, checkpoints, report, validation, stop, watchdog)
        keep()
        return _Run(config, model, *between_steps, config, rollouts, mesh, reference)(state, start)


@dataclasses.dataclass
class _Run(BetweenSteps):
    """Training loop: answers and updates, and between steps checkpoints, evaluations and reports.

    reference: parameters of the first model in the compute dtype, for the KL term; None: without it.
    """

    chosen: ReinforceConfig  # `config`, by its own type
    rollouts: Rollouts
    mesh: Mesh
    reference: Parameters | None

    def __call__(self, state: TrainState, start: int) -> Outcome:
        """Trains from step `start` to the end."""
        self._graphdef = nnx.split(build_model(self.model, dict(abstract_parameters(self.model, jnp.float32))))[0]
        self._without_groups = 0
        self.begin(state, start)
        while self.goes_on():
            step = self.step + 1
            self.watchdog.reached(f"the answers of step {step}", long=self.step == start)
            copies = in_compute_dtype(state.trainable | state.frozen, self.config.step)
            try:
                rollout = self.rollouts(build_model(self.model, copies), step, self.stop.is_requested)
            except Interrupted:
                break
            except RewardError:
                if self.step > self.saved:
                    self.save(state)
                raise
            self.step = step
            self.watchdog.reached(f"the updates of step {step}", long=step == start + 1)
            began = time.perf_counter()
            batches = [placed(batch, self.mesh) for batch in self._batches(rollout)]
            batches = [self._with_old(batch, copies, len(batches) > 1) for batch in batches]
            del copies
            state, metrics = self._updated(state, batches)
            jax.block_until_ready(metrics)  # the answers of the next step need the update anyway
            self.stop.save_on_ctrl_c()
            figures = self._figures(rollout, batches, began)
            self.report.add(step, metrics, lambda figures=figures: figures)
            self.report.flush()
            shown = rollout.asked[: self.config.validation.show_samples]
            self.report.add_rollouts(step, [group.shown() for group in shown])
            self.after(state)
        return self.end(state)

    def _batches(self, rollout: Rollout) -> list[PolicyBatch]:
        """Makes the batches of the updates: each of an equal part of the groups."""
        config, audio = self.chosen, self.model.audio_config
        assert audio.chunk_frames is not None  # `SampleMaker` requires it
        shape = (config.data.budget, config.data.batch_size, audio.chunk_frames, audio.num_mel_bins)
        count = min(config.objective.minibatches, len(rollout.groups))
        parts = np.array_split(np.arange(len(rollout.groups)), count) if count else []
        algorithm = config.objective.algorithm
        return [policy_batch([rollout.groups[index] for index in part], algorithm, *shape) for part in parts]

    def _with_old(self, batch: PolicyBatch, copies: Parameters, several: bool) -> PolicyBatch:
        """Adds the log-probabilities before the updates, if there are several, and those of the first model."""

        def logprobs(parameters: Parameters) -> Any:
            temperature = self.chosen.rollout.sampling.temperature
            return policy_logprobs(self._graphdef, self.config.step, temperature, parameters, batch)

        old = logprobs(copies) if several else None
        reference = None if self.reference is None else logprobs(self.reference)
        return dataclasses.replace(batch, old=old, reference=reference)

    def _updated(self, state: TrainState, batches: list[PolicyBatch]) -> tuple[TrainState, Metrics]:
        """Returns the state after the updates of a step, and their mean metrics."""
        config, found = self.chosen, []
        if not batches:
            return self._passed_over(state)
        self._without_groups = 0
        for batch in batches:
            state, metrics = policy_step(
                self._graphdef,
                config.step,
                config.optimizer,
                config.objective,
                config.rollout.sampling.temperature,
                state,
                batch,
                batch is batches[-1],
            )
            found.append(metrics)
        totals = {name: value for name, value in found[-1].items() if name.startswith("skipped_")}
        return state, _means(found) | totals

    def _passed_over(self, state: TrainState) -> tuple[TrainState, Metrics]:
        """Counts a step without a group to learn from; raises MossAudioError after too many."""
        self._without_groups += 1
        if self._without_groups >= self.config.loop.max_skipped_in_a_row:
            raise MossAudioError(
                f"step {self.step}: in {self._without_groups} steps in a row all answers to each question had the same "
                "reward: give questions that the model answers right now and then, or rewards that tell answers apart"
            )
        state = dataclasses.replace(state, step=state.step + 1)
        skipped = {"skipped": 1, "skipped_total": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, {"loss": jnp.float32(jnp.nan)} | {name: jnp.int32(value) for name, value in skipped.items()}

    def _figures(self, rollout: Rollout, batches: list[PolicyBatch], began: float) -> dict[str, float]:
        """Returns the figures of a step beside its metrics."""
        seconds = time.perf_counter() - began
        prompts = sum(len(group.encoded.ids) * len(group.ids) for group in rollout.groups)
        packed = float(prompts + sum(len(ids) for group in rollout.groups for ids in group.ids))
        room = sum(batch.inputs.tokens.size for batch in batches)
        return rollout.figures | {
            "packed_tokens": packed,
            "token_fill": packed / room if room else 0.0,
            "microbatches": float(sum(len(batch.targets) for batch in batches)),
            "update_seconds": seconds,
            "update_tokens_per_second": packed / seconds,
            "rollout_tokens_per_second": rollout.figures["drawn_tokens"] / rollout.figures["rollout_seconds"],
            "data_wait": 0.0,
        }


@jax.jit
def _means(updates: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *values: sum(values) / len(values), *updates)
