"""`moss-audio-train` prepares training data, trains and evaluates."""

import argparse
import dataclasses
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from moss_audio_jax.commands.interruption import ends_on_ctrl_c

with ends_on_ctrl_c():  # these imports take long enough to be interrupted
    import tyro

    from moss_audio_jax.commands.cli import Commands, run_cli
    from moss_audio_jax.commands.interruption import INTERRUPTED, end
    from moss_audio_jax.commands.json_output import write_json
    from moss_audio_jax.commands.paths import PathArgument
    from moss_audio_jax.commands.renamed import current_arguments
    from moss_audio_jax.errors import MossAudioError
    from moss_audio_jax.storage.paths import Path, require_writable
    from moss_audio_jax.storage.retries import retried
    from train.ablation_config import FAMILIES, AblationConfig
    from train.config import Config, RunConfig, with_paths
    from train.data.config import ColumnsConfig, SceneConfig
    from train.evaluation.config import EvaluationConfig
    from train.recipes import DOCSTRINGS, RECIPES, REINFORCE_RECIPES, read_recipe, read_reinforce_recipe
    from train.reinforce.config import ReinforceConfig, with_question_paths
    from train.running.config import DistributedConfig, ResumeConfig
    from train.running.config_file import stored_config
    from train.running.directory import is_begun

PREEMPTED = 75  # exit code, EX_TEMPFAIL: run it again

app = Commands()
_COLUMNS = ColumnsConfig()


@app.command
def prepare(
    manifest: tyro.conf.Positional[PathArgument],
    out: tyro.conf.Positional[PathArgument],
    /,
    *,
    shards: int | None = None,
    part: str = "0/1",
    shard: str | None = None,
    processes: int | None = None,
    columns: ColumnsConfig = _COLUMNS,
) -> None:
    """Packs a manifest, or data of another kind, and its audio into ArrayRecord shards.

    Training reads them like the manifest. Finished shards are kept: repeat an interrupted call. Machines can share the
    work, each writing its own part of the shards into the same directory.

    Args:
        manifest: JSON lines, Parquet, Arrow or another kind of docs/data.md: a file, a directory or a quoted glob.
        out: Directory of the shards.
        shards: Number of shards in all.
        part: Part of the shards that this machine writes: `0/4`, `1/4`, `2/4` or `3/4` of four machines.
        shard: Write only this shard: `2/8` is number 2 of 8, counted from 0.
        processes: Number of processes. Default: that of processors.
        columns: Columns of data that is no manifest.
    """
    from train.data.shard_writing import ShardReport
    from train.data.shard_writing import prepare as write

    logging.basicConfig(format="%(message)s")  # prints the names of clips that can't be read
    if shard is not None:
        part, shards = shard, _count_of_one_shard(shard, shards)
    if shards is None:
        raise MossAudioError("prepare needs --shards N for all shards, or --shard I/N for one of them")
    place = _place("--shard" if shard is not None else "--part", part)
    total, done = len(range(place[0], shards, place[1])), itertools.count(1)

    def say(report: ShardReport) -> None:
        state = "already there" if report.already_there else f"{report.examples} examples"
        print(f"{report.path}: {state}, {report.unreadable} of them unreadable ({next(done)} of {total})", flush=True)

    workers = processes if processes is not None else os.cpu_count() or 1
    reports = write(manifest, out, shards, part=place, columns=columns, workers=workers, completed=say)
    if unreadable := sum(report.unreadable for report in reports):
        print(f"{unreadable} examples hold no audio, only the reason; training skips and counts them", file=sys.stderr)


def _count_of_one_shard(shard: str, shards: int | None) -> int:
    """Returns the number of shards that `--shard I/N` names."""
    total = _place("--shard", shard)[1]
    if shards not in (None, total):
        raise MossAudioError(
            f"--shards {shards} and --shard {shard} name different numbers of shards: give one of them"
        )
    return total


def _place(option: str, value: str) -> tuple[int, int]:
    """Reads I/N of an option."""
    number, slash, total = value.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise MossAudioError(f"{option} must be I/N with I from 0 to N - 1, such as 2/8, not {value!r}")
    return int(number), int(total)


_SCENES = SceneConfig()


@app.command
def scenes(
    out: tyro.conf.Positional[PathArgument],
    /,
    *,
    count: int,
    seed: int = 0,
    config: Annotated[SceneConfig, tyro.conf.arg(name="scenes")] = _SCENES,
) -> None:
    """Writes sound scenes as audio files and a manifest: data to try a fine-tune with.

    A line of OUT/manifest.jsonl is a conversation about a clip, with labels of its sounds.

    Args:
        out: A new directory.
        count: Number of scenes.
        seed: Seed of the scenes. Use different seeds for training and evaluation.
        config: Content of the scenes, and questions about them.
    """
    from train.data.scene_files import write_scenes

    print(f"wrote {write_scenes(out, count, seed, config)}, {count} conversations about as many clips")


def check_command(arguments: list[str]) -> Callable[..., None]:
    """Makes the command `check`, whose options are those of `run` with the defaults of the recipe in the arguments."""
    recipe_config = _named_recipe(arguments, "finetune")

    def check(
        manifest: tyro.conf.Positional[PathArgument],
        /,
        *,
        group: str | None = None,
        recipe: str = "finetune",
        init: str | None = None,
        show: int = 0,
        plot: PathArgument | None = None,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = recipe_config,
    ) -> None:
        """Prints the errors of each line or row of training data that are found without decoding its audio.

        Writes nothing. Exits with 1 if an example can't be trained on: its line is invalid or has no labels for the
        objectives of its group, its audio is missing, empty or not audio, its labels exceed the clip, or it is too
        long. Of shards, the hash of each file is compared with that of its writing.

        Args:
            manifest: JSON lines, or another kind of data of docs/data.md.
            group: Group of the mixture that gives the objectives, such as speech. Default: the group with this path (as
                with --mixture.speech.paths), or else that of --data.
            recipe: Recipe, or config.json of a run, that gives the other options their defaults. Those of the data
                decide what is too long.
            init: Checkpoint to train, short for --model.checkpoint: with its tokenizer, texts count too.
            show: Print this many examples as they are trained on, with the text that is learned between ⟦ and ⟧.
            plot: PNG file of histograms: seconds and tokens of examples, and how full sequences are.
            config: Options of the recipe.
        """
        _check(manifest, config, init, group, show, plot)

    return check


def _check(
    manifest: Path, config: RunConfig, init: str | None, group: str | None, show: int, plot: Path | None
) -> None:
    from moss_audio_jax.pictures import require_matplotlib
    from train.running.preflight import check_of, with_bytes

    if plot:
        require_matplotlib()
        require_writable(plot)
    config = with_paths(config, init)
    check = check_of(config, manifest, group)
    if show and check.maker is None:
        print("without --init or --model.tokenizer, tokens are bytes:", file=sys.stderr)
    for sample in with_bytes(check, config).samples(show) if show else ():
        print(f"{sample}\n")
    for problem in check.problems():
        print(problem)
    for note in check.notes():
        print(note)
    for sentence in check.statistics():
        print(sentence)
    if plot:
        check.sizes.plot(plot, check.data)
        print(f"wrote {plot}")
    print(check.summary())
    if check.unusable or check.too_long or check.damaged:
        sys.exit(1)


def run_command(arguments: list[str]) -> Callable[..., None]:
    """Makes the command `run`. Defaults are those of the run in `--out` or `--branch`, or else of the recipe."""
    one_process, at_the_newest = DistributedConfig(), ResumeConfig()
    stored = _stored_config(arguments)
    defaults = stored.with_named_groups(arguments) if stored else _named_recipe(arguments, "pretrain_stage1")

    def run(
        *,
        recipe: str | None = None,
        out: PathArgument,
        init: str | None = None,
        data: tuple[str, ...] = (),
        eval_data: tuple[str, ...] = (),
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = defaults,
        resume: Annotated[ResumeConfig, tyro.conf.arg(name="")] = at_the_newest,
        processes: Annotated[DistributedConfig, tyro.conf.arg(name="")] = one_process,
    ) -> None:
        """Trains. Resumes from the newest checkpoint in the directory if there is one.

        SIGTERM and Ctrl-C save a checkpoint and exit with code 75. The same command then resumes, with the same result.
        Before the first step, and the second time, Ctrl-C ends the run at once with code 130.
        A resumed run keeps the options it was begun with, and compares those that are given with them.

        Args:
            recipe: Recipe, or config.json of any run, that gives the options of a new run their defaults.
            out: Directory of the run: config.json, metrics.jsonl, checkpoints/.
            init: Checkpoint to start from, short for --model.checkpoint; OWNER/NAME on the Hugging Face hub, too.
            data: Conversations or labelled clips to train on, short for --mixture.conversations.paths.
            eval_data: Data to evaluate on, short for --validation.data; at each checkpoint unless --validation.every is
                given.
            config: Options of the recipe.
            resume: Resuming, and changed options.
            processes: Processes of the run, if there are several.
        """
        from train.running.distributed import join

        _require_recipe(recipe, stored)
        settled = with_paths(config, init, data, eval_data, default=stored)
        join(processes)  # before anything else of JAX
        from train.loop import train

        _train(settled, out, resume, train)

    run.__doc__ = _with_recipe(run.__doc__, arguments)
    return run


def reinforce_command(arguments: list[str]) -> Callable[..., None]:
    """Makes the command `reinforce`. Defaults are those of the run in `--out` or `--branch`, or else of the recipe."""
    one_process, at_the_newest = DistributedConfig(), ResumeConfig()
    stored = _stored_config(arguments, ReinforceConfig)
    defaults = stored or read_reinforce_recipe(_scanned(arguments, "recipe") or "dapo")

    def reinforce(
        *,
        recipe: str | None = None,
        out: PathArgument,
        init: str | None = None,
        data: tuple[str, ...] = (),
        eval_data: tuple[str, ...] = (),
        config: Annotated[ReinforceConfig, tyro.conf.arg(name="")] = defaults,
        resume: Annotated[ResumeConfig, tyro.conf.arg(name="")] = at_the_newest,
        processes: Annotated[DistributedConfig, tyro.conf.arg(name="")] = one_process,
    ) -> None:
        """Trains by reward: draws answers to questions, judges them, and learns from the better ones.

        Resumes and ends like `run`. docs/reinforce.md explains it.

        Args:
            recipe: Recipe, or config.json of any such run, that gives the options of a new run their defaults.
            out: Directory of the run: config.json, metrics.jsonl, rollouts.jsonl, checkpoints/.
            init: Checkpoint to start from, short for --model.checkpoint; OWNER/NAME on the Hugging Face hub, too.
            data: Questions with known answers, short for --questions.data.
            eval_data: Data to evaluate on, short for --validation.data; at each checkpoint unless --validation.every is
                given.
            config: Options of the recipe.
            resume: Resuming, and changed options.
            processes: Processes of the run, if there are several.
        """
        from train.running.distributed import join

        _require_recipe(recipe, stored, REINFORCE_RECIPES)
        settled = with_question_paths(config, init, data, eval_data, default=stored)
        join(processes)  # before anything else of JAX
        from train.reinforce.loop import reinforce as train

        _train(settled, out, resume, train)

    reinforce.__doc__ = _with_recipe(reinforce.__doc__, arguments)
    return reinforce


def _with_recipe(docstring: str | None, arguments: list[str]) -> str:
    """Puts the docstring of the recipe that the arguments name after the first line of a command's docstring."""
    summary, _, rest = (docstring or "").partition("\n")
    recipe = inspect.cleandoc(DOCSTRINGS.get(_scanned(arguments, "recipe") or "", ""))
    indented = "".join(f"        {line}".rstrip() + "\n" for line in recipe.splitlines())
    return f"{summary}\n\n{indented}{rest}" if recipe else docstring or ""


def _require_recipe(recipe: str | None, stored: RunConfig | None, known: Iterable[str] = RECIPES) -> None:
    if recipe is None and stored is None:
        raise MossAudioError(f"--recipe must be given to begin a run: one of {', '.join(known)}, or a config.json")
    begun_with = stored and stored.recipe
    if recipe is not None and begun_with is not None and recipe != begun_with:
        raise MossAudioError(
            f"--recipe must be {begun_with}, with which the run was begun, not {recipe}: or leave it out"
        )


def _stored_config(arguments: list[str], kind: type[Config] = RunConfig) -> Config | None:
    """Reads the configuration of the run in `--out`, or of the one that `--branch` begins from; None for a new run."""
    out, branch = _scanned(arguments, "out"), _scanned(arguments, "branch")
    if out is not None and is_begun(out):
        return stored_config(out, kind)
    if branch is not None and (origin := ResumeConfig(branch=branch).origin):
        return stored_config(origin[0], kind)
    return None


def _named_recipe(arguments: list[str], default: str) -> RunConfig:
    """Reads the recipe of `--recipe`, or else the default, and adds the named groups of the arguments."""
    return read_recipe(_scanned(arguments, "recipe") or default).with_named_groups(arguments)


def _scanned(arguments: list[str], option: str) -> str | None:
    """Value of an option that other options take their defaults from."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument(f"--{option}")
    try:
        return getattr(scan.parse_known_args(arguments)[0], option)
    except argparse.ArgumentError:  # no value, about which the parser of the command complains
        return None


def plan_command(arguments: list[str]) -> Callable[..., None]:
    """Makes the command `plan`. Its options are those of `run` with the defaults of the recipe, and some more."""
    by_reward = _scanned(arguments, "mode") == "reinforce"
    recipe_config: Any = _named_recipe(arguments, "pretrain_stage2") if not by_reward else None
    if by_reward:
        recipe_config = read_reinforce_recipe(_scanned(arguments, "recipe") or "dapo")
    kind: Any = type(recipe_config)

    def plan(
        *,
        topology: str,
        recipe: str = "dapo" if by_reward else "pretrain_stage2",
        mode: Literal["train", "generate", "serve", "load", "reinforce"] = "train",
        preset: str | None = None,
        slices: int = 1,
        batch_size: int | None = None,
        tokens: int | None = None,
        chunks: int | None = None,
        segments: int = 1,
        propose_batch: bool = False,
        int8: tuple[str, ...] = (),
        kv_int8: bool = False,
        eval_data: tuple[str, ...] = (),
        json: PathArgument | None = None,
        config: Annotated[kind, tyro.conf.arg(name="")] = recipe_config,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        """Compiles a recipe's step for a TPU, on any machine without one; prints whether it fits and how fast it is.

        Exits with 1 if it does not fit, after trying changes that would.

        Args:
            topology: Kind and shape of the TPU, such as v5e:2x4, v5p:4x4x4 or v6e:8x8, or the name that it is rented
                by, such as v5litepod-8, v5p-128 or v6e-64.
            recipe: Recipe, or config.json of a run, that gives the other options their defaults.
            mode: train: a training step. generate: prefill and decoding of a token, in bfloat16. serve: an engine with
                --batch-size slots of --tokens. load: loading alone. reinforce: answers and an update of `reinforce`.
            preset: Size of the model, short for --model.preset.
            slices: Number of such TPUs, each with a replica.
            batch_size: Sequences of a step (or prompts) in all, short for --data.batch-size.
            tokens: Tokens of a sequence (or of a prompt and its answer), short for --data.tokens.
            chunks: Audio chunks of a sequence, short for --data.chunks. Default: in the recipe's proportion to tokens.
            segments: Clips packed into a sequence, of equal length. More segments need less attention.
            propose_batch: If the step fits, find the largest batch that does by doubling it. Compiles two or three more
                programs. The evaluation is planned for the given batch.
            int8: Globs over linear layers whose weights are int8 in generate, serve and load, such as
                'language_model.layers.*_proj'.
            kv_int8: Keys and values are int8 in serve.
            eval_data: Data to evaluate on, as for `run`: the headers of its clips give the lengths of the questions.
                With it, or --validation.every, the memory of the evaluation is planned too.
            json: Write JSON to this file instead of printing a table; - for stdout.
            config: Options of the recipe.
        """

        from train.planning.plan import plan_table, with_sizes

        config = with_paths(with_sizes(config, preset, slices, batch_size, tokens, chunks), eval_data=eval_data)
        report = _plan(config, topology, mode, slices, segments, propose_batch, int8, kv_int8)
        if json is None:
            print(plan_table(report))
        else:
            write_json(json, report)
        if not (report["fits"] and report.get("evaluation", report)["fits"]):
            sys.exit(1)

    return plan


def _plan(
    config: RunConfig,
    topology: str,
    mode: str,
    slices: int,
    segments: int,
    propose_batch: bool,
    int8: tuple[str, ...],
    kv_int8: bool,
) -> dict[str, Any]:
    from train.planning import plan
    from train.planning.plan_evaluation import plan_evaluation
    from train.planning.topology import topology_devices, topology_of

    if mode != "train" and config.lora is not None and config.lora.int8:
        raise MossAudioError(f"--lora.int8 is for training: give --int8 for --mode {mode}")
    if mode == "train" and int8:
        raise MossAudioError(
            "--int8 is for --mode generate, serve and load: frozen kernels of training become int8 by --lora.int8"
        )
    if mode != "serve" and kv_int8:
        raise MossAudioError(f"--kv-int8 is for --mode serve: leave it out of --mode {mode}")
    if mode != "train" and (segments != 1 or propose_batch):
        raise MossAudioError(f"--segments and --propose-batch are for training: leave them out of --mode {mode}")
    if not 1 <= segments <= config.data.tokens:
        raise MossAudioError(
            f"--segments must be from 1 to the {config.data.tokens} tokens of a sequence, not {segments}"
        )
    topology = topology_of(topology)
    devices = topology_devices(topology, slices)
    named = {"model": config.model.preset, "topology": topology, "slices": slices, "chips": len(devices)}
    model = dataclasses.replace(config.model_config(), int8=int8)
    if mode == "generate":
        data = config.data
        return named | plan.plan_generation(
            model,
            devices,
            tensor=config.mesh.tensor,
            prompts=data.batch_size,
            slots=data.tokens,
            chunks=data.chunks,
        )
    if mode == "serve":
        from moss_audio_jax.sharding import make_mesh
        from train.planning.plan_serving import plan_serving

        sizes = {"slots": config.data.batch_size, "length": config.data.tokens, "kv_int8": kv_int8}
        mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
        return named | plan_serving(model, mesh, **sizes)
    if mode == "reinforce":
        from train.planning.plan_reinforce import plan_reinforce

        assert isinstance(config, ReinforceConfig)  # of its recipes
        return named | plan_reinforce(config, devices)
    if mode == "load":
        return named | plan.plan_load(model, devices, tensor=config.mesh.tensor)
    report = named | plan.plan_step(config, devices, segments)
    if not report["fits"]:
        report["would_fit"] = plan.what_would_fit(config, devices)
    elif propose_batch:
        report["largest_batch"] = plan.propose_batch(config, devices, report)
    if report["fits"] and config.validation.every is not None:
        report["evaluation"] = plan_evaluation(config, devices, report)
    return report


def _train(config: RunConfig, out: Path, resume: ResumeConfig, train: Callable[..., Any]) -> None:
    """Calls `train`, the loop of a command, and says how it ended."""
    import jax

    from moss_audio_jax.weights.locate import RUN_BEST

    logging.basicConfig(format="%(message)s", force=True)  # prints the names of skipped examples
    # Orbax logs the traceback of a checkpoint that can't be written. It is raised too, and printed as a sentence.
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
            early = f", and stopped early: {best.since} evaluations since the best {best.metric}"
        print(f"{out}: trained to step {outcome.step}{early}")
        if best is not None and best.step is not None:
            print(f"{out / RUN_BEST}: the checkpoint of step {best.step}, {best.metric} {best.value:.4g}")


_EVALUATION, _ONE_PROCESS = EvaluationConfig(), DistributedConfig()


@app.command
def evaluate(
    checkpoint: tyro.conf.Positional[PathArgument],
    /,
    *,
    json: PathArgument | None = None,
    predictions: PathArgument | None = None,
    plot: PathArgument | None = None,
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = _EVALUATION,
    processes: Annotated[DistributedConfig, tyro.conf.arg(name="")] = _ONE_PROCESS,
) -> None:
    """Asks a checkpoint questions with known answers, and prints measures of its answers.

    Ctrl-C stops it after the current batch: the answers so far are measured, written and marked as partial, and the
    exit code is 130. A second Ctrl-C ends it at once.

    Args:
        checkpoint: Released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint (`moss-audio-convert
            to-orbax`), or training run, whose best checkpoint is RUN/best.
        json: JSON file for all measures, their counts and this configuration.
        predictions: JSON-lines file for every question, its reference and the model's answer.
        plot: PNG file of the first clips with questions about events: spectrogram, true and predicted events.
        config: Questions, and generation of the answers.
        processes: Processes, if there are several. The first one prints and writes.
    """
    from train.running.distributed import join

    join(processes)  # before anything else of JAX
    _evaluate(checkpoint, config, json, predictions, plot)


def _evaluate(
    checkpoint: Path, config: EvaluationConfig, out: Path | None, predictions: Path | None, plot: Path | None
) -> None:
    import jax

    from moss_audio_jax.pictures import require_matplotlib
    from train.evaluation.evaluate import evaluate, has_timeline, read_questions
    from train.evaluation.measures import measures_table
    from train.running.distributed import exit_if_peer_lost, on_first_process

    items = read_questions(config)
    if plot:
        require_matplotlib()
        if not any(map(has_timeline, items)):
            raise MossAudioError("--plot draws timelines, but no question asks for one: leave it out")

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


def ablate_command(arguments: list[str]) -> Callable[..., None]:
    """Makes the command `ablate`, whose options have the defaults of the family in the arguments."""
    family = FAMILIES.get(_scanned(arguments, "family") or "times", FAMILIES["times"])

    def ablate(
        out: tyro.conf.Positional[PathArgument],
        /,
        *,
        config: Annotated[AblationConfig, tyro.conf.arg(name="")] = family,
    ) -> None:
        """Trains a small model with and without time markers, or DeepStack, and compares them.

        The same command, started again, resumes what was stopped.

        Args:
            out: Directory of all runs, the tables ablation.md, the pictures ablation.png and curves.png, and all scores
                in JSON.
            config: Training and evaluation of each model.
        """
        _ablate(out, config)

    return ablate


def _ablate(out: Path, config: AblationConfig) -> None:
    from train.ablation import ablate

    if not ablate(config, out):
        print("stopped: run the same command to resume", file=sys.stderr)
        sys.exit(PREEMPTED)
    print((out / "ablation.md").read_text("utf-8"), end="")


_PICTURE = Path("training.png")


@app.command
def plot(
    runs: Annotated[tuple[PathArgument, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    /,
    *,
    plot: PathArgument = _PICTURE,
) -> None:
    """Plots training runs: loss, learning rate, and the scores of their evaluations, by step.

    Args:
        runs: Directories of runs, drawn over each other.
        plot: PNG file to write.
    """
    from train.running.curves import plot_curves

    plot_curves(plot, runs)
    print(f"wrote {plot}")


def _cli() -> None:
    """Adds the commands whose options depend on the arguments, and runs the one that is named."""
    arguments = current_arguments(sys.argv[1:])
    made = {
        "ablate": ablate_command,
        "check": check_command,
        "run": run_command,
        "reinforce": reinforce_command,
        "plan": plan_command,
    }
    for name, make in made.items():
        app.command(name=name)(make(arguments[1:] if arguments[:1] == [name] else []))
    app.cli(prog="moss-audio-train", description=__doc__, args=arguments)


def main() -> None:
    run_cli(_cli)


if __name__ == "__main__":
    main()
