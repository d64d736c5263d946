/** Pictures from files, from the camera and from videos. */

import { Trouble } from "./files.js";

/** @typedef {import("./types.js").Picture} Picture */

/** Longest side of a photograph and of a video's frame in pixels; larger ones are reduced. */
const LONGEST = { photograph: 2048, video: 960 };
const FRAMES_TO_MEASURE = 8;
/** Milliseconds to wait for a frame after the video has gone there. */
const LONGEST_WAIT = 1000;

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
  video.src = URL.createObjectURL(file);
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Trouble(`${file.name} is no video that this browser can read.`));
  });
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
 * Frames per second of a video, from the times of its first frames. HTML does not tell it. 30 if it cannot be measured.
 *
 * @param {HTMLVideoElement} video
 * @returns {Promise<number>}
 */
async function frameRate(video) {
  if (!("requestVideoFrameCallback" in video)) return 30;
  /** @type {number[]} */
  const times = [];
  const counted = new Promise((resolve) => {
    /** @param {number} _ @param {{mediaTime: number}} frame */
    const next = (_, { mediaTime }) => {
      times.push(mediaTime);
      if (times.length > FRAMES_TO_MEASURE) resolve(null);
      else video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
    video.onended = () => resolve(null);
    setTimeout(resolve, 2000);
  });
  video.muted = true;
  await video.play().catch(() => {});
  await counted;
  video.pause();
  video.onended = null;
  const gaps = times.slice(1).map((time, i) => time - times[i]).filter((gap) => gap > 0);
  if (!gaps.length) return 30;
  // a slow machine leaves frames out, so the shortest gap is one frame
  const exact = 1 / Math.min(...gaps);
  return Math.abs(exact - Math.round(exact)) < 0.02 * exact ? Math.round(exact) : exact;
}

/**
 * Go to a frame of a video and wait until it is shown. `seeked` alone can come before the frame does.
 *
 * @param {HTMLVideoElement} video
 * @param {number} frame Number of the frame.
 * @param {number} rate Frames per second.
 */
export async function seek(video, frame, rate) {
  const time = (frame + 0.5) / rate;
  const seeked = new Promise((resolve) => (video.onseeked = resolve));
  const shown = new Promise((resolve) => {
    if (!("requestVideoFrameCallback" in video)) return resolve(null);
    /** @param {number} _ @param {{mediaTime: number}} found */
    const check = (_, { mediaTime }) => {
      if (Math.abs(mediaTime + 0.5 / rate - time) < 0.5 / rate) resolve(null);
      else if (Math.abs(video.currentTime - time) < 1e-3) video.requestVideoFrameCallback(check);
    };
    video.requestVideoFrameCallback(check);
  });
  video.currentTime = time;
  await seeked;
  // no frame is shown anew if it is there already, or if the page is in the background
  await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, LONGEST_WAIT))]);
}
