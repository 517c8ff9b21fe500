// Requests to the server. What goes wrong is thrown as a Failure, whose message is a sentence for the reader.

const KEY = "moss-audio-key";
const BROKEN_OFF = "The answer broke off: the server closed the connection early.";

export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Server {
  /** askForKey(refused): asks the reader for the server's key; resolves to null if there is none. */
  constructor(askForKey) {
    this.askForKey = askForKey;
  }

  async models() {
    return JSON.parse(await this.#send("v1/models")).data.map((model) => model.id);
  }

  /** Asks; `onDelta` gets {content} or {reasoning_content} as they are written. Returns the reason for the end. */
  async chat(body, { signal, onUpload, onDelta }) {
    let reason = null;
    const onText = eventReader((event) => {
      if (event.error) throw new Failure(sentence(event.error.message));
      const choice = event.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      if (choice?.delta) onDelta(choice.delta);
    });
    await this.#send("v1/chat/completions", { body: JSON.stringify({ ...body, stream: true }), signal, onUpload, onText });
    if (reason === null) throw new Failure(BROKEN_OFF);
    return reason;
  }

  /** Returns the transcript of a file: {text, duration, segments or words}. unit: "segment" or "word". */
  async transcribe(file, name, model, unit, { signal, onUpload }) {
    const body = transcriptionForm(file, name, model);
    body.append("response_format", "verbose_json");
    body.append("timestamp_granularities[]", unit);
    return JSON.parse(await this.#send("v1/audio/transcriptions", { body, signal, onUpload }));
  }

  /** Transcribes a file without times; `onDelta` gets the text as it comes. */
  async transcribeText(file, name, model, { signal, onUpload, onDelta }) {
    const body = transcriptionForm(file, name, model);
    body.append("stream", "true");
    let isDone = false;
    const onText = eventReader((event) => {
      if (event.error) throw new Failure(sentence(event.error.message));
      if (event.type === "transcript.text.delta") onDelta(event.delta);
      isDone ||= event.type === "transcript.text.done";
    });
    await this.#send("v1/audio/transcriptions", { body, signal, onUpload, onText });
    if (!isDone) throw new Failure(BROKEN_OFF);
  }

  /** Reads the times of an answer; returns the text of a file of this format. */
  timeline(text, seconds, format, signal) {
    return this.#send("v1/timelines", { body: JSON.stringify({ text, seconds, format }), signal });
  }

  async #send(path, options = {}) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      try {
        return await request(path, key, options);
      } catch (error) {
        if (error.status !== 401) throw error;
        const given = await this.askForKey(key !== null);
        if (given === null) throw error;
        sessionStorage.setItem(KEY, given);
      }
    }
  }
}

function transcriptionForm(file, name, model) {
  const form = new FormData();
  form.append("file", file, name);
  form.append("model", model);
  return form;
}

/** Sends one request, a POST if it has a body. `fetch` can't tell how much is uploaded; XMLHttpRequest can. */
function request(path, key, { body, signal, onUpload, onText }) {
  return new Promise((resolve, reject) => {
    const http = new XMLHttpRequest();
    let read = 0;
    const forward = () => {
      if (http.status !== 200 || !onText) return;
      try {
        const text = http.responseText.slice(read);
        read += text.length;
        onText(text);
      } catch (error) {
        reject(error);
        http.abort();
      }
    };
    http.open(body === undefined ? "GET" : "POST", path);
    if (key !== null) http.setRequestHeader("Authorization", `Bearer ${key}`);
    if (typeof body === "string") http.setRequestHeader("Content-Type", "application/json");
    if (onUpload) http.upload.onprogress = (event) => onUpload(event.loaded / event.total);
    http.onprogress = forward;
    http.onload = () => {
      forward();
      if (http.status === 200) resolve(http.responseText);
      else reject(failure(http));
    };
    http.onerror = () => reject(new Failure("The server can't be reached: check that it is still running."));
    http.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal?.throwIfAborted();
    signal?.addEventListener("abort", () => http.abort());
    http.send(body);
  });
}

/** Returns a function that takes pieces of a stream of events, and calls `onEvent` with the JSON of each event. */
function eventReader(onEvent) {
  let rest = "";
  return (text) => {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") onEvent(JSON.parse(data));
    }
  };
}

function failure(http) {
  let message = "";
  try {
    message = JSON.parse(http.responseText).error.message;
  } catch {
    // Not from this server, but from a proxy before it.
  }
  if (http.status === 401) return new Failure("The server needs a key: ask again to enter it.", 401);
  if (http.status === 429) {
    const seconds = Number(http.getResponseHeader("Retry-After"));
    const when = seconds > 0 ? `in ${seconds} ${seconds === 1 ? "second" : "seconds"}` : "in a moment";
    return new Failure(`The server is busy: try again ${when}.`, 429);
  }
  return new Failure(message ? sentence(message) : `The server refused the request (status ${http.status}).`, http.status);
}

function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}
