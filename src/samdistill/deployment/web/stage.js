/** The picture with masks and prompts on it: drawing, pointer and keys. */

/** @typedef {import("./types.js").Answer} Answer */
/** @typedef {import("./types.js").Box} Box */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").Point} Point */

/** Colours that remain distinct for people with colour-blindness (Okabe and Ito). */
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8f6bd1"];
const FILL = 0.42;
const LEAST_DRAG = 5;

/** @param {number} index */
export function colourOf(index) {
  return COLOURS[index % COLOURS.length];
}

/** @param {string} hex */
function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * @typedef {object} Hooks
 * @property {(x: number, y: number) => void} point A click, in pixels of the picture.
 * @property {(box: Box) => void} box A drawn box.
 * @property {(key: string) => boolean} key Another key; true if it was used.
 */

export class Stage {
  /** @type {{bitmap: HTMLCanvasElement, width: number, height: number} | null} */
  #picture = null;
  /** @type {HTMLCanvasElement | null} */
  #masks = null;
  /** @type {{x: number, y: number, text: string, colour: string}[]} */
  #labels = [];
  /** @type {Point[]} */
  #points = [];
  /** @type {Box[]} */
  #boxes = [];
  /** @type {Box | null} */
  #draft = null;
  /** @type {{x: number, y: number} | null} */
  #cursor = null;
  /** @type {{x: number, y: number, id: number} | null} */
  #pressed = null;
  /** @type {{x: number, y: number} | null} */
  #corner = null;
  /** Whether a drag draws a box, and a click a point. */
  drags = true;
  clicks = true;
  /** Whether the tool is the box. */
  boxing = false;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {Hooks} hooks
   */
  constructor(canvas, hooks) {
    this.canvas = canvas;
    this.hooks = hooks;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", () => this.#cancel());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      this.#cursor = null;
      this.draw();
    });
    new ResizeObserver(() => this.#fit()).observe(/** @type {Element} */ (canvas.parentElement));
  }

  /** @param {Picture} picture */
  show({ data, width, height }) {
    const bitmap = document.createElement("canvas");
    bitmap.width = width;
    bitmap.height = height;
    bitmap.getContext("2d")?.putImageData(new ImageData(new Uint8ClampedArray(data), width, height), 0, 0);
    const same = this.#picture?.width === width && this.#picture?.height === height;
    this.#picture = { bitmap, width, height };
    this.canvas.hidden = false;
    if (same) this.draw();
    else this.#fit();
  }

  /**
   * Draw masks with an outline, and a label for each.
   *
   * @param {Answer | null} answer
   * @param {(index: number) => {colour: string, text: string}} [looks]
   */
  masks(answer, looks) {
    this.#masks = null;
    this.#labels = [];
    if (answer && looks) {
      const { width, height } = answer;
      const image = new ImageData(width, height);
      answer.instances.forEach((instance, index) => {
        const { colour, text } = looks(index);
        paint(image, instance.mask, rgb(colour), Math.max(1, Math.round(this.#perPixel() * 1.5)));
        if (text && instance.visible !== false) this.#labels.push({ x: instance.box[0], y: instance.box[1], text, colour });
      });
      const layer = document.createElement("canvas");
      layer.width = width;
      layer.height = height;
      layer.getContext("2d")?.putImageData(image, 0, 0);
      this.#masks = layer;
    }
    this.draw();
  }

  /**
   * @param {Point[]} points
   * @param {Box[]} boxes
   */
  prompts(points, boxes) {
    this.#points = points;
    this.#boxes = boxes;
    this.draw();
  }

  /** The picture with everything on it, at its own size. */
  composite() {
    const canvas = document.createElement("canvas");
    if (!this.#picture) return canvas;
    canvas.width = this.#picture.width;
    canvas.height = this.#picture.height;
    const context = canvas.getContext("2d");
    context?.drawImage(this.#picture.bitmap, 0, 0);
    if (this.#masks) context?.drawImage(this.#masks, 0, 0);
    return canvas;
  }

  /** Pixels of the picture for one pixel of the screen. */
  #perPixel() {
    return this.#picture ? this.#picture.width / (this.canvas.clientWidth || this.#picture.width) : 1;
  }

  #fit() {
    const around = this.canvas.parentElement;
    if (!this.#picture || !around) return;
    const { width, height } = this.#picture;
    const tallest = Math.max(240, Math.min(window.innerHeight * 0.72, 900));
    const scale = Math.min(around.clientWidth / width, tallest / height);
    const ratio = window.devicePixelRatio || 1;
    this.canvas.style.width = `${Math.round(width * scale)}px`;
    this.canvas.style.height = `${Math.round(height * scale)}px`;
    this.canvas.width = Math.round(width * scale * ratio);
    this.canvas.height = Math.round(height * scale * ratio);
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    if (!context || !this.#picture) return;
    const { width, height } = this.canvas;
    const ratio = window.devicePixelRatio || 1;
    const scale = width / this.#picture.width;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#picture.bitmap, 0, 0, width, height);
    if (this.#masks) context.drawImage(this.#masks, 0, 0, width, height);
    for (const box of this.#boxes) frame(context, box, scale, ratio, []);
    if (this.#draft) frame(context, this.#draft, scale, ratio, [6, 4]);
    for (const label of this.#labels) tag(context, label, scale, ratio);
    for (const point of this.#points) dot(context, point, scale, ratio);
    if (this.#cursor) cross(context, this.#cursor, scale, ratio);
  }

  /** @param {PointerEvent} event */
  #place(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    const size = /** @type {{width: number, height: number}} */ (this.#picture);
    /** @param {number} value @param {number} limit */
    const inside = (value, limit) => Math.min(Math.max(value, 0), limit);
    return {
      x: inside(((event.clientX - left) / width) * size.width, size.width),
      y: inside(((event.clientY - top) / height) * size.height, size.height),
    };
  }

  /** @param {PointerEvent} event */
  #down(event) {
    if (!this.#picture || event.button !== 0) return;
    this.#cursor = null;
    this.#pressed = { ...this.#place(event), id: event.pointerId };
    this.canvas.setPointerCapture(event.pointerId);
  }

  /** @param {PointerEvent} event */
  #move(event) {
    const start = this.#pressed;
    if (!start || event.pointerId !== start.id || !this.#draws(event)) return;
    this.#draft = boxOf(start, this.#place(event));
    this.draw();
  }

  /** A finger scrolls the page, except with the box tool. @param {PointerEvent} event */
  #draws(event) {
    return this.drags && (this.boxing || event.pointerType !== "touch");
  }

  /** @param {PointerEvent} event */
  #up(event) {
    const start = this.#pressed;
    if (!start || event.pointerId !== start.id) return;
    const end = this.#place(event);
    const box = boxOf(start, end);
    const far = Math.max(box[2] - box[0], box[3] - box[1]) / this.#perPixel() >= LEAST_DRAG;
    this.#cancel();
    if (far && this.#draws(event) && box[2] - box[0] >= 1 && box[3] - box[1] >= 1) this.hooks.box(box);
    else if (!far && this.clicks && !this.boxing) this.hooks.point(end.x, end.y);
  }

  #cancel() {
    this.#pressed = this.#draft = null;
    this.draw();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (!this.#picture || event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this.#picture;
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 40));
    const moves = /** @type {Record<string, number[]>} */ ({
      ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
    });
    if (event.key in moves) {
      const at = this.#cursor ?? { x: width / 2, y: height / 2 };
      const [dx, dy] = this.#cursor ? moves[event.key] : [0, 0];
      this.#cursor = { x: Math.min(Math.max(at.x + dx, 0.5), width - 0.5), y: Math.min(Math.max(at.y + dy, 0.5), height - 0.5) };
      this.#draft = this.#corner ? boxOf(this.#corner, this.#cursor) : null;
      this.draw();
    } else if (event.key === "Enter" || event.key === " ") this.#enter();
    else if (event.key === "Escape" && this.#corner) this.#corner = this.#draft = null;
    else if (!this.hooks.key(event.key)) return;
    event.preventDefault();
  }

  #enter() {
    const at = this.#cursor;
    if (!at) return;
    if (!this.boxing) {
      if (this.clicks) this.hooks.point(at.x, at.y);
    } else if (!this.#corner) this.#corner = at;
    else {
      const box = boxOf(this.#corner, at);
      this.#corner = this.#draft = null;
      if (box[2] > box[0] && box[3] > box[1]) this.hooks.box(box);
    }
  }
}

/**
 * @param {{x: number, y: number}} a
 * @param {{x: number, y: number}} b
 * @returns {Box}
 */
function boxOf(a, b) {
  return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];
}

/**
 * Fill a mask, with a white line along its edge and one of its colour inside, so that it shows on any background.
 *
 * @param {ImageData} image
 * @param {Uint8Array} mask
 * @param {number[]} colour
 * @param {number} line Width of a line in pixels of the picture.
 */
function paint({ data, width, height }, mask, colour, line) {
  /** @param {number} at @param {number} row @param {number} i @param {number} far */
  const edge = (at, row, i, far) => row < far || i < far || row >= height - far || i >= width - far
    || !mask[at - far] || !mask[at + far] || !mask[at - far * width] || !mask[at + far * width];
  for (let row = 0, at = 0; row < height; row++) {
    for (let i = 0; i < width; i++, at++) {
      if (!mask[at]) continue;
      const outer = edge(at, row, i, line);
      const [red, green, blue] = outer ? [255, 255, 255] : colour;
      data[at * 4] = red;
      data[at * 4 + 1] = green;
      data[at * 4 + 2] = blue;
      data[at * 4 + 3] = outer || edge(at, row, i, 2 * line) ? 255 : 255 * FILL;
    }
  }
}

/** @param {CanvasRenderingContext2D} context @param {Box} box @param {number} scale @param {number} ratio @param {number[]} dashes */
function frame(context, [left, top, right, bottom], scale, ratio, dashes) {
  context.setLineDash(dashes.map((dash) => dash * ratio));
  for (const [colour, width] of /** @type {[string, number][]} */ ([["rgb(0 0 0 / 0.6)", 4], ["#ffffff", 2]])) {
    context.strokeStyle = colour;
    context.lineWidth = width * ratio;
    context.strokeRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
  }
  context.setLineDash([]);
}

/** @param {CanvasRenderingContext2D} context @param {Point} point @param {number} scale @param {number} ratio */
function dot(context, { x, y, label }, scale, ratio) {
  context.beginPath();
  context.arc(x * scale, y * scale, 7 * ratio, 0, 2 * Math.PI);
  context.fillStyle = label ? "#16a34a" : "#dc2626";
  context.fill();
  context.lineWidth = 2 * ratio;
  context.strokeStyle = "#ffffff";
  context.stroke();
  context.beginPath();
  context.moveTo((x * scale) - 3.5 * ratio, y * scale);
  context.lineTo((x * scale) + 3.5 * ratio, y * scale);
  if (label) {
    context.moveTo(x * scale, (y * scale) - 3.5 * ratio);
    context.lineTo(x * scale, (y * scale) + 3.5 * ratio);
  }
  context.stroke();
}

/** @param {CanvasRenderingContext2D} context @param {{x: number, y: number}} at @param {number} scale @param {number} ratio */
function cross(context, { x, y }, scale, ratio) {
  for (const [colour, width] of /** @type {[string, number][]} */ ([["rgb(0 0 0 / 0.7)", 4], ["#ffffff", 2]])) {
    context.strokeStyle = colour;
    context.lineWidth = width * ratio;
    context.beginPath();
    context.moveTo(x * scale - 14 * ratio, y * scale);
    context.lineTo(x * scale + 14 * ratio, y * scale);
    context.moveTo(x * scale, y * scale - 14 * ratio);
    context.lineTo(x * scale, y * scale + 14 * ratio);
    context.stroke();
  }
}

/** @param {CanvasRenderingContext2D} context @param {{x: number, y: number, text: string, colour: string}} label @param {number} scale @param {number} ratio */
function tag(context, { x, y, text, colour }, scale, ratio) {
  context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 10 * ratio;
  const left = Math.min(Math.max(0, x * scale), context.canvas.width - width);
  const top = Math.max(0, y * scale - 20 * ratio);
  const [red, green, blue] = rgb(colour);
  context.fillStyle = colour;
  context.fillRect(left, top, width, 20 * ratio);
  context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000000" : "#ffffff";
  context.textBaseline = "middle";
  context.fillText(text, left + 5 * ratio, top + 10.5 * ratio);
}
