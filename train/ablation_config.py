"""Options of the ablation. Imports nothing heavy: `--help` needs these classes."""

import dataclasses

from moss_audio_jax.commands.options import require, require_choice, require_positive
from moss_audio_jax.config import PRESETS
from train.data.config import SceneConfig
from train.evaluation.config import AnswerConfig


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model of the ablation."""

    time_markers: bool
    deepstack: bool


ARMS = {
    "both": Arm(time_markers=True, deepstack=True),
    "no markers": Arm(time_markers=False, deepstack=True),
    "no DeepStack": Arm(time_markers=True, deepstack=False),
    "neither": Arm(time_markers=False, deepstack=False),
}
_ABLATION_TASKS = ("timeline", "start", "duration", "what_at", "pitch", "loudness")
_ABLATION_SCENES = SceneConfig(seconds=(2.0, 6.0), events=(1, 3), tasks=_ABLATION_TASKS, questions=3)
_ABLATION_EASY_SCENES = dataclasses.replace(_ABLATION_SCENES, seconds=(4.0, 4.0), events=(1, 2))
_ABLATION_ANSWERS = AnswerConfig(batch_size=25, max_new_tokens=96)


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Training and evaluation of each model of the ablation."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Models to compare: both, no markers, no DeepStack, neither."""
    steps: int = 600
    """Steps of every run."""
    seeds: int = 3
    """Runs of each arm at its learning rate. Their data and their first parameters differ."""
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3)
    """Learning rates that each arm tries with its first seed."""
    preset: str = "small"
    """Size of the model: small or tiny, 4b or 8b."""
    scenes: SceneConfig = _ABLATION_SCENES
    """Scenes of training, and of the test at the same length."""
    easy_scenes: SceneConfig = _ABLATION_EASY_SCENES
    """Scenes at the beginning of training."""
    easy_examples: int = 6400
    """Number of scenes at the beginning of training."""
    longer: float = 2.0
    """Length of the longer test scenes, and their most events, as a multiple of the longest scenes of training."""
    questions: int = 100
    """Questions of each task, about validation scenes and about both lengths of test scenes."""
    answers: AnswerConfig = _ABLATION_ANSWERS
    """Generation of the answers."""

    def __post_init__(self):
        chosen = f"some of {', '.join(ARMS)}"
        require(self, "", ("arms",), lambda arms: bool(arms) and set(arms) <= set(ARMS), chosen)
        require_positive(self, "", "steps", "seeds", "questions")
        require(self, "", ("learning_rates",), bool, "one rate or more")
        require(self, "", ("longer",), lambda value: value > 1, "above 1")
        require_choice(self, "", "preset", PRESETS)

    @property
    def longer_scenes(self) -> SceneConfig:
        """Scenes of the test that are longer than those of training."""
        seconds = self.scenes.seconds[1] * self.longer
        events = (self.scenes.events[0], round(self.scenes.events[1] * self.longer))
        return dataclasses.replace(self.scenes, seconds=(seconds, seconds), events=events)
