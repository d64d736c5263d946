/** The page: what a person chooses becomes questions to the model's thread, and its answers a picture and a list. */

import { Client } from "./client.js";
import { Trouble } from "./files.js";
import { close, frameOf, openCamera, openVideo, photograph, seek } from "./media.js";
import { Stage, colourOf } from "./stage.js";
import { element, megabytes, nameOf, percent, showInstances, showTimes, takeDropped, wordChips } from "./view.js";

/** @typedef {import("./types.js").About} About */
/** @typedef {import("./types.js").Answer} Answer */
/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Point} Point */

/** @typedef {{kind: "photo"} | {kind: "camera", frozen: boolean} | {kind: "video", rate: number, name: string}} Source */

const video = element("video", HTMLVideoElement);
const client = new Client(({ what, done, total }) => {
  element("progress", HTMLProgressElement).value = done / total;
  element("hint").textContent = `${what}: ${megabytes(done)} of ${megabytes(total)}`;
});

const state = {
  about: /** @type {About | null} */ (null),
  source: /** @type {Source | null} */ (null),
  picture: /** @type {Picture | null} */ (null),
  points: /** @type {Point[]} */ ([]),
  boxes: /** @type {Box[]} */ ([]),
  /** Prompts in the order in which they were given, for undo. */
  history: /** @type {("point" | "box")[]} */ ([]),
  phrases: /** @type {Set<string>} */ (new Set()),
  threshold: 0.5,
  answer: /** @type {Answer | null} */ (null),
  following: false,
  /** Whether the video has been followed to its end. */
  over: false,
  /** Counts pictures and questions, so that a late answer to an earlier one is dropped. */
  turn: 0,
};

const stage = new Stage(element("canvas", HTMLCanvasElement), {
  point: (x, y) => addPoint({ x, y, label: tool() === "outside" ? 0 : 1 }),
  box: (box) => addBox(box),
  key: (key) => {
    const tools = /** @type {Record<string, string>} */ ({ 1: "inside", 2: "outside", 3: "box" });
    if (key in tools && promptable()) choose(tools[key]);
    else if (key === "Backspace") undo();
    else if (key === "Escape") clear();
    else return false;
    return true;
  },
});

const promptable = () => state.about?.family === "promptable";
/** Whether a finger is what points: it scrolls the page, and there are no files to drop. */
const touch = matchMedia("(pointer: coarse)").matches;
const inVideo = () => state.source?.kind === "video" || (state.source?.kind === "camera" && !state.source.frozen);
const tool = () => /** @type {HTMLInputElement} */ (document.querySelector("[name=tool]:checked")).value;

/** @param {string} name */
function choose(name) {
  const input = /** @type {HTMLInputElement | null} */ (document.querySelector(`[name=tool][value=${name}]`));
  if (!input || input.disabled) return;
  input.checked = true;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

/** Begin a picture or a question: answers to earlier ones are no longer waited for. */
function nextTurn() {
  stage.canvas.classList.remove("busy");
  return ++state.turn;
}

/** @param {string} text */
function say(text) {
  element("status").textContent = text;
}

/**
 * Run an action of the person; a failure becomes one line on the page.
 *
 * @param {() => Promise<unknown>} action
 */
async function attempt(action) {
  element("trouble").hidden = true;
  try {
    await action();
  } catch (error) {
    const text = error instanceof Trouble ? error.message : `Something failed in the page: ${String(error)}`;
    element("trouble").textContent = text;
    element("trouble").hidden = false;
    say("");
    document.dispatchEvent(new CustomEvent("samdistill:trouble", { detail: text }));
  }
}

async function open() {
  const settings = new URLSearchParams(location.search);
  const folder = new URL("./", document.baseURI).href;
  const about = await client.ask("open", { folder, precision: settings.get("precision") });
  state.about = about;
  element("model").textContent = about.title;
  document.title = `${about.title} – samdistill`;
  facts("wasm");
  const things = promptable() ? "a photograph" : "a photograph or a video";
  element("invitation").textContent = touch ? `Choose ${things} above` : `Drop ${things} here`;
  element("hint").textContent = touch ? "" : "or choose one above";
  element("progress").hidden = true;
  for (const id of ["photo", "camera", "video-file"]) enable(id);
  element("choose-video").hidden = promptable();
  element("tools").hidden = !about.boxes;
  element("words").hidden = promptable();
  stage.drags = about.boxes;
  stage.clicks = promptable();
  if (!promptable()) {
    choose("box");
    element("segments").hidden = true;
    element("tools-title").textContent = "Boxes";
    wordChips(about.phrases, (phrase, chosen) => attempt(() => setPhrase(phrase, chosen)));
  }
  advise();
  document.dispatchEvent(new CustomEvent("samdistill:ready", { detail: about }));
  if (settings.get("backend") === "wasm") return;
  const { used, reason } = await client.ask("webgpu", { slow: settings.get("backend") === "webgpu" });
  facts(used ? "webgpu" : "wasm", reason);
}

/** @param {string} id */
function enable(id) {
  const control = /** @type {HTMLInputElement | HTMLButtonElement} */ (element(id));
  control.disabled = false;
  control.closest(".button")?.classList.remove("off");
}

/** @param {string} backend @param {string} [reason] */
function facts(backend, reason) {
  const { bytes, threads } = /** @type {About} */ (state.about);
  const count = threads > 1 ? `${threads} threads` : "1 thread";
  element("facts").textContent = [megabytes(bytes), backend === "wasm" ? `wasm, ${count}` : "WebGPU", reason].filter(Boolean).join(" · ");
  element("facts").dataset.backend = backend;
}

function advise() {
  const boxes = "Drag on the picture: the box gives an example of what to look for.";
  const video = "Drag on the picture: the object in the box is followed.";
  element("advice").textContent = promptable()
    ? `Click on the object; correct the mask with further clicks. ${touch ? "Choose Box, then drag, for a box." : "Drag to draw a box."}`
    : inVideo() ? video : boxes;
}

/** @param {Picture} picture @param {Source} source */
async function start(picture, source) {
  nextTurn();
  if (source.kind !== "video" && !(source.kind === "camera" && !source.frozen)) close(video);
  Object.assign(state, { source, picture, points: [], boxes: [], history: [], answer: null, following: false, over: false });
  element("empty").hidden = true;
  stage.show(picture);
  stage.masks(null);
  await client.ask("picture", picture);
  if (inVideo()) await client.ask("follow", { threshold: state.threshold });
  for (const phrase of inVideo() ? state.phrases : []) await client.ask("addText", phrase);
  advise();
  refresh();
  say(promptable() ? "Click on an object, or drag a box around it." : state.phrases.size ? "" : "Choose a word.");
  if (!inVideo() && state.phrases.size) await ask();
}

function refresh() {
  const { source, history, answer, following } = state;
  stage.prompts(state.points, state.boxes);
  element("undo", HTMLButtonElement).disabled = !history.length || inVideo();
  element("clear", HTMLButtonElement).disabled = !history.length && !state.phrases.size;
  element("save", HTMLButtonElement).disabled = !answer?.instances.length;
  element("actions").hidden = !source;
  element("choose-photo").classList.toggle("primary", !source);
  element("transport").hidden = !inVideo();
  element("take").hidden = source?.kind !== "camera";
  element("follow").hidden = promptable();
  element("restart").hidden = promptable();
  element("follow").textContent = following ? "Pause" : "Follow";
  element("canvas").setAttribute("aria-label", describe());
}

function describe() {
  const found = state.answer?.instances.filter((instance) => instance.visible !== false).length;
  return found === undefined ? "Picture" : `Picture with ${found} ${found === 1 ? "mask" : "masks"}`;
}

/**
 * Ask the model about the photograph, and show the answer unless another question was asked meanwhile.
 *
 * @param {boolean} [correct] Start from the last mask.
 */
async function ask(correct = false) {
  const turn = nextTurn();
  const { points, boxes, phrases, threshold } = state;
  if (promptable() ? !points.length && !boxes.length : !boxes.length && !phrases.size) return show(null);
  stage.canvas.classList.add("busy");
  say(state.answer ? "Looking …" : "Reading the picture …");
  const answer = await (promptable()
    ? client.ask("segment", { points, box: boxes[0] ?? null, correct })
    : client.ask("detect", { phrases: [...phrases], boxes, threshold })
  ).finally(() => turn === state.turn && stage.canvas.classList.remove("busy"));
  if (turn === state.turn) show(answer);
}

/** @param {Answer | null} answer */
function show(answer) {
  state.answer = answer;
  const seen = answer?.instances ?? [];
  const colours = seen.map((instance, index) => colourOf(instance.id === undefined ? index : instance.id - 1));
  const names = seen.map((instance, index) => nameOf(instance, promptable() ? "Mask" : `Object ${index + 1}`));
  stage.masks(answer, (index) => ({ colour: colours[index], text: promptable() ? "" : names[index] }));
  const visible = showInstances(answer && seen, names, colours);
  if (answer) showTimes(answer.times);
  refresh();
  say(!answer ? "" : promptable() ? `Predicted overlap with the object: ${percent(seen[0].score)}.` : visible ? "" : "Nothing was found.");
  if (answer) document.dispatchEvent(new CustomEvent("samdistill:answer", { detail: answer }));
}

/** @param {Point} point */
function addPoint(point) {
  if (!promptable()) return;
  state.points = [...state.points, point];
  state.history.push("point");
  refresh();
  const correct = Boolean(state.answer);
  void attempt(() => ask(correct));
}

/** @param {Box} box */
function addBox(box) {
  if (!state.about?.boxes) return;
  const several = inVideo() || state.about.several;
  state.boxes = several ? [...state.boxes, box] : [box];
  if (!several) state.history = state.history.filter((kind) => kind !== "box");
  state.history.push("box");
  if (promptable() && tool() === "box") choose("inside");
  refresh();
  void attempt(async () => {
    if (!inVideo()) return ask();
    await client.ask("addBox", { box, phrase: null });
    say("The box is followed from the next frame on.");
  });
}

/** @param {string} phrase @param {boolean} chosen */
async function setPhrase(phrase, chosen) {
  if (chosen) state.phrases.add(phrase);
  else state.phrases.delete(phrase);
  refresh();
  if (!state.picture) return;
  if (!inVideo()) return ask();
  if (chosen) return client.ask("addText", phrase);
  say("A word that is no longer wanted takes effect with Start again.");
}

function undo() {
  const kind = state.history.at(-1);
  if (!kind || inVideo()) return;
  state.history.pop();
  if (kind === "point") state.points = state.points.slice(0, -1);
  else state.boxes = state.boxes.slice(0, -1);
  refresh();
  void attempt(() => ask());
}

function clear() {
  Object.assign(state, { points: [], boxes: [], history: [] });
  state.phrases.clear();
  for (const input of element("chips").querySelectorAll("input")) input.checked = false;
  nextTurn();
  if (inVideo()) void attempt(restart);
  else show(null);
}

async function restart() {
  const { source } = state;
  state.following = false;
  nextTurn();
  if (source?.kind === "video") await seek(video, 0, source.rate);
  if (source) await start(frameOf(video), source);
  stage.masks(null);
  element("results").hidden = true;
  element("frame").textContent = "";
}

/** Push frames until the video ends or the person pauses. A file gives every frame, the camera the latest one. */
async function follow() {
  const { source } = state;
  if (!source || !inVideo()) return;
  if (state.over) await restart();
  if (!state.phrases.size && !state.boxes.length && !state.answer?.instances.length) throw new Trouble("Choose a word, or draw a box around an object, then follow.");
  state.following = true;
  refresh();
  const turn = state.turn;
  try {
    while (state.following && turn === state.turn) {
      const frame = frameOf(video);
      const answer = await client.ask("push", frame);
      if (turn !== state.turn) return;
      state.boxes = [];
      stage.show(frame);
      show(answer);
      element("frame").textContent = `frame ${answer.number + 1} · ${(1000 / answer.times.frame).toFixed(1)} per second`;
      if (answer.crowded) say("More objects are there than can be followed at a time.");
      if (source.kind === "video" && !(await next(source.rate))) {
        state.over = true;
        say("The video is over.");
        document.dispatchEvent(new CustomEvent("samdistill:end"));
        break;
      }
    }
  } finally {
    if (turn === state.turn) state.following = false;
    refresh();
  }
}

/** Go one frame on. Return false at the end of the video. @param {number} rate */
async function next(rate) {
  const frame = Math.floor(video.currentTime * rate) + 1;
  if ((frame + 0.5) / rate >= video.duration) return false;
  await seek(video, frame, rate);
  return true;
}

/** @param {File} file */
async function openFile(file) {
  if (file.type.startsWith("video/")) {
    if (promptable()) throw new Trouble("This model takes photographs; a video needs an exported detector.");
    say("Opening the video …");
    const rate = await openVideo(video, file);
    return start(frameOf(video), { kind: "video", rate, name: file.name });
  }
  const picture = await photograph(file);
  return start(picture, { kind: "photo" });
}

async function openLive() {
  await openCamera(video);
  await start(frameOf(video), { kind: "camera", frozen: false });
  const turn = state.turn;
  const preview = () => {
    if (turn !== state.turn || state.source?.kind !== "camera" || state.source.frozen) return;
    if (!state.following && video.videoWidth) stage.show(frameOf(video));
    requestAnimationFrame(preview);
  };
  preview();
}

async function save() {
  const blob = await new Promise((resolve) => stage.composite().toBlob(resolve, "image/png"));
  if (!(blob instanceof Blob)) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "samdistill.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const id of ["photo", "video-file"]) {
  const input = element(id, HTMLInputElement);
  input.addEventListener("change", () => {
    const file = input.files?.[0];
    input.value = "";
    if (file) void attempt(() => openFile(file));
  });
}
takeDropped(element("stage"), (file) => state.about && void attempt(() => openFile(file)));
element("camera").addEventListener("click", () => void attempt(openLive));
element("take").addEventListener("click", () => void attempt(() => start(frameOf(video), { kind: "camera", frozen: true })));
element("follow").addEventListener("click", () => {
  if (state.following) state.following = false;
  else void attempt(follow);
});
element("restart").addEventListener("click", () => void attempt(restart));
element("undo").addEventListener("click", undo);
element("clear").addEventListener("click", clear);
element("save").addEventListener("click", () => void attempt(save));
element("tools").addEventListener("change", () => {
  stage.boxing = tool() === "box";
  stage.canvas.classList.toggle("box", stage.boxing);
});
const threshold = element("threshold", HTMLInputElement);
threshold.addEventListener("input", () => {
  state.threshold = Number(threshold.value);
  element("least").textContent = state.threshold.toFixed(2);
});
threshold.addEventListener("change", () => {
  if (state.picture && !inVideo()) void attempt(() => ask());
  else if (inVideo()) say("The lowest score takes effect with Start again.");
});

void attempt(open);
