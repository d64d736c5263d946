/**
 * Pixels to tensors and back, with the arithmetic of `samdistill.data.transforms.Geometry`.
 *
 * Coordinates are continuous: pixel i covers the interval from i to i + 1.
 */

/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Size} Size */

/** Value of padded pixels. */
const PAD = 128;

/**
 * Fixed-point weights of a triangle filter along one axis. Its support grows with the reduction, which is what
 * antialiasing means. They equal those of PyTorch's uint8 kernel, which Python uses.
 *
 * @param {number} from Number of pixels of the source.
 * @param {number} to Number of pixels of the result.
 */
function triangle(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  const taps = Math.ceil(support) * 2 + 1;
  const weights = new Float64Array(to * taps);
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  let largest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    first[i] = Math.max(Math.trunc(centre - support + 0.5), 0);
    count[i] = Math.min(Math.min(Math.trunc(centre + support + 0.5), from) - first[i], taps);
    let total = 0;
    for (let j = 0; j < count[i]; j++) {
      const weight = Math.max(0, 1 - Math.abs((j + first[i] - centre + 0.5) / support));
      weights[i * taps + j] = weight;
      total += weight;
    }
    for (let j = 0; j < count[i]; j++) {
      weights[i * taps + j] /= total;
      largest = Math.max(largest, weights[i * taps + j]);
    }
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  return { first, count, taps, bits, fixed: Int32Array.from(weights, (weight) => Math.trunc(0.5 + weight * 2 ** bits)) };
}

/** @param {number} sum @param {number} bits */
function rounded(sum, bits) {
  const value = (sum + (1 << (bits - 1))) >> bits;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/**
 * Resize an RGBA picture to planes of red, green and blue: bilinear with antialiasing, equal to Python's bit for bit.
 *
 * @param {Picture} picture
 * @param {number} height Height of the result.
 * @param {number} width Width of the result.
 * @returns {Uint8Array} 3 x height x width.
 */
export function resized(picture, height, width) {
  const { data, height: rows, width: columns } = picture;
  const across = new Uint8Array(3 * rows * width);
  const x = triangle(columns, width);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < width; i++) {
      let red = 0, green = 0, blue = 0;
      for (let j = 0, at = (row * columns + x.first[i]) * 4, w = i * x.taps; j < x.count[i]; j++, at += 4, w++) {
        red += data[at] * x.fixed[w];
        green += data[at + 1] * x.fixed[w];
        blue += data[at + 2] * x.fixed[w];
      }
      const to = row * width + i;
      const plane = rows * width;
      across[to] = rounded(red, x.bits);
      across[to + plane] = rounded(green, x.bits);
      across[to + 2 * plane] = rounded(blue, x.bits);
    }
  }
  if (rows === height) return across;
  const out = new Uint8Array(3 * height * width);
  const y = triangle(rows, height);
  const sums = new Int32Array(width);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < height; i++) {
      sums.fill(0);
      for (let j = 0; j < y.count[i]; j++) {
        const weight = y.fixed[i * y.taps + j];
        const from = (channel * rows + y.first[i] + j) * width;
        for (let k = 0; k < width; k++) sums[k] += across[from + k] * weight;
      }
      const to = (channel * height + i) * width;
      for (let k = 0; k < width; k++) out[to + k] = rounded(sums[k], y.bits);
    }
  }
  return out;
}

/**
 * Bilinear interpolation of one map without antialiasing (`align_corners=False`).
 *
 * @param {Float32Array} map
 * @param {Size} from Height and width of the part that is read, from the top left corner.
 * @param {Size} to Height and width of the result.
 * @param {number} [stride] Width of a row of `map`; by default that of `from`.
 * @returns {Float32Array}
 */
export function interpolated(map, [h, w], [height, width], stride = w) {
  const out = new Float32Array(height * width);
  const left = new Int32Array(width);
  const right = new Int32Array(width);
  const share = new Float32Array(width);
  for (let i = 0; i < width; i++) {
    const at = Math.max(0, (w / width) * (i + 0.5) - 0.5);
    left[i] = Math.min(Math.trunc(at), w - 1);
    right[i] = Math.min(left[i] + 1, w - 1);
    share[i] = at - left[i];
  }
  for (let row = 0; row < height; row++) {
    const at = Math.max(0, (h / height) * (row + 0.5) - 0.5);
    const top = Math.min(Math.trunc(at), h - 1);
    const upper = top * stride;
    const lower = Math.min(top + 1, h - 1) * stride;
    const down = at - top;
    for (let i = 0, to = row * width; i < width; i++, to++) {
      const one = map[upper + left[i]] * (1 - share[i]) + map[upper + right[i]] * share[i];
      const two = map[lower + left[i]] * (1 - share[i]) + map[lower + right[i]] * share[i];
      out[to] = one * (1 - down) + two * down;
    }
  }
  return out;
}

/** Placement of a picture on a model's square canvas. */
export class Geometry {
  /**
   * @param {number} side Side of the canvas in pixels.
   * @param {string} kind `square` (stretched) or `longest_side` (aspect kept, padded at the bottom and the right).
   */
  constructor(side, kind) {
    this.side = side;
    this.kind = kind;
  }

  /**
   * Height and width on the canvas of a picture of `size`.
   *
   * @param {Size} size
   * @returns {Size}
   */
  placed([height, width]) {
    if (this.kind === "square") return [this.side, this.side];
    const scale = this.side / Math.max(height, width);
    return [Math.max(1, Math.trunc(height * scale + 0.5)), Math.max(1, Math.trunc(width * scale + 0.5))];
  }

  /**
   * The normalised input of a network, 1 x 3 x side x side.
   *
   * @param {Picture} picture
   * @param {number[]} mean Per channel, in 0..1.
   * @param {number[]} std Per channel, in 0..1.
   * @param {boolean} [zeroPadding] Padding is zero after the normalisation, as for a SAM, instead of a grey pixel.
   */
  input(picture, mean, std, zeroPadding = false) {
    const { side } = this;
    const [height, width] = this.placed([picture.height, picture.width]);
    const pixels = resized(picture, height, width);
    const out = new Float32Array(3 * side * side);
    const value = Math.fround;
    for (let channel = 0; channel < 3; channel++) {
      const [centre, spread] = [value(mean[channel]), value(std[channel])];
      const levels = Float32Array.from({ length: 256 }, (_, level) => value(value(level / 255) - centre) / spread);
      out.fill(zeroPadding ? 0 : levels[PAD], channel * side * side, (channel + 1) * side * side);
      for (let row = 0; row < height; row++) {
        const from = (channel * height + row) * width;
        const to = (channel * side + row) * side;
        for (let i = 0; i < width; i++) out[to + i] = levels[pixels[from + i]];
      }
    }
    return out;
  }

  /**
   * Picture coordinates x, y, x, y, ... to canvas coordinates.
   *
   * @param {ArrayLike<number>} xy
   * @param {Size} size Height and width of the picture.
   */
  points(xy, size) {
    const [height, width] = this.placed(size);
    return Float32Array.from(xy, (value, i) => value * (i % 2 ? height / size[0] : width / size[1]));
  }

  /**
   * A mask of the picture on the canvas: each pixel takes the value under its centre, padding is 0.
   *
   * @param {Uint8Array} mask
   * @param {Size} size Height and width of the picture.
   */
  mask(mask, size) {
    const [height, width] = this.placed(size);
    const out = new Uint8Array(this.side * this.side);
    const columns = Int32Array.from({ length: width }, (_, i) => source(i, width, size[1]));
    for (let row = 0; row < height; row++) {
      const from = source(row, height, size[0]) * size[1];
      for (let i = 0; i < width; i++) out[row * this.side + i] = mask[from + columns[i]];
    }
    return out;
  }

  /**
   * Mask logits of the decoder at the size of the picture: to the canvas, without the padding, to the picture.
   *
   * @param {Float32Array} logits
   * @param {Size} grid Height and width of `logits`.
   * @param {Size} size Height and width of the picture.
   */
  back(logits, grid, size) {
    const canvas = interpolated(logits, grid, [this.side, this.side]);
    return interpolated(canvas, this.placed(size), size, this.side);
  }
}

/** @param {number} i @param {number} placed @param {number} size */
function source(i, placed, size) {
  return Math.min(Math.trunc(Math.fround(Math.fround(i + 0.5) * Math.fround(size / placed))), size - 1);
}

/**
 * Pixels whose logit is above 0.
 *
 * @param {Float32Array} logits
 * @returns {Uint8Array}
 */
export function positive(logits) {
  const mask = new Uint8Array(logits.length);
  for (let i = 0; i < logits.length; i++) mask[i] = logits[i] > 0 ? 1 : 0;
  return mask;
}

/** @param {number} logit */
export function sigmoid(logit) {
  return 1 / (1 + Math.exp(-logit));
}
