"""Options of the ablation. Imports nothing heavy: `--help` needs these classes."""

import dataclasses

from moss_audio_jax.commands.options import require, require_choice, require_positive
from train.data.config import DRUMS, SceneConfig
from train.evaluation.config import AnswerConfig
from train.recipes import TEST_DIGITS, digit_strings


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model of the ablation.

    labels: audio tokens have auxiliary labels. label_times: digits of the time are among them.
    preset: size of the model. without: the arm that has one thing less, to compare with.
    """

    time_markers: bool = True
    deepstack: bool = True
    labels: bool = True
    label_times: bool = False
    preset: str = "small"
    without: str | None = None


ARMS = {
    "both": Arm(),
    "no markers": Arm(time_markers=False, without="both"),
    "no DeepStack": Arm(deepstack=False, without="both"),
    "timed labels": Arm(label_times=True),
    "timed labels, no markers": Arm(label_times=True, time_markers=False, without="timed labels"),
    "no labels": Arm(labels=False),
    "no labels, no DeepStack": Arm(labels=False, deepstack=False, without="no labels"),
    "deep encoder": Arm(preset="deep"),
    "deep encoder, no DeepStack": Arm(preset="deep", deepstack=False, without="deep encoder"),
}


FAMILY_NAMES = ("times", "details", "drums", "voices", "digits")

_TIMES = SceneConfig(
    seconds=(4.0, 30.0),
    events=(1, 1),  # of several, it would also be measured which one a model takes
    labels=("tone", "chirp", "click", "noise", "dial", "hum"),
    tasks=("start",),
)
# In one chunk the encoder's positions are the seconds: a model learns there to look for a sound and to write a time.
_ONE_CHUNK = dataclasses.replace(_TIMES, seconds=(4.0, 4.0))
_FEW_CHUNKS = dataclasses.replace(_TIMES, seconds=(4.0, 12.0))
_DETAILS = SceneConfig(
    seconds=(1.6, 2.0),
    events=(2, 2),
    labels=("tone",),
    event_seconds=(0.4, 0.6),
    gap=0.1,
    tasks=("pitch", "fine_pitch", "loudness", "fine_loudness"),
    questions=3,
)
_DRUMS = dataclasses.replace(_DETAILS, events=(2, 3), labels=DRUMS, seconds=(2.0, 2.4), tasks=("drum",))
_VOICES = dataclasses.replace(
    digit_strings(),
    seconds=(2.0, 3.0),
    events=(2, 2),
    speed=(1.0, 1.0),  # another speed is another voice
    tasks=("voice", "speaker"),
    questions=3,
)
_ANSWERS = AnswerConfig(batch_size=25, max_new_tokens=128)


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Training and evaluation of each model of the ablation."""

    family: str = "times"
    """Tasks to compare the models by, which gives the other options their defaults. times: sounds and their times in
    clips of 4 to 30 s. details: which of two tones is higher, or louder. drums: which drum it is. voices: who says two
    digits, and whether one person says both. digits: a spoken digit and its time, in clips of 4 to 30 s."""
    arms: tuple[str, ...] = ("both", "no markers")
    """Models to compare: both, no markers, no DeepStack; with digits of the time among the auxiliary labels: timed
    labels, and timed labels, no markers; without auxiliary labels: no labels, and no labels, no DeepStack; with an
    encoder of 6 layers: deep encoder, and deep encoder, no DeepStack."""
    steps: int = 1200
    """Steps of every run."""
    seeds: int = 5
    """Runs of each arm at its learning rate. Their data and their first parameters differ."""
    learning_rates: tuple[float, ...] = (2e-3,)
    """Learning rates that each arm tries with its first seed, if there are several. The best in the last validation is
    taken."""
    scenes: SceneConfig = _TIMES
    """Scenes of training."""
    easy_scenes: SceneConfig = _ONE_CHUNK
    """Scenes at the beginning of training."""
    easy_examples: int = 12_000
    """Number of scenes at the beginning of training."""
    middle_scenes: SceneConfig = _FEW_CHUNKS
    """Scenes between the beginning of training and its end."""
    middle_examples: int = 8000
    """Number of scenes between the beginning of training and its end. 0: none."""
    test_scenes: SceneConfig = _TIMES
    """Scenes of the tests; their lengths are those of the bins."""
    bins: tuple[tuple[float, float], ...] = ((4.0, 8.0), (8.0, 16.0), (16.0, 30.0), (30.0, 45.0))
    """Shortest and longest scene of each test, in seconds."""
    clips: str | None = None
    """Directory of recordings, in place of the one that the scenes name."""
    batch_size: int = 8
    """Packed sequences in a batch."""
    tokens: int = 512
    """Tokens of a packed sequence."""
    chunks: int = 8
    """Audio chunks (4 s each) of a packed sequence."""
    validations: int = 10
    """Validations of a run, which make its learning curve."""
    validation_questions: int = 60
    """Questions of a validation."""
    questions: int = 100
    """Questions of each task in each test."""
    answers: AnswerConfig = _ANSWERS
    """Generation of the answers."""

    def __post_init__(self):
        require_choice(self, "", "family", FAMILY_NAMES)
        chosen = f"some of {', '.join(ARMS)}"
        require(self, "", ("arms",), lambda arms: bool(arms) and set(arms) <= set(ARMS), chosen)
        counts = ("steps", "seeds", "questions", "validations", "validation_questions", "batch_size")
        require_positive(self, "", *counts)
        require(self, "", ("validations",), lambda count: count <= self.steps, f"{self.steps} steps or fewer")
        require(self, "", ("learning_rates",), bool, "one rate or more")
        require(self, "", ("bins",), lambda bins: all(0 < low <= high for low, high in bins), "bounds above 0")

    @property
    def longest(self) -> float:
        """Seconds of the longest scene of training."""
        return self.scenes.seconds[1]


def _of_test_recordings(scenes: SceneConfig) -> SceneConfig:
    others = tuple(glob for glob in scenes.clips_except if glob != TEST_DIGITS)
    return dataclasses.replace(scenes, clips_only=(TEST_DIGITS,), clips_except=others)


def _spoken(scenes: SceneConfig) -> SceneConfig:
    """Returns scenes of the same lengths and tasks with spoken digits in place of the sounds."""
    return dataclasses.replace(
        digit_strings(), seconds=scenes.seconds, events=scenes.events, pause=None, tasks=scenes.tasks
    )


def _family_of_details(
    family: str, steps: int, scenes: SceneConfig, easy: SceneConfig, test: SceneConfig
) -> AblationConfig:
    return AblationConfig(
        family=family,
        arms=("both", "no DeepStack"),
        steps=steps,
        scenes=scenes,
        easy_scenes=easy,
        easy_examples=10_000,
        middle_examples=0,
        test_scenes=test,
        bins=(scenes.seconds,),
        tokens=320,
        chunks=4,
        batch_size=16,
    )


FAMILIES: dict[str, AblationConfig] = {
    "times": AblationConfig(),
    "details": _family_of_details(
        "details", 700, _DETAILS, dataclasses.replace(_DETAILS, tasks=("pitch", "loudness")), _DETAILS
    ),
    "drums": _family_of_details("drums", 500, _DRUMS, _DRUMS, _DRUMS),
    "voices": _family_of_details(
        "voices", 1000, _VOICES, dataclasses.replace(_VOICES, tasks=("speaker",)), _of_test_recordings(_VOICES)
    ),
    "digits": AblationConfig(
        family="digits",
        scenes=_spoken(_TIMES),
        easy_scenes=_spoken(_ONE_CHUNK),
        middle_scenes=_spoken(_FEW_CHUNKS),
        test_scenes=_of_test_recordings(_spoken(_TIMES)),
    ),
}
