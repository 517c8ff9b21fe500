// The page: a clip, a conversation about it, and the segments of an answer. Texts of the model go in by textContent alone.

import { Server, Failure } from "./server.js";
import { RATE, SOUND_NAMES, decode, makeSound, peaks, startRecording, toBase64, toWav, wavBytes } from "./sound.js";
import Regions from "./vendor/regions.esm.js";
import WaveSurfer from "./vendor/wavesurfer.esm.js";

const COLOURS = [210, 30, 140, 280, 350, 60, 180, 320, 100, 250].map((hue) => `hsl(${hue} 75% 50% / 0.3)`);
const READ_BY_SERVER = ["mp3", "flac", "ogg", "opus", "wav"]; // endings; other files are decoded here if they can be
const MOST_DRAWN = 300; // segments on the waveform; more take wavesurfer.js seconds, and can't be told apart

const $ = (id) => document.getElementById(id);
const server = new Server(askForKey);

// {name, file, seconds, samples, sent: {file, format}}; a browser that can't decode it has only the name and `sent`.
let clip = null;
let turns = []; // {question, answer} of the conversation about the clip
let shown = null; // {text, timeline, colours}: the answer whose segments are shown
let working = null; // the AbortController of the request under way
let recording = null; // {stop, ticking}, or "asks"
let wave = null;
let regions = null;
let drawn = null; // {from, to, scale}: where segments are drawn

// Small parts

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Returns 83.456 as 1:23.46. */
function clock(seconds, digits = 2) {
  const rounded = Number(seconds.toFixed(digits));
  const hours = Math.floor(rounded / 3600);
  const minutes = Math.floor((rounded % 3600) / 60);
  const rest = (rounded % 60).toFixed(digits).padStart(digits ? digits + 3 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

function say(id, error) {
  $(id).hidden = error === null;
  if (error === null) return;
  if (!(error instanceof Failure)) console.error(error);
  $(id).textContent = error instanceof Failure ? error.message : `The page failed: ${error.message}.`;
}

function askForKey(refused) {
  const dialog = $("key-dialog");
  $("key-text").textContent = refused
    ? "The last key was refused. Give another one, or ask whoever runs the server."
    : "Whoever runs it can tell you. It is kept until this tab is closed.";
  $("key").value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? $("key").value.trim() : null), {
      once: true,
    });
  });
}

// Clip

async function takeFile(file, name = file.name) {
  say("clip-problem", null);
  const ending = name.split(".").pop().toLowerCase();
  const format = READ_BY_SERVER.includes(ending) ? ending : "wav"; // the server goes by the bytes in the end
  const samples = await decode(file).catch(() => null);
  if (samples) {
    const sent = READ_BY_SERVER.includes(ending) && file.size < wavBytes(samples) ? { file, format } : null;
    takeSamples(samples, name, sent);
  } else {
    takeClip({ name, sent: { file, format }, samples: null, seconds: null });
    say("clip-problem", new Failure("This browser can't play the file. It is sent as it is, and the server may read it."));
  }
}

/** Takes a clip that is sent as 16 kHz WAV, or as `sent` if that is given. It is played as the model hears it. */
function takeSamples(samples, name, sent = null) {
  const file = toWav(samples);
  takeClip({ name, file, sent: sent ?? { file, format: "wav" }, samples, seconds: samples.length / RATE });
}

function takeClip(made) {
  working?.abort();
  wave?.destroy();
  wave = regions = null;
  showPlaying(false);
  clip = made;
  say("clip-problem", null);
  say("problem", null);
  newConversation();
  const about = clip.samples ? `, ${clock(clip.seconds, 1)}` : "";
  $("clip-name").replaceChildren(element("strong", { textContent: clip.name }), about);
  $("player").hidden = false;
  for (const id of ["wave", "play", "position", "zooming", "wave-keys"]) $(id).hidden = !clip.samples;
  if (clip.samples) drawWave();
}

function drawWave() {
  regions = Regions.create();
  wave = WaveSurfer.create({
    container: $("wave"),
    height: 128,
    cursorWidth: 2,
    cspNonce: document.querySelector("meta[name=style-nonce]").content,
    plugins: [regions],
    ...waveColours(),
  });
  wave.on("timeupdate", showPosition);
  for (const event of ["scroll", "zoom", "resize"]) wave.on(event, onView);
  wave.on("play", () => showPlaying(true));
  wave.on("pause", () => showPlaying(false));
  regions.on("region-clicked", (region, event) => {
    event.stopPropagation(); // else the waveform takes the click too, and moves on to where it was
    playFrom(region.start);
  });
  $("zoom").value = 0;
  $("wave").setAttribute("aria-valuemax", clip.seconds.toFixed(2));
  showPosition(0);
  return wave.loadBlob(clip.file, [peaks(clip.samples)], clip.seconds);
}

function waveColours() {
  const style = getComputedStyle(document.documentElement);
  const [waveColor, progressColor, cursorColor] = ["--wave", "--played", "--ink"].map((name) =>
    style.getPropertyValue(name),
  );
  return { waveColor, progressColor, cursorColor };
}

function showPosition(seconds) {
  $("position").textContent = `${clock(seconds, 1)} / ${clock(clip.seconds, 1)}`;
  $("wave").setAttribute("aria-valuenow", seconds.toFixed(2));
  $("wave").setAttribute("aria-valuetext", `${clock(seconds, 1)} of ${clock(clip.seconds, 1)}`);
  const rows = $("rows-body").rows;
  shown?.timeline.segments.forEach(({ begin, end }, index) => {
    if (seconds >= begin && seconds < (end ?? begin + 0.3)) rows[index].setAttribute("aria-current", "true");
    else rows[index].removeAttribute("aria-current");
  });
}

function showPlaying(isPlaying) {
  $("play").textContent = isPlaying ? "Pause" : "Play";
  $("play").classList.toggle("playing", isPlaying);
}

function playFrom(seconds) {
  wave.setTime(Math.max(0, Math.min(clip.seconds, seconds)));
  play();
}

function play() {
  wave.play().catch((error) => {
    // Playing that was paused before it began is no failure.
    if (error.name !== "AbortError") say("clip-problem", new Failure("The browser refused to play the clip."));
  });
}

function waveKey(event) {
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
  const now = wave.getCurrentTime();
  const to = { Home: 0, End: clip.seconds }[event.key] ?? (event.key in moves ? now + moves[event.key] : null);
  if (event.key === " " || event.key === "Enter") wave.isPlaying() ? wave.pause() : play();
  else if (to !== null) wave.setTime(Math.max(0, Math.min(clip.seconds, to)));
  else return;
  event.preventDefault();
}

async function toggleRecording() {
  const button = $("record");
  if (recording === "asks") return; // the browser asks whether the microphone may be used
  if (recording) {
    const { stop, ticking } = recording;
    recording = null;
    clearInterval(ticking);
    button.textContent = "Record";
    button.classList.remove("on");
    await takeFile(await stop(), "Recording");
    return;
  }
  say("clip-problem", null);
  if (!navigator.mediaDevices) {
    say("clip-problem", new Failure("Browsers record only on pages from https or from this machine."));
    return;
  }
  recording = "asks";
  try {
    const { stop } = await startRecording();
    const began = Date.now();
    const tick = () => (button.textContent = `Stop recording, ${clock((Date.now() - began) / 1000, 0)}`);
    recording = { stop, ticking: setInterval(tick, 500) };
    tick();
    button.classList.add("on");
  } catch (error) {
    recording = null;
    const why = error.name === "NotFoundError" ? "No microphone was found." : "The microphone can't be used: allow it.";
    say("clip-problem", new Failure(why));
  }
}

// Questions

/** Runs a request with its progress and its errors; `job` gets the signal by which it is stopped. */
async function work(job) {
  const began = Date.now();
  const controller = new AbortController();
  working = controller;
  const tick = () => ($("clock").textContent = `${Math.floor((Date.now() - began) / 1000)} s`);
  const ticking = setInterval(tick, 1000);
  say("problem", null);
  $("work").hidden = false;
  for (const id of ["ask", "transcribe"]) $(id).setAttribute("aria-disabled", "true");
  state("Sending");
  tick();
  let end = "";
  try {
    await job(controller.signal);
    end = `Done in ${((Date.now() - began) / 1000).toFixed(1)} s.`;
  } catch (error) {
    if (error.name === "AbortError") end = "Stopped.";
    else say("problem", error);
  }
  clearInterval(ticking);
  if (document.activeElement === $("stop")) $("prompt").focus();
  $("work").hidden = true;
  for (const id of ["ask", "transcribe"]) $(id).removeAttribute("aria-disabled");
  $("clock").textContent = "";
  $("status").textContent = end;
  working = null;
}

/** Shows what is going on; without a fraction its end is not known. */
function state(text, fraction = null) {
  $("status").textContent = text;
  if (fraction === null) $("progress").removeAttribute("value");
  else $("progress").value = fraction;
}

function onUpload(fraction) {
  if (fraction < 1) state("Sending the clip", fraction);
  else state("Waiting for the answer");
}

/** Returns false, and says why, if there is no clip or a request is under way. */
function isReady() {
  if (working) return false;
  if (!clip) say("problem", new Failure("There is no clip yet: choose, record or make one above."));
  return clip !== null;
}

/** Puts a turn at the top of the answers. */
function addTurn(question) {
  const thought = element("p");
  const thinking = element("details", { hidden: true }, element("summary", { textContent: "Thinking" }), thought);
  const answer = element("p", { className: "answer" });
  answer.setAttribute("aria-live", "polite");
  answer.setAttribute("aria-busy", "true"); // read out when it is complete
  const notes = element("p", { className: "soft" });
  $("answers").hidden = false;
  $("turns").prepend(element("li", {}, element("h3", { textContent: question }), thinking, answer, notes));
  return { thinking, thought, answer, notes };
}

async function ask(question) {
  const turn = addTurn(question);
  const about = clip;
  await work(async (signal) => {
    await loadModels();
    const data = (about.base64 ??= await toBase64(about.sent.file));
    const audio = { type: "input_audio", input_audio: { data, format: about.sent.format } };
    const messages = [...turns, { question }].flatMap(({ question, answer }, index) => [
      { role: "user", content: index ? question : [audio, { type: "text", text: question }] },
      ...(answer === undefined ? [] : [{ role: "assistant", content: answer }]),
    ]);
    const body = { model: $("model").value, messages };
    if ($("longest").value) body.max_completion_tokens = Number($("longest").value);
    if ($("temperature").value) body.temperature = Number($("temperature").value);
    const onDelta = ({ content, reasoning_content }) => {
      if (reasoning_content) {
        turn.thinking.hidden = false;
        turn.thought.append(reasoning_content);
        state("Thinking");
      }
      if (content) {
        turn.answer.append(content);
        state("Writing");
      }
    };
    const reason = await server.chat(body, { signal, onUpload, onDelta });
    if (reason === "length") turn.notes.append("The answer was cut off: allow more tokens in the settings. ");
    const text = turn.answer.textContent;
    turns.push({ question, answer: text });
    await showSegments(turn, text, about, signal);
  });
  finish(turn);
}

/** unit: what has a time, "segment" or "word"; empty: nothing, and then the text is shown as it comes. */
async function transcribe(unit) {
  const titles = { segment: "Transcript with times of sentences", word: "Transcript with times of words" };
  const turn = addTurn(titles[unit] ?? "Transcript");
  const about = clip;
  await work(async (signal) => {
    await loadModels();
    const name = about.sent.file === about.file ? "clip.wav" : about.name;
    const call = [about.sent.file, name, $("model").value];
    const onDelta = (text) => {
      turn.answer.append(text);
      state("Writing");
    };
    if (!unit) return server.transcribeText(...call, { signal, onUpload, onDelta });
    const found = await server.transcribe(...call, unit, { signal, onUpload });
    turn.answer.append(found.text);
    const pieces = unit === "word" ? found.words : found.segments;
    const segments = (pieces ?? []).map(({ start, end, text, word }) => ({ start, end, text: text ?? word }));
    about.seconds ??= found.duration;
    if (segments.length) await showSegments(turn, JSON.stringify(segments), about, signal);
  });
  finish(turn);
}

function finish(turn) {
  turn.answer.removeAttribute("aria-busy");
  if (!turn.answer.textContent) turn.notes.append("There is no answer.");
}

function newConversation() {
  turns = [];
  $("turns").replaceChildren();
  $("answers").hidden = true;
  $("status").textContent = "";
  show(null);
}

// Segments

/** Shows the segments of an answer, if it has any, and a button that shows them again. */
async function showSegments(turn, text, about, signal) {
  const timeline = JSON.parse(await server.timeline(text, about.seconds, "json", signal));
  const number = timeline.segments.length;
  if (!number) return;
  const found = { text, timeline, colours: coloursOf(timeline.segments) };
  const button = element("button", {
    type: "button",
    className: "small",
    textContent: `Show ${number === 1 ? "its segment" : `its ${number} segments`}`,
    onclick: () => show(found),
  });
  turn.notes.append(button);
  show(found);
}

function show(found) {
  shown = found;
  $("found").hidden = found === null;
  $("no-segments").hidden = found !== null;
  const { segments, problems } = found?.timeline ?? { segments: [], problems: [] };
  $("doubts").replaceChildren(...problems.map((textContent) => element("li", { textContent })));
  $("doubts").hidden = !problems.length;
  $("rows-body").replaceChildren(...segments.map((segment, index) => row(segment, found.colours[index])));
  const first = $("rows-body").querySelector("button");
  if (first) first.tabIndex = 0;
  $("zoom-in").hidden = true;
  drawRegions();
}

/** Returns a segment's text with its speaker as S01, not as [S01]. */
function said({ speaker, text }) {
  const label = `[${speaker}]`;
  return speaker && text.startsWith(label) ? `${speaker} ${text.slice(label.length).trim()}` : text;
}

function row(segment, colour) {
  const { begin, end } = segment;
  const text = said(segment);
  let time = clock(begin);
  if (clip.samples) {
    time = element("button", { type: "button", className: "small", tabIndex: -1, textContent: time });
    time.setAttribute("aria-label", `Play from ${clock(begin)}: ${text}`);
  }
  const made = element(
    "tr",
    { onclick: () => clip.samples && playFrom(begin) },
    element("td", {}, time),
    element("td", { textContent: end === null ? "" : clock(end) }),
    element("td", { textContent: text }),
  );
  made.style.setProperty("--segment", colour);
  return made;
}

/** Returns the colours of segments: by speaker, or by text where few texts come again and again. */
function coloursOf(segments) {
  const hasSpeakers = segments.some(({ speaker }) => speaker);
  const names = segments.map(({ speaker, text }) => (hasSpeakers ? speaker : text));
  const places = new Map([...new Set(names)].map((name, place) => [name, place]));
  const areFew = hasSpeakers || places.size <= COLOURS.length;
  return names.map((name, index) => COLOURS[(areFew ? places.get(name) : index % 2) % COLOURS.length]);
}

/** Returns what is in view: from and to, and seconds a pixel. */
function view() {
  const scale = clip.seconds / wave.getWrapper().clientWidth;
  const from = wave.getScroll() * scale;
  return { from, to: from + wave.getWidth() * scale, scale };
}

/** Draws the segments in view and to both sides of it, unless they are too many. */
function drawRegions() {
  regions?.clearRegions();
  drawn = null;
  if (!clip?.samples || !shown) return;
  const { from, to, scale } = view();
  drawn = { from: 2 * from - to, to: 2 * to - from, scale };
  const { colours, timeline } = shown;
  const near = timeline.segments
    .map((segment, index) => ({ ...segment, index, until: Math.max(segment.end ?? segment.begin, segment.begin) }))
    .filter(({ begin, until }) => begin <= drawn.to && until >= drawn.from);
  $("zoom-in").hidden = near.length <= MOST_DRAWN;
  if (near.length > MOST_DRAWN) return;
  const lanes = []; // where the last label of each line ends, in seconds
  for (const segment of near) {
    const { begin, until, index } = segment;
    const isPoint = until === begin; // so is one that ends before it begins
    let lane = lanes.findIndex((last) => last <= begin + 0.01);
    if (lane < 0) lane = lanes.length;
    lanes[lane] = isPoint ? begin + 100 * scale : until;
    const text = said(segment);
    const content = element("div", { textContent: text, title: `${clock(begin)} ${text}` });
    content.style.setProperty("--lane", lane);
    content.style.setProperty("--room", isPoint ? "100px" : "100%");
    const where = { id: `segment-${index}`, start: begin, end: until, drag: false, resize: false };
    regions.addRegion({ ...where, content, color: colours[index] });
  }
}

/** Draws the segments again when the view has left those that are drawn, or has another scale. */
function onView() {
  if (!drawn) return;
  const { from, to, scale } = view();
  if (from < drawn.from || to > drawn.to || scale !== drawn.scale) drawRegions();
}

async function download(format) {
  try {
    say("problem", null);
    const text = await server.timeline(shown.text, clip.seconds, format);
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    const name = clip.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} _-]+/gu, "_") || "clip";
    element("a", { href: url, download: `${name}.${format}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    say("problem", error);
  }
}

// What the reader does

$("file").onchange = () => {
  if ($("file").files[0]) takeFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
};
$("record").onclick = toggleRecording;
for (const name of SOUND_NAMES) {
  const onclick = () => takeSamples(makeSound(name), name);
  $("sounds").append(element("button", { type: "button", className: "small", textContent: name, onclick }));
}
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files[0]) takeFile(event.dataTransfer.files[0]);
});

$("play").onclick = () => (wave.isPlaying() ? wave.pause() : play());
$("wave").onkeydown = waveKey;
$("zoom").oninput = () => {
  const whole = $("wave").clientWidth / clip.seconds; // pixels a second
  wave.zoom(whole * Math.max(4, 100 / whole) ** $("zoom").value);
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => wave?.setOptions(waveColours()));

$("question").onsubmit = (event) => {
  event.preventDefault();
  const question = $("prompt").value.trim();
  if (!isReady()) return;
  if (!question) {
    say("problem", new Failure("There is no question yet: write one, or take an example."));
    $("prompt").focus();
    return;
  }
  $("prompt").value = "";
  ask(question);
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("question").requestSubmit();
};
$("transcribe").onclick = () => isReady() && transcribe($("unit").value);
$("stop").onclick = () => working?.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) working?.abort();
});
$("clear").onclick = () => {
  working?.abort();
  newConversation();
  $("prompt").focus();
};

// The list is one tab stop: arrow keys move within it.
$("rows-body").addEventListener("keydown", (event) => {
  const buttons = [...$("rows-body").querySelectorAll("button")];
  const place = buttons.indexOf(event.target);
  const next = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  buttons[Math.max(0, Math.min(buttons.length - 1, next))].focus();
});
$("rows-body").addEventListener("focusin", (event) => {
  for (const button of $("rows-body").querySelectorAll("button")) button.tabIndex = button === event.target ? 0 : -1;
});
for (const button of $("downloads").querySelectorAll("button")) button.onclick = () => download(button.dataset.format);

// What the server has

async function start() {
  const examples = await (await fetch("page/examples.json")).json();
  for (const { name, prompt } of examples) {
    const onclick = () => {
      $("prompt").value = prompt;
      $("prompt").focus();
    };
    $("examples").append(element("button", { type: "button", className: "small", textContent: name, onclick }));
  }
  await loadModels();
}

/** Fills the list of models, unless it is filled already. */
async function loadModels() {
  if ($("model").options.length) return;
  const models = await server.models();
  $("model").replaceChildren(...models.map((name) => new Option(name)));
  $("models").hidden = models.length < 2;
}

start().catch((error) => say("problem", error));
