// Clips: decoded by the browser, recorded or made, as 16 kHz mono samples, which is what the model hears.

export const RATE = 16000;

/** Returns the samples of an audio file, its channels averaged; throws if the browser can't decode it. */
export async function decode(file) {
  // Decoding in a context also resamples to its rate.
  const context = new OfflineAudioContext(1, 1, RATE);
  const buffer = await context.decodeAudioData(await file.arrayBuffer());
  const samples = buffer.getChannelData(0).slice();
  for (let channel = 1; channel < buffer.numberOfChannels; channel++) {
    buffer.getChannelData(channel).forEach((value, index) => (samples[index] += value));
  }
  return samples.map((value) => value / buffer.numberOfChannels);
}

/** Returns the size of the WAV file of samples. */
export const wavBytes = (samples) => 44 + 2 * samples.length;

/** Returns a WAV file with 16-bit samples. */
export function toWav(samples) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (offset, value) => [...value].forEach((letter, i) => header.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // bytes of the format
  header.setUint16(20, 1, true); // integers
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, RATE, true);
  header.setUint32(28, 2 * RATE, true); // bytes a second
  header.setUint16(32, 2, true); // bytes a sample of all channels
  header.setUint16(34, 16, true); // bits a sample
  text(36, "data");
  header.setUint32(40, 2 * samples.length, true);
  const values = new Int16Array(samples.length);
  samples.forEach((value, i) => (values[i] = Math.max(-32768, Math.min(32767, Math.round(value * 32768)))));
  return new Blob([header, values], { type: "audio/wav" });
}

/** Returns the largest absolute value of each 5 ms, for drawing. */
export function peaks(samples) {
  const step = RATE / 200;
  const found = new Float32Array(Math.max(1, Math.ceil(samples.length / step)));
  samples.forEach((value, index) => {
    const place = Math.floor(index / step);
    found[place] = Math.max(found[place], Math.abs(value));
  });
  return found;
}

/** Returns the bytes of a file in base64. */
export function toBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Starts to record from the microphone; `stop` of what it returns gives the file. */
export async function startRecording() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = (event) => pieces.push(event.data);
  recorder.start();
  return {
    stop: () =>
      new Promise((resolve) => {
        recorder.onstop = () => {
          stream.getTracks().forEach((track) => track.stop());
          resolve(new Blob(pieces, { type: recorder.mimeType }));
        };
        recorder.stop();
      }),
  };
}

// A sound is a list of [begin, end, wave]; a wave maps seconds since its begin, and until its end, to -1..1.
const tone = (hertz) => (t) => Math.sin(2 * Math.PI * hertz * t);
const siren = (t) => Math.sin(2 * Math.PI * 700 * t - 200 * Math.cos(2 * Math.PI * 0.8 * t));
const bell = (t) => Math.exp(-3 * t) * (tone(880)(t) + 0.6 * tone(2093)(t) + 0.4 * tone(3520)(t)) * 0.5;
const noise = () => Math.random() * 2 - 1;
const click = (t) => Math.exp(-300 * t) * noise();

const SOUNDS = {
  "Three tones": { seconds: 5, parts: [[0.5, 1.3, tone(440)], [2.0, 2.8, tone(660)], [3.5, 4.3, tone(880)]] },
  "Clicks and a siren": {
    seconds: 6,
    parts: [[0.5, 0.6, click], [1.0, 1.1, click], [1.5, 1.6, click], [2.5, 5.2, siren]],
  },
  "Noise and a bell": { seconds: 6, parts: [[0.5, 2.0, noise], [3.0, 5.5, bell]] },
};

export const SOUND_NAMES = Object.keys(SOUNDS);

/** Returns the samples of a sound of SOUND_NAMES. */
export function makeSound(name) {
  const { seconds, parts } = SOUNDS[name];
  const samples = new Float32Array(seconds * RATE);
  for (const [begin, end, wave] of parts) {
    for (let index = Math.round(begin * RATE); index < end * RATE; index++) {
      const t = index / RATE - begin;
      const edge = Math.min(1, t / 0.002, (end - begin - t) / 0.02); // without clicks where it begins and ends
      samples[index] += 0.4 * Math.max(0, edge) * wave(t);
    }
  }
  return samples;
}
