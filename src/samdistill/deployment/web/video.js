/** Tracking in a video, frame by frame, with the rules and the ids of `samdistill.inference.video.VideoSession`. */

import { Trouble } from "./files.js";
import { sigmoid } from "./pixels.js";
import { Ring, apart, assign, boxOverlap, filled, overlap, sightOf } from "./tracks.js";

/** @typedef {import("./detector.js").Detector} Detector */
/** @typedef {import("./detector.js").Vision} Vision */
/** @typedef {import("./detector.js").Found} Found */
/** @typedef {import("./tracks.js").Sight} Sight */
/** @typedef {import("./tracks.js").Track} Track */
/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Instance} Instance */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Size} Size */

export const MOST_OBJECTS = 20;
const SAME = 0.5;
const LEAST_SCORE = 0.05;

/**
 * @typedef {object} Frame
 * @property {Vision} vision
 * @property {Map<number, Sight>} sights Visible instances by object id.
 * @property {Map<number, number>} scores By object id.
 * @property {Map<string, Sight[]>} plain Instances without memory, by phrase.
 */

export class VideoSession {
  /**
   * @param {Detector} detector
   * @param {{threshold?: number}} [options] Minimum score of a new object, and minimum presence of a remembered one.
   */
  constructor(detector, { threshold = 0.5 } = {}) {
    const { memory } = detector.model;
    this.detector = detector;
    this.threshold = threshold;
    this.stride = detector.model.stride;
    this.context = memory?.context ?? 0;
    this.marks = Boolean(memory?.marks && this.context);
    this.unnamed = memory?.unnamed ?? "object";
    this.crowded = false;
    this.number = 0;
    /** @type {Size} */
    this.size = [0, 0];
    this.ring = new Ring(this.context);
    /** @type {Map<number, Track>} */
    this.tracks = new Map();
    /** @type {Map<number, {phrase: string | null, box: Box}>} */
    this.shown = new Map();
    /** @type {Map<string, boolean>} */
    this.phrases = new Map();
  }

  /**
   * Track every instance of `phrase`.
   *
   * @param {string} phrase
   */
  addText(phrase) {
    this.detector.concept(phrase);
    if (!this.phrases.has(phrase)) this.phrases.set(phrase, false);
  }

  /**
   * Track the object in `box` of the next frame.
   *
   * @param {Box} box
   * @param {string | null} [phrase]
   * @returns {number} Its id.
   */
  addBox(box, phrase = null) {
    this.detector.concept(phrase ?? this.unnamed);
    if (this.tracks.size + this.shown.size >= MOST_OBJECTS) {
      throw new Trouble(`At most ${MOST_OBJECTS} objects can be followed at a time.`);
    }
    const id = this.#newId();
    this.shown.set(id, { phrase, box });
    return id;
  }

  /**
   * Process the next frame.
   *
   * @param {Picture} picture
   * @returns {Promise<Instance[]>} All objects in the order in which they were added, those that are hidden included.
   */
  async push(picture) {
    /** @type {Size} */
    const size = [picture.height, picture.width];
    if (this.number && (size[0] !== this.size[0] || size[1] !== this.size[1])) {
      throw new Trouble(`A frame is ${size[1]} x ${size[0]} pixels, the first one ${this.size[1]} x ${this.size[0]}.`);
    }
    this.size = size;
    const shown = this.shown;
    this.shown = new Map();
    const vision = await this.detector.encode(picture);
    /** @type {Frame} */
    const now = { vision, sights: new Map(), scores: new Map(), plain: new Map() };
    const before = this.tracks.size;
    if (this.marks) await this.#recall(now);
    else await this.#follow(now);
    await this.#start(now, shown);
    await this.#discover(now);
    for (const [id, sight] of now.sights) this.#track(id).last = sight;
    if (this.context && (this.number % this.stride === 0 || this.tracks.size > before)) this.#remember(now);
    this.number++;
    return [...this.tracks.values()].map((track) => tracked(track, now.sights.get(track.id), now.scores.get(track.id) ?? 0));
  }

  /** @param {number} id */
  #track(id) {
    return /** @type {Track} */ (this.tracks.get(id));
  }

  #newId() {
    let id = 1;
    while (this.tracks.has(id) || this.shown.has(id)) id++;
    return id;
  }

  /**
   * Instances of query `row` with at least LEAST_SCORE, by descending score; MOST_OBJECTS at most.
   *
   * @param {Found} found
   * @param {number} row
   */
  #instances(found, row) {
    const { instances } = this.detector.instances(found, row, LEAST_SCORE, this.size, MOST_OBJECTS);
    return instances.flatMap(({ score, mask }) => sightOf(score, mask, this.size) ?? []);
  }

  /**
   * Instances of each phrase in this frame, detected without memory. Each phrase is run once.
   *
   * @param {Frame} now
   * @param {string[]} phrases
   */
  async #plain(now, phrases) {
    const missing = phrases.filter((phrase) => !now.plain.has(phrase));
    if (missing.length) {
      const found = await this.detector.ask(now.vision, missing);
      missing.forEach((phrase, row) => now.plain.set(phrase, this.#instances(found, row)));
    }
    return phrases.map((phrase) => /** @type {[string, Sight[]]} */ ([phrase, now.plain.get(phrase)]));
  }

  /**
   * Find every object that the memory shows, in one run. The query with the highest logit is taken; a pixel that
   * several masks cover belongs to the one with the largest logit.
   *
   * @param {Frame} now
   */
  async #recall(now) {
    const { marked } = this.ring;
    const tracks = [...this.tracks.values()].filter((track) => marked.has(track.id));
    if (!tracks.length) return;
    const memory = { ring: this.ring, number: this.number, stride: this.stride, objects: tracks.map((track) => track.id) };
    const found = await this.detector.ask(now.vision, tracks.map((track) => track.asked), { memory });
    const [height, width] = this.size;
    const best = new Float32Array(height * width);
    const owner = new Int16Array(height * width).fill(-1);
    const scores = tracks.map((_, row) => sigmoid(found.presence[row]));
    tracks.forEach((_, row) => {
      if (scores[row] < this.threshold) return;
      const logits = this.detector.onFrame(found, row, strongest(found, row), this.size);
      for (let i = 0; i < logits.length; i++) {
        if (logits[i] > best[i]) {
          best[i] = logits[i];
          owner[i] = row;
        }
      }
    });
    tracks.forEach((track, row) => {
      now.scores.set(track.id, scores[row]);
      if (scores[row] < this.threshold) return;
      const sight = sightOf(scores[row], Uint8Array.from(owner, (one) => Number(one === row)), this.size);
      if (sight) now.sights.set(track.id, sight);
    });
  }

  /**
   * Run the detector once per phrase, and assign the instances to objects.
   *
   * @param {Frame} now
   */
  async #follow(now) {
    const phrases = [...new Set([...this.tracks.values()].map((track) => track.asked))];
    if (!phrases.length) return;
    let answers;
    if (this.ring.frames.length) {
      const memory = { ring: this.ring, number: this.number, stride: this.stride, objects: [] };
      const found = await this.detector.ask(now.vision, phrases, { memory });
      answers = phrases.map((phrase, row) => /** @type {[string, Sight[]]} */ ([phrase, this.#instances(found, row)]));
    } else answers = await this.#plain(now, phrases);
    for (const [phrase, sights] of answers) {
      const own = [...this.tracks.values()].filter((track) => track.asked === phrase);
      for (const [id, sight] of assign(own, sights)) now.sights.set(id, sight);
    }
  }

  /**
   * Add the objects that were shown with a box.
   *
   * @param {Frame} now
   * @param {Map<number, {phrase: string | null, box: Box}>} shown
   */
  async #start(now, shown) {
    if (!shown.size) return;
    const given = [...shown.entries()];
    const found = await this.detector.ask(now.vision, given.map(([, one]) => one.phrase ?? this.detector.visual), {
      boxes: given.map(([, one]) => [one.box]), size: this.size,
    });
    given.forEach(([id, { box, phrase }], row) => {
      const { instances } = this.detector.instances(found, row, LEAST_SCORE, this.size);
      const shares = instances.map((instance) => boxOverlap(box, instance.box));
      const best = shares.indexOf(Math.max(...shares));
      const fits = best >= 0 && shares[best] >= SAME;
      const sight = fits ? sightOf(instances[best].score, instances[best].mask, this.size) : null;
      this.#begin(now, id, phrase, sight ?? filled(box, this.size));
    });
  }

  /**
   * @param {Frame} now
   * @param {number} id
   * @param {string | null} phrase
   * @param {Sight} sight
   */
  #begin(now, id, phrase, sight) {
    this.tracks.set(id, { id, phrase, asked: phrase ?? this.unnamed, last: sight });
    now.sights.set(id, sight);
  }

  /**
   * Detect new instances of the phrases. Each is matched to an object that is not visible, or is a new object.
   *
   * @param {Frame} now
   */
  async #discover(now) {
    const due = [...this.phrases].filter(([, asked]) => !asked || this.number % this.stride === 0).map(([phrase]) => phrase);
    if (!due.length) return;
    for (const [phrase, sights] of await this.#plain(now, due)) {
      this.phrases.set(phrase, true);
      for (const sight of sights) {
        if (sight.score < this.threshold) continue;
        const own = [...this.tracks.values()].filter((track) => track.asked === phrase);
        const seen = own.flatMap((track) => now.sights.get(track.id) ?? []);
        if (seen.some((other) => overlap(sight, other) >= SAME)) continue;
        const hidden = own.filter((track) => !now.sights.has(track.id));
        if (hidden.length) {
          const nearest = hidden.reduce((a, b) => (apart(b.last, sight) < apart(a.last, sight) ? b : a));
          now.sights.set(nearest.id, sight);
        } else if (this.tracks.size < MOST_OBJECTS) this.#begin(now, this.#newId(), phrase, sight);
        else this.crowded = true;
      }
    }
  }

  /** @param {Frame} now */
  #remember(now) {
    const { features, shape } = this.detector.remembered(now.vision);
    /** @type {Map<number, Float32Array>} */
    const marks = new Map();
    if (this.marks) {
      for (const [id, sight] of now.sights) marks.set(id, this.#mark(sight, [shape[2], shape[3]]));
    }
    this.ring.add({ number: this.number, features, marks });
  }

  /**
   * The share of each grid cell of the canvas that an object covers.
   *
   * @param {Sight} sight
   * @param {Size} grid
   */
  #mark(sight, [height, width]) {
    const { geometry } = this.detector;
    const canvas = geometry.mask(sight.mask, this.size);
    const out = new Float32Array(height * width);
    for (let row = 0; row < height; row++) {
      const [top, bottom] = [Math.floor((row * geometry.side) / height), Math.ceil(((row + 1) * geometry.side) / height)];
      for (let i = 0; i < width; i++) {
        const [left, right] = [Math.floor((i * geometry.side) / width), Math.ceil(((i + 1) * geometry.side) / width)];
        let sum = 0;
        for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sum += canvas[y * geometry.side + x];
        out[row * width + i] = sum / ((bottom - top) * (right - left));
      }
    }
    return out;
  }
}

/**
 * Query with the highest logit.
 *
 * @param {Found} found
 * @param {number} row
 */
function strongest({ logits, queries }, row) {
  let best = 0;
  for (let query = 1; query < queries; query++) {
    if (logits[row * queries + query] > logits[row * queries + best]) best = query;
  }
  return best;
}

/**
 * @param {Track} track
 * @param {Sight | undefined} sight
 * @param {number} score
 * @returns {Instance}
 */
function tracked(track, sight, score) {
  const { id, phrase } = track;
  if (sight) return { id, phrase, score: sight.score, visible: true, mask: sight.mask, box: sight.box };
  return { id, phrase, score, visible: false, mask: new Uint8Array(track.last.mask.length), box: [0, 0, 0, 0] };
}
