"""The page in a browser, headless Chromium, beside a server whose answers are made up."""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
from page_stub import SENTENCES, SOUNDS, Stub, served  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium: apt-get install chromium")
expect = playwright.expect
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
NARROW = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    arguments = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    if os.getuid() == 0:
        arguments.append("--no-sandbox")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def page(browser: playwright.Browser, stub: Stub) -> Iterator[playwright.Page]:
    """The page, opened. At the end nothing may have been logged: a refused style or a failed script would be."""
    yield from _opened(browser, stub, viewport=DESKTOP)


def _opened(browser: playwright.Browser, stub: Stub, **options) -> Iterator[playwright.Page]:
    with served(stub.app()) as address:
        page = browser.new_page(**options)
        page.set_default_timeout(5000)
        logged: list[str] = []
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect(page.locator("#examples button")).to_have_count(6)
        yield page
        page.close()
    assert [text for text in logged if not text.startswith("Failed to load resource")] == []


def wav(seconds: float, rate: int = 44100) -> bytes:
    """A file with two channels, of which one is silent."""
    times = np.arange(round(seconds * rate)) / rate
    file = io.BytesIO()
    soundfile.write(file, np.stack([np.sin(2 * np.pi * 440 * times), 0 * times], axis=1), rate, format="WAV")
    return file.getvalue()


def choose(page: playwright.Page, name: str = "a clip.wav", data: bytes | None = None):
    page.set_input_files("#file", {"name": name, "mimeType": "audio/wav", "buffer": data or wav(5.0)})
    expect(page.locator("#clip-name")).to_contain_text(name)


def ask(page: playwright.Page, question: str):
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")


def position(page: playwright.Page) -> float:
    return float(page.get_attribute("#wave", "aria-valuenow") or "nan")


def test_from_a_file_to_a_click_on_a_segment(page: playwright.Page, stub: Stub):
    choose(page)
    page.click("#transcribe")
    rows = page.locator("#rows-body tr")
    expect(rows).to_have_count(3)
    samples, rate = soundfile.read(io.BytesIO(stub.files[0]), dtype="float32")
    assert (rate, samples.shape) == (16000, (80000,))
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.01)  # the mean of the two channels

    assert rows.nth(1).inner_text().split("\t") == ["0:01.90", "0:02.90", "S02 Is it <b>on</b>?"]
    expect(page.locator("#turns .answer")).to_have_text(" ".join(text for text, _, _ in SENTENCES))
    assert page.locator("#turns b, #rows-body b").count() == 0  # texts of the model are never HTML

    region = page.locator("#wave [part~=segment-1]")
    expect(region).to_contain_text("S02 Is it <b>on</b>?")
    region.click()
    expect(page.locator("#play")).to_have_text("Pause")
    assert 1.9 <= position(page) < 2.9
    expect(rows.nth(1)).to_have_attribute("aria-current", "true")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play")

    rows.nth(0).click()
    page.wait_for_function("Number(document.querySelector('#wave').ariaValueNow) < 1.9")
    expect(rows.nth(0)).to_have_attribute("aria-current", "true")


def test_words(page: playwright.Page):
    choose(page)
    page.select_option("#unit", "word")
    page.click("#transcribe")
    expect(page.locator("#rows-body td:last-child")).to_have_text(["Good", "morning"])


def test_a_transcript_without_times_is_shown_as_it_comes(page: playwright.Page, stub: Stub):
    choose(page)
    page.select_option("#unit", "")
    page.click("#transcribe")
    answer = page.locator("#turns .answer")
    expect(answer).to_have_text(SENTENCES[0][0])
    stub.go_on.set()
    expect(answer).to_have_text("".join(text for text, _, _ in SENTENCES))
    expect(page.locator("#status")).to_contain_text("Done in")


def test_an_answer_is_shown_while_it_is_written(page: playwright.Page, stub: Stub):
    choose(page)
    ask(page, "slow")
    answer = page.locator("#turns .answer")
    expect(answer).to_have_text("<i>A</i> ")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_have_text("Writing")
    expect(page.locator("#ask")).to_have_attribute("aria-disabled", "true")
    stub.go_on.set()
    expect(answer).to_have_text("<i>A</i> tone.")
    expect(page.locator("#status")).to_contain_text("Done in")
    assert answer.get_attribute("aria-busy") is None
    expect(page.locator("#work")).to_be_hidden()


def test_a_request_can_be_stopped(page: playwright.Page, stub: Stub):
    choose(page)
    ask(page, "slow")
    expect(page.locator("#turns .answer")).to_have_text("<i>A</i> ")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert stub.stopped.wait(5)
    expect(page.locator("#prompt")).to_be_focused()


def test_thinking_is_folded(page: playwright.Page):
    choose(page)
    ask(page, "think")
    expect(page.locator("#turns .answer")).to_have_text("<i>A</i> tone.")
    thought = page.get_by_text("Hm, a tone.")
    expect(thought).to_be_hidden()
    page.get_by_text("Thinking", exact=True).click()
    expect(thought).to_be_visible()


def test_a_conversation_is_kept(page: playwright.Page, stub: Stub):
    choose(page)
    for number, question in enumerate(("First?", "Second?"), start=1):
        ask(page, question)
        expect(page.locator("#turns .answer")).to_have_count(number)
        expect(page.locator("#turns .answer").first).to_have_text("<i>A</i> tone.")
        expect(page.locator("#work")).to_be_hidden()
    first, answer, second = stub.requests[1]["messages"]
    assert first["role"] == "user" and first["content"][1] == {"type": "text", "text": "First?"}
    assert soundfile.info(io.BytesIO(first["content"][0]["input_audio"]["data"])).samplerate == 16000
    assert answer == {"role": "assistant", "content": "<i>A</i> tone."}
    assert second == {"role": "user", "content": "Second?"}
    page.click("#clear")
    expect(page.locator("#answers")).to_be_hidden()
    ask(page, "Third?")
    expect(page.locator("#status")).to_contain_text("Done in")
    assert len(stub.requests[2]["messages"]) == 1


def test_times_of_an_answer_become_segments_and_files(page: playwright.Page):
    page.get_by_role("button", name="Three tones").click()
    page.get_by_role("button", name="Sounds with times").click()
    expect(page.locator("#prompt")).to_have_value("List the sounds with their start and end times.")
    page.click("#ask")
    expect(page.locator("#rows-body tr")).to_have_count(3)
    expect(page.locator("#turns .answer")).to_have_text("".join(SOUNDS))
    expect(page.get_by_role("button", name="Show its 3 segments")).to_be_visible()

    files = {}
    for form in ("srt", "vtt", "json"):
        with page.expect_download() as download:
            page.click(f"[data-format={form}]")
        assert download.value.suggested_filename == f"Three tones.{form}"
        files[form] = Path(download.value.path()).read_text("utf-8")
    assert files["srt"].startswith("1\n00:00:00,500 --> 00:00:01,300\ntone\n")
    assert files["vtt"].startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.300\ntone\n")
    assert [segment["begin"] for segment in json.loads(files["json"])["segments"]] == [0.5, 2.0, 3.5]


def test_the_keyboard_is_enough(page: playwright.Page):
    def tab_to(selector: str):
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
    page.wait_for_function("document.querySelector('#wave').ariaValueNow === '2.00'")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Pause")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Play")
    tab_to("#prompt")
    page.keyboard.type("Which sounds?")
    page.keyboard.press("Enter")
    buttons = page.locator("#rows-body button")
    expect(buttons).to_have_count(3)
    tab_to("#rows-body button")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(buttons.nth(2)).to_be_focused()
    assert "solid" in buttons.nth(2).evaluate("button => getComputedStyle(button).outlineStyle")
    page.keyboard.press("Enter")
    page.wait_for_function("Number(document.querySelector('#wave').ariaValueNow) >= 3.5")


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("busy", "The server is busy: try again in 7 seconds."),
        ("wrong", "The clip must be shorter than 60 s, not 61.0 s: cut it."),
        ("break", "The engine died."),
    ],
)
def test_errors_are_sentences(page: playwright.Page, question: str, shown: str):
    choose(page)
    ask(page, question)
    expect(page.locator("#problem")).to_have_text(shown)
    ask(page, "again")
    expect(page.locator("#problem")).to_be_hidden()


def test_what_is_missing_is_said(page: playwright.Page):
    ask(page, "Hm?")
    expect(page.locator("#problem")).to_contain_text("no clip yet")


def test_a_key_is_asked_for_and_kept(browser: playwright.Browser):
    stub = Stub(key="sesame", models=("moss", "moss-birds"))
    for page in _opened(browser, stub, viewport=DESKTOP):
        for key in ("wrong", "sesame"):
            expect(page.locator("#key-dialog")).to_be_visible()
            page.fill("#key", key)
            page.press("#key", "Enter")
            if key == "wrong":
                expect(page.locator("#key-text")).to_contain_text("refused")
        page.select_option("#model", "moss-birds")
        choose(page)
        ask(page, "Hm?")
        expect(page.locator("#status")).to_contain_text("Done in")
        assert stub.requests[0]["model"] == "moss-birds"
        assert page.evaluate("Object.values(sessionStorage)") == ["sesame"]


def test_a_file_that_the_browser_cannot_decode_is_sent_as_it_is(page: playwright.Page, stub: Stub):
    choose(page, "notes.sph", b"NIST_1A" + bytes(100))
    expect(page.locator("#clip-problem")).to_contain_text("sent as it is")
    page.click("#transcribe")
    expect(page.locator("#rows-body tr")).to_have_count(3)
    assert stub.files == [b"NIST_1A" + bytes(100)]


def test_a_compressed_file_is_dropped_and_sent_as_it_is(page: playwright.Page, stub: Stub):
    file = io.BytesIO()
    soundfile.write(file, np.sin(2 * np.pi * 440 * np.arange(96000) / 48000), 48000, format="MP3")
    transfer = page.evaluate_handle(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "two seconds.mp3"));
          return transfer;
        }""",
        list(file.getvalue()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#clip-name")).to_have_text(re.compile(r"two seconds\.mp3, 0:02\.[01]"))
    ask(page, "Hm?")
    expect(page.locator("#status")).to_contain_text("Done in")
    audio = stub.requests[0]["messages"][0]["content"][0]["input_audio"]
    assert audio == {"format": "mp3", "data": file.getvalue()}


def test_a_recording(page: playwright.Page, stub: Stub):
    page.click("#record")
    expect(page.locator("#record")).to_contain_text("Stop recording, 0:01")
    page.click("#record")
    expect(page.locator("#clip-name")).to_contain_text("Recording")
    page.click("#transcribe")
    expect(page.locator("#status")).to_contain_text("Done in")
    samples, rate = soundfile.read(io.BytesIO(stub.files[0]))
    assert rate == 16000 and 0.5 < len(samples) / rate < 3
    assert np.abs(samples).max() > 0.01  # Chromium's stand-in for a microphone beeps


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE, NARROW], ids=["desktop", "phone", "narrow"])
def test_sizes_and_colours(browser: playwright.Browser, stub: Stub, viewport: dict[str, int], theme: str):
    """Nothing scrolls sideways, and each text has a contrast of 4.5 to what is behind it."""
    for page in _opened(browser, stub, viewport=viewport, color_scheme=theme, reduced_motion="reduce"):
        page.get_by_role("button", name="Three tones").click()
        ask(page, "think")
        expect(page.locator("#status")).to_contain_text("Done in")
        page.click("#transcribe")
        expect(page.locator("#rows-body tr")).to_have_count(3)
        ask(page, "busy")
        expect(page.locator("#problem")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 20 and ["S02 Is it <b>on</b>?", pytest.approx(15, abs=3)] in contrasts
        assert {text: value for text, value in contrasts if value < 4.5} == {}


# [text, contrast] of each element with text of its own that is seen; colours are drawn on a canvas, over each other.
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
  const found = [];
  const labels = document.querySelector("#wave > div").shadowRoot.querySelectorAll("[part=region-content]");
  for (const element of [...document.querySelectorAll("body *"), ...labels]) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "NOSCRIPT", "OPTION"].includes(element.tagName)) continue;
    const behind = [];
    for (let each = element; each; each = each.parentElement ?? each.getRootNode().host) behind.unshift(getComputedStyle(each).backgroundColor);
    const lights = [luminance(behind), luminance([...behind, getComputedStyle(element).color])].sort((a, b) => a - b);
    found.push([element.textContent, (lights[1] + 0.05) / (lights[0] + 0.05)]);
  }
  return found;
}
"""


def test_the_policy_and_the_types_of_files(stub: Stub):
    from starlette.testclient import TestClient

    client = TestClient(stub.app())
    first, second = client.get("/"), client.get("/")
    policy = first.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'self'" in policy
    (nonce,) = re.findall(r"'nonce-([^']+)'", policy)
    assert f'content="{nonce}"' in first.text and nonce not in second.text
    assert client.get("/page/page.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/page/vendor/wavesurfer.esm.js").status_code == 200
    assert client.get("/page/__init__.py").status_code == 404
    assert client.get("/page/..%2f__init__.py").status_code == 404
