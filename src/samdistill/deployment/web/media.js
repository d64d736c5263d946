/** Pictures from files, from the camera and from videos. */

import { Trouble } from "./files.js";

/** @typedef {import("./types.js").Picture} Picture */

/** Longest side of a photograph and of a video's frame in pixels; larger ones are reduced. */
const LONGEST = { photograph: 2048, video: 960 };
/** The frame rate is measured over this many frames, from the one at this time in seconds back. */
const FRAMES_TO_MEASURE = 8;
const TIME_TO_MEASURE = 1;
/** Seconds. Browsers round times, so a shorter step can end in the same frame. */
const JUST_BEFORE = 0.004;
/** Milliseconds to wait for a frame after the video has gone there, and after no frame came. */
const LONGEST_WAIT = 20_000;
const SHORTEST_WAIT = 200;
let longestWait = LONGEST_WAIT;

/**
 * Pixels of an image or of a video's current frame.
 *
 * @param {CanvasImageSource} source
 * @param {number} width
 * @param {number} height
 * @param {number} longest
 * @returns {Picture}
 */
function pixelsOf(source, width, height, longest) {
  const scale = Math.min(1, longest / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Trouble("This browser gives the page no canvas.");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return { data, width: canvas.width, height: canvas.height };
}

/**
 * Read a photograph, upright.
 *
 * @param {File} file
 */
export async function photograph(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Trouble(`${file.name} is no picture that this browser can read.`);
  }
  const picture = pixelsOf(bitmap, bitmap.width, bitmap.height, LONGEST.photograph);
  bitmap.close();
  return picture;
}

/**
 * The current frame of a video or camera.
 *
 * @param {HTMLVideoElement} video
 */
export function frameOf(video) {
  return pixelsOf(video, video.videoWidth, video.videoHeight, LONGEST.video);
}

/**
 * Start the camera in a video element.
 *
 * @param {HTMLVideoElement} video
 */
export async function openCamera(video) {
  if (!navigator.mediaDevices) throw new Trouble("The camera needs https or localhost: open the page from there.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    const refused = error instanceof DOMException && error.name === "NotAllowedError";
    throw new Trouble(refused ? "The browser does not let this page use the camera." : "No camera was found.");
  }
  close(video);
  video.srcObject = stream;
  await video.play();
}

/**
 * Open a video file at its first frame.
 *
 * @param {HTMLVideoElement} video
 * @param {File} file
 * @returns {Promise<number>} Frames per second.
 */
export async function openVideo(video, file) {
  close(video);
  const shown = nextFrame(video);
  video.src = URL.createObjectURL(file);
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Trouble(`${file.name} is no video that this browser can read.`));
  });
  await inTime(shown);
  const rate = await frameRate(video);
  await seek(video, 0, rate);
  return rate;
}

/** @param {HTMLVideoElement} video */
export function close(video) {
  video.pause();
  if (video.srcObject instanceof MediaStream) video.srcObject.getTracks().forEach((track) => track.stop());
  if (video.src) URL.revokeObjectURL(video.src);
  video.onerror = null;
  video.srcObject = null;
  video.removeAttribute("src");
}

/**
 * Frames per second of a video, which HTML does not tell: from the times of some frames, found by going back from one to
 * the one before it. 30 if the browser does not tell the time of a frame.
 *
 * @param {HTMLVideoElement} video
 * @returns {Promise<number>}
 */
async function frameRate(video) {
  const last = await frameAt(video, Math.min(TIME_TO_MEASURE, video.duration));
  let [first, count] = [last, 0];
  while (first && count < FRAMES_TO_MEASURE) {
    const before = await frameAt(video, first - JUST_BEFORE);
    if (before === null || before >= first) break;
    [first, count] = [before, count + 1];
  }
  if (last === null || first === null || !count) return 30;
  const exact = count / (last - first);
  return Math.abs(exact - Math.round(exact)) < 0.02 * exact ? Math.round(exact) : exact;
}

/**
 * Go to a frame of a video and wait until it is shown.
 *
 * @param {HTMLVideoElement} video
 * @param {number} frame Number of the frame.
 * @param {number} rate Frames per second.
 */
export async function seek(video, frame, rate) {
  await frameAt(video, (frame + 0.5) / rate);
}

/**
 * Go to a time of a video and wait until its frame is shown. `seeked` alone can come before the frame does.
 *
 * @param {HTMLVideoElement} video
 * @param {number} time In seconds.
 * @returns {Promise<number | null>} When the frame begins. Null if the browser does not tell.
 */
async function frameAt(video, time) {
  const there = Math.min(Math.max(time, 0), video.duration);
  if (Math.abs(video.currentTime - there) < 1e-6) return null; // no frame is shown anew
  const seeked = new Promise((resolve, reject) => {
    video.onseeked = resolve;
    video.onerror = () => reject(new Trouble("This browser cannot read the rest of the video."));
  });
  const shown = nextFrame(video);
  video.currentTime = there;
  await seeked;
  return inTime(shown);
}

/**
 * When the next frame that is shown begins, in seconds. Null if the browser does not tell.
 *
 * @param {HTMLVideoElement} video
 * @returns {Promise<number | null>}
 */
function nextFrame(video) {
  if (!("requestVideoFrameCallback" in video)) return Promise.resolve(null);
  return new Promise((resolve) => video.requestVideoFrameCallback((_, { mediaTime }) => resolve(mediaTime)));
}

/** Wait for a frame, but not for ever: a page in the background shows none. @param {Promise<number | null>} shown */
async function inTime(shown) {
  const found = await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, longestWait, null))]);
  longestWait = found === null ? SHORTEST_WAIT : LONGEST_WAIT;
  return found;
}
