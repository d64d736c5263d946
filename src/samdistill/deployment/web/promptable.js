/** Promptable models: points and a box on one object to its mask. */

import { Trouble } from "./files.js";
import { Geometry, positive } from "./pixels.js";
import { int64 } from "./runtime.js";
import { sightOf } from "./tracks.js";

/** @typedef {import("./runtime.js").Numbers} Numbers */
/** @typedef {import("./runtime.js").Sessions} Sessions */
/** @typedef {import("./types.js").Answer} Answer */
/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Point} Point */
/** @typedef {import("./types.js").Size} Size */
/** @typedef {{points: Point[], box: Box | null, correct: boolean}} Question `correct`: start from the last mask. */
/** @typedef {{score: number, values: Float32Array, grid: Size}} Mask Logits of the last mask, and its score. */

const DECODER = "prompt_encoder_mask_decoder";
const CORRECTOR = "prompt_encoder_mask_decoder_masks";
/** With fixed axes: the decoder of a box. */
const BOXER = "prompt_encoder_mask_decoder_boxes";

export class Promptable {
  /**
   * @param {Model} model
   * @param {Sessions} sessions
   */
  constructor(model, sessions) {
    this.model = model;
    this.sessions = sessions;
    this.geometry = new Geometry(model.side, model.geometry);
    /** @type {{picture: Picture, levels: Record<string, Numbers>} | null} */
    this.kept = null;
    /** @type {Mask | null} */
    this.last = null;
  }

  /** @param {Picture} picture */
  async #encode(picture) {
    const { side, mean, std, zeroPadding } = this.model;
    const values = this.geometry.input(picture, mean, std, zeroPadding);
    return this.sessions.run("vision_encoder", { pixel_values: { values, shape: [1, 3, side, side] } });
  }

  /**
   * The questions that a decoder answers in one run each. A decoder of fixed axes takes one point or one box, so that each
   * further point corrects the mask of those before.
   *
   * @param {Question} question
   * @returns {Question[]}
   */
  #steps({ points, box, correct }) {
    const goesOn = correct && Boolean(this.last) && this.sessions.has(CORRECTOR);
    if (!this.model.fixed) return [{ points, box, correct: goesOn }];
    /** @type {Question[]} */
    const each = points.map((point, index) => ({ points: [point], box: null, correct: goesOn || Boolean(box) || index > 0 }));
    if (goesOn) return each.slice(-1);
    return box ? [{ points: [], box, correct: false }, ...each] : each;
  }

  /**
   * Masks of one object: three for an ambiguous prompt, otherwise one.
   *
   * @param {Record<string, Numbers>} levels
   * @param {Size} size Height and width of the picture.
   * @param {Question} question
   */
  async #decode(levels, size, { points, box, correct }) {
    // the prompt encoder adds half a pixel to points, as to pixel indices; boxes are continuous
    const xy = this.geometry.points(points.flatMap(({ x, y }) => [x, y]), size).map((value) => value - 0.5);
    /** @type {Record<string, Numbers>} */
    const inputs = {
      ...levels,
      input_points: { values: xy, shape: [1, 1, points.length, 2] },
      input_labels: { values: int64(points.map(({ label }) => label)), shape: [1, 1, points.length] },
      input_boxes: { values: this.geometry.points(box ?? [], size), shape: [1, box ? 1 : 0, 4] },
    };
    const { last } = this;
    if (correct && last) {
      inputs.input_masks = { values: last.values, shape: [1, 1, ...last.grid] };
      return this.sessions.run(CORRECTOR, inputs);
    }
    return this.sessions.run(this.model.fixed && box ? BOXER : DECODER, inputs);
  }

  /**
   * The mask of the object that the points and the box mark.
   *
   * @param {Picture} picture
   * @param {Question} question
   * @returns {Promise<Answer>}
   */
  async answer(picture, question) {
    /** @type {Size} */
    const size = [picture.height, picture.width];
    if (!question.points.length && !question.box) throw new Trouble("Mark the object with a click or a box.");
    /** @type {Record<string, number>} */
    const times = {};
    if (this.kept?.picture !== picture) {
      const started = performance.now();
      this.kept = { picture, levels: await this.#encode(picture) };
      this.last = null;
      times["image encoder"] = performance.now() - started;
    }
    const started = performance.now();
    for (const step of this.#steps(question)) this.last = best(await this.#decode(this.kept.levels, size, step), step);
    const { score, values, grid } = /** @type {Mask} */ (this.last);
    const mask = positive(this.geometry.back(values, grid, size));
    times["mask decoder"] = performance.now() - started;
    const tight = sightOf(score, mask, size)?.box ?? [0, 0, 0, 0];
    const instances = [{ mask, box: tight, score, phrase: null }];
    return { width: picture.width, height: picture.height, instances, times };
  }

  /**
   * Outputs for a fixed picture and question, to compare two backends.
   *
   * @param {Picture} picture
   */
  async probe(picture) {
    const { width, height } = picture;
    /** @type {Point} */
    const middle = { x: width / 2, y: height / 2, label: 1 };
    const found = await this.#decode(await this.#encode(picture), [height, width], {
      points: [middle], box: null, correct: false,
    });
    return Object.values(found).map(({ values }) => values);
  }
}

/**
 * The mask with the highest predicted IoU of the three for an ambiguous prompt, a click alone, otherwise the single mask.
 *
 * @param {import("./runtime.js").Outputs} found
 * @param {Question} question
 * @returns {Mask}
 */
function best(found, { points, box, correct }) {
  const ambiguous = points.length === 1 && points[0].label === 1 && !box && !correct;
  const [scores, masks] = ambiguous || !found.single_masks
    ? [found.iou_scores, found.pred_masks]
    : [found.single_iou_scores, found.single_masks];
  const [count, height, width] = masks.shape.slice(2);
  let index = 0;
  for (let i = 1; i < count; i++) if (scores.values[i] > scores.values[index]) index = i;
  const values = masks.values.slice(index * height * width, (index + 1) * height * width);
  return { score: scores.values[index], values, grid: [height, width] };
}
