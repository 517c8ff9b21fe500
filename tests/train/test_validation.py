"""Evaluation while a run trains: right, and nothing of the training changed by it; the best kept, the end in time."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from moss_audio_jax import MossAudio, MossAudioError, load_model, load_processor
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.weights.parameters import parameters_of
from tests.conftest import compilations
from tests.train.training_runs import assert_same_end, lines, one_device, until
from train.config import LoopConfig, RunConfig
from train.data import Manifest, Message, SampleMaker, TimedText
from train.data.samples import Sample
from train.evaluation.measures import measure
from train.evaluation.questions import Question, manifest_questions
from train.loop import Outcome, train
from train.running.best import Best, overall
from train.running.validation import Validation, evaluation_shapes, questions_and_texts, scalars


def written(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_the_best_is_kept_and_a_run_ends_that_gets_no_better(
    straight: Path,
    config: RunConfig,
    corpus: Path,
    tmp_path: Path,
):
    """It ends after step 5, and is continued beyond its patience. Nothing else is changed by it.

    No word is right at steps 2, 4 and 6, so the first of these is the best, and at 6 two in a row were not better. The
    evaluation of step 5, which was the last then, counts no more.
    """
    out = tmp_path / "run"
    asked = {
        "every": 2,
        "data": (str(corpus / "clips.jsonl"),),
        "count": 3,
        "max_new_tokens": 4,
        "show_samples": 1,
        "best_metric": "wer",
        "patience": 2,
        "keep_last": 1,
        "checkpoint_every": 3,
    }
    with compilations() as compiled:
        assert not train(until(config, 5, **asked), out, mesh=one_device()).stopped_early
        outcome = train(until(config, 10, **asked), out, mesh=one_device())
    ended = Outcome(6, preempted=False, best=Best("wer", 1.0, step=2, since=2, evaluated=6), stopped_early=True)
    assert outcome == ended
    assert compiled.count("validation_sums") == 1
    assert_same_end(out, straight, config)
    kept = out / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["2", "6"]

    scores, samples = written(out, "scores"), written(out, "samples")
    assert [line["step"] for line in scores] == [line["step"] for line in samples] == [2, 4, 5, 6]
    name = f"eval/{corpus / 'clips.jsonl'}"
    for line in scores:
        items = [value for key, value in line.items() if key.startswith(name) and key.endswith("/items")]
        assert items == [3] and line["eval/unfinished"] == 3
    assert len({(line["name"], line["reference"]) for line in samples}) == 1 and samples[0]["reference"]
    assert scores[0]["eval/loss"] > scores[1]["eval/loss"] > scores[2]["eval/loss"]
    table = (out / "answers" / "4.md").read_text().splitlines()
    assert len(table) == 2 + 3 and "| number 1 |" in table[3]

    best, second = parameters_of(load_model(out / "best")), parameters_of(load_model(kept / "2"))
    newest = parameters_of(load_model(out))
    changed = [path for path in best if not np.array_equal(best[path], newest[path])]
    assert len(changed) > 0.9 * len(best)
    jax.tree.map(np.testing.assert_array_equal, best, second)
    assert load_processor(out / "best").config == load_processor(out).config

    assert train(until(config, 10, **asked), out, mesh=one_device()) == ended  # at once
    assert [line["step"] for line in lines(out)] == list(range(1, 7))
    shutil.rmtree(kept / "2")
    with pytest.raises(MossAudioError, match="its best checkpoint by wer is that of step 2, which is not there"):
        load_model(out / "best")


@pytest.fixture(scope="module")
def evaluated(config: RunConfig, corpus: Path) -> RunConfig:
    """A run whose loss falls from one evaluation to the next."""
    asked = {"every": 2, "data": (str(corpus / "clips.jsonl"),), "count": 3}
    return until(config, 5, **asked, max_new_tokens=4, best_metric="loss", keep_last=1, checkpoint_every=10)


@pytest.fixture(scope="module")
def unstopped(evaluated: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("unstopped")
    return out, train(evaluated, out, mesh=one_device())


def failing_after(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation after that step reads its data and ends with the error, once."""
    ask = Validation._loss_sums

    def fail(self: Validation, model: MossAudio, parameters: dict) -> dict:
        found = ask(self, model, parameters)
        failing.append(len(failing) + 1)
        if 2 * failing[-1] == step:
            raise error
        return found

    failing: list[int] = []
    monkeypatch.setattr(Validation, "_loss_sums", fail)


def assert_same_outcome(found: Path, expected: Path, evaluated: RunConfig) -> None:
    assert_same_end(found, expected, evaluated)
    for name in ("scores", "samples"):
        assert written(found, name) == written(expected, name)
    assert json.loads((found / "best.json").read_text()) == json.loads((expected / "best.json").read_text())
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == sorted(
        path.name for path in (expected / "checkpoints").iterdir()
    )


def test_the_last_step_is_saved_evaluated_and_the_best(unstopped: tuple[Path, Outcome]):
    out, outcome = unstopped
    assert outcome.best is not None and (outcome.best.step, outcome.best.evaluated) == (5, 5)
    assert [line["step"] for line in written(out, "scores")] == [2, 4, 5]
    newest, best = parameters_of(load_model(out)), parameters_of(load_model(out / "best"))
    jax.tree.map(np.testing.assert_array_equal, newest, best)


@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_without_enough_memory_comes_after_the_checkpoint(
    step: int,
    evaluated: RunConfig,
    unstopped: tuple[Path, Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "run"
    failing_after(step, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1.2G of 1.0G"), monkeypatch)
    message = (
        f"after step {step} runs out of device memory .*1.2G of 1.0G.*--validation.batch-size below 16, which resumes"
    )
    with pytest.raises(MossAudioError, match=message):
        train(evaluated, out, mesh=one_device())
    assert (out / "checkpoints" / str(step)).is_dir()
    monkeypatch.undo()
    smaller = until(evaluated, 5, batch_size=2)
    assert train(smaller, out, mesh=one_device()) == unstopped[1]
    assert_same_outcome(out, unstopped[0], evaluated)


def test_a_first_evaluation_is_saved_before_though_no_best_is_looked_for(
    evaluated: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing_after(2, RuntimeError("killed"), monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(until(evaluated, 5, best_metric=None), tmp_path / "run", mesh=one_device())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("written_by", ["a kill after the scores", "a kill before the scores", "an older version"])
def test_what_an_evaluation_found_survives(
    written_by: str, evaluated: RunConfig, unstopped: tuple[Path, Outcome], tmp_path: Path
):
    """A run stopped with the evaluation of its newest checkpoint, 4, recorded or not, ends like one that never was."""
    out = tmp_path / "run"
    train(until(evaluated, 4), out, mesh=one_device())
    best, of_checkpoint = out / "best.json", out / "checkpoints" / "4" / "best" / "metadata"
    if written_by == "an older version":  # it evaluated before it saved, and so counted the evaluation in it
        now = json.loads(best.read_text())
        assert json.loads(of_checkpoint.read_text()) != now
        of_checkpoint.write_text(json.dumps({name: now[name] for name in ("metric", "value", "step", "since")}))
        best.unlink()
        load_model(out / "best")
    else:
        shutil.copy(of_checkpoint, best)  # of step 2
        if written_by == "a kill before the scores":
            lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
            (out / "scores.jsonl").write_text(lines[0] + lines[1][:50])
    assert train(evaluated, out, mesh=one_device()) == unstopped[1]
    assert_same_outcome(out, unstopped[0], evaluated)


def test_the_shapes_of_an_evaluation(config: RunConfig, corpus: Path):
    asking = until(config, 5, every=1, batch_size=3, max_new_tokens=20)
    assert evaluation_shapes(asking, parts=2) == (4, 192, 2, 32, 1)
    items = manifest_questions(corpus / "clips.jsonl", limit=2)
    prompts, tokens, chunks, new_tokens, _ = evaluation_shapes(asking, 1, items)
    assert (prompts, chunks, new_tokens) == (2, 1, 32) and 64 <= tokens < 160


def test_a_run_that_looks_for_no_best_has_none(straight: Path):
    with pytest.raises(MossAudioError, match="does not know its best checkpoint"):
        load_model(straight / "best")


def validation(config: RunConfig, mesh: jax.sharding.Mesh, out: Path, **loop) -> Validation:
    config = until(config, 1, **{"every": 1, **loop})
    processor = load_processor(str(config.model.checkpoint))
    return Validation(config, processor, SampleMaker(processor.tokenizer, processor.config), mesh, out)


def test_the_loss_is_of_all_of_a_long_text(config: RunConfig, tmp_path: Path):
    text, path = "a word " * 100, tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": text}))
    batches = validation(config, one_device(), tmp_path, data=(str(path),))._batches
    assert sum(float(batch.loss_mask.sum()) for _, batch in batches) == len(
        text
    )  # of bytes and an end, all but the first


@pytest.mark.alone
def test_the_loss_is_of_all_tokens_and_the_same_on_a_mesh(
    config: RunConfig,
    corpus: Path,
    tmp_path: Path,
):
    """Against log-probabilities one sample at a time; packed, it takes several batches, of one shape."""
    exact = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=4),
        step=dataclasses.replace(config.step, compute_dtype="float32"),
    )
    data = (str(corpus / "clips.jsonl"), str(corpus / "texts.jsonl"))
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    of_mesh = validation(exact, mesh, tmp_path, data=data, count=5, max_new_tokens=2)
    model, processor = load_model(corpus / "model", mesh=mesh), load_processor(corpus / "model")
    with jax.set_mesh(mesh), compilations() as compiled:
        scores, answers = of_mesh.ask(1, parameters_of(model))
    assert compiled.count("validation_sums") == 1
    assert len(answers) == 5  # a number that the mesh doesn't divide

    maker = SampleMaker(processor.tokenizer, processor.config)
    items = [item for path in data for item in manifest_questions(path, limit=5)]
    samples = [maker.sample(item.name, (*item.turns, Message("assistant", (item.reference,)))) for item in items]
    samples += [maker.sample(example.name, example.text) for example in Manifest(data[1])][:5]
    alone = load_model(corpus / "model")
    of_each = [by_hand(alone, sample) for sample in samples]
    found = {"eval": of_each, f"eval/{data[0]}": of_each[: len(items)], f"eval/{data[1]}": of_each[len(items) :]}
    for name, parts in found.items():
        sums = np.sum(parts, axis=0)
        assert scores[f"{name}/tokens"] == sums[2]
        np.testing.assert_allclose(scores[f"{name}/loss"], sums[0] / sums[2], rtol=1e-5)
        np.testing.assert_allclose(scores[f"{name}/token_accuracy"], sums[1] / sums[2], rtol=1e-6)


def by_hand(model: MossAudio, sample: Sample) -> tuple[float, int, int]:
    """Sum of the losses of the supervised tokens, number of those that are the most likely, number of all."""
    length = sample.num_tokens
    logits = np.asarray(model(sample.inputs)[0], np.float64)[: length - 1]
    targets, learned = np.asarray(sample.inputs.tokens)[0, 1:length], sample.loss_mask[1:]
    losses = logsumexp(logits, axis=-1) - np.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return losses[learned].sum(), (logits.argmax(-1) == targets)[learned].sum(), learned.sum()


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (
            {"best_metric": "f1"},
            "--best-metric must be a metric of the evaluation's data, one of loss, token_accuracy, wer, cer, not 'f1'",
        ),
        ({"best_metric": "loss", "every": None}, "--best-metric needs --validation.every or --eval-data"),
        ({"best_metric": "bleu"}, "one of loss, token_accuracy, wer, cer, not 'bleu'"),
        ({"data": ("long.jsonl",)}, "nothing in .*long.jsonl to evaluate on that fits into 160 tokens and 2"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_before_training(
    loop: dict,
    message: str,
    config: RunConfig,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    write_conversation(tmp_path / "long.jsonl", "far too long " * 100, "yes")
    paths = (*(str(tmp_path / path) for path in loop.get("data", ())), str(corpus / "clips.jsonl"))
    with pytest.raises(MossAudioError, match=message):
        validation(config, one_device(), tmp_path, **loop | {"data": paths[:1]})
    assert ("left out of eval/loss" in caplog.text) == ("data" in loop)


def test_what_is_too_long_is_cut_as_in_training(config: RunConfig, tmp_path: Path):
    write_conversation(tmp_path / "long.jsonl", "Say it.", "far too long " * 100)
    truncating = dataclasses.replace(config, data=dataclasses.replace(config.data, oversize="truncate"))
    cut = validation(truncating, one_device(), tmp_path, data=(str(tmp_path / "long.jsonl"),))
    assert sum(int((batch.inputs.segment_ids > 0).sum()) for _, batch in cut._batches) == config.data.tokens
    assert all(batch.loss_mask[0, -2] == 1 for _, batch in cut._batches)  # up to a token of the answer


def write_conversation(path: Path, question: str, answer: str) -> None:
    turns = [{"role": role, "message_type": "text"} for role in ("user", "assistant")]
    path.write_text(json.dumps({"conversation": [turns[0] | {"content": question}, turns[1] | {"content": answer}]}))


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("loss", [3.0, math.nan, 2.0, 2.0, None], Best("loss", 2.0, step=3, since=2, evaluated=5)),
        ("accuracy", [0.0, 0.0, 0.5, 0.25], Best("accuracy", 0.5, step=3, since=1, evaluated=4)),
        ("aas", [None, math.inf], Best("aas", None, step=None, since=2, evaluated=2)),
    ],
)
def test_the_best_so_far(metric: str, values: list[float | None], best: Best):
    found = Best(metric)
    for step, value in enumerate(values, start=1):
        found = found.after(step, value)
    assert found == best


def test_a_metric_over_several_tasks_is_that_of_all_questions():
    answers = ["one two", "three", "[0.0]a[1.0]", "[0.5]b[2.0][3.0]c[4.0]"]
    labels = [(), (), (TimedText("a", 0.1, 1.0),), (TimedText("b", 0.5, 2.5), TimedText("d", 3.0, 4.0))]
    references = ["one two six", "four", "", ""]
    measures = ["text", "text", "events", "events"]

    def items(sources: str) -> list[Question]:
        parts = zip(sources, measures, references, labels, strict=True)
        return [Question("item", source, kind, (), text, kind, labels=timed) for source, kind, text, timed in parts]

    together, apart = (
        overall(task for tasks in measure(items(sources), answers).values() for task in tasks.values())
        for sources in ("aaaa", "abab")
    )
    assert together.keys() == {"wer", "cer", "aas", "f1"}
    assert apart == pytest.approx(together)
    assert together["wer"] == 2 / 4 and together["f1"] == 2 * 2 / (3 + 3)


def test_a_class_that_nobody_expects_is_no_curve():
    item = Question("item", "a", "events", (), "", "events", labels=(TimedText("hum", 0.0, 1.0),))
    found = dict(scalars("eval", measure([item], ["[0.0]hum[1.0][2.0]mmm[3.0]"])))
    assert {name.split("/")[4] for name in found if "/by_class/" in name} == {"hum"}
    assert found["eval/a/events/predicted_events"] == 2


def test_objectives_that_ask_nothing(config: RunConfig, corpus: Path):
    asking = {"every": 2, "objectives": ("events", "caption")}
    with pytest.raises(MossAudioError, match=r"--validation\.objectives needs --validation\.data: give both"):
        questions_and_texts(until(config, 5, **asking))
    with pytest.raises(
        MossAudioError, match=r"clips.jsonl has no labels for --validation.objectives events, caption: "
    ):
        questions_and_texts(until(config, 5, **asking, data=(str(corpus / "clips.jsonl"),)))


def test_options_that_need_others():
    with pytest.raises(MossAudioError, match="--patience needs --best-metric"):
        LoopConfig(patience=3)
    with pytest.raises(MossAudioError, match="--patience must be 1 or more, not 0"):
        LoopConfig(best_metric="loss", patience=0)
