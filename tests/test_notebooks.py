"""The notebooks: they have no outputs, and every cell runs on the CPU with a small checkpoint."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.xla_flags import QUICK
from train.data.config import SceneConfig
from train.data.scene_files import write_scenes

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 240


def execute(name: str, directory: Path, look: str, **settings: str) -> dict[str, Any]:
    """Runs a notebook in a directory, then `look`, an expression for a JSON object, in the same kernel."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({look}))"))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,  # one device
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **settings,
    }
    nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    ).execute(env=environment)
    (shown,) = notebook.cells[-1].outputs
    return json.loads(shown.text) | {"printed": printed(notebook)}


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells[:-1] for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path):
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
            assert cell.source.count("\n") < 25, f"{cell.id} is too long to read at a glance"
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


FITS = """
{
    "v5e-1": fitting(15.75, 1), "v5e-1 8B": fitting(15.75, 1, "8B"), "v5e-8": fitting(15.75, 8),
    "v6e-1": fitting(31.24, 1), "seconds": timeline.seconds, "truth": len(truth.segments),
    "description": len(description.ids), "windows": [[w.place.begin, w.place.end] for w in recording.windows],
    "answers": answers, "timeline": timeline.to_json(), "answer": answer.text,
}
"""


def test_transcribe(released: Path, tmp_path: Path):
    write_scenes(tmp_path / "mine", 1, 3, SceneConfig(seconds=(6.0, 6.0), events=(2, 2)))
    found = execute(
        "transcribe",
        tmp_path,
        FITS,
        MOSS_AUDIO_CHECKPOINT=str(released),
        MOSS_AUDIO_CLIP="mine/0.wav",
        MOSS_AUDIO_NEW_TOKENS="24",
        MOSS_AUDIO_WINDOW="6",
    )
    assert found["v5e-1"] == ["4B", [], 4, {"tensor": 1, "fsdp": 1, "replica": -1}]
    assert found["v5e-1 8B"][:2] == ["8B", ["language_model.layers.*_proj"]]
    assert found["v5e-8"] == ["8B", [], 32, {"tensor": 4, "fsdp": 1, "replica": -1}]
    assert found["v6e-1"][:2] == ["8B", []]
    assert found["seconds"] == 6.0 and found["truth"] == 4
    assert 1 <= found["description"] <= 24
    assert found["windows"][0][0] == 0 and found["windows"][-1][1] == 15.0 and len(found["windows"]) >= 3
    assert len(found["answers"]) == 3
    assert json.loads((tmp_path / "clip.json").read_text("utf-8")) == found["timeline"]
    assert (tmp_path / "clip.vtt").read_text("utf-8").startswith("WEBVTT")
    for name in ("timeline.png", "example.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "long.srt").exists() and (tmp_path / "clip.srt").exists()


TUNED = """
{
    "v5e-1": fitting("TPU v5 lite", 1), "v5e-8": fitting("TPU v5 lite", 8), "question": question, "answers": answers,
    "before": f1("before.json"), "after": f1("after.json"),
    "adapter": float(abs(tuned.language_model.layers.self_attn.q_proj.lora_b[...]).max()),
}
"""


def test_finetune(released: Path, tmp_path: Path):
    found = execute(
        "finetune",
        tmp_path,
        TUNED,
        MOSS_AUDIO_CHECKPOINT=str(released),
        MOSS_AUDIO_CLIPS="16",
        MOSS_AUDIO_STEPS="3",
    )
    size, steps, options = found["v5e-1"]
    assert (size, steps) == ("4B", 200) and "--data.batch-size 1 " in options
    size, steps, options = found["v5e-8"]
    assert (size, steps) == ("8B", 60) and "--data.batch-size 8 " in options
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/siren/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert found["adapter"] > 0
    assert 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1
    assert "not that the model learned" in found["printed"]
    answer = json.loads((tmp_path / "data/test/manifest.jsonl").read_text().splitlines()[0])["conversation"][-1]
    assert found["answers"]["true"] == answer["content"] and {*found["answers"]} == {"true", "before", "after"}
    for name in ("training.png", "after.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "siren-peft/adapter_model.safetensors").stat().st_size > 10_000


def test_a_command_that_fails_stops_the_notebook(tmp_path: Path):
    """IPython alone goes on after one."""
    notebook = nbformat.read(ROOT / "notebooks" / "finetune.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "def command(" in cell.source)
    cells = [cell, nbformat.v4.new_code_cell("command('exit 3')")]
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=CELL_SECONDS, kernel_name="python3")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="exit code 3"):
        client.execute(cwd=str(tmp_path))
