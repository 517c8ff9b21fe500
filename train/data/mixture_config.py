"""Options of the mixture of training data: groups of data sets and of sound scenes, and their shares.

Imports nothing heavy: `--help` needs these classes.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moss_audio_jax.errors import MossAudioError
from train.data.config import ColumnsConfig, SceneConfig

if TYPE_CHECKING:
    from train.data.mixture import Group

NEXT_EPOCH, NOW = "next-epoch", "now"  # begins that a start of a run replaces by an example (`train.running.additions`)


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """A group of data sets that share a purpose."""

    share: float = 0.0
    """Share of all examples, relative to the other groups that have paths."""
    objectives: tuple[str, ...] = ()
    """Objectives to draw from, of those that an example has labels for (`train/data/objectives.py` lists them). A name
    may have a weight, as in `transcribe=2`; the default weight is 1. If none is named, all have weight 1."""
    paths: tuple[str, ...] = ()
    """Manifests, shard directories, and data of other kinds (docs/data.md)."""
    weights: tuple[float, ...] = ()
    """Weights by which the paths are drawn. Default: the square root of the number of examples."""
    begins: tuple[int | Literal["next-epoch", "now"], ...] = ()
    """For each path the example of the run at which it joins the group. `next-epoch`: when the largest data set of the
    group completes its epoch. `now`: at the next example that was not read. Default: 0, with the group."""
    begin: int = 0
    """First example of the run at which the group takes part."""
    end: int | None = None
    """Example of the run at which the group ends. Default: never."""

    def group(self, name: str, seed: int, columns: ColumnsConfig | None = None) -> "Group | None":
        """Opens the group; returns None if it has no paths. Leaves out those whose begin is not an example yet."""
        from train.data.mixture import Group, Source
        from train.data.shards import open_examples

        if not self.paths:
            return None
        self.require_complete(name)
        shares, weights = self.shares(name), self.weights or (None,) * len(self.paths)
        # Groups of new names may have different objectives for one data set.
        prefix = "" if name in _OWN_GROUPS else f"{name}: "
        sources = tuple(
            Source(prefix + path, open_examples(path, columns), shares, weight, begin)
            for path, weight, begin in zip(self.paths, weights, self.all_begins, strict=True)
            if not isinstance(begin, str)
        )
        return Group(name, self.share, sources, self.begin, self.end) if sources else None

    @property
    def all_begins(self) -> tuple[int | str, ...]:
        """`begins`, or its default, for each path."""
        return self.begins or (0,) * len(self.paths)

    def require_complete(self, name: str) -> None:
        """Raises MossAudioError if weights or begins are not one for each path, or if begins are negative."""
        for option, given in (("weights", self.weights), ("begins", self.begins)):
            if given and len(given) != len(self.paths):
                raise MossAudioError(
                    f"--mixture.{name}.{option} must be one for each of its {len(self.paths)} paths, not {len(given)}"
                )
        if negative := [begin for begin in self.begins if isinstance(begin, int) and begin < 0]:
            raise MossAudioError(f"--mixture.{name}.begins must be 0 or more, not {negative[0]}")

    def shares(self, name: str) -> dict[str, float]:
        """Returns the weight of each objective. Raises MossAudioError that names the option of the group `name`."""
        from train.data.objectives import OBJECTIVES, check_shares

        objectives, shares = f"--mixture.{name}.objectives", {}
        for entry in self.objectives:
            objective, equals, weight = entry.partition("=")
            if objective in shares:
                raise MossAudioError(f"{objectives} names {objective} twice: give it once, with one weight")
            try:
                shares[objective] = float(weight) if equals else 1.0
            except ValueError as error:
                raise MossAudioError(
                    f"{objectives} must be names, or names with weights such as transcribe=2, not {entry!r}"
                ) from error
        try:
            check_shares(shares or dict.fromkeys(OBJECTIVES, 1.0))
        except MossAudioError as error:
            raise MossAudioError(f"{objectives}: {error}") from error
        return shares or dict.fromkeys(OBJECTIVES, 1.0)


@dataclasses.dataclass(frozen=True)
class SceneGroupConfig:
    """A group of sound scenes, made while training."""

    share: float = 0.0
    """Share of all examples, relative to the other groups. 0: no scenes."""
    scenes: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    begin: int = 0
    """First example of the run at which the group takes part."""
    end: int | None = None
    """Example of the run at which the group ends. Default: never. A curriculum ends its easier scenes here."""

    def group(self, name: str, seed: int, columns: ColumnsConfig | None = None) -> "Group | None":
        """Opens the group; returns None if its share is 0."""
        from train.data.mixture import Group, Source
        from train.data.scenes import SceneExamples

        if not self.share:
            return None
        source = Source(name, SceneExamples(self.scenes, seed), {"conversation": 1.0})
        return Group(name, self.share, (source,), self.begin, self.end)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Mixture of training data: MOSS-Audio's published groups, sound scenes, and groups of any other name."""

    speech: GroupConfig = GroupConfig(0.3, ("transcribe", "transcribe_words", "transcribe_sentences"))
    """Speech with transcripts."""
    captions: GroupConfig = GroupConfig(0.4, ("caption", "events", "time_qa", "conversation"))
    """Audio with captions, events or conversations."""
    text: GroupConfig = GroupConfig(0.3, ("plain_text",))
    """Plain text."""
    conversations: GroupConfig = GroupConfig(1.0, ("conversation", "labels"))
    """Fine-tuning data; `--data` is short for its paths. Labels of a clip without a conversation become questions."""
    scenes: SceneGroupConfig = SceneGroupConfig()
    """Sound scenes."""
    easy_scenes: SceneGroupConfig = SceneGroupConfig()
    """Sound scenes of a curriculum's beginning."""
    middle_scenes: SceneGroupConfig = SceneGroupConfig()
    """Sound scenes between a curriculum's beginning and its end."""
    full_scenes: SceneGroupConfig = SceneGroupConfig()
    """Sound scenes of the greatest length, which random lengths seldom reach."""
    clips: str | None = None
    """Directory of recordings for all groups of scenes, in place of their own `clips`."""
    clips_except: tuple[str, ...] = ()
    """Globs of recordings that all groups of scenes leave out, besides their own."""
    named: Annotated[dict[str, GroupConfig], tyro.conf.arg(name="")] = dataclasses.field(default_factory=dict)
    """Groups of other names, each with the options of `speech` (`with_named_groups`)."""

    def manifest_groups(self) -> dict[str, GroupConfig]:
        """Returns the groups of data sets by name."""
        return {name: group for name, group in self._by_name().items() if isinstance(group, GroupConfig)}

    def groups(self, seed: int, columns: ColumnsConfig | None = None) -> "list[Group]":
        """Opens the groups that have data. seed: seed of the scenes. columns: of data that is no manifest."""
        for name, group in self.named.items():
            _require_complete(name, group)
        opened = [group.group(name, seed, columns) for name, group in self._by_name().items()]
        used = [group for group in opened if group is not None]
        if not used and any(group.begins for group in self.manifest_groups().values()):
            raise MossAudioError("no data are read from the beginning on: give 0 as the begin of a path that is")
        if not used:
            options = ", ".join(f"--mixture.{name}.paths" for name in self.manifest_groups())
            raise MossAudioError(f"there is nothing to train on: give one of {options}, or --mixture.scenes.share")
        return used

    def with_begins(self, begins: Mapping[str, Sequence[int]]) -> "MixtureConfig":
        """Returns the mixture with these begins of its groups, by name."""
        groups = self.manifest_groups()
        changed = {name: dataclasses.replace(groups[name], begins=tuple(of)) for name, of in begins.items()}
        own = {name: group for name, group in changed.items() if name in _OWN_GROUPS}
        named = {name: group for name, group in changed.items() if name not in own}
        return dataclasses.replace(self, **own, named=self.named | named)

    def with_named_groups(self, arguments: Iterable[str]) -> "MixtureConfig":
        """Adds an empty group for each new name in arguments such as `--mixture.NAME.paths`."""
        found = (match[1].replace("-", "_") for match in map(_GROUP_OPTION.match, arguments) if match)
        named = {name: GroupConfig() for name in found if name not in (*_OWN_GROUPS, *_OTHER_FIELDS)}
        return dataclasses.replace(self, named=named | self.named)

    def with_clips(self, scenes: SceneConfig) -> SceneConfig:
        """Returns the scenes of a group with the recordings that the mixture names."""
        clips = scenes.clips if self.clips is None else self.clips
        return dataclasses.replace(scenes, clips=clips, clips_except=scenes.clips_except + self.clips_except)

    def _by_name(self) -> dict[str, "GroupConfig | SceneGroupConfig"]:
        """Returns all groups. Named ones are sorted: the order of examples must not depend on that of the options."""
        own = {name: getattr(self, name) for name in _OWN_GROUPS}
        with_clips = {
            name: dataclasses.replace(group, scenes=self.with_clips(group.scenes))
            for name, group in own.items()
            if isinstance(group, SceneGroupConfig) and group.share
        }
        return own | with_clips | dict(sorted(self.named.items()))


_OTHER_FIELDS = ("named", "clips", "clips_except")
_OWN_GROUPS = tuple(field.name for field in dataclasses.fields(MixtureConfig) if field.name not in _OTHER_FIELDS)
_GROUP_OPTION = re.compile(r"--mixture\.([^.=]+)\.")


def _require_complete(name: str, group: GroupConfig) -> None:
    """Raises MossAudioError for a named group with a bad name, or without paths or a share, which have no default."""
    if not re.fullmatch("[a-z0-9_]+", name):
        raise MossAudioError(f"--mixture.{name} must be named with a-z, 0-9 and _, as its metrics are: rename it")
    missing = [option for option in ("paths", "share") if not getattr(group, option)]
    if missing:
        raise MossAudioError(
            f"--mixture.{name} is a new group without --mixture.{name}.{missing[0]}: give it, or name one of "
            f"{', '.join(_OWN_GROUPS)}"
        )
