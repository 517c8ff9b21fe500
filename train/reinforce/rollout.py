"""Answers of a step: groups of them to questions, drawn from the present model by an engine, with their rewards.

A question whose answers all have the same reward teaches nothing: it is dropped, and the next one of the order is asked
instead. What is drawn depends on the parameters, the run's seed, the step and the place in the order alone: an answer's
seed is of (run, step, place, number of the answer).
"""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.errors import MossAudioError, StorageError
from moss_audio_jax.inference.engine import Engine
from moss_audio_jax.inference.requests import Handle, Reply, Request
from moss_audio_jax.inputs import ModelInputs, encode_sequence
from moss_audio_jax.model import MossAudio
from moss_audio_jax.processor import Processor
from moss_audio_jax.sharding import num_parts
from train.data import Interrupted
from train.data.budget import TooLong
from train.evaluation.answers import encode_question, whole_batch
from train.evaluation.questions import Question
from train.reinforce.config import ReinforceConfig
from train.reinforce.questions import QuestionOrder
from train.reinforce.rewards import Answered, RewardError, Rewards
from train.running.distributed import from_first_process
from train.running.sink import RolloutGroup

log = logging.getLogger(__name__)

EVERY = 32  # tokens that the engine draws before the host looks, unless an answer ends and another waits
POLL_SECONDS = 0.2  # between two checks of `stopped`


class Encoded(NamedTuple):
    """A question as the model reads it. inputs: a batch of one sequence, its chunks in bfloat16."""

    question: Question
    ids: list[int]
    mels: list[np.ndarray]
    inputs: ModelInputs


@dataclasses.dataclass(frozen=True)
class Group:
    """A question and its answers. logprobs: of each drawn id. reward: float64 [samples], weighted; rewards: by name."""

    encoded: Encoded
    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    answers: Sequence[Answered]
    reward: np.ndarray
    rewards: dict[str, list[float]]

    @property
    def varies(self) -> bool:
        return bool(self.reward.max() > self.reward.min())

    def shown(self) -> RolloutGroup:
        question = self.encoded.question
        texts, tokens = [answer.text for answer in self.answers], [answer.tokens for answer in self.answers]
        return RolloutGroup(
            question.name, question.text, question.reference, texts, tokens, self.reward.tolist(), self.rewards
        )


class Rollout(NamedTuple):
    """groups: those to train on. figures: of all answers that were drawn. asked: all groups."""

    groups: list[Group]
    asked: list[Group]
    figures: dict[str, float]


class Rollouts:
    """Draws the answers of each step in turn. Use it as a context manager; its state is the place in the order."""

    def __init__(
        self, config: ReinforceConfig, order: QuestionOrder, rewards: Rewards, processor: Processor, mesh: Mesh
    ):
        self._config, self._order, self._rewards, self._processor = config, order, rewards, processor
        chosen = config.rollout
        parts = num_parts("batch", mesh)
        self._slots = whole_batch(min(chosen.slots, chosen.prompts * chosen.samples), parts)
        self._length = chosen.length or config.data.tokens
        self.place = 0
        self._pool = ThreadPoolExecutor(thread_name_prefix="questions")
        self._coming: dict[int, Future[Encoded]] = {}

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get_state(self) -> dict[str, Any]:
        return {"next": self.place, "questions": self._order.count}

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> bool:
        """Goes to a place in the order; to its beginning, and returns False, if these are other questions."""
        same = state.get("questions") == self._order.count
        if not same and not allow_other_data:
            raise MossAudioError(
                f"the run was saved with {state.get('questions')} questions, and now there are {self._order.count}: "
                "restore the data, or give --allow-change questions, which begins with them anew"
            )
        self.place = state["next"] if same else 0
        return same

    def __call__(self, model: MossAudio, step: int, stopped: Callable[[], bool] = lambda: False) -> Rollout:
        """Draws and judges the answers of a step, and moves on in the order.

        Raises Interrupted, and stays where it is, if `stopped()` while answers are drawn. Raises RewardError for a
        reward that fails.
        """
        chosen, place = self._config.rollout, self.place
        most = int(chosen.most_prompts * chosen.prompts)
        asked: list[Group] = []
        kept: list[Group] = []
        seconds = {"rollout_seconds": 0.0, "reward_seconds": 0.0}
        left_out = Counter({"too_long": 0, "unreadable": 0})
        with Engine(model, self._processor, slots=self._slots, max_length=self._length, every=EVERY) as engine:
            while len(kept) < chosen.prompts and len(asked) < most:
                wanted = min(chosen.prompts - len(kept), most - len(asked))
                taken, place, skipped = self._taken(place, wanted)
                left_out.update(skipped)
                began = time.perf_counter()
                replies = self._replies(engine, taken, step, stopped)
                drawn = time.perf_counter()
                groups = self._judged([encoded for _, encoded in taken], replies)
                seconds["rollout_seconds"] += drawn - began
                seconds["reward_seconds"] += time.perf_counter() - drawn
                asked += groups
                kept += [group for group in groups if group.varies]
        self.place = place
        for ahead in range(place, place + chosen.prompts):  # while the update runs
            self._encoding(ahead)
        return Rollout(kept, asked, _figures(asked, kept) | seconds | left_out)

    def _taken(self, place: int, count: int) -> tuple[list[tuple[int, Encoded]], int, Counter[str]]:
        """Returns the next usable questions with their places, the place after them, and the numbers left out."""
        taken: list[tuple[int, Encoded]] = []
        begin, in_a_row, skipped = place, 0, Counter[str]()
        most = min(self._config.data.max_skips_in_a_row, self._order.count)
        for ahead in range(place, place + count):
            self._encoding(ahead)
        while len(taken) < count:
            try:
                taken.append((place, self._usable(place)))
                in_a_row = 0
            except StorageError:  # not the fault of the question
                raise
            except MossAudioError as error:
                kind = "too_long" if isinstance(error, TooLong) else "unreadable"
                log.warning("skipped (%s): %s", kind.replace("_", " "), error)
                skipped[kind] += 1
                in_a_row += 1
                if in_a_row >= most:
                    raise MossAudioError(
                        f"none of {in_a_row} questions in a row could be used; the last: {error}"
                    ) from error
            place += 1
        for done in [known for known in self._coming if known < begin]:
            del self._coming[done]
        return taken, place, skipped

    def _usable(self, place: int) -> Encoded:
        """Waits for the question at a place. Raises TooLong, or MossAudioError if its audio can't be read."""
        encoded = self._encoding(place).result()
        chunks, new = encoded.inputs.audio_chunks.shape[1], self._config.rollout.max_new_tokens
        if len(encoded.ids) + new > self._length or chunks > self._config.data.chunks:
            raise TooLong(
                f"{encoded.question.name}: {len(encoded.ids)} tokens and {chunks} chunks of audio, with "
                f"--rollout.max-new-tokens {new}, must fit into {self._length} tokens and {self._config.data.chunks} "
                "chunks: raise --data.tokens, --rollout.length or --data.chunks"
            )
        return encoded

    def _encoding(self, place: int) -> Future[Encoded]:
        if place not in self._coming:
            self._coming[place] = self._pool.submit(self._encode, place)
        return self._coming[place]

    def _encode(self, place: int) -> Encoded:
        question = self._order[place]
        ids, mels = encode_question(self._processor, question, None)
        inputs = encode_sequence(ids, mels, self._processor.config)
        inputs = dataclasses.replace(inputs, audio_chunks=inputs.audio_chunks.astype(ml_dtypes.bfloat16))
        return Encoded(question, ids, mels, inputs)

    def _replies(
        self, engine: Engine, taken: Sequence[tuple[int, Encoded]], step: int, stopped: Callable[[], bool]
    ) -> list[Reply]:
        chosen = self._config.rollout
        requests = [
            Request(
                "",
                max_new_tokens=chosen.max_new_tokens,
                sampling=chosen.sampling,
                seed=seed_of(self._config.seed, step, place),
                n=chosen.samples,
                logprobs="drawn",
                whole=True,
            )
            for place, _ in taken
        ]
        triples = zip(requests, taken, strict=True)
        handles = engine.submit_all((request, encoded.ids, encoded.mels) for request, (_, encoded) in triples)
        return [_result(handle, stopped) for handle in handles]

    def _judged(self, encoded: Sequence[Encoded], replies: Sequence[Reply]) -> list[Group]:
        """Returns the groups with their rewards, which the first process computes."""
        of_groups = [(reply, *reply.others) for reply in replies]
        answers = [
            [Answered(self._processor.decode(one.ids), len(one.ids), one.finish_reason == "stop") for one in replies]
            for replies in of_groups
        ]
        questions = [one.question for one, group in zip(encoded, answers, strict=True) for _ in group]
        scores, error = None, None
        if jax.process_index() == 0:
            try:
                scores = self._rewards(questions, [answer for group in answers for answer in group])
            except RewardError as raised:
                error = raised
        scores = from_first_process(scores)
        if scores is None:
            raise error or RewardError("a reward has failed in process 0 of the run: see its message")
        total = self._rewards.total(scores)
        groups, begin = [], 0
        for one, replies, group in zip(encoded, of_groups, answers, strict=True):
            here = slice(begin, begin + len(group))
            begin += len(group)
            of_group = {name: found[here] for name, found in scores.items()}
            ids, logprobs = [reply.ids for reply in replies], [reply.logprobs for reply in replies]
            groups.append(Group(one, ids, logprobs, group, total[here], of_group))
        return groups


def seed_of(run: int, step: int, place: int) -> int:
    """Returns the seed of the first answer to the question at a place; the next ones have the next seeds."""
    return int(np.random.SeedSequence([run, step, place]).generate_state(1, np.uint64)[0])


def _result(handle: Handle, stopped: Callable[[], bool]) -> Reply:
    """Waits for all answers to a question."""
    while True:
        try:
            return handle.result(POLL_SECONDS)
        except TimeoutError:
            if stopped():
                raise Interrupted from None


def _figures(asked: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """Returns figures of the answers that were drawn in a step."""
    answers = [answer for group in asked for answer in group.answers]
    tokens = np.array([answer.tokens for answer in answers])
    rewards = {
        f"reward/{name}": float(np.mean([value for group in asked for value in group.rewards[name]]))
        for name in asked[0].rewards
    }
    return {
        "reward": float(np.mean([group.reward for group in asked])),
        "reward_deviation": float(np.mean([group.reward.std(ddof=1) for group in asked])),
        **rewards,
        "groups": len(asked),
        "groups_trained": len(kept),
        "groups_kept": len(kept) / len(asked),
        "answer_tokens": float(tokens.mean()),
        "longest_answer": float(tokens.max()),
        "drawn_tokens": float(tokens.sum()),
        "unfinished": float(np.mean([not answer.finished for answer in answers])),
    }
