/** State of a video session without the model, with the rules of `samdistill.inference.tracks`. */

/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Size} Size */

/**
 * @typedef {object} Sight One instance in one frame.
 * @property {number} score In 0..1.
 * @property {Uint8Array} mask Never empty.
 * @property {Box} box Tight around the mask, xyxy in pixels.
 * @property {number} area Number of pixels of the mask.
 * @property {number} width Width of the mask.
 */

/** @typedef {{id: number, phrase: string | null, asked: string, last: Sight}} Track */

/**
 * The instance of a mask, or null if the mask is empty.
 *
 * @param {number} score
 * @param {Uint8Array} mask
 * @param {Size} size
 * @returns {Sight | null}
 */
export function sightOf(score, mask, [height, width]) {
  let [left, top, right, bottom, area] = [width, height, 0, 0, 0];
  for (let row = 0, at = 0; row < height; row++) {
    for (let i = 0; i < width; i++, at++) {
      if (!mask[at]) continue;
      area++;
      if (i < left) left = i;
      if (i >= right) right = i + 1;
      if (row < top) top = row;
      bottom = row + 1;
    }
  }
  return area ? { score, mask, box: [left, top, right, bottom], area, width } : null;
}

/**
 * A rectangular instance of all pixels that `box` touches.
 *
 * @param {Box} box Inside the frame, not empty.
 * @param {Size} size
 * @returns {Sight}
 */
export function filled(box, [height, width]) {
  const [left, top, right, bottom] = [Math.floor(box[0]), Math.floor(box[1]), Math.ceil(box[2]), Math.ceil(box[3])];
  const mask = new Uint8Array(height * width);
  for (let row = top; row < bottom; row++) mask.fill(1, row * width + left, row * width + right);
  return { score: 1, mask, box: [left, top, right, bottom], area: (right - left) * (bottom - top), width };
}

/**
 * IoU of two masks. Only the intersection of their boxes is compared.
 *
 * @param {Sight} one
 * @param {Sight} other
 */
export function overlap(one, other) {
  const [left, top] = [Math.max(one.box[0], other.box[0]), Math.max(one.box[1], other.box[1])];
  const [right, bottom] = [Math.min(one.box[2], other.box[2]), Math.min(one.box[3], other.box[3])];
  let common = 0;
  for (let row = top; row < bottom; row++) {
    for (let i = left, at = row * one.width + left; i < right; i++, at++) common += one.mask[at] & other.mask[at];
  }
  return common / (one.area + other.area - common);
}

/**
 * IoU of two boxes.
 *
 * @param {Box} one
 * @param {Box} other
 */
export function boxOverlap(one, other) {
  const width = Math.min(one[2], other[2]) - Math.max(one[0], other[0]);
  const height = Math.min(one[3], other[3]) - Math.max(one[1], other[1]);
  const common = Math.max(0, width) * Math.max(0, height);
  /** @param {Box} box */
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return common / (area(one) + area(other) - common);
}

/**
 * Distance of the centres of two boxes in pixels.
 *
 * @param {Sight} one
 * @param {Sight} other
 */
export function apart({ box: a }, { box: b }) {
  return Math.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2;
}

/**
 * Assign instances to objects so that the sum of IoUs with each object's last visible mask is greatest. An instance is
 * assigned to at most one object, and only to an object that it overlaps.
 *
 * @param {Track[]} tracks
 * @param {Sight[]} found
 * @returns {Map<number, Sight>} The instance of each assigned object, by object id.
 */
export function assign(tracks, found) {
  const shares = tracks.map((track) => found.map((sight) => overlap(track.last, sight)));
  /** @type {Map<number, Sight>} */
  const assigned = new Map();
  for (const [row, column] of matched(shares)) {
    if (shares[row][column] > 0) assigned.set(tracks[row].id, found[column]);
  }
  return assigned;
}

/**
 * Pairs of row and column with the greatest sum: shortest augmenting paths (Jonker and Volgenant, 1987).
 *
 * @param {number[][]} gains
 * @returns {[number, number][]}
 */
export function matched(gains) {
  if (!gains.length || !gains[0].length) return [];
  if (gains.length > gains[0].length) {
    const turned = gains[0].map((_, column) => gains.map((row) => row[column]));
    return matched(turned).map(([row, column]) => [column, row]);
  }
  const [n, m] = [gains.length, gains[0].length];
  const rows = new Float64Array(n + 1);
  const columns = new Float64Array(m + 1);
  const owner = new Int32Array(m + 1); // row of each column, from 1; 0 is none
  for (let row = 1; row <= n; row++) {
    const least = new Float64Array(m + 1).fill(Infinity);
    const before = new Int32Array(m + 1);
    const used = new Uint8Array(m + 1);
    let column = 0;
    owner[0] = row;
    do {
      used[column] = 1;
      let [step, next] = [Infinity, 0];
      for (let j = 1; j <= m; j++) {
        if (used[j]) continue;
        const cost = -gains[owner[column] - 1][j - 1] - rows[owner[column]] - columns[j];
        if (cost < least[j]) [least[j], before[j]] = [cost, column];
        if (least[j] < step) [step, next] = [least[j], j];
      }
      for (let j = 0; j <= m; j++) {
        if (used[j]) {
          rows[owner[j]] += step;
          columns[j] -= step;
        } else least[j] -= step;
      }
      column = next;
    } while (owner[column]);
    for (; column; column = before[column]) owner[column] = owner[before[column]];
  }
  /** @type {[number, number][]} */
  const pairs = [];
  for (let j = 1; j <= m; j++) if (owner[j]) pairs.push([owner[j] - 1, j - 1]);
  return pairs;
}

/** @typedef {{number: number, features: Float32Array, marks: Map<number, Float32Array>}} Remembered */

/**
 * A memory of `length` frames: their features, and the share of each grid cell that each object covers.
 *
 * The last frame that shows an object is kept while later frames are dropped. At most half of the slots are used so.
 */
export class Ring {
  /** @param {number} length */
  constructor(length) {
    this.length = length;
    /** @type {Remembered[]} */
    this.frames = [];
  }

  /**
   * Add a frame. A full memory drops one.
   *
   * @param {Remembered} frame
   */
  add(frame) {
    this.frames.push(frame);
    if (this.frames.length > this.length) this.frames.splice(this.#leaves(), 1);
  }

  /** Index of the oldest frame that is not the last to show some object, or 0 if too many frames are. */
  #leaves() {
    for (let place = 0; place <= Math.floor(this.length / 2) && place < this.frames.length; place++) {
      const later = new Set(this.frames.slice(place + 1).flatMap((frame) => [...frame.marks.keys()]));
      if ([...this.frames[place].marks.keys()].every((id) => later.has(id))) return place;
    }
    return 0;
  }

  /** Ids of the objects that are visible in a frame of the memory. */
  get marked() {
    return new Set(this.frames.flatMap((frame) => [...frame.marks.keys()]));
  }

  /**
   * Age of each frame at frame `number`, in units of `stride` frames, at most `length`.
   *
   * @param {number} number
   * @param {number} stride
   */
  ages(number, stride) {
    return this.frames.map((frame) => Math.min((number - frame.number) / stride, this.length));
  }
}
