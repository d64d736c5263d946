/** The exported folder: what its JSON files say about the model. */

import { Trouble, readJson } from "./files.js";

/** @typedef {import("./types.js").FileRecord} FileRecord */
/** @typedef {import("./types.js").Model} Model */

/** Newest version of export.json that this page reads. */
const FORMAT = 1;
/** Frames between two searches for a word, of a model that does not say. */
const STRIDE = 4;
const PRECISIONS = ["fp32", "fp16", "int8"];

/**
 * Files without which a kind of model cannot be used here, and all others that the page uses. A detector is one file, or
 * several if objects can be shown with boxes.
 *
 * @type {Record<string, {needed: string[], also: string[]}>}
 */
const PARTS = {
  promptable: {
    needed: ["vision_encoder", "prompt_encoder_mask_decoder"],
    also: ["prompt_encoder_mask_decoder_boxes", "prompt_encoder_mask_decoder_masks"],
  },
  detector: { needed: [], also: ["detector", "vision_encoder", "decoder", "decoder_boxes"] },
  "detector with memory": {
    needed: ["vision_encoder", "decoder", "memory", "decoder_memory"], also: ["decoder_boxes"],
  },
};

/**
 * Read what an exported folder says about its model.
 *
 * @param {URL} folder
 * @param {string | null} [precision] One of PRECISIONS; null takes the first that the folder has.
 * @returns {Promise<Model>}
 */
export async function openModel(folder, precision = null) {
  const record = await readJson(new URL("export.json", folder));
  if (!(Number.isInteger(record.format) && record.format <= FORMAT)) {
    throw new Trouble(`export.json has format ${record.format}, this page reads up to ${FORMAT}: use the page that was exported with it.`);
  }
  const parts = PARTS[record.kind];
  if (!parts) throw new Trouble(`A ${record.kind} cannot be used in this page.`);
  const detector = record.kind !== "promptable";
  const files = filesOf(record, precision).filter(({ name }) => [...parts.needed, ...parts.also].includes(name));
  const missing = parts.needed.find((name) => !files.some((file) => file.name === name));
  if (missing) throw new Trouble(`This export has no ${missing}: export the model again with --to onnx --web.`);
  const words = detector ? vocabularyOf(record) : { phrases: [], hidden: [] };
  const { canvas, config } = record;
  return {
    title: record.name, family: detector ? "detector" : "promptable", side: canvas.image_size,
    geometry: canvas.geometry, mean: canvas.mean, std: canvas.std, zeroPadding: canvas.zero_padding,
    phrases: words.phrases, concepts: [...words.phrases, ...words.hidden], files, fixed: Boolean(record.static),
    stride: config.memory_stride ?? STRIDE,
    memory: record.kind !== "detector with memory" ? null : {
      context: config.memory_context, marks: config.memory_marks,
      unnamed: config.memory_phrase, level: config.memory_level,
    },
  };
}

/**
 * @param {any} record
 * @param {string | null} precision
 * @returns {FileRecord[]}
 */
function filesOf(record, precision) {
  const rows = record.files.filter((/** @type {any} */ row) => row.target === "onnx" && row.passed);
  const there = PRECISIONS.filter((name) => rows.some((/** @type {any} */ row) => row.precision === name));
  const chosen = precision ?? there[0];
  if (!there.includes(chosen)) {
    throw new Trouble(`This folder has no ONNX files${precision ? ` in ${precision}` : ""}: export the model with --to onnx.`);
  }
  return rows
    .filter((/** @type {any} */ row) => row.precision === chosen)
    .map((/** @type {any} */ row) => ({ name: row.part, path: row.path, bytes: row.bytes, sha256: row.sha256 }));
}

/**
 * @param {any} record
 * @returns {{phrases: string[], hidden: string[]}}
 */
function vocabularyOf(record) {
  if (!record.vocabulary) {
    throw new Trouble('This detector has no vocabulary: export it again with --vocabulary "red car,dog".');
  }
  return record.vocabulary;
}
