/** The model's thread: opens the files and answers requests, one after the other, while the page stays responsive. */

import { Detector } from "./detector.js";
import { openModel } from "./exported.js";
import { Trouble, readModelFile } from "./files.js";
import { Promptable } from "./promptable.js";
import { Sessions, agree, hasWebGpu, threads } from "./runtime.js";
import { VideoSession } from "./video.js";

/** @typedef {import("./types.js").Answer} Answer */
/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").About} About */

/** @type {Model | null} */
let model = null;
/** @type {Promptable | Detector | null} */
let network = null;
/** @type {Map<string, Uint8Array>} */
let files = new Map();
/** @type {VideoSession | null} */
let session = null;
/** @type {Picture | null} */
let picture = null;

/** @param {Model} about @param {Sessions} sessions */
function build(about, sessions) {
  return about.family === "promptable" ? new Promptable(about, sessions) : new Detector(about, sessions);
}

/** @template T @param {T | null} value @param {string} what @returns {T} */
function needed(value, what) {
  if (!value) throw new Trouble(what);
  return value;
}

const detector = () => {
  if (!(network instanceof Detector)) throw new Trouble("This model has no words.");
  return network;
};

/** A picture of smooth colours that every browser computes alike. */
function probePicture() {
  const side = 96;
  const data = new Uint8ClampedArray(side * side * 4);
  for (let at = 0, row = 0; row < side; row++) {
    for (let column = 0; column < side; column++, at += 4) {
      const inside = (row - 48) ** 2 + (column - 48) ** 2 < 900;
      data.set(inside ? [220, 60 + row, 40, 255] : [40, 90 + column, 120 + row, 255], at);
    }
  }
  return { data, width: side, height: side };
}

/** Requests by name. Each gets its argument and returns what the page receives. */
const requests = {
  /** @param {{folder: string, precision: string | null}} given @returns {Promise<About>} */
  async open({ folder, precision }) {
    const place = new URL(folder);
    const about = await openModel(place, precision);
    model = about;
    const total = about.files.reduce((sum, file) => sum + file.bytes, 0);
    let before = 0;
    files = new Map();
    for (const file of about.files) {
      const content = await readModelFile(place, file, (bytes) => progress(file.name, before + bytes, total));
      files.set(file.name, content);
      before += file.bytes;
    }
    const sessions = await Sessions.open("wasm", files, (name) => progress(`opening ${name}`, total, total));
    network = build(about, sessions);
    return {
      title: about.title, family: about.family, phrases: about.phrases, bytes: total, threads,
      boxes: network instanceof Promptable || network.boxes, several: network instanceof Detector && !about.fixed,
      memory: Boolean(about.memory),
    };
  },

  /**
   * Change to the graphics card, if its answers agree with those of the processor and it is faster.
   *
   * @param {{slow: boolean}} given Whether it may also be slower.
   * @returns {Promise<{used: boolean, reason: string}>}
   */
  async webgpu({ slow }) {
    if (!(await hasWebGpu())) return { used: false, reason: "no WebGPU in this browser" };
    const about = needed(model, "No model is open.");
    const own = needed(network, "No model is open.");
    let sessions;
    try {
      sessions = await Sessions.open("webgpu", files);
      const other = build(about, sessions);
      const shown = probePicture();
      const [ours] = await timed(() => own.probe(shown));
      const [theirs] = await timed(() => other.probe(shown)); // compiles the shaders
      if (!agree(ours, theirs)) throw new Trouble("the answers of WebGPU differ from those of wasm");
      const [, wasm] = await timed(() => own.probe(shown));
      const [, webgpu] = await timed(() => other.probe(shown));
      if (webgpu > wasm && !slow) throw new Trouble("WebGPU is slower than wasm here");
      await own.sessions.release();
      network = other;
      return { used: true, reason: `${(wasm / webgpu).toFixed(1)} times as fast as wasm` };
    } catch (error) {
      await sessions?.release();
      return { used: false, reason: error instanceof Error ? error.message.split("\n")[0] : String(error) };
    }
  },

  /** @param {Picture} given */
  async picture(given) {
    picture = given;
  },

  /** @param {import("./promptable.js").Question} question @returns {Promise<Answer>} */
  async segment(question) {
    if (!(network instanceof Promptable)) throw new Trouble("This model takes no points.");
    return network.answer(needed(picture, "Choose a photograph first."), question);
  },

  /** @param {{phrases: string[], boxes?: import("./types.js").Box[], threshold: number}} question @returns {Promise<Answer>} */
  async detect(question) {
    return detector().answer(needed(picture, "Choose a photograph first."), question);
  },

  /** @param {{threshold?: number}} options */
  async follow(options) {
    session = new VideoSession(detector(), options);
  },

  /** @param {string} phrase */
  async addText(phrase) {
    needed(session, "No video is open.").addText(phrase);
  },

  /** @param {{box: import("./types.js").Box, phrase: string | null}} given @returns {Promise<number>} */
  async addBox({ box, phrase }) {
    return needed(session, "No video is open.").addBox(box, phrase);
  },

  /** @param {Picture} frame @returns {Promise<Answer & {crowded: boolean, number: number}>} */
  async push(frame) {
    const open = needed(session, "No video is open.");
    const [instances, frameTime] = await timed(() => open.push(frame));
    const { width, height } = frame;
    return { width, height, instances, times: { frame: frameTime }, crowded: open.crowded, number: open.number - 1 };
  },
};

/** @typedef {typeof requests} Requests */

/** @template T @param {() => Promise<T>} run @returns {Promise<[T, number]>} */
async function timed(run) {
  const started = performance.now();
  const value = await run();
  return [value, performance.now() - started];
}

/** @param {string} what @param {number} done @param {number} total */
function progress(what, done, total) {
  self.postMessage({ progress: { what, done, total } });
}

/** @type {Promise<void>} */
let last = Promise.resolve();
self.onmessage = ({ data }) => {
  last = last.then(async () => {
    try {
      const value = await /** @type {any} */ (requests)[data.name](data.given);
      self.postMessage({ id: data.id, value });
    } catch (error) {
      const known = error instanceof Trouble;
      const text = error instanceof Error ? error.message.split("\n")[0] : String(error);
      self.postMessage({ id: data.id, trouble: known ? text : `Something failed in the page: ${text}` });
    }
  });
};
