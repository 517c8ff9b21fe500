"""Groups of any names on the command line: their weights, their objectives, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_audio_jax.errors import MossAudioError
from train.__main__ import main
from train.config import RunConfig
from train.data.config import AugmentConfig
from train.data.mixture import ExampleOrder, source_weights
from train.data.mixture_config import GroupConfig, MixtureConfig
from train.data.objectives import OBJECTIVES
from train.recipes import RECIPES
from train.running.resume import write_or_check_config


@pytest.fixture
def manifests(tmp_path: Path) -> tuple[str, str]:
    """Manifests of four and of sixteen texts."""
    paths = tmp_path / "four.jsonl", tmp_path / "sixteen.jsonl"
    for path, count in zip(paths, (4, 16), strict=True):
        path.write_text("\n".join(json.dumps({"text": f"text {number}"}) for number in range(count)))
    return str(paths[0]), str(paths[1])


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """The configuration that `run` makes of a command line."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("train.__main__._train", lambda config, *_: configs.append(config))

    def parse(*arguments: object) -> RunConfig:
        common = ("run", "--recipe", "pretrain_stage2", "--out", "unused")
        monkeypatch.setattr("sys.argv", ["moss-audio-train", *common, *map(str, arguments)])
        main()
        return configs[-1]

    return parse


def test_groups_take_names_weights_and_objectives_from_the_command_line(parsed, manifests: tuple[str, str]):
    dialect = ("--mixture.dialect.share", 3, "--mixture.dialect.paths", *manifests, "--mixture.dialect.weights", 3, 1)
    dialect += ("--mixture.dialect.objectives", "plain_text=2", "caption", "--mixture.dialect.begin", 5)
    more = (
        "--mixture.my-books.share=1",
        "--mixture.my_books.paths",
        manifests[1],
        "--mixture.text.paths",
        manifests[0],
    )
    config = parsed(*dialect, *more)
    assert set(config.mixture.named) == {"dialect", "my_books"}
    groups = {group.name: group for group in config.mixture.groups(seed=0)}
    assert list(groups) == ["text", "dialect", "my_books"]
    assert (groups["dialect"].begin, groups["dialect"].end) == (5, None)
    assert groups["dialect"].sources[0].objectives == {"plain_text": 2.0, "caption": 1.0}
    assert groups["my_books"].sources[0].objectives == dict.fromkeys(OBJECTIVES, 1.0)
    weights = [weight for *_, weight in source_weights(list(groups.values()))]
    assert weights == pytest.approx([0.3 / 4.3, 3 / 4.3 * 3 / 4, 3 / 4.3 / 4, 1 / 4.3])
    # Sources without weights keep the square roots of their sizes.
    groups = MixtureConfig(text=GroupConfig(1.0, ("plain_text",), manifests)).groups(seed=0)
    assert [weight for *_, weight in source_weights(groups)] == pytest.approx([1 / 3, 2 / 3])


def test_the_order_of_options_does_not_change_that_of_examples(parsed, manifests: tuple[str, str], tmp_path: Path):
    options = [[f"--mixture.{name}.share", 1, f"--mixture.{name}.paths", manifests[1]] for name in ("b", "a")]
    configs = [parsed(*options[0], *options[1]), parsed(*options[1], *options[0])]
    orders = [ExampleOrder(config.mixture.groups(0), seed=1) for config in configs]
    drawn = [[(order[n].group, order[n].index) for n in range(50)] for order in orders]
    assert drawn[0] == drawn[1] and {group for group, _ in drawn[0]} == {"a", "b"}
    write_or_check_config(configs[0], tmp_path, begun=False)
    write_or_check_config(configs[1], tmp_path, begun=True)
    other = parsed(*options[0], *options[1], "--mixture.a.objectives", "caption=2")
    with pytest.raises(MossAudioError, match=r"another configuration: mixture\.a\.objectives is \['caption=2'\]"):
        write_or_check_config(other, tmp_path, begun=True)


def test_a_run_older_than_named_groups_and_augmentation_resumes(tmp_path: Path):
    config = RECIPES["pretrain_stage2"]
    old = json.loads(json.dumps(dataclasses.asdict(config)))
    del old["mixture"]["named"], old["augment"]
    for name in config.mixture.manifest_groups():
        del old["mixture"][name]["weights"]
    assert old["mixture"]["speech"]["objectives"] == ["transcribe", "transcribe_words", "transcribe_sentences"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(MossAudioError, match=r"configuration: augment\.time_masks is 1"):
        write_or_check_config(dataclasses.replace(config, augment=AugmentConfig(time_masks=1)), tmp_path, begun=True)
    write_or_check_config(config, tmp_path, begun=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speach.paths": ("four.jsonl",)}, r"speach\.share: give it, or name one of speech, captions"),
        ({"speach.share": (1,)}, r"a new group without --mixture\.speach\.paths"),
        ({"Big.share": (1,), "Big.paths": ("four.jsonl",)}, r"mixture\.Big must be named with a-z, 0-9 and _"),
        (
            {"text.paths": ("four.jsonl",), "text.weights": (1, 2)},
            r"text\.weights must be one for each of its 1 paths, not 2",
        ),
        ({"text.paths": ("four.jsonl",), "text.weights": (0,)}, r"four\.jsonl: expected a weight above 0, found 0"),
        ({"text.paths": ("four.jsonl",), "text.objectives": ("caption=x",)}, r"text\.objectives must be .*'caption=x'"),
        ({"text.paths": ("four.jsonl",), "text.objectives": ("captoin",)}, r"text\.objectives: .*found 'captoin'"),
        ({"text.paths": ("four.jsonl",), "text.objectives": ("caption=2", "caption")}, "names caption twice"),
    ],
)
def test_mistakes_are_named(
    parsed, manifests: tuple[str, str], monkeypatch: pytest.MonkeyPatch, options: dict[str, tuple], message: str
):
    monkeypatch.chdir(Path(manifests[0]).parent)
    config = parsed(*(part for name, values in options.items() for part in (f"--mixture.{name}", *values)))
    with pytest.raises(MossAudioError, match=message):
        config.mixture.groups(seed=0)


COMMANDS = {
    "run": ("--recipe", "finetune", "--out", "unused"),
    "check": ("train.jsonl",),
    "plan": ("--topology", "v5e:2x2"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["mixture.dialect.pths", "mixture.share", "mixture.named.share", "mixtures.a.share"])
def test_misspelt_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, option: str
):
    monkeypatch.setattr("sys.argv", ["moss-audio-train", command, *COMMANDS[command], f"--{option}", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and f"error: there is no option --{option}: " in capsys.readouterr().err


def test_new_names_alone_make_groups():
    arguments = [
        "--mixture.speech.paths",
        "--mixture.easy-scenes.share",
        "--mixture.a.paths=b",
        "--out",
        "mixture.c.paths",
    ]
    config = RECIPES["pretrain_stage2"].with_named_groups(arguments)
    assert set(config.mixture.named) == {"a"}
