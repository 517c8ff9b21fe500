"""Pictures: bars at their times, equal labels in equal colours, nothing hidden."""

import sys

import numpy as np
import pytest

from moss_audio_jax.audio import log_mel
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.pictures import COLORS, label_colors, mel_bin
from train.data.config import SceneConfig
from train.data.manifest import TimedText
from train.data.scene_synthesis import SOUNDS
from train.data.scenes import make_scene
from train.evaluation.plots import TimelinePlot, _draw, _draw_ranges, plot_timelines

pytest.importorskip("matplotlib")

SCENE = make_scene(0, 0, SceneConfig())


def events(*labels: tuple[str, float, float]) -> list[TimedText]:
    return [TimedText(*label) for label in labels]


def bars(axes) -> list[tuple[float, float, float, tuple]]:
    """Start, length, row and colour of each bar."""
    return [
        (round(bar.get_x(), 6), round(bar.get_width(), 6), bar.get_y() + bar.get_height() / 2, bar.get_facecolor())
        for bar in axes.patches
    ]


def test_bars_stand_at_their_times_in_the_colour_of_their_label():
    true = events(("tone", 1.0, 3.0), ("hum", 2.0, 4.0), ("tone", 5.0, 6.0))
    figure = _draw([TimelinePlot(SCENE.wave, true, events(("tone", 1.5, 3.0), ("noise", 7.75, 99.0)), "a scene")])
    spectrogram, timeline = figure.axes
    assert spectrogram.get_title(loc="left") == "a scene"
    assert spectrogram.images[0].get_extent() == [0, 8.0, 0, 128]
    assert timeline.get_xlim() == spectrogram.get_xlim() == (0, 8.0)

    tone, late, hum, predicted, noise = bars(timeline)  # row by row
    assert [bar[:3] for bar in (tone, late, hum)] == [(1.0, 2.0, 0.5), (5.0, 1.0, 0.5), (2.0, 2.0, 1.5)]
    assert [bar[:3] for bar in (predicted, noise)] == [(1.5, 1.5, 2.5), (7.75, 0.25, 2.5)]  # cut at the end of the clip
    assert tone[3] == late[3] == predicted[3]
    assert len({tone[3], hum[3], noise[3]}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tone", "noise", "hum"]
    assert [text.get_text() for text in timeline.texts] == ["tone", "tone", "hum", "tone"]  # no space for `noise`


def test_awkward_predictions():
    wrong = events(("tone", 5.0, 4.0), ("tone", 20.0, 21.0), ("hum", 30.0, 31.0))
    figure = _draw([TimelinePlot(SCENE.wave, [], wrong), TimelinePlot(SCENE.wave, [], [])])
    assert len(figure.axes) == 4
    (backwards,) = bars(figure.axes[1])
    assert backwards[:3] == (4.0, 1.0, 1.5) and figure.axes[1].patches[0].get_hatch()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tone", "hum", "ends before it starts"]
    shown = [text.get_text().strip() for text in figure.axes[1].texts]
    assert shown == ["nothing", "tone", "2 after the end"]
    assert [text.get_text().strip() for text in figure.axes[3].texts] == ["nothing", "nothing"]
    many = events(*((f"label {index}", index / 10, index / 10 + 0.1) for index in range(60)))
    assert not _draw([TimelinePlot(SCENE.wave, many, [])]).legends  # colours are shared


def test_a_picture_is_written(tmp_path):
    plot_timelines(tmp_path / "one.png", [TimelinePlot(SCENE.wave, SCENE.events, [])])
    plot_timelines(tmp_path / "two.png", [TimelinePlot(SCENE.wave, SCENE.events, SCENE.events)] * 2)
    from matplotlib.image import imread

    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert one.shape[1] == two.shape[1] and 1.5 < two.shape[0] / one.shape[0] < 2
    assert len(np.unique(one.reshape(-1, one.shape[2]), axis=0)) > 1000  # the spectrogram's colours


@pytest.mark.parametrize(("name", "message"), [("absent/a.png", "No such file"), (".", "directory")])
def test_files_that_cannot_be_written_are_named(tmp_path, name, message):
    with pytest.raises(MossAudioError, match=f"expected a picture that can be written.*{message}"):
        plot_timelines(tmp_path / name, [TimelinePlot(SCENE.wave, [], [])])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(MossAudioError, match="expected clips to plot, found none"):
        plot_timelines(tmp_path / "a.png", [])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MossAudioError, match=r"pip install 'moss-audio-jax\[plot\]'"):
        plot_timelines(tmp_path / "a.png", [TimelinePlot(SCENE.wave, [], [])])


def test_what_cannot_be_read_is_said():
    unread = TimelinePlot(SCENE.wave, [], [], unreadable=1, answer="A tone,\nthen $noise.")
    partly = TimelinePlot(SCENE.wave, [], events(("tone", 1.0, 2.0)), unreadable=2, answer="[1]tone[2] and [3")
    figure = _draw([unread, partly])
    notes = [[text.get_text().strip() for text in figure.axes[index].texts] for index in (1, 3)]
    assert notes[0] == ["nothing", "1 piece of the answer can't be read: A tone, then $noise."]
    assert notes[1] == ["nothing", "tone", "2 pieces of the answer can't be read"]
    assert figure.axes[1].get_ylim() == (2, 0) and figure.axes[3].get_ylim() == (3, 0)


def test_a_label_has_one_colour():
    assert label_colors(["hum"], SOUNDS)["hum"] == label_colors(["tone", "hum", "dog"], SOUNDS)["hum"]
    colors = label_colors(["tone", "hum", "siren", "dog", "cat", "car"], SOUNDS)
    assert len(set(colors.values())) == 6 and set(colors.values()) <= set(COLORS)
    assert label_colors(["dog"], SOUNDS)["dog"] == label_colors(["dog", "dog"], SOUNDS)["dog"]


def test_frequencies_stand_where_they_are_in_the_spectrogram():
    time = np.arange(16000) / 16000
    for hertz in (250, 1000, 4000):
        loudest = log_mel(np.sin(2 * np.pi * hertz * time).astype(np.float32)).mean(1).argmax()
        assert abs(mel_bin(hertz) - (loudest + 0.5)) <= 1


def test_compared_runs_have_one_panel():
    values = {"short": {"start": {"a": [10.0, 30.0], "b": [50.0]}}, "long": {"end": {"a": [0.0, 0.0], "b": [5.0, 7.0]}}}
    figure = _draw_ranges(values, "%")
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["", "start", "", "end"]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    ranges = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() != "o"]
    assert means == [20.0, 50.0, 0.0, 6.0] and ranges == [(10.0, 30.0), (50.0, 50.0), (0.0, 0.0), (5.0, 7.0)]
