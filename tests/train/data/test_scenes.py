"""Scenes: labels that are true of the waves, questions whose answers follow from the labels, nothing left to chance."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.audio import SAMPLE_RATE
from moss_audio_jax.errors import MossAudioError
from train.data.config import LABELS, SOUND_NAMES, TASK_NAMES, SceneConfig
from train.data.manifest import Clip
from train.data.scene_synthesis import SOUNDS, Event, ScenePlan
from train.data.scene_tasks import TASKS, caption
from train.data.scenes import make_scene, make_task
from train.evaluation.metrics.events import score_events
from train.evaluation.metrics.timelines import parse_timeline, score_timestamps

RATE = 16000


def layout(*events, seconds=8.0, background="white"):
    return ScenePlan(round(seconds * RATE), tuple(events), background, -60.0)


def ask(task, scene, seed=0):
    return TASKS[task](scene, np.random.default_rng(seed))


# Determinism


def fingerprint(index):
    scene = make_scene(5, index, SceneConfig())
    return scene.events, scene.background, scene.wave.tobytes()


def test_scenes_do_not_depend_on_order_or_process():
    there = [fingerprint(index) for index in range(4)]
    back = [fingerprint(index) for index in reversed(range(4))][::-1]
    assert there == back
    assert len({wave for _, _, wave in there}) == 4
    code = (
        "import hashlib; from train.data.scenes import *;"
        "print(hashlib.sha256(make_scene(5, 3, SceneConfig()).wave.tobytes()).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(there[3][2]).hexdigest()


def test_seeds_differ():
    config = SceneConfig()
    assert make_scene(0, 1, config).events != make_scene(1, 0, config).events
    assert make_scene(0, 0, config).events != make_scene(1, 0, config).events


def test_a_task_is_about_the_scene_of_the_same_index():
    for index in range(5):
        task = make_task(3, index, SceneConfig(tasks=("start",)))
        assert task.scene.events == make_scene(3, index, SceneConfig()).events
        assert np.array_equal(task.scene.wave, make_scene(3, index, SceneConfig()).wave)
        again = make_task(3, index, SceneConfig(tasks=("start",)))
        assert (task.question, task.answer) == (again.question, again.answer)


# Waves


def level(wave):
    return 20 * np.log10(np.sqrt(np.mean(np.square(wave, dtype=np.float64))) + 1e-12)


@pytest.mark.parametrize("label", (*LABELS, "siren"))
def test_sounds_begin_and_end_where_they_are_labelled(label):
    config = SceneConfig(labels=(label,), events=(3, 3), event_seconds=(0.3, 1.0))
    window = round(0.02 * RATE)
    for index in range(20):
        scene = make_scene(0, index, config)
        for event in scene.events:
            first, last = round(event.start * RATE), round(event.end * RATE)
            assert level(scene.wave[first : first + window]) > level(scene.wave[first - window : first]) + 8
            assert level(scene.wave[last - window : last]) > level(scene.wave[last : last + window]) + 8


def test_levels():
    config = SceneConfig(background_db=(-90, -90), level_db=(-20, -8))
    for index in range(20):
        scene = make_scene(1, index, config)
        for event in scene.events:
            sound = scene.wave[round(event.start * RATE) : round(event.end * RATE)]
            assert -20 <= event.level_db <= -8
            assert 20 * np.log10(np.abs(sound).max()) == pytest.approx(event.level_db, abs=0.05)
    assert level(make_scene(1, 0, config).wave[: round(0.2 * RATE)]) == pytest.approx(-90, abs=6)


def test_overlapping_sounds_stay_within_full_scale():
    config = SceneConfig(overlap=True, events=(8, 8), level_db=(-1, 0), labels=("tone", "hum"))
    waves = [make_scene(0, index, config).wave for index in range(10)]
    assert max(np.abs(wave).max() for wave in waves) == pytest.approx(1.0)
    assert all(wave.dtype == np.float32 for wave in waves)


@pytest.mark.parametrize("label", ["tone", "chirp", "noise", "hum"])
def test_sounds_rise_and_fall_without_a_click(label):
    for _, wave in sounds(label):
        middle = level(wave[len(wave) // 4 : -len(wave) // 4])
        assert level(wave[:8]) < middle - 15 and level(wave[-8:]) < middle - 15


def peaks(wave, count, reach=30.0):
    """The strongest frequencies, in Hz, at least `reach` apart."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 4 * RATE)) ** 2
    found = []
    for index in np.argsort(power)[::-1]:
        if all(abs(index / 4 - other) > reach for other in found):
            found.append(index / 4)
        if len(found) == count:
            return sorted(found)


def sounds(label, count=8):
    config = SceneConfig(labels=(label,), events=(2, 2), background_db=(-90, -90))
    for index in range(count):
        scene = make_scene(2, index, config)
        for event in scene.events:
            yield event, scene.wave[round(event.start * RATE) : round(event.end * RATE)]


def test_tones_and_hums_have_their_pitch():
    for event, wave in sounds("tone"):
        assert event.pitch_hz[0] == event.pitch_hz[1]
        assert peaks(wave, 1)[0] == pytest.approx(event.pitch_hz[0], abs=2)
    for event, wave in sounds("hum"):
        assert peaks(wave, 3) == pytest.approx([event.pitch_hz[0] * k for k in (1, 2, 3)], abs=4)


def test_chirps_glide():
    directions = set()
    for event, wave in sounds("chirp"):
        low, high = sorted(event.pitch_hz)
        assert 1.79 <= high / low <= 4.01
        part = len(wave) // 20
        # the pitch a fortieth of the glide from either end, on a logarithmic scale
        inner = event.pitch_hz[0] ** np.array([39 / 40, 1 / 40]) * event.pitch_hz[1] ** np.array([1 / 40, 39 / 40])
        assert peaks(wave[:part], 1)[0] == pytest.approx(inner[0], rel=0.05)
        assert peaks(wave[-part:], 1)[0] == pytest.approx(inner[1], rel=0.05)
        directions.add(event.pitch_hz[0] < event.pitch_hz[1])
    assert directions == {True, False}


def test_dialled_digits_are_pairs_of_dtmf_frequencies():
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477, 1633)
    for _, wave in sounds("dial"):
        row, column = peaks(wave[: round(0.08 * RATE)], 2, reach=200)
        assert min(abs(row - known) for known in rows) < 8
        assert min(abs(column - known) for known in columns) < 8


def test_backgrounds_have_their_colour():
    for background, slope in (("white", 0), ("pink", -3), ("brown", -6)):
        config = SceneConfig(backgrounds=(background,), events=(1, 1), event_seconds=(0.1, 0.1), level_db=(-90, -90))
        scene = make_scene(0, 0, config)
        power = np.abs(np.fft.rfft(scene.wave)) ** 2
        octaves = [10 * np.log10(power[800 * 2**k : 1600 * 2**k].mean()) for k in range(6)]
        assert np.polyfit(range(6), octaves, 1)[0] == pytest.approx(slope, abs=0.3)


# Plans


@st.composite
def configs(draw):
    shortest = draw(st.floats(0.1, 1.0))
    longest = draw(st.floats(shortest, 2.0))
    gap = draw(st.floats(0, 0.5))
    least = draw(st.floats(longest + 2 * gap + 0.01, 6))
    few = draw(st.integers(1, 4))
    return SceneConfig(
        seconds=(least, draw(st.floats(least, 12))),
        events=(few, draw(st.integers(few, 8))),
        event_seconds=(shortest, longest),
        gap=gap,
        overlap=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(0, 2**31), st.integers(0, 2**31))
def test_events_keep_to_the_configuration(config, seed, index):
    scene = make_scene(seed, index, config)
    sample = 1.5 / RATE
    assert config.seconds[0] - 0.01 <= scene.seconds <= config.seconds[1] + 0.01
    assert len(scene.wave) == scene.samples and scene.samples % 160 == 0
    assert np.isfinite(scene.wave).all() and np.abs(scene.wave).max() <= 1
    assert 1 <= len(scene.events) <= config.events[1]
    for event in scene.events:
        assert config.event_seconds[0] - sample <= event.end - event.start <= config.event_seconds[1] + sample
        assert config.gap - sample <= event.start and event.end <= scene.seconds - config.gap + sample
    for event, following in itertools.pairwise(scene.events):
        assert event.start <= following.start
        if not config.overlap:
            assert following.start - event.end >= config.gap - sample


def test_everything_is_drawn():
    scenes = [make_scene(0, index, SceneConfig(seconds=(6, 10))) for index in range(150)]
    assert {event.text for scene in scenes for event in scene.events} == set(LABELS)
    assert {scene.background for scene in scenes} == {"white", "pink", "brown"}
    assert {len(scene.events) for scene in scenes} == {1, 2, 3, 4}
    seconds = [scene.seconds for scene in scenes]
    assert min(seconds) < 6.3 and max(seconds) > 9.7
    alone = SceneConfig(events=(1, 1), event_seconds=(1, 1))
    starts = [make_scene(0, index, alone).events[0].start for index in range(60)]
    assert min(starts) < 0.8 and max(starts) > 6.2  # of 0.2 to 6.8


# Tasks

TONE = Event("tone", 2.71, 3.48, -20.0, (500.0, 500.0))
NOISE = Event("noise", 3.7, 4.5, -10.0)


def test_timeline():
    assert ask("timeline", layout(TONE, NOISE))[1] == "[2.7]tone[3.5][3.7]noise[4.5]"


def test_timelines_are_scored_against_the_events_they_were_made_from():
    tasks = [make_task(4, index, SceneConfig(events=(1, 5))) for index in range(30)]
    predictions = [parse_timeline(task.answer).items for task in tasks]
    references = [task.scene.events for task in tasks]
    assert score_events(predictions, references).total.f1 == 1
    assert 15 < score_timestamps(predictions, references).aas_ms < 35  # rounding to 0.1 s costs 25 ms


def test_when_and_how_long():
    question, answer = ask("start", layout(TONE))
    assert "the tone" in question and answer == "2.7"
    assert ask("duration", layout(TONE))[1] == "0.8"
    second = replace(TONE, start=5.0, end=6.0)
    answers = {ask("start", layout(TONE, NOISE, second), seed) for seed in range(40)}
    answers = {(question, answer) for question, answer in answers if "noise" not in question}
    assert {("first tone" in question, answer) for question, answer in answers} == {(True, "2.7"), (False, "5.0")}
    assert all("second tone" in question for question, answer in answers if answer == "5.0")


def test_what_is_heard_at_a_time():
    scene = layout(TONE, NOISE)
    answers = [ask("what_at", scene, seed) for seed in range(300)]
    times = {answer: set() for _, answer in answers}
    for question, answer in answers:
        times[answer].add(float(next(word.strip("?") for word in question.split() if word[0].isdigit())))
    assert set(times) == {"tone", "noise", "nothing"}
    assert times["tone"] == {2.9, 3.0, 3.1, 3.2, 3.3}
    assert times["noise"] == {3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 4.4}
    assert times["nothing"] <= {tenth / 10 for tenth in (*range(1, 27), 36, *range(46, 80))}
    assert 0.15 < sum(answer == "nothing" for _, answer in answers) / len(answers) < 0.35
    both = ask("what_at", layout(replace(TONE, start=0.0, end=8.0), replace(NOISE, start=0.1, end=8.0)), seed=1)
    assert both[1] == "tone, noise"


def test_pitches_are_compared_where_they_clearly_differ():
    higher = replace(TONE, start=5.0, end=6.0, pitch_hz=(601.0, 601.0))
    assert ask("pitch", layout(TONE, higher))[1] == "second"
    assert ask("pitch", layout(replace(higher, start=1.0), TONE))[1] == "first"
    assert ask("pitch", layout(TONE, replace(higher, pitch_hz=(599.0, 599.0)))) is None
    assert ask("pitch", layout(TONE, NOISE)) is None
    assert ask("pitch", layout(TONE, higher, replace(higher, start=7.0))) is None  # first and second of three
    assert ask("pitch", layout(replace(TONE, text="chirp"), replace(higher, text="chirp"))) is None


def test_loudnesses_are_compared_where_they_clearly_differ():
    softer = replace(NOISE, start=6.0, end=7.0, level_db=-16.0)
    assert ask("loudness", layout(NOISE, softer))[1] == "first"
    assert ask("loudness", layout(replace(softer, start=1.0), NOISE))[1] == "second"
    assert ask("loudness", layout(NOISE, replace(softer, level_db=-15.9))) is None
    assert ask("loudness", layout(NOISE, TONE)) is None


def test_speakers_are_named_in_their_order():
    words = [
        Event("seven", begin, begin + 0.5, -9.0, recording=0, voice=name) for begin, name in ((1, "ann"), (2, "bo"))
    ]
    asked = {ask("speaker", layout(words[0], TONE, words[1]), seed) for seed in range(40)}
    assert {("first" in question, answer) for question, answer in asked} == {(True, "ann"), (False, "bo")}
    assert ask("speaker", layout(TONE, NOISE)) is None


def test_drums_are_named_in_their_order():
    kick, hat = Event("kick", 1.0, 1.5, -9.0), Event("hat", 6.0, 6.5, -9.0)
    asked = {ask("drum", layout(kick, TONE, hat), seed) for seed in range(40)}
    assert {("first" in question, answer) for question, answer in asked} == {(True, "kick"), (False, "hat")}
    assert ask("drum", layout(TONE, NOISE)) is None


def test_drums_differ_in_their_sound():
    """Kick and tom ring at their pitch; the hat is higher than the clap; all decay."""
    centers = {}
    for name in ("kick", "tom", "snare", "clap", "hat"):
        waves = [SOUNDS[name](Event(name, 0, 0.5, -9.0), 8000, np.random.default_rng(seed)) for seed in range(20)]
        powers = np.mean([np.square(np.abs(np.fft.rfft(wave))) for wave in waves], 0)
        centers[name] = float(np.sum(powers * np.fft.rfftfreq(8000, 1 / SAMPLE_RATE)) / powers.sum())
        assert all(np.square(wave[4000:]).sum() < 0.1 * np.square(wave[:4000]).sum() for wave in waves), name
    assert centers["kick"] < 100 < centers["tom"] < 250 < centers["snare"] < centers["clap"] < centers["hat"]


def test_caption():
    chirp = Event("chirp", 5.0, 6.0, -10.0, (900.0, 400.0))
    click = Event("click", 6.5, 7.0, -10.0)
    assert caption(layout(TONE, chirp, click)) == (
        "A tone, then a falling chirp, then a row of clicks, over a faint hiss."
    )
    rising = replace(chirp, pitch_hz=(400.0, 900.0))
    assert caption(layout(rising, background="brown")) == "A rising chirp, over a faint rumble."
    captions = {caption(layout(Event(label, 1.0, 2.0, -9.0, (1.0, 2.0)))) for label in SOUND_NAMES}
    assert len(captions) == len(SOUND_NAMES)


def test_every_task_is_drawn_and_answered():
    of_synthetic = tuple(task for task in TASKS if task not in ("voice", "speaker"))
    labels = (*LABELS, "snare", "hat")
    config = SceneConfig(tasks=of_synthetic, labels=labels, events=(1, 6), seconds=(8, 12))
    tasks = [make_task(0, index, config) for index in range(200)]
    assert {task.name for task in tasks} == set(of_synthetic)
    assert all(task.answer and task.question and "{" not in task.question for task in tasks)
    for name in ("pitch", "fine_pitch", "loudness", "fine_loudness"):
        assert {task.answer for task in tasks if task.name == name} == {"first", "second"}


def test_where_no_time_is_quiet_a_time_with_a_sound_is_asked_about():
    """Though a quarter of these questions look for a quiet time: for another scene the kind is drawn anew."""
    loud = SceneConfig(seconds=(2, 2), events=(1, 1), event_seconds=(1.75, 1.8), gap=0.1, tasks=("what_at",))
    assert "nothing" not in {make_task(0, index, loud).answer for index in range(20)}


def test_scenes_without_events_have_nothing_in_their_timeline():
    asked = ("timeline", "start", "duration", "words", "transcript", "caption")
    silent = SceneConfig(events=(0, 1), tasks=asked)
    tasks = [make_task(0, index, silent) for index in range(60)]
    empty = [task for task in tasks if not task.scene.events]
    assert {task.name for task in empty} == {"timeline", "caption"}  # the others ask about an event
    assert {task.answer for task in empty if task.name == "timeline"} == {"nothing"}
    assert all(task.answer.startswith("Nothing, over ") for task in empty if task.name == "caption")
    assert not parse_timeline("nothing").items
    assert {len(make_scene(0, index, replace(silent, pause=(0.1, 0.2))).events) for index in range(10)} == {0, 1}


def test_as_an_example():
    task = make_task(0, 0, SceneConfig())
    example = task.example("scene 0")
    user, assistant = example.conversation
    assert isinstance(user.content[0], Clip) and user.content[0].wave() is not None
    assert np.array_equal(user.content[0].wave(), task.scene.wave)
    assert (user.role, user.content[1]) == ("user", task.question)
    assert (assistant.role, assistant.content) == ("assistant", (task.answer,))
    assert example.events == task.scene.events and example.caption == caption(task.scene)


# Errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seconds": (9, 8)}, "seconds must be a lower and an upper bound"),
        ({"labels": ("tone", "bell")}, "labels must be some of tone, chirp"),
        ({"labels": ()}, "labels must be some of"),
        ({"tasks": ("sing",)}, "tasks must be some of timeline"),
        ({"backgrounds": ("blue",)}, "backgrounds must be some of white"),
        ({"events": (0, 0)}, "events must be 0 or more, and 1 or more"),
        ({"event_seconds": (0.05, 1)}, "event_seconds must be 0.1 or more"),
        ({"seconds": (1.8, 8)}, "seconds must be 1.9 s or more, for the longest event"),
        ({"gap": -0.1}, "gap must be 0 or more"),
        ({"level_db": (-6, 1)}, "level_db must be 0 or less"),
        ({"level_db": (float("nan"), 0)}, "level_db must be a lower and an upper bound"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(MossAudioError, match=message):
        SceneConfig(**setting)


def test_a_task_no_scene_allows():
    with pytest.raises(MossAudioError, match="can be asked the task 'pitch'"):
        make_task(0, 0, SceneConfig(tasks=("pitch",), labels=("noise",)))


def test_options_name_all_sounds_and_tasks():
    assert tuple(SOUNDS) == SOUND_NAMES and tuple(TASKS) == TASK_NAMES
