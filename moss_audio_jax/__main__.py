"""`moss-audio` asks a checkpoint about a sound, and shows the parts of a checkpoint."""

import dataclasses
import sys
from typing import Annotated, Literal

from moss_audio_jax.commands.interruption import ends_on_ctrl_c

with ends_on_ctrl_c():  # these imports take long enough to be interrupted
    import tyro

    from moss_audio_jax.commands.cli import Commands, run_cli
    from moss_audio_jax.commands.options import MeshConfig
    from moss_audio_jax.commands.paths import PathArgument
    from moss_audio_jax.errors import MossAudioError
    from moss_audio_jax.prompts import DEFAULT_SYSTEM_PROMPT
    from moss_audio_jax.sampling_config import Sampling
    from moss_audio_jax.serving.limits import Limits
    from moss_audio_jax.timelines import command as timelines

DEFAULT_PROMPT = "Transcribe the audio."

_GREEDY, _ALL_DEVICES, _LIMITS = Sampling(), MeshConfig(), Limits()

app = Commands()


@app.command
def generate(
    checkpoint: tyro.conf.Positional[PathArgument],
    clips: Annotated[tuple[PathArgument, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CLIP_OF_ONE_PROMPT ...]")],
    /,
    *,
    prompts: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="prompt")] = (),
    batch: PathArgument | None = None,
    out: PathArgument | None = None,
    slots: int = 8,
    adapter: PathArgument | None = None,
    system: str = DEFAULT_SYSTEM_PROMPT,
    max_new_tokens: int = 1024,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = _GREEDY,
    seed: int = 0,
    time_markers: bool | None = None,
    context: str = "",
    hot_words: tuple[str, ...] = (),
    loops: Literal["ignore", "stop", "warm"] = "ignore",
    thinking: Literal["show", "hide", "only"] = "show",
    thinking_budget: int | None = None,
    special_tokens: bool = False,
    dtype: Literal["bfloat16", "float32"] | None = None,
    int8: tuple[str, ...] = (),
    verify: bool = False,
    mesh: MeshConfig = _ALL_DEVICES,
) -> None:
    """Answers a question about sounds, several questions about the same sounds, or a file of requests.

    The text is printed as it is generated. All clips belong to one prompt, with one answer. For an answer per file, use
    `moss-audio transcribe`, with its --prompt, or --batch.

    Args:
        checkpoint: Released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint (`moss-audio-convert
            to-orbax`), or training run.
        clips: Audio files (wav, flac, ogg, mp3) of one prompt, in order; none for text alone.
        prompts: The question. Default with a clip: "Transcribe the audio." Give several for as many answers about the
            same clips.
        batch: File of requests, a line of JSON each: prompt, clips (relative to the file), system, max_new_tokens, seed
            and sampling options, by default those of the command. Results are lines of JSON, in order.
        out: New file for the results of --batch. Default: stdout.
        slots: Answers that --batch, or several prompts, generate at the same time.
        adapter: LoRA adapter of the checkpoint: PEFT's directory or its OWNER/NAME on the hub, one of `from-peft`, or a
            training run.
        system: System prompt.
        max_new_tokens: Maximum tokens of the answer. An answer that is cut off is reported on stderr.
        sampling: Sampling options.
        seed: Seed of the sampling, a whole number of 64 bits.
        time_markers: Insert time markers between audio tokens. Default: the checkpoint's setting.
        context: What is known about the clips, such as "A podcast about birds."; stands before the question.
        hot_words: Names and terms that may occur; stand before the question too.
        loops: What to do about an answer that repeats the same words without end: ignore it, stop the answer, or draw
            the rest of it at a temperature of 1 (warm) and stop at a second loop.
        thinking: Show the thought before the answer of a Thinking checkpoint (dimmed on a terminal), hide it, or show
            only it.
        thinking_budget: Maximum tokens of the thought. Then it is ended with the words that Qwen3's report publishes,
            and the answer follows. Default: no limit but that of all new tokens.
        special_tokens: Also print special tokens such as <|im_end|>.
        dtype: Dtype of weights and computation. Default: bfloat16, on the CPU float32.
        int8: Globs over linear layers whose weights are rounded to int8, such as 'language_model.layers.*_proj'.
        verify: First compare the weights with the checksums that they were written with.
        mesh: Device mesh.
    """
    options = {"thinking_budget": thinking_budget, "context": context, "hot_words": hot_words, "loops": loops}
    options |= {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    options |= {"system_prompt": system, "time_markers": time_markers}

    from moss_audio_jax.inference.asking import answer_batch, answer_prompt, answer_prompts
    from moss_audio_jax.inference.loading import Loading

    loading = Loading(checkpoint, adapter, dtype, int8, dataclasses.asdict(mesh), slots, verify=verify)
    if batch is None and out is None and len(prompts) < 2:
        prompt = _checked_prompt(prompts[0] if prompts else None, len(clips))
        return answer_prompt(loading, prompt, clips, options, thinking, special_tokens=special_tokens)
    if special_tokens:
        raise MossAudioError("--special-tokens is for one prompt, not for several or for --batch: leave it out")
    if batch is None and out is None:
        return answer_prompts(loading, prompts, clips, options, thinking)
    if batch is None or clips or len(prompts) > 1:
        raise MossAudioError("--batch takes prompts and clips from its file, and --out its results: give them alone")
    if thinking != "show":
        raise MossAudioError(
            "--thinking is for printed answers: --batch gives thoughts as `reasoning`, so leave it out"
        )
    answer_batch(loading, batch, out, {"text": prompts[0] if prompts else DEFAULT_PROMPT, **options})


def _checked_prompt(prompt: str | None, clips: int) -> str:
    if not clips and not prompt:
        raise MossAudioError("there is nothing to answer: give a clip, or a question with --prompt, or both")
    if clips > 1:
        print(
            f"[all {clips} clips are in one prompt, for one answer; for an answer a file, use `moss-audio "
            "transcribe`, or --batch]",
            file=sys.stderr,
        )
    return DEFAULT_PROMPT if prompt is None else prompt


@app.command
def transcribe(
    checkpoint: tyro.conf.Positional[PathArgument],
    paths: Annotated[tuple[PathArgument, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PATH ...]")] = (),
    /,
    *,
    out: PathArgument,
    list_: Annotated[PathArgument | None, tyro.conf.arg(name="list")] = None,
    format: str = "txt,json",
    timestamps: Literal["none", "sentences", "words", "speakers", "events"] = "none",
    prompt: str | None = None,
    window: float = 300.0,
    slots: int = 8,
    adapter: PathArgument | None = None,
    system: str = DEFAULT_SYSTEM_PROMPT,
    max_new_tokens: int | None = None,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = _GREEDY,
    seed: int = 0,
    time_markers: bool | None = None,
    loops: Literal["ignore", "stop", "warm"] = "stop",
    dtype: Literal["bfloat16", "float32"] | None = None,
    int8: tuple[str, ...] = (),
    kv_int8: bool = False,
    verify: bool = False,
    mesh: MeshConfig = _ALL_DEVICES,
) -> None:
    """Transcribes recordings of any length and number into files, one of each format for each recording.

    Run it again after Ctrl-C, or with more recordings: those that are done, with the same options, are skipped. A
    recording that can't be read is named, the others are transcribed, and the exit code is 1.

    Args:
        checkpoint: Released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint (`moss-audio-convert
            to-orbax`), or training run.
        paths: Recordings: files, folders, with all below them, globs in quotes, or @FILE, a list with a path on each
            line.
        out: Directory for the transcripts. Folders are mirrored; equal names keep their suffixes, or get more folders.
        list_: List of recordings, a path on each line, relative to the list.
        format: Formats, separated by commas, of txt, json, jsonl (a segment a line), csv, srt, vtt, tsv (labels of
            Audacity).
        timestamps: Times to ask for. speakers: of sentences, with their speakers; events: of sounds.
        prompt: Question to ask instead of the one for --timestamps.
        window: Longest part of a recording that is answered at once, in seconds. Longer ones are cut, at quiet places
            where there are some. The authors advise 600 at most.
        slots: Answers that are generated at the same time.
        adapter: LoRA adapter of the checkpoint: PEFT's directory or its OWNER/NAME on the hub, one of `from-peft`, or a
            training run.
        system: System prompt.
        max_new_tokens: Maximum tokens of the answer to a window. Default: 64, and for each second 8 without times, 16
            with times of sentences, 64 with times of words. An answer that is cut off is reported.
        sampling: Sampling options.
        seed: Seed of the sampling, a whole number of 64 bits.
        time_markers: Insert time markers between audio tokens. Default: the checkpoint's setting.
        loops: What to do about an answer that repeats the same words without end: ignore it, stop the answer, or draw
            the rest of it at a temperature of 1 (warm) and stop at a second loop.
        dtype: Dtype of weights and computation. Default: bfloat16, on the CPU float32.
        int8: Globs over linear layers whose weights are rounded to int8, such as 'language_model.layers.*_proj'.
        kv_int8: Round keys and values to int8: about half their memory.
        verify: First compare the weights with the checksums that they were written with.
        mesh: Device mesh.
    """
    from moss_audio_jax.inference.loading import Loading
    from moss_audio_jax.inference.transcription import Answers, transcribe_paths

    loading = Loading(checkpoint, adapter, dtype, int8, dataclasses.asdict(mesh), slots, kv_int8, verify)
    answers = Answers(timestamps, prompt, system, max_new_tokens, sampling, seed, time_markers, loops, window)
    transcribe_paths(paths, () if list_ is None else (list_,), out, format, answers, loading)


@app.command
def timeline(
    source: tyro.conf.Positional[PathArgument],
    clip: Annotated[PathArgument | None, tyro.conf.Positional] = None,
    /,
    *,
    out: tuple[PathArgument, ...] = (),
    plot: PathArgument | None = None,
    row_seconds: float | None = None,
    question: Annotated[timelines.Question, tyro.conf.arg(name="")] = timelines.Question(),  # noqa: B008
) -> None:
    """Prints the sounds or words of a clip with their times, and writes them as subtitles, labels, data or a picture.

    A checkpoint is asked, or an existing answer is read: `moss-audio timeline answer.txt clip.wav`. What
    could not be read, and times that can't be right, are reported on stderr.

    Args:
        source: Checkpoint to ask: released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint, or
            training run. Or a file with an answer, or with a timeline in JSON, or `-` for one from stdin.
        clip: Audio file (wav, flac, ogg, mp3). With an answer it is needed for --plot alone.
        out: Files to write, by their ends: .srt, .vtt (subtitles), .audacity.txt (labels), .csv, .tsv, .json, .txt.
        plot: PNG to write: waveform, mel, and segments with their texts; of several pages for a long clip.
        row_seconds: Seconds in a row of the picture. Default: as many as leave room for the texts, up to 60.
        question: What a checkpoint is asked.
    """
    timelines.run(source, clip, question, out=out, plot=plot, row_seconds=row_seconds)


@app.command
def info(checkpoint: tyro.conf.Positional[PathArgument], /) -> None:
    """Prints the parts of a checkpoint: shapes, dtypes, parameters, bytes.

    Args:
        checkpoint: Released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint, or training run.
    """
    from moss_audio_jax.weights.info import describe

    print(describe(checkpoint))


@app.command
def serve(
    checkpoint: tyro.conf.Positional[PathArgument],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    adapters: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="adapter")] = (),
    slots: int = 8,
    max_length: int | None = None,
    window: float = 300.0,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = _GREEDY,
    api_key: str | None = None,
    allow_url_hosts: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="allow-url-host")] = (),
    allow_files: PathArgument | None = None,
    limits: Annotated[Limits, tyro.conf.arg(name="")] = _LIMITS,
    drain_seconds: float = 60.0,
    page: bool = False,
    dtype: Literal["bfloat16", "float32"] | None = None,
    int8: tuple[str, ...] = (),
    kv_int8: bool = False,
    verify: bool = False,
    mesh: MeshConfig = _ALL_DEVICES,
) -> None:
    """Serves a checkpoint, and adapters of it, over HTTP, for OpenAI's clients.

    Chats with clips, transcriptions, a list of the models, health and metrics. SIGTERM, or Ctrl-C, ends it once the
    answers in progress have ended. One process uses all devices of one host.

    Args:
        checkpoint: Released directory, its OWNER/NAME on the Hugging Face hub, Orbax checkpoint (`moss-audio-convert
            to-orbax`), or training run.
        host: Address to listen at; 0.0.0.0 for all of this machine.
        port: Port to listen at; 0 takes a free one.
        name: Name of the model for clients. Default: that of its directory.
        adapters: LoRA adapter of the checkpoint, as NAME=PATH: a model of its own that shares the weights. May be given
            several times.
        slots: Answers of a model that are generated at the same time. Others wait.
        max_length: Tokens of a prompt and its answer at most. Memory for all of them is taken for each slot of each
            model. Default: 8,192.
        window: Longest part of a recording that is transcribed at once, in seconds; shorter where --max-length leaves
            less room.
        sampling: Sampling options of requests that do not say.
        api_key: Key that requests must have. Other users of this machine can see a command line: better set the
            environment variable MOSS_AUDIO_API_KEY.
        allow_url_hosts: Host whose https URLs may be clips, such as cdn.example.org or cdn.example.org:8443. May be
            given several times.
        allow_files: Directory whose files may be clips, as file: URLs. Links in it are not followed.
        limits: Limits of requests.
        drain_seconds: Seconds that answers in progress have to end after SIGTERM.
        page: Also serve a page for a browser, at /.
        dtype: Dtype of weights and computation. Default: bfloat16, on the CPU float32.
        int8: Globs over linear layers whose weights are rounded to int8, such as 'language_model.layers.*_proj'.
        kv_int8: Round keys and values to int8: about half their memory.
        verify: First compare the weights with the checksums that they were written with.
        mesh: Device mesh.
    """
    from moss_audio_jax.serving import command

    command.require_server()
    from moss_audio_jax.inference.loading import Loading

    loading = Loading(checkpoint, None, dtype, int8, dataclasses.asdict(mesh), slots, kv_int8, verify)
    serving = command.Serving(
        host=host,
        port=port,
        name=name,
        adapters=adapters,
        max_length=max_length,
        window=window,
        sampling=sampling,
        api_key=api_key,
        allow_url_hosts=allow_url_hosts,
        allow_files=allow_files,
        drain_seconds=drain_seconds,
        page=page,
    )
    command.serve(loading, serving, limits)


@app.command
def env(*, json: PathArgument | None = None) -> None:
    """Prints versions, devices and settings: what to add to a report of a problem.

    Values of keys and tokens are left out.

    Args:
        json: Write JSON to this file instead of printing a table; - for stdout.
    """
    from moss_audio_jax.commands.environment import environment, environment_table
    from moss_audio_jax.commands.json_output import write_json

    found = environment()
    if json is None:
        print(environment_table(found))
    else:
        write_json(json, found)


def main() -> None:
    run_cli(lambda: app.cli(prog="moss-audio", description=__doc__))


if __name__ == "__main__":
    main()
