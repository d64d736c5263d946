// What the tests of the page share: expected values, a file server, and headless Chromium.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
export const BUILD = join(ROOT, "build", "web");
export const SOURCE = join(ROOT, "src", "samdistill", "deployment", "web");
const ARGUMENTS = [
  "--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
];

/** Milliseconds after which a test hangs. A busy machine needs a small part of it. */
const PATIENCE = 1_200_000;

const TYPES = { uint8: Uint8Array, float32: Float32Array, bool: Uint8Array };

/** An array that arithmetic.py or answers.py packed. */
export function unpacked({ dtype, data }) {
  const bytes = Buffer.from(data, "base64");
  const values = new Uint8Array(bytes).buffer;
  return new TYPES[dtype](values);
}

/** A JSON file of build/web. */
export function expected(...path) {
  return JSON.parse(readFileSync(join(BUILD, ...path), "utf8"));
}

/** Intersection over union of two masks. Two empty masks are equal. */
export function iou(one, other) {
  assert.equal(one.length, other.length);
  let [common, either] = [0, 0];
  for (let i = 0; i < one.length; i++) {
    common += one[i] & other[i];
    either += one[i] | other[i];
  }
  return either ? common / either : 1;
}

/** Serve a folder with Python's own file server, as the documentation says. */
export async function serve(folder) {
  return started(["-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, "0"]);
}

/** Serve a folder with the headers for several threads. */
export async function serveIsolated(folder) {
  const code = "import sys; from pathlib import Path; from samdistill.deployment.page import serve_page; serve_page(Path(sys.argv[1]), print)";
  return started(["-c", code, folder]);
}

async function started(parameters) {
  const server = spawn(process.env.PYTHON ?? "python3", ["-u", ...parameters], { stdio: ["ignore", "pipe", "ignore"] });
  const address = await new Promise((resolve, reject) => {
    server.stdout.on("data", (text) => {
      const port = /(?:port |127\.0\.0\.1:)(\d+)/.exec(String(text))?.[1];
      if (port) resolve(`http://127.0.0.1:${port}/`);
    });
    server.on("exit", () => reject(new Error("the file server ended")));
  });
  return { address, stop: () => server.kill() };
}

/** Switches of Chromium for WebGPU on the processor, and for none. */
export const GPU = [
  "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader", "--use-webgpu-adapter=swiftshader",
];
const NO_GPU = ["--disable-gpu"];

/** Chromium with a fresh profile. */
export async function browser(more = NO_GPU) {
  const { chromium } = createRequire(join(BUILD, "package.json"))("playwright-core");
  const path = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser"].find(existsSync);
  assert.ok(path, "Chromium is not installed");
  const profile = mkdtempSync(join(tmpdir(), "samdistill-web-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: path, args: [...ARGUMENTS, ...more], viewport: { width: 1280, height: 900 },
    ignoreDefaultArgs: ["--headless"], headless: true, permissions: ["camera"], timeout: PATIENCE,
  });
  context.setDefaultTimeout(PATIENCE);
  return {
    context,
    async stop() {
      await context.close();
      rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
    },
  };
}

/** Open the page and fail on any request that leaves the server, and on any error of the page's code. */
export async function openPage(context, address, query = "") {
  const page = await context.newPage();
  const faults = [];
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(address) && !/^(blob|data):/.test(url)) faults.push(`request to ${url}`);
  });
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("console", (message) => {
    if (/Content.Security.Policy/i.test(message.text())) faults.push(message.text());
  });
  await page.addInitScript(() => {
    window.seen = { ready: [], answer: [], trouble: [], end: [] };
    for (const name of Object.keys(window.seen)) {
      document.addEventListener(`samdistill:${name}`, (event) => window.seen[name].push(event.detail));
    }
  });
  await page.goto(address + query);
  return { page, faults };
}

/** Wait until the page has dispatched `count` events of a name, and return the last of them. Masks become base64. */
export async function event(page, name, count = 1) {
  await page.waitForFunction(([n, c]) => window.seen[n].length >= c || (n !== "trouble" && window.seen.trouble.length), [name, count]);
  const { detail, trouble } = await page.evaluate((n) => {
    const plain = (value) => {
      if (value instanceof Uint8Array) {
        let text = "";
        for (const byte of value) text += String.fromCharCode(byte);
        return { dtype: "uint8", data: btoa(text) };
      }
      if (Array.isArray(value)) return value.map(plain);
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, plain(one)]));
      }
      return value;
    };
    return { detail: plain(window.seen[n].at(-1)), trouble: window.seen.trouble.at(-1) };
  }, name);
  if (name !== "trouble") assert.equal(trouble, undefined);
  return detail;
}
