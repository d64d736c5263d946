/** The page's end of the model's thread. */

import { Trouble } from "./files.js";

/** @typedef {import("./worker.js").Requests} Requests */
/** @typedef {{what: string, done: number, total: number}} Progress */

/** Sends requests to the model's thread and waits for its answers. */
export class Client {
  #worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  #waiting = /** @type {Map<number, {resolve: (value: any) => void, reject: (error: Error) => void}>} */ (new Map());
  #count = 0;

  /** @param {(progress: Progress) => void} progress */
  constructor(progress) {
    this.#worker.onmessage = ({ data }) => {
      if (data.progress) return progress(data.progress);
      const waiting = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if ("trouble" in data) waiting?.reject(new Trouble(data.trouble));
      else waiting?.resolve(data.value);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const error = new Trouble(`The model's thread stopped: ${event.message || "a file of the page is missing"}.`);
      for (const { reject } of this.#waiting.values()) reject(error);
      this.#waiting.clear();
    };
  }

  /**
   * @template {keyof Requests} Name
   * @param {Name} name
   * @param {Parameters<Requests[Name]>[0]} given
   * @returns {ReturnType<Requests[Name]>}
   */
  ask(name, given) {
    const id = ++this.#count;
    const answer = new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, name, given });
    });
    return /** @type {ReturnType<Requests[Name]>} */ (answer);
  }
}
