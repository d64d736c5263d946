/**
 * Types that the modules of the page share. There is no code here.
 *
 * @typedef {[number, number]} Size Height and width in pixels.
 * @typedef {[number, number, number, number]} Box Left, top, right, bottom in pixels of the picture.
 * @typedef {{data: Uint8ClampedArray | Uint8Array, width: number, height: number}} Picture RGBA pixels.
 * @typedef {{x: number, y: number, label: 0 | 1}} Point Continuous pixels; 1 is inside the object, 0 outside.
 *
 * @typedef {object} Instance One object that was found in a picture or a frame.
 * @property {Uint8Array} mask Height x width of the picture, 0 or 1.
 * @property {Box} box
 * @property {number} score In 0..1.
 * @property {string | null} phrase The word it was found with.
 * @property {number} [id] Its id in a video.
 * @property {boolean} [visible] In a video: whether this frame shows it.
 *
 * @typedef {object} Answer
 * @property {number} width
 * @property {number} height
 * @property {Instance[]} instances
 * @property {Record<string, number>} times Milliseconds by step.
 *
 * @typedef {object} FileRecord One model file of `export.json`.
 * @property {string} name
 * @property {string} path Relative to `export.json`.
 * @property {number} bytes
 * @property {string} sha256
 *
 * @typedef {"promptable" | "detector"} Family
 *
 * @typedef {object} Model What the page must know about an exported model.
 * @property {string} title
 * @property {Family} family
 * @property {number} side Side of the canvas in pixels.
 * @property {string} geometry `square` or `longest_side`.
 * @property {number[]} mean
 * @property {number[]} std
 * @property {boolean} zeroPadding
 * @property {string[]} phrases Words that a person can choose.
 * @property {string[]} concepts All phrases of the file, in the order of its index.
 * @property {FileRecord[]} files
 * @property {number} stride Frames between two that are remembered, and between two searches for a word.
 * @property {boolean} fixed Whether all axes are fixed: a file reads one prompt at a time, and a memory all its frames.
 * @property {{context: number, marks: boolean, unnamed: string, level: number} | null} memory
 *
 * @typedef {object} About What the page shows once a model is open.
 * @property {string} title
 * @property {Family} family
 * @property {string[]} phrases
 * @property {boolean} boxes Whether a box can be drawn.
 * @property {boolean} several Whether a concept can be shown with several boxes.
 * @property {boolean} memory
 * @property {number} bytes
 * @property {number} threads
 *
 * @typedef {typeof import("onnxruntime-common")} Ort
 * @typedef {import("onnxruntime-common").InferenceSession} OrtSession
 * @typedef {import("onnxruntime-common").Tensor} Tensor
 */

export {};
