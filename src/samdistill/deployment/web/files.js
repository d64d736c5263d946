/** Files of the exported folder: read with progress, and checked against their SHA-256. */

/** @typedef {import("./types.js").FileRecord} FileRecord */

/** An error whose message is a sentence for the person at the page. */
export class Trouble extends Error {}

/**
 * Read a file of the exported folder.
 *
 * @param {URL} url
 * @param {(bytes: number) => void} [progress] Called with the bytes received so far.
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function read(url, progress) {
  const name = decodeURIComponent(url.pathname.split("/").slice(-2).join("/"));
  let response;
  try {
    response = await fetch(url, { cache: "no-cache" });
  } catch {
    throw new Trouble(`${name} could not be read: the server does not answer.`);
  }
  if (response.status === 404) throw new Trouble(`${name} is missing beside this page: export the model again.`);
  if (!response.ok || !response.body) throw new Trouble(`${name} could not be read: the server answered ${response.status}.`);
  const chunks = [];
  let total = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      total += value.length;
      progress?.(total);
    }
  } catch {
    throw new Trouble(`${name} could not be read: the connection was interrupted.`);
  }
  const content = new Uint8Array(total);
  let at = 0;
  for (const chunk of chunks) {
    content.set(chunk, at);
    at += chunk.length;
  }
  return content;
}

/**
 * Read a JSON file of the exported folder.
 *
 * @param {URL} url
 * @returns {Promise<any>}
 */
export async function readJson(url) {
  const content = await read(url);
  try {
    return JSON.parse(new TextDecoder().decode(content));
  } catch {
    throw new Trouble(`${url.pathname.split("/").at(-1)} is damaged: it is not JSON. Export the model again.`);
  }
}

/**
 * Read a model file and compare it with its record. Browsers compute SHA-256 only for https and localhost; elsewhere the
 * size alone is compared.
 *
 * @param {URL} folder
 * @param {FileRecord} file
 * @param {(bytes: number) => void} [progress]
 */
export async function readModelFile(folder, file, progress) {
  const content = await read(new URL(file.path, folder), progress);
  const damaged = new Trouble(`${file.path} is damaged: it is not the file that was exported. Export the model again.`);
  if (content.length !== file.bytes) throw damaged;
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== file.sha256) throw damaged;
  }
  return content;
}
