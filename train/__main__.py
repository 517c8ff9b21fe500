"""`python -m train`, or `moss-audio-train`: training data made ready, training, and evaluation."""

import os
import signal
import sys

if (
    (__name__ == "__main__" or os.path.basename(sys.argv[0]).startswith("moss-audio"))  # not imported by a test
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # during the imports below, which take seconds

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moss_audio_jax.commands.cli import Commands, PathArgument, run_cli, storage_refusal
from moss_audio_jax.commands.interruption import INTERRUPTED, end, ends_on_ctrl_c
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.storage.paths import Path, require_writable
from moss_audio_jax.storage.retries import retried

if TYPE_CHECKING:
    from train.ablation import AblationConfig
    from train.config import RunConfig
    from train.evaluation.evaluate import EvaluationConfig
    from train.running.resume import ResumeConfig

PREEMPTED = 75  # exit code, EX_TEMPFAIL: run it again

app = Commands()


@app.command
def prepare(
    manifest: tyro.conf.Positional[PathArgument],
    out: tyro.conf.Positional[PathArgument],
    /,
    *,
    shards: int | None = None,
    shard: str | None = None,
) -> None:
    """Packs a manifest and the audio it names into ArrayRecord shards, which training reads like the manifest itself.

    A finished shard is left alone, so an interrupted call is simply repeated. Machines may share the work, each
    writing a shard of its own into the same directory.

    Args:
        manifest: JSON lines; `train/data/manifest.py` says what a line may hold.
        out: The directory of the shards.
        shards: Write all of so many shards.
        shard: Write one only: `2/8` is number 2 of 8, counted from 0.
    """
    from train.data.shards import prepare as write

    logging.basicConfig(format="%(message)s")  # names the clips that can't be read
    number, total = _which_shard(shards, shard)
    unreadable = 0
    for report in write(manifest, out, total, only=number):
        state = "already there" if report.already_there else f"{report.examples} examples"
        print(f"{report.path}: {state}, {report.unreadable} of them unreadable")
        unreadable += report.unreadable
    if unreadable:
        print(f"{unreadable} examples hold no audio, only the reason; training skips and counts them", file=sys.stderr)


def _which_shard(shards: int | None, shard: str | None) -> tuple[int | None, int]:
    """The number of the one shard to write (None: all), and how many there are."""
    if shard is None:
        if shards is None:
            raise MossAudioError("prepare needs --shards N for all shards, or --shard I/N for one of them")
        return None, shards
    number, slash, total = shard.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise MossAudioError(f"--shard must be I/N, such as 2/8, not {shard!r}")
    if shards not in (None, int(total)):
        raise MossAudioError(
            f"--shards {shards} and --shard {shard} name different numbers of shards: give one of them"
        )
    return int(number), int(total)


def scenes_command() -> Callable[..., None]:
    from train.data.scenes import SceneConfig

    defaults = SceneConfig()

    def scenes(
        out: tyro.conf.Positional[PathArgument],
        /,
        *,
        count: int,
        seed: int = 0,
        config: Annotated[SceneConfig, tyro.conf.arg(name="scenes")] = defaults,
    ) -> None:
        """Writes sound scenes as audio files and a manifest: data to try a fine-tune with.

        A line of OUT/manifest.jsonl is a conversation about a clip, with labels of what is heard.

        Args:
            out: A new directory.
            count: How many.
            seed: Makes other scenes; take another for evaluation than for training.
            config: What they are made of, and what is asked about them.
        """
        from train.data.scene_files import write_scenes

        print(f"wrote {write_scenes(out, count, seed, config)}, {count} conversations about as many clips")

    return scenes


def check_command(arguments: list[str]) -> Callable[..., None]:
    """The command `check`; its options are those of `run` for the recipe that the arguments name."""
    from train.config import RecipeName, RunConfig

    recipe_config = _named_recipe(arguments, "finetune")

    def check(
        manifest: tyro.conf.Positional[PathArgument],
        /,
        *,
        group: str | None = None,
        recipe: RecipeName = "finetune",
        init: str | None = None,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = recipe_config,
    ) -> None:
        """Says what is wrong with each line of a manifest, as far as can be told without decoding its audio.

        Writes nothing. Exits with 1 if an example can't be trained on: its line is invalid or has nothing for the
        objectives of its group, its audio is missing, empty or no audio, its labels go beyond the clip, or it is too
        long.

        Args:
            manifest: JSON lines; `train/data/manifest.py` says what a line may hold.
            group: The group of the mixture that it is for, such as speech; by default the one that names it (as with
                --mixture.speech.paths), or else that of --data. The group's objectives are what is asked.
            recipe: Where the other options get their defaults; of them, the data's say what is too long.
            init: The checkpoint to train, short for --model.checkpoint: with its tokenizer, texts count too.
            config: What the recipe says, and may be said otherwise.
        """
        _check(manifest, config, init, group)

    return check


def _check(manifest: Path, config: "RunConfig", init: str | None, group: str | None) -> None:
    from train.config import with_paths
    from train.running.preflight import check_of

    check = check_of(with_paths(config, init), manifest, group)
    for problem in check.problems():
        print(problem)
    for note in check.notes():
        print(note)
    print(check.summary())
    if check.unusable or check.too_long:
        sys.exit(1)


def run_command(arguments: list[str]) -> Callable[..., None]:
    """The command `run`; the run in `--out`, that of `--branch` or else the recipe gives its options their defaults."""
    from train.config import RecipeName, RunConfig, with_named_groups, with_paths
    from train.running.distributed import DistributedConfig, join
    from train.running.resume import ResumeConfig

    one_process, at_the_newest = DistributedConfig(), ResumeConfig()
    stored = _stored_config(arguments)
    defaults = with_named_groups(stored, arguments) if stored else _named_recipe(arguments, "pretrain_stage1")

    def run(
        *,
        recipe: RecipeName | None = None,
        out: PathArgument,
        init: str | None = None,
        data: tuple[str, ...] = (),
        eval_data: tuple[str, ...] = (),
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = defaults,
        resume: Annotated[ResumeConfig, tyro.conf.arg(name="")] = at_the_newest,
        processes: Annotated[DistributedConfig, tyro.conf.arg(name="")] = one_process,
    ) -> None:
        """Trains, and resumes from the newest checkpoint in the directory if there is one.

        SIGTERM and Ctrl-C make a checkpoint and exit with code 75; the same command then resumes, to the same result.
        Before the first step, and the second time, Ctrl-C ends the run at once with code 130.
        A run that resumes keeps the options that it was begun with; those that are given are compared with them.

        Args:
            recipe: Where the options of a new run get their defaults.
            out: The directory of the run: config.json, metrics.jsonl, checkpoints/.
            init: The checkpoint to begin with, short for --model.checkpoint.
            data: Conversations or labelled clips to learn, short for --mixture.conversations.paths.
            eval_data: What to evaluate on, short for --evaluate-data; at each checkpoint if nothing says how often.
            config: What the recipe says, and may be said otherwise.
            resume: Where a run resumes, and which of its options may be others than it was begun with.
            processes: How the processes of a run find each other, if there are several.
        """
        _require_recipe(recipe, stored)
        settled = with_paths(config, init, data, eval_data, default=stored)
        join(processes)  # before anything else of JAX
        _train(settled, out, resume)

    return run


def _require_recipe(recipe: str | None, stored: "RunConfig | None") -> None:
    from train.config import RECIPES

    if recipe is None and stored is None:
        raise MossAudioError(f"--recipe is needed to begin a run: give one of {', '.join(RECIPES)}")
    begun_with = stored and stored.recipe
    if recipe is not None and begun_with is not None and recipe != begun_with:
        raise MossAudioError(f"--recipe is {recipe}, and the run was begun with {begun_with}: give that, or none")


def _stored_config(arguments: list[str]) -> "RunConfig | None":
    """Of the run that `--out` holds, or of the one that `--branch` begins from; None for a new run."""
    from train.running.resume import ResumeConfig, is_begun, stored_config

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--out")
    scan.add_argument("--branch")
    scanned = scan.parse_known_args(arguments)[0]
    try:
        if scanned.out is not None and is_begun(scanned.out):
            return stored_config(scanned.out)
        if scanned.branch is not None and (origin := ResumeConfig(branch=scanned.branch).origin):
            return stored_config(origin[0])
    except (MossAudioError, OSError) as error:
        print(f"error: {storage_refusal(error) or error}", file=sys.stderr)
        sys.exit(2)
    return None


def _named_recipe(arguments: list[str], default: str) -> "RunConfig":
    """The recipe that `--recipe` names, or else the default, with the groups of new names that the arguments have."""
    from train.config import RECIPES, with_named_groups

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--recipe")
    recipe = RECIPES.get(scan.parse_known_args(arguments)[0].recipe, RECIPES[default])
    return with_named_groups(recipe, arguments)


def plan_command(arguments: list[str]) -> Callable[..., None]:
    """The command `plan`; its options are those of `run` for the recipe that the arguments name, and some more."""
    from train.config import RecipeName, RunConfig, with_paths

    recipe_config = _named_recipe(arguments, "pretrain_stage2")

    def plan(
        *,
        topology: str,
        recipe: RecipeName = "pretrain_stage2",
        mode: Literal["train", "generate", "load"] = "train",
        model: str | None = None,
        slices: int = 1,
        batch: int | None = None,
        seq: int | None = None,
        chunks: int | None = None,
        segments: int = 1,
        propose_batch: bool = False,
        eval_data: tuple[str, ...] = (),
        json: bool = False,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = recipe_config,
    ) -> None:
        """Compiles a recipe's step for a TPU, on any machine; no TPU needed. Says whether it fits, and how fast it
        might be.

        Exits with 1 if it does not fit, having tried what would.

        Args:
            topology: Kind and shape of the TPU, such as v5e:2x4, v5p:4x4x4 or v6e:8x8, or the name that it is rented
                by, such as v5litepod-8, v5p-128 or v6e-64.
            recipe: Where the other options get their defaults.
            mode: A step of training; answering (prompts read, a token decoded), in bfloat16; or loading alone.
            model: Size, short for --model.preset.
            slices: How many such TPUs, each with a replica.
            batch: Sequences of a step (or prompts) in all, short for --data.batch-size.
            seq: Tokens of a sequence (of a prompt and its answer), short for --data.tokens.
            chunks: Audio chunks of a sequence, short for --data.chunks; by default in the recipe's proportion.
            segments: Clips packed into a sequence, of equal length: attention within them is less work that counts.
            propose_batch: If it fits, find the largest batch that does, the batch doubled again and again. Compiles
                two more programs or three. The evaluation is planned for the batch that was given.
            eval_data: What the run will be evaluated on, as for `run`: the headers of its clips tell how long questions
                are. With it, or --evaluate-every, the memory of the evaluation is planned too.
            json: Print one JSON object instead of a table.
            config: What the recipe says, and may be said otherwise.
        """
        from json import dumps

        from train.planning.plan import plan_table, with_sizes

        config = with_paths(with_sizes(config, model, slices, batch, seq, chunks), eval_data=eval_data)
        report = _plan(config, topology, mode, slices, segments, propose_batch)
        print(dumps(report, indent=2) if json else plan_table(report))
        if not (report["fits"] and report.get("evaluation", report)["fits"]):
            sys.exit(1)

    return plan


def _plan(
    config: "RunConfig", topology: str, mode: str, slices: int, segments: int, propose_batch: bool
) -> dict[str, Any]:
    from train.planning import plan
    from train.planning.plan_evaluation import plan_evaluation
    from train.planning.topology import topology_devices, topology_of

    if mode != "train" and config.lora is not None and config.lora.int8:
        raise MossAudioError(f"lora.int8 is for training: leave it out of --mode {mode}, where no kernel is int8")
    if mode != "train" and (segments != 1 or propose_batch):
        raise MossAudioError(f"--segments and --propose-batch are for training: leave them out of --mode {mode}")
    if not 1 <= segments <= config.data.tokens:
        raise MossAudioError(
            f"--segments must be from 1 to the {config.data.tokens} tokens of a sequence, not {segments}"
        )
    topology = topology_of(topology)
    devices = topology_devices(topology, slices)
    named = {"model": config.model.preset, "topology": topology, "slices": slices, "chips": len(devices)}
    if mode == "generate":
        data = config.data
        return named | plan.plan_generation(
            config.model_config(),
            devices,
            tensor=config.mesh.tensor,
            prompts=data.batch_size,
            slots=data.tokens,
            chunks=data.chunks,
        )
    if mode == "load":
        return named | plan.plan_load(config.model_config(), devices, tensor=config.mesh.tensor)
    report = named | plan.plan_step(config, devices, segments)
    if not report["fits"]:
        report["would_fit"] = plan.what_would_fit(config, devices)
    elif propose_batch:
        report["largest_batch"] = plan.propose_batch(config, devices, report)
    if report["fits"] and config.loop.evaluate_every is not None:
        report["evaluation"] = plan_evaluation(config, devices, report)
    return report


def _train(config: "RunConfig", out: Path, resume: "ResumeConfig") -> None:
    import jax

    from moss_audio_jax.weights.locate import RUN_BEST
    from train.loop import train

    logging.basicConfig(format="%(message)s", force=True)  # names the examples that are skipped
    # Orbax logs the traceback of a checkpoint that can't be written, which is then raised and said in a sentence.
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())
    outcome = train(config, out, resume=resume)
    first = jax.process_index() == 0
    if outcome.preempted:
        if first:
            print(f"stopped after step {outcome.step}, which is saved: run the same command to resume", file=sys.stderr)
        sys.exit(PREEMPTED)
    if first:
        best, early = outcome.best, ""
        if best is not None and outcome.stopped_early:
            early = f", and no further: evaluations since the best {best.metric}: {best.since}"
        print(f"{out}: trained to step {outcome.step}{early}")
        if best is not None and best.step is not None:
            print(f"{out / RUN_BEST}: the checkpoint of step {best.step}, {best.metric} {best.value:.4g}")


def evaluate_command() -> Callable[..., None]:
    """The command `evaluate`."""
    from train.evaluation.evaluate import EvaluationConfig
    from train.running.distributed import DistributedConfig, join

    defaults, one_process = EvaluationConfig(), DistributedConfig()

    def evaluate(
        checkpoint: tyro.conf.Positional[PathArgument],
        /,
        *,
        out: PathArgument | None = None,
        predictions: PathArgument | None = None,
        plot: PathArgument | None = None,
        config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = defaults,
        processes: Annotated[DistributedConfig, tyro.conf.arg(name="")] = one_process,
    ) -> None:
        """Asks a checkpoint questions whose answers are known, and prints how right it is.

        Ctrl-C ends it after the questions at hand: what was answered so far is measured, written and marked as partial,
        and the exit code is 130. A second Ctrl-C ends it at once.

        Args:
            checkpoint: A released directory, one that `python -m convert to-orbax` wrote, or a training run's, whose
                best checkpoint is RUN/best.
            out: A JSON file for all measures, their counts and this configuration.
            predictions: A JSON-lines file for every question, its reference and the model's answer.
            plot: A PNG file for the first clips whose events were asked for: spectrogram, true and predicted events.
            config: What is asked, and how.
            processes: How the processes find each other, if there are several; the first one prints and writes.
        """
        join(processes)  # before anything else of JAX
        _evaluate(checkpoint, config, out, predictions, plot)

    return evaluate


def _evaluate(
    checkpoint: Path, config: "EvaluationConfig", out: Path | None, predictions: Path | None, plot: Path | None
) -> None:
    import jax

    from train.evaluation.evaluate import evaluate, has_events, read_questions
    from train.evaluation.measures import measures_table
    from train.evaluation.plots import require_matplotlib
    from train.running.distributed import exit_if_peer_lost, on_first_process

    items = read_questions(config)
    if plot:
        require_matplotlib()
        if not any(map(has_events, items)):
            raise MossAudioError("--plot draws timelines of events, but no question asks for one: leave it out")

    def require_all_writable() -> None:
        for path in filter(None, (out, predictions, plot)):
            require_writable(path)

    on_first_process(require_all_writable)
    first = jax.process_index() == 0
    with exit_if_peer_lost():
        evaluation = evaluate(checkpoint, items, config, progress=first, keep_partial=jax.process_count() == 1)
    if not first:
        return
    print(measures_table(evaluation.results["measures"]))
    if unfinished := evaluation.results["unfinished"]:
        limit = config.answers.max_new_tokens
        print(f"{unfinished} of {len(evaluation.questions)} answers were cut off after {limit} tokens", file=sys.stderr)
    for path, save in (
        (out, evaluation.save_results),
        (predictions, evaluation.save_predictions),
        (plot, evaluation.save_plot),
    ):
        if path:
            retried(path, lambda path=path: path.parent.mkdir(parents=True, exist_ok=True))
            save(path)
    if evaluation.partial:
        print(f"interrupted: this is of {len(evaluation.questions)} of {len(items)} questions", file=sys.stderr)
        end(INTERRUPTED)


def ablate_command() -> Callable[..., None]:
    """The command `ablate`."""
    from train.ablation import AblationConfig

    defaults = AblationConfig()

    def ablate(
        out: tyro.conf.Positional[PathArgument],
        /,
        *,
        config: Annotated[AblationConfig, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Trains a small model with and without time markers, with and without DeepStack, and compares them.

        What was stopped goes on when the same command is run again.

        Args:
            out: The directory of all runs, the table ablation.md, the picture ablation.png and all scores in JSON.
            config: How each model is trained, and what it is asked.
        """
        _ablate(out, config)

    return ablate


def _ablate(out: Path, config: "AblationConfig") -> None:
    from train.ablation import ablate

    if not ablate(config, out):
        print("stopped: run the same command to go on", file=sys.stderr)
        sys.exit(PREEMPTED)
    print((out / "ablation.md").read_text("utf-8"), end="")


def _arguments_of(command: str) -> list[str]:
    """What stands behind a command, which decides about its options; nothing behind another one."""
    return sys.argv[2:] if sys.argv[1:2] == [command] else []


def plot_command() -> Callable[..., None]:
    """The command `plot`."""
    default = Path("training.png")

    def plot(
        runs: tyro.conf.Positional[tuple[PathArgument, ...]],
        /,
        *,
        out: PathArgument = default,
    ) -> None:
        """Draws how training runs went: loss, learning rate, and the scores of their evaluations, by step.

        Args:
            runs: Directories of runs, drawn over each other.
            out: The PNG file to write.
        """
        from train.running.curves import plot_curves

        plot_curves(out, runs)
        print(f"wrote {out}")

    return plot


def main() -> None:
    with ends_on_ctrl_c():
        if sys.argv[1:2] not in (["prepare"], ["--version"]):  # they start faster without recipes
            app.command(name="scenes")(scenes_command())
            app.command(name="check")(check_command(_arguments_of("check")))
            app.command(name="run")(run_command(_arguments_of("run")))
            app.command(name="plan")(plan_command(_arguments_of("plan")))
            app.command(name="evaluate")(evaluate_command())
            app.command(name="ablate")(ablate_command())
            app.command(name="plot")(plot_command())
        run_cli(lambda: app.cli(prog="moss-audio-train", description=__doc__))


if __name__ == "__main__":
    main()
