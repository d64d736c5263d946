/** Concept detectors: a picture and words of the vocabulary, or example boxes, to all instances. */

import { Trouble } from "./files.js";
import { Geometry, positive, sigmoid } from "./pixels.js";
import { int64 } from "./runtime.js";

/** @typedef {import("./runtime.js").Numbers} Numbers */
/** @typedef {import("./runtime.js").Sessions} Sessions */
/** @typedef {import("./tracks.js").Ring} Ring */
/** @typedef {import("./types.js").Answer} Answer */
/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Instance} Instance */
/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Size} Size */

/** An encoded picture: its feature maps, or its pixels where encoder and decoder are one file. */
/** @typedef {Record<string, {values: Float32Array, shape: number[]}>} Vision */

/** @typedef {{ring: Ring, number: number, stride: number, objects: number[]}} Memory */

/**
 * @typedef {object} Found Predictions for some prompts on one picture.
 * @property {Float32Array} masks Logits, prompts x queries x grid.
 * @property {Float32Array} boxes Fractions of the canvas, prompts x queries x 4.
 * @property {Float32Array} logits Prompts x queries.
 * @property {Float32Array} presence One per prompt.
 * @property {number} queries
 * @property {Size} grid
 */

/** Prompts in one run, as in Python. */
const AT_ONCE = 32;
/** Text of a prompt with boxes only. */
const VISUAL = "visual";

export class Detector {
  /**
   * @param {Model} model
   * @param {Sessions} sessions
   */
  constructor(model, sessions) {
    this.model = model;
    this.sessions = sessions;
    this.geometry = new Geometry(model.side, model.geometry);
    this.visual = VISUAL;
    /** @type {Map<Picture, Vision>} */
    this.kept = new Map();
  }

  /** Whether an object can be shown with a box. */
  get boxes() {
    return this.sessions.has("decoder_boxes") && this.model.concepts.includes(VISUAL);
  }

  /**
   * Index of a phrase in the file.
   *
   * @param {string} phrase
   */
  concept(phrase) {
    const index = this.model.concepts.indexOf(phrase);
    if (index < 0) throw new Trouble(`"${phrase}" is not in this model's vocabulary: export it again with the word.`);
    return index;
  }

  /**
   * Encode a picture.
   *
   * @param {Picture} picture
   * @returns {Promise<Vision>}
   */
  async encode(picture) {
    const { side, mean, std } = this.model;
    const pixels = { values: this.geometry.input(picture, mean, std), shape: [1, 3, side, side] };
    if (this.sessions.has("detector")) return { pixel_values: pixels };
    return this.sessions.run("vision_encoder", { pixel_values: pixels });
  }

  /**
   * The feature map that enters the memory.
   *
   * @param {Vision} vision
   */
  remembered(vision) {
    const name = `vision_features.${this.model.memory?.level}`;
    const features = vision[name];
    if (!features) throw new Trouble(`vision_encoder has no ${name}: export the model again.`);
    return { features: features.values, shape: features.shape };
  }

  /**
   * Run the decoder on one picture.
   *
   * @param {Vision} vision
   * @param {string[]} phrases One prompt each.
   * @param {{boxes?: Box[][], size?: Size, memory?: Memory}} [options] Boxes in pixels of a picture of `size`.
   * @returns {Promise<Found>}
   */
  async ask(vision, phrases, { boxes, size, memory } = {}) {
    const prompts = phrases.length;
    /** @type {Record<string, Numbers>} */
    const inputs = {
      concepts: { values: int64(phrases.map((phrase) => this.concept(phrase))), shape: [prompts] },
      prompt_images: { values: new BigInt64Array(prompts), shape: [prompts] },
    };
    let file = this.sessions.has("detector") ? "detector" : "decoder";
    if (boxes && size) {
      const each = boxes[0].length;
      const values = boxes.flat().flatMap((box) => this.#fractions(box, size));
      inputs.input_boxes = { values: Float32Array.from(values), shape: [prompts, each, 4] };
      inputs.input_boxes_labels = { values: new BigInt64Array(prompts * each).fill(1n), shape: [prompts, each] };
      file = "decoder_boxes";
    }
    if (memory) {
      inputs.memory_tokens = await this.#recall(vision, prompts, memory);
      file = "decoder_memory";
    }
    const out = await this.sessions.rows(file, inputs, vision, this.model.fixed);
    const [, queries, height, width] = out.pred_masks.shape;
    return {
      masks: out.pred_masks.values, boxes: out.pred_boxes.values, logits: out.pred_logits.values,
      presence: out.presence_logits.values, queries, grid: [height, width],
    };
  }

  /**
   * The tokens of the memory, one row for each prompt. A file of fixed axes reads a full memory, in which the frames that
   * are not there yet are not valid, and come first, as the oldest.
   *
   * @param {Vision} vision
   * @param {number} prompts
   * @param {Memory} memory
   * @returns {Promise<Numbers>}
   */
  async #recall(vision, prompts, { ring, number, stride, objects }) {
    const [, channels, height, width] = this.remembered(vision).shape;
    const { frames } = ring;
    const length = this.model.fixed ? ring.length : frames.length;
    const empty = length - frames.length;
    const rows = objects.length || 1; // without marks the prompts share one memory
    const cells = height * width;
    const features = new Float32Array(rows * length * channels * cells);
    const masks = new Float32Array(rows * length * cells);
    const ages = new Float32Array(rows * length);
    const valid = new Uint8Array(rows * length);
    for (let row = 0; row < rows; row++) {
      const first = row * length + empty;
      frames.forEach((frame, index) => {
        features.set(frame.features, (first + index) * channels * cells);
        const mark = frame.marks.get(objects[row]);
        if (mark) masks.set(mark, (first + index) * cells);
      });
      ages.set(ring.ages(number, stride), first);
      valid.fill(1, first, first + frames.length);
    }
    const out = await this.sessions.rows("memory", {
      memory_features: { values: features, shape: [rows, length, channels, height, width] },
      memory_ages: { values: ages, shape: [rows, length] },
      memory_valid: { values: valid, shape: [rows, length] },
      memory_masks: { values: masks, shape: [rows, length, height, width] },
    }, {}, this.model.fixed);
    const tokens = out.memory_tokens;
    if (objects.length) return tokens;
    const repeated = new Float32Array(prompts * tokens.values.length);
    for (let row = 0; row < prompts; row++) repeated.set(tokens.values, row * tokens.values.length);
    return { values: repeated, shape: [prompts, ...tokens.shape.slice(1)] };
  }

  /**
   * A box of the picture as centre, width and height in fractions of the canvas.
   *
   * @param {Box} box
   * @param {Size} size
   */
  #fractions(box, size) {
    const [left, top, right, bottom] = this.geometry.points(box, size).map((value) => value / this.model.side);
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top];
  }

  /**
   * Mask logits of one query at the size of the picture.
   *
   * @param {Found} found
   * @param {number} row
   * @param {number} query
   * @param {Size} size
   */
  onFrame({ masks, queries, grid }, row, query, size) {
    const cells = grid[0] * grid[1];
    const start = (row * queries + query) * cells;
    return this.geometry.back(masks.subarray(start, start + cells), grid, size);
  }

  /**
   * Instances of one prompt at the size of the picture, by descending score.
   *
   * @param {Found} found
   * @param {number} row
   * @param {number} threshold Minimum score.
   * @param {Size} size
   * @param {number} [most]
   * @param {string | null} [phrase]
   * @returns {{instances: Instance[]}}
   */
  instances(found, row, threshold, size, most = Infinity, phrase = null) {
    const { queries, logits, boxes } = found;
    const presence = Math.fround(sigmoid(found.presence[row]));
    const scores = Array.from({ length: queries }, (_, query) =>
      Math.fround(Math.fround(sigmoid(logits[row * queries + query])) * presence));
    const order = scores.map((_, query) => query).sort((a, b) => scores[b] - scores[a] || a - b);
    const [height, width] = this.geometry.placed(size);
    const across = (this.model.side * size[1]) / width;
    const down = (this.model.side * size[0]) / height;
    const instances = order.slice(0, most).filter((query) => scores[query] >= threshold).map((query) => {
      const at = (row * queries + query) * 4;
      /** @param {number} value @param {number} limit */
      const inside = (value, limit) => Math.min(Math.max(value, 0), limit);
      /** @type {Box} */
      const box = [
        inside(boxes[at] * across, size[1]), inside(boxes[at + 1] * down, size[0]),
        inside(boxes[at + 2] * across, size[1]), inside(boxes[at + 3] * down, size[0]),
      ];
      return { mask: positive(this.onFrame(found, row, query, size)), box, score: scores[query], phrase };
    });
    return { instances };
  }

  /**
   * All instances of some words, or of what the boxes show, in a picture.
   *
   * @param {Picture} picture
   * @param {{phrases: string[], boxes?: Box[], threshold: number}} question
   * @returns {Promise<Answer>}
   */
  async answer(picture, { phrases, boxes = [], threshold }) {
    /** @type {Size} */
    const size = [picture.height, picture.width];
    let started = performance.now();
    const known = this.kept.get(picture);
    const vision = known ?? (await this.encode(picture));
    this.kept.clear();
    this.kept.set(picture, vision);
    /** @type {Record<string, number>} */
    const times = known || this.sessions.has("detector") ? {} : { "image encoder": performance.now() - started };
    started = performance.now();
    const asked = phrases.length ? phrases : [VISUAL];
    /** @type {Instance[]} */
    const instances = [];
    for (let start = 0; start < asked.length; start += AT_ONCE) {
      const some = asked.slice(start, start + AT_ONCE);
      const found = await this.ask(vision, some, boxes.length ? { boxes: some.map(() => boxes), size } : {});
      some.forEach((phrase, row) => {
        const shown = phrases.length ? phrase : null;
        instances.push(...this.instances(found, row, threshold, size, Infinity, shown).instances);
      });
    }
    times[this.sessions.has("detector") ? "detector" : "decoder"] = performance.now() - started;
    return { width: picture.width, height: picture.height, instances, times };
  }

  /**
   * Outputs for a fixed picture and question, to compare two backends.
   *
   * @param {Picture} picture
   */
  async probe(picture) {
    const found = await this.ask(await this.encode(picture), [this.model.concepts[0]]);
    return [found.masks, found.boxes, found.logits, found.presence];
  }
}
