"""The page in a browser, headless Chromium, beside the real server with an engine whose answers are made up."""

import base64
import collections
import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from moss_audio_jax import Processor
from moss_audio_jax.serving.app import make_app
from moss_audio_jax.serving.service import Service
from tests.serving.canned_engine import ANSWERS, CannedEngine
from tests.serving.conftest import serving, until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install playwright")
expect, Browser, Page = playwright.expect, playwright.Browser, playwright.Page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not there: apt-get install chromium")
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
NARROW = {"width": 360, "height": 640}
SECOND = "S02 Is it <b>on</b>?"  # segment of the transcript


@dataclass
class Running:
    """A server with the page. bodies: of the requests, by path."""

    url: str
    service: Service
    engine: CannedEngine
    bodies: dict[str, list[bytes]]

    def chats(self) -> list[Any]:
        return [json.loads(body) for body in self.bodies["/v1/chat/completions"]]

    def audio(self, number: int = 0) -> tuple[str, bytes]:
        """Returns the format and the bytes of the clip in a chat."""
        audio = self.chats()[number]["messages"][0]["content"][0]["input_audio"]
        return audio["format"], base64.b64decode(audio["data"])

    def file(self) -> bytes:
        """Returns the file of the last form, which is its first field."""
        body = self.bodies["/v1/audio/transcriptions"][-1]
        boundary = body.partition(b"\r\n")[0]
        return body.split(boundary)[1].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")


@contextlib.contextmanager
def running(processor: Processor, *names: str, key: str | None = None) -> Iterator[Running]:
    engine = CannedEngine(processor)
    service = Service({name: engine for name in names}, processor, key=key)  # type: ignore[dict-item]
    app, bodies = make_app(service, page=True), collections.defaultdict[str, list[bytes]](list)

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        pieces: list[bytes] = []

        async def heard() -> Any:
            message = await receive()
            pieces.append(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body"):
                bodies[scope["path"]].append(b"".join(pieces))
            return message

        await app(scope, heard, send)

    with serving(service, recorded) as server:
        yield Running(server.url, service, engine, bodies)
        engine.go_on.set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    if os.getuid() == 0:
        arguments.append("--no-sandbox")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server(processor: Processor) -> Iterator[Running]:
    with running(processor, "moss") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    with opened(browser, server, viewport=DESKTOP) as page:
        yield page


@contextlib.contextmanager
def opened(browser: Browser, server: Running, **options: Any) -> Iterator[Page]:
    """Opens the page. At the end the browser must have logged nothing, as it does of a style that is refused."""
    logged: list[str] = []
    with contextlib.closing(browser.new_page(**options)) as page:
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        expect(page.locator("#examples button")).to_have_count(6)
        yield page
    assert [text for text in logged if not text.startswith("Failed to load resource")] == []  # a status of 400 or more


def tone(seconds: float, rate: int) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def encoded(wave: np.ndarray, rate: int, format: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format)
    return file.getvalue()


def choose(page: Page, name: str = "a clip.wav", content: bytes | None = None) -> None:
    """Chooses a file; without content 5 s in two channels, of which one is silent."""
    if content is None:
        content = encoded(np.stack([tone(5, 44100), 0 * tone(5, 44100)], axis=1), 44100, "WAV")
    page.set_input_files("#file", {"name": name, "mimeType": "", "buffer": content})
    expect(page.locator("#clip-name")).to_contain_text(name)


def ask(page: Page, question: str) -> None:
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")


def expect_done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(r"Done in \d+\.\d s\."))


def expect_position(page: Page, least: float, most: float) -> None:
    until(lambda: least <= float(page.get_attribute("#wave", "aria-valuenow") or -1) <= most)


def jump(page: Page, place: playwright.Locator, **options: Any) -> float:
    """Clicks somewhere while nothing plays; returns a position soon after it."""
    page.evaluate("""() => {
      const wave = document.querySelector("#wave");
      window.positions = [];
      new MutationObserver(() => positions.push(Number(wave.ariaValueNow))).observe(wave, { attributes: true });
    }""")
    place.click(**options)
    until(lambda: page.evaluate("positions.length") > 2)
    return page.evaluate("positions[2]")


def test_from_a_file_to_a_click_on_a_segment(page: Page, server: Running):
    choose(page)
    page.click("#transcribe")
    rows = page.locator("#rows-body tr")
    expect(rows).to_have_count(3)
    samples, rate = soundfile.read(io.BytesIO(server.file()))
    assert rate == 16000 and samples.shape == (80000,)
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.01)  # the mean of the two channels

    assert rows.nth(1).inner_text().split("\t") == ["0:01.90", "0:02.90", SECOND]
    expect(page.locator("#turns .answer")).to_have_text("[S01]Good morning. [S02]Is it <b>on</b>? [S01]It is.")
    assert page.locator("#turns b, #rows-body b").count() == 0  # no text of the model is HTML

    region = page.locator("#wave [part~=segment-1]")
    expect(region).to_contain_text(SECOND)
    box = region.bounding_box()
    assert box is not None
    near_its_end = {"x": 0.9 * box["width"], "y": 0.5 * box["height"]}
    assert jump(page, region, position=near_its_end) == pytest.approx(2.1, abs=0.25)
    expect(page.locator("#play")).to_have_text("Pause")
    expect(rows.nth(1)).to_have_attribute("aria-current", "true")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play")
    assert jump(page, rows.nth(0)) == pytest.approx(0.6, abs=0.25)
    expect(rows.nth(0)).to_have_attribute("aria-current", "true")
    expect(rows.nth(1)).not_to_have_attribute("aria-current", "true")


def test_words(page: Page):
    choose(page)
    page.select_option("#unit", "word")
    page.click("#transcribe")
    expect(page.locator("#rows-body td:last-child")).to_have_text(["Good", "morning."])


def test_a_transcript_without_times_is_shown_as_it_comes(page: Page, server: Running):
    choose(page)
    page.select_option("#unit", "")
    page.click("#transcribe")
    answer = page.locator("#turns .answer")
    expect(answer).to_have_text("Good morning.")
    expect(answer).to_have_attribute("aria-busy", "true")
    server.engine.go_on.set()
    expect(answer).to_have_text("Good morning. Is it on?")
    expect_done(page)


def test_an_answer_is_shown_while_it_is_written(page: Page, server: Running):
    choose(page)
    ask(page, "slowly")
    answer = page.locator("#turns .answer")
    expect(answer).to_have_text(re.compile("^<i>A</i>"))
    expect(answer).to_have_attribute("aria-busy", "true")  # a screen reader waits for the end
    expect(page.locator("#status")).to_have_text("Writing")
    expect(page.locator("#ask")).to_have_attribute("aria-disabled", "true")
    assert "tone" not in answer.inner_text()
    server.engine.go_on.set()
    expect(answer).to_have_text("<i>A</i> tone.")
    expect_done(page)
    assert answer.get_attribute("aria-busy") is None
    expect(page.locator("#work")).to_be_hidden()


def test_a_request_can_be_stopped(page: Page, server: Running):
    choose(page)
    ask(page, "slowly")
    expect(page.locator("#turns .answer")).to_have_text(re.compile("^<i>A</i>"))
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    until(lambda: server.engine.handles[0].done)
    expect(page.locator("#prompt")).to_be_focused()


def test_thinking_is_folded(page: Page):
    choose(page)
    ask(page, "think")
    expect(page.locator("#turns .answer")).to_have_text("A tone.")
    thought = page.get_by_text("Hm, a tone.")
    expect(thought).to_be_hidden()
    page.get_by_text("Thinking", exact=True).click()
    expect(thought).to_be_visible()


def test_a_conversation_is_kept_until_a_new_one(page: Page, server: Running):
    choose(page)
    for question in ("First?", "Second?"):
        ask(page, question)
        expect(page.locator("#turns h3").first).to_have_text(question)
        expect_done(page)
    first, answer, second = server.chats()[1]["messages"]
    assert first["role"] == "user" and first["content"][1] == {"type": "text", "text": "First?"}
    assert answer == {"role": "assistant", "content": "<i>A</i> tone."}
    assert second == {"role": "user", "content": "Second?"}
    assert soundfile.info(io.BytesIO(server.audio(1)[1])).samplerate == 16000
    page.click("#clear")
    expect(page.locator("#answers")).to_be_hidden()
    ask(page, "Third?")
    expect_done(page)
    assert len(server.chats()[2]["messages"]) == 1


def test_times_of_an_answer_become_segments_and_files(page: Page):
    page.get_by_role("button", name="Three tones").click()
    page.get_by_role("button", name="Sounds with times").click()
    expect(page.locator("#prompt")).to_have_value("List the sounds with their start and end times.")
    page.click("#ask")
    expect(page.locator("#rows-body tr")).to_have_count(3)
    expect(page.locator("#turns .answer")).to_have_text("".join(ANSWERS["List the sounds"]))

    files = {}
    for form in ("srt", "vtt", "json"):
        with page.expect_download() as download:
            page.click(f"[data-format={form}]")
        assert download.value.suggested_filename == f"Three tones.{form}"
        files[form] = Path(download.value.path()).read_text("utf-8")
    assert files["srt"].startswith("1\n00:00:00,500 --> 00:00:01,300\ntone\n")
    assert files["vtt"].startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.300\ntone\n")
    assert [segment["begin"] for segment in json.loads(files["json"])["segments"]] == [0.5, 2.0, 3.5]


def test_times_that_can_not_be_right_are_said_and_earlier_segments_come_back(page: Page):
    choose(page)
    ask(page, "List the sounds")
    expect(page.locator("#rows-body tr")).to_have_count(3)
    expect_done(page)
    ask(page, "backwards")
    expect(page.locator("#rows-body tr")).to_have_count(2)
    expect(page.locator("#doubts")).to_contain_text("ends before it begins")
    page.get_by_role("button", name="Show its 3 segments").click()
    expect(page.locator("#rows-body tr")).to_have_count(3)
    expect(page.locator("#doubts")).to_be_hidden()


def test_of_many_segments_those_in_view_are_drawn(page: Page):
    choose(page)
    ask(page, "many")
    expect(page.locator("#rows-body tr")).to_have_count(400)
    expect(page.locator("#zoom-in")).to_be_visible()
    regions = page.locator("#wave [part~=region]")
    assert regions.count() == 0
    page.fill("#zoom", "1")  # four times as wide
    expect(page.locator("#zoom-in")).to_be_hidden()
    expect(regions.first).to_have_text("hum")
    assert 50 < regions.count() < 300


def test_the_keyboard_is_enough(page: Page):
    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"no Tab leads to {selector}")

    tab_to("#file")
    tab_to("#sounds button")
    page.keyboard.press("Enter")
    tab_to("#wave")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect_position(page, 2.0, 2.0)
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Pause")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Play")
    tab_to("#prompt")
    page.keyboard.type("List the sounds!")
    page.keyboard.press("Enter")
    buttons = page.locator("#rows-body button")
    expect(buttons).to_have_count(3)
    tab_to("#rows-body button")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(buttons.nth(2)).to_be_focused()
    assert buttons.nth(2).evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect_position(page, 3.5, 5.0)


def test_errors_are_sentences(page: Page, server: Running):
    problem = page.locator("#problem")
    ask(page, "Hm?")
    expect(problem).to_have_text("There is no clip yet: choose, record or make one above.")
    choose(page)
    served = server.service.models["moss"]
    served.held, served.seconds = 35, 0.6
    ask(page, "Hm?")
    expect(problem).to_have_text("The server is busy: try again in 7 seconds.")
    served.held = 0
    ask(page, "crash")
    expect(problem).to_have_text("The engine has failed: restart the server.")
    page.get_by_text("Settings").click()
    page.fill("#longest", "200000")
    ask(page, "Hm?")
    expect(problem).to_have_text(re.compile(r"^The messages have .* fewer max_completion_tokens\.$"))
    page.fill("#longest", "")
    ask(page, "Hm?")
    expect_done(page)
    expect(problem).to_be_hidden()


def test_a_key_is_asked_for_and_kept(browser: Browser, processor: Processor):
    with (
        running(processor, "moss", "moss-birds", key="sesame") as server,
        opened(browser, server, viewport=DESKTOP) as page,
    ):
        expect(page.locator("#key-dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#problem")).to_contain_text("needs a key")
        choose(page)
        ask(page, "First?")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#key-text")).to_contain_text("was refused")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        expect_done(page)
        page.select_option("#model", "moss-birds")
        ask(page, "Second?")
        expect(page.locator("#turns h3").first).to_have_text("Second?")
        expect_done(page)
        assert [body["model"] for body in server.chats()] == ["moss", "moss-birds"]
        assert page.evaluate("Object.values(sessionStorage)") == ["sesame"]


def test_a_file_that_the_browser_can_not_decode_is_sent_as_it_is(page: Page, server: Running):
    content = encoded(tone(5, 16000), 16000, "AIFF")
    choose(page, "notes.aiff", content)
    expect(page.locator("#clip-problem")).to_contain_text("sent as it is")
    expect(page.locator("#play")).to_be_hidden()
    page.click("#transcribe")
    expect(page.locator("#rows-body tr")).to_have_count(3)
    assert page.locator("#rows-body button").count() == 0  # it can't be played
    assert server.file() == content
    ask(page, "Hm?")
    expect_done(page)
    assert server.audio() == ("wav", content)


def test_a_compressed_file_is_dropped_and_sent_as_it_is(page: Page, server: Running):
    content = encoded(tone(2, 48000), 48000, "MP3")
    transfer = page.evaluate_handle(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "two seconds.mp3"));
          return transfer;
        }""",
        list(content),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#clip-name")).to_have_text(re.compile(r"^two seconds\.mp3, 0:02\.[01]$"))
    ask(page, "Hm?")
    expect_done(page)
    assert server.audio() == ("mp3", content)


def test_a_recording(page: Page, server: Running):
    page.click("#record")
    expect(page.locator("#record")).to_have_text("Stop recording, 0:01")
    page.click("#record")
    expect(page.locator("#clip-name")).to_contain_text("Recording")
    ask(page, "Hm?")
    expect_done(page)
    form, content = server.audio()
    samples, rate = soundfile.read(io.BytesIO(content))
    assert (form, rate, samples.ndim) == ("wav", 16000, 1)
    assert 0.5 < len(samples) / rate < 3 and np.abs(samples).max() > 0.01  # Chromium's stand-in for a microphone beeps


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
def test_sizes_and_colours(browser: Browser, server: Running, viewport: dict[str, int], theme: str):
    """Nothing scrolls sideways, and each text has a contrast of 4.5 to what is behind it."""
    with opened(browser, server, viewport=viewport, color_scheme=theme, reduced_motion="reduce") as page:
        page.get_by_role("button", name="Three tones").click()
        ask(page, "think")
        expect_done(page)
        page.get_by_text("Thinking", exact=True).click()
        page.get_by_text("Settings").click()
        page.click("#transcribe")
        expect(page.locator("#rows-body tr")).to_have_count(3)
        ask(page, "crash")
        expect(page.locator("#problem")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        contrasts = dict(page.evaluate(CONTRASTS))
        assert len(contrasts) > 25 and {"Ask", "Hm, a tone.", SECOND} <= contrasts.keys()
        assert {text: value for text, value in contrasts.items() if value < 4.5} == {}


# [text, contrast] of each element that is seen and has text of its own: its colours, drawn over each other on a canvas.
CONTRASTS = """
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => getComputedStyle(element).backgroundColor;
  const labels = document.querySelector("#wave > div").shadowRoot.querySelectorAll("[part=region-content]");
  const found = [];
  for (const element of [...document.querySelectorAll("body *"), ...labels]) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || ["NOSCRIPT", "OPTION"].includes(element.tagName)) continue;
    const behind = [];
    for (let each = element; each; each = each.parentElement ?? each.getRootNode().host) {
      behind.unshift(background(each));
    }
    const lights = [luminance(behind), luminance([...behind, getComputedStyle(element).color])].sort((a, b) => a - b);
    found.push([element.textContent, (lights[1] + 0.05) / (lights[0] + 0.05)]);
  }
  return found;
}
"""


def test_the_policy_and_the_types_of_files(server: Running):
    with httpx.Client(base_url=server.url) as client:
        first, second = client.get("/"), client.get("/")
        policy = first.headers["content-security-policy"]
        assert "unsafe" not in policy and "default-src 'self'" in policy
        (nonce,) = re.findall(r"'nonce-([^']+)'", policy)
        assert f'content="{nonce}"' in first.text and nonce not in second.text
        assert client.get("/page/page.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/page/vendor/wavesurfer.esm.js").status_code == 200
        assert client.get("/page/__init__.py").status_code == 404
        assert client.get("/page/..%2f__init__.py").status_code == 404
