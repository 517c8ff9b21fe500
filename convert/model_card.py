"""Writes README.md of a model that is to be published: base model, licence, training facts, and how to load it.

Everything is read from the files of the run; what they don't say is left out and named on stderr.
"""

import json
import posixpath
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_audio_jax.storage.hub import HubName, hub_name
from moss_audio_jax.storage.json_files import read_json
from moss_audio_jax.storage.paths import absolute, exists, read_text, to_path
from moss_audio_jax.weights.locate import RUN_CHECKPOINTS, Location, base_name
from moss_audio_jax.weights.recognition import OWNER, RELEASED_NAMES

CARD = "README.md"
_MOST_SCORES = 40


def write_model_card(directory: Path, location: Location, title: str) -> None:
    """Writes README.md into a directory that has none.

    location: the checkpoint that is converted: a run, one of its checkpoints, an adapter, or what has no run.
    """
    run = _run_of(location)
    options = {} if run is None else read_json(to_path(run) / "config.json")
    base = _base(location, options)
    of_authors = base is not None and base.repository.startswith(f"{OWNER}/")
    sections = [
        _front_matter(base, of_authors, location),
        f"# {title}\n",
        _origin(base, location),
        "" if run is None else _training(run, location, options),
        _loading(title),
    ]
    with open(directory / CARD, "x", encoding="utf-8") as file:
        file.write("\n".join(filter(None, sections)))
    missing = [what for what, known in (("base model", base), ("licence", of_authors)) if not known]
    if missing:
        print(f"[{CARD} names no {' and no '.join(missing)}: add what you know before you publish it]", file=sys.stderr)


def _run_of(location: Location) -> Any:
    """Returns the directory of the run that a checkpoint is of; None for others."""
    if location.params is None:
        return None
    checkpoint = absolute(location.params).parent
    run = checkpoint.parent.parent
    is_one = checkpoint.parent.name == RUN_CHECKPOINTS and checkpoint.name.isdecimal() and exists(run / "config.json")
    return run if is_one else None


def _base(location: Location, options: Mapping[str, Any]) -> HubName | None:
    """Returns the model of the hub that training began from; None if the files don't name one."""
    given = _section(options, "model").get("checkpoint")
    if given is None and location.is_adapter:
        given = base_name(location.files)
    if not isinstance(given, str):
        return None
    name = hub_name(given)
    if name is not None and name.is_commit:
        return name
    released = posixpath.basename(given.rstrip("/"))
    return HubName(f"{OWNER}/{released}") if released in RELEASED_NAMES else None


def _section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = options.get(name)
    return found if isinstance(found, dict) else {}


def _front_matter(base: HubName | None, of_authors: bool, location: Location) -> str:
    lines = []
    if base is not None:
        lines += [f"base_model: {base.repository}", "base_model_relation: finetune"]
    if of_authors:  # the licence and the languages of the releases
        lines += ["license: apache-2.0", "language:", "- en", "- zh"]
    lines += ["library_name: moss-audio-jax", "pipeline_tag: audio-text-to-text"]
    tags = ["moss-audio", "audio", "speech", "music", *(["lora"] if location.is_adapter else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---\n"])


def _origin(base: HubName | None, location: Location) -> str:
    what = "A LoRA adapter merged into its model" if location.is_adapter else "A MOSS-Audio model"
    if base is None:
        return f"{what}, in the layout of the released ones.\n"
    commit = f" at commit `{base.revision}`" if base.is_commit else ""
    return f"{what}, trained from `{base.repository}`{commit}, in the layout of the released ones.\n"


def _training(run: Any, location: Location, options: Mapping[str, Any]) -> str:
    assert location.params is not None
    step = int(location.params.parent.name)
    optimizer, data, lora = (_section(options, name) for name in ("optimizer", "data", "lora"))
    tokens = sum(int(line.get("tokens") or 0) for line in _lines(run / "metrics.jsonl") if _step(line) <= step)
    facts = {
        "recipe": posixpath.basename(str(options.get("recipe") or "")),
        "steps": f"{step:,}" + (", moving averages of the parameters" if location.averages is not None else ""),
        "tokens with labels": f"{tokens:,}" if tokens else "",
        "data": ", ".join(_data(options)),
        "batch": _joined(data, "{batch_size} sequences of up to {tokens} tokens", "batch_size", "tokens"),
        "optimizer": _joined(optimizer, "{name}, schedule {schedule}", "name", "schedule"),
        "learning rate": str(optimizer.get("learning_rate") or ""),
        "frozen": ", ".join(f"`{_plain(glob)}`" for glob in optimizer.get("freeze") or ()),
        "LoRA": _joined(lora, "rank {rank}, alpha {alpha}", "rank", "alpha"),
        "compute": str(_section(options, "step").get("compute_dtype") or ""),
        "seed": str(options.get("seed", "")),
        "versions": ", ".join(
            f"{_plain(name)} {_plain(value)}" for name, value in _section(options, "versions").items()
        ),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    table = "\n".join(["## Training\n", "| | |", "|---|---|", *rows]) + "\n"
    return table + _scores(run, step)


def _data(options: Mapping[str, Any]) -> list[str]:
    """Lists the groups of the mixture that have data, and the names of their files, without directories."""
    found, mixture = [], _section(options, "mixture")
    for name, group in {**mixture, **_section(mixture, "named")}.items():
        if not isinstance(group, dict):
            continue
        files = [f"`{_plain(posixpath.basename(str(path).rstrip('/')))}`" for path in group.get("paths") or ()]
        if files:
            found.append(f"{_plain(name)} ({', '.join(files)})")
        elif "paths" not in group and group.get("share"):
            found.append(f"{_plain(name)} (made on the fly)")
    return found


def _scores(run: Any, step: int) -> str:
    """Returns a table of the last evaluation up to a step; empty without one."""
    evaluations = [line for line in _lines(run / "scores.jsonl") if _step(line) <= step]
    if not evaluations:
        return ""
    last = evaluations[-1]
    numbers = {name: value for name, value in last.items() if name != "step" and isinstance(value, int | float)}
    rows = [f"| {_plain(name)} | {value:.4g} |" for name, value in list(numbers.items())[:_MOST_SCORES]]
    heading = (
        f"\n## Evaluation\n\nOn the run's validation data, after step {_step(last):,}:\n\n| measure | |\n|---|---|\n"
    )
    return heading + "\n".join(rows) + "\n" if rows else ""


def _loading(title: str) -> str:
    return f"""## Use

With moss-audio-jax, where OWNER is the owner of this repository:

```sh
pip install 'moss-audio-jax[hub]'
moss-audio generate OWNER/{title} clip.wav --prompt "Transcribe the audio."
```

In PyTorch with `transformers==4.57.1` and the code of [MOSS-Audio](https://github.com/OpenMOSS/MOSS-Audio), of which
this repository holds no copy:

```python
from src.modeling_moss_audio import MossAudioModel

model = MossAudioModel.from_pretrained("OWNER/{title}", dtype="auto")
```
"""


def _lines(file: Any) -> list[dict[str, Any]]:
    """Reads JSON lines; empty without the file. A killed run may have left a part of a line, which is skipped."""
    if not exists(file):
        return []
    found = []
    for line in read_text(file).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _step(line: Mapping[str, Any]) -> int:
    step = line.get("step")
    return step if isinstance(step, int) else sys.maxsize


def _joined(section: Mapping[str, Any], form: str, *names: str) -> str:
    return form.format(**section) if all(section.get(name) is not None for name in names) else ""


def _plain(text: object) -> str:
    """Returns text that neither ends a cell of a table nor begins other markup."""
    return "".join(letter for letter in str(text) if letter.isprintable() and letter not in "`|<>[]")
