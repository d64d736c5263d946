/** onnxruntime-web: sessions on the processor (wasm) and, where it gives the same answers, on the graphics card. */

import { Trouble } from "./files.js";

/** @typedef {import("./types.js").Ort} Ort */
/** @typedef {import("./types.js").OrtSession} OrtSession */
/** @typedef {import("./types.js").Tensor} Tensor */
/** @typedef {"wasm" | "webgpu"} Backend */
/** @typedef {Int32Array | BigInt64Array | Float32Array | Uint8Array} Values */
/** @typedef {{values: Values, shape: number[]}} Numbers */
/** @typedef {Record<string, {values: Float32Array, shape: number[]}>} Outputs */

const BUNDLES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };
const MOST_THREADS = 4;

/** Number of threads: more than one only where the server isolates the page (COOP and COEP headers). */
export const threads = globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;

/**
 * Load the runtime from the files beside the page.
 *
 * @param {Backend} backend
 * @returns {Promise<Ort>}
 */
export async function loadRuntime(backend) {
  const folder = new URL("./ort/", import.meta.url);
  /** @type {Ort} */
  let ort;
  try {
    ort = await import(new URL(BUNDLES[backend], folder).href);
  } catch {
    throw new Trouble(`web/ort/${BUNDLES[backend]} is missing beside this page: export the model again with --web.`);
  }
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

/** Whether this browser has a graphics card that WebGPU can use. */
export async function hasWebGpu() {
  const gpu = /** @type {any} */ (navigator).gpu;
  try {
    return Boolean(gpu && (await gpu.requestAdapter()));
  } catch {
    return false;
  }
}

/** The sessions of one model on one backend. */
export class Sessions {
  /**
   * @param {Ort} ort
   * @param {Backend} backend
   * @param {Map<string, OrtSession>} sessions By name of the file.
   */
  constructor(ort, backend, sessions) {
    this.ort = ort;
    this.backend = backend;
    this.sessions = sessions;
  }

  /**
   * @param {Backend} backend
   * @param {Map<string, Uint8Array>} files Content by name.
   * @param {(name: string) => void} [progress] Called before each file is opened.
   */
  static async open(backend, files, progress) {
    const ort = await loadRuntime(backend);
    const sessions = new Map();
    for (const [name, content] of files) {
      progress?.(name);
      try {
        sessions.set(name, await ort.InferenceSession.create(content, { executionProviders: [backend], logSeverityLevel: 3 }));
      } catch (error) {
        throw new Trouble(`${name} cannot be opened by onnxruntime-web: ${firstLine(error)}`);
      }
    }
    return new Sessions(ort, backend, sessions);
  }

  /** @param {string} name */
  has(name) {
    return this.sessions.has(name);
  }

  /**
   * Names of the inputs of a file.
   *
   * @param {string} name
   */
  inputs(name) {
    return this.sessions.get(name)?.inputNames ?? [];
  }

  /**
   * Run a file. Inputs that it does not have are left out.
   *
   * @param {string} name
   * @param {Record<string, Numbers>} inputs
   * @returns {Promise<Outputs>}
   */
  async run(name, inputs) {
    const session = this.sessions.get(name);
    if (!session) throw new Trouble(`this export has no ${name}: export the model again.`);
    /** @type {Record<string, Tensor>} */
    const feeds = {};
    for (const input of session.inputNames) {
      if (!(input in inputs)) throw new Trouble(`${name} has an input ${input} that this page does not know.`);
      feeds[input] = this.#tensor(inputs[input]);
    }
    let found;
    try {
      found = await session.run(feeds);
    } catch (error) {
      throw new Trouble(`${name} failed: ${firstLine(error)}`);
    }
    return Object.fromEntries(
      Object.entries(found).map(([key, tensor]) => [
        key, { values: /** @type {Float32Array} */ (tensor.data), shape: [...tensor.dims] },
      ]),
    );
  }

  /**
   * Run a file on inputs with a row for each prompt: on all at once, or one by one where its axes are fixed.
   *
   * @param {string} name
   * @param {Record<string, Numbers>} given Inputs with a row for each prompt.
   * @param {Record<string, Numbers>} shared Inputs that are the same for all prompts.
   * @param {boolean} fixed
   * @returns {Promise<Outputs>}
   */
  async rows(name, given, shared, fixed) {
    const count = Object.values(given)[0].shape[0];
    if (!fixed || count === 1) return this.run(name, { ...shared, ...given });
    /** @type {Outputs[]} */
    const found = [];
    for (let row = 0; row < count; row++) {
      const one = Object.entries(given).map(([key, numbers]) => [key, rowOf(numbers, row)]);
      found.push(await this.run(name, { ...shared, ...Object.fromEntries(one) }));
    }
    return Object.fromEntries(Object.keys(found[0]).map((key) => [key, joined(found.map((one) => one[key]))]));
  }

  /** @param {Numbers} numbers */
  #tensor({ values, shape }) {
    if (values instanceof BigInt64Array) return new this.ort.Tensor("int64", values, shape);
    if (values instanceof Uint8Array) return new this.ort.Tensor("bool", values, shape);
    return new this.ort.Tensor("float32", /** @type {Float32Array} */ (values), shape);
  }

  async release() {
    for (const session of this.sessions.values()) await session.release();
    this.sessions.clear();
  }
}

/** @param {Numbers} numbers @param {number} row @returns {Numbers} */
function rowOf({ values, shape }, row) {
  const size = values.length / shape[0];
  return { values: values.slice(row * size, (row + 1) * size), shape: [1, ...shape.slice(1)] };
}

/** @param {{values: Float32Array, shape: number[]}[]} rows */
function joined(rows) {
  const size = rows[0].values.length;
  const values = new Float32Array(rows.length * size);
  rows.forEach((row, index) => values.set(row.values, index * size));
  return { values, shape: [rows.length, ...rows[0].shape.slice(1)] };
}

/** @param {unknown} error */
function firstLine(error) {
  return String(error instanceof Error ? error.message : error).split("\n")[0].slice(0, 200);
}

/** @param {ArrayLike<number>} values */
export function int64(values) {
  return BigInt64Array.from(Array.from(values), (value) => BigInt(value));
}

/**
 * Whether two runs of the same inputs agree: every tensor within 1/200 of its largest value, and mask logits with the
 * same sign in 999 of 1000 places.
 *
 * @param {Float32Array[]} ours
 * @param {Float32Array[]} theirs
 */
export function agree(ours, theirs) {
  return ours.every((one, index) => {
    const other = theirs[index];
    if (!other || one.length !== other.length) return false;
    let [largest, worst, turned] = [0, 0, 0];
    for (let i = 0; i < one.length; i++) {
      const difference = Math.abs(one[i] - other[i]);
      if (!(difference <= Infinity)) return false; // not a number
      largest = Math.max(largest, Math.abs(one[i]));
      worst = Math.max(worst, difference);
      if (one[i] > 0 !== other[i] > 0) turned++;
    }
    return worst <= largest / 200 && turned <= one.length / 1000 + 1;
  });
}
