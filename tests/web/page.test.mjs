// The page in headless Chromium, on exports of the sandbox's models: its answers are those of the package.

import assert from "node:assert/strict";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { BUILD, GPU, browser, event, expected, iou, openPage, serve, serveIsolated, unpacked } from "./harness.mjs";

const SAME = 0.999;
const answers = expected("answers.json");
const { inside, outside, box, words, example } = answers.picture;
const scene = join(BUILD, "scene.png");
const folderOf = (name) => join(BUILD, "exports", name);

let chrome;
before(async () => {
  chrome = await browser();
});
after(() => chrome?.stop());

/** Open an export, run `steps` with its page, and check that nothing else was asked for and nothing failed. */
async function withPage(folder, steps, { query = "", context = chrome.context, start = serve } = {}) {
  const server = await start(folder);
  const { page, faults } = await openPage(context, server.address, query);
  try {
    await steps(page);
    assert.deepEqual(faults, []);
  } finally {
    await page.close();
    server.stop();
  }
}

async function choosePhoto(page, file = scene) {
  await page.setInputFiles("#photo", file);
  await page.waitForSelector("#canvas:not([hidden])");
}

/** Where a pixel's corner is on the screen. */
async function place(page, x, y) {
  const { x: left, y: top, width } = await page.locator("#canvas").boundingBox();
  assert.equal(width, 864, "the picture is shown at twice its size, so that clicks are exact");
  return [left + 2 * x, top + 2 * y];
}

/** Click on the centre of a pixel. */
async function click(page, [x, y]) {
  await page.mouse.click(...(await place(page, x + 0.5, y + 0.5)));
}

async function drag(page, [left, top, right, bottom]) {
  await page.mouse.move(...(await place(page, left, top)));
  await page.mouse.down();
  await page.mouse.move(...(await place(page, (left + right) / 2, (top + bottom) / 2)));
  await page.mouse.move(...(await place(page, right, bottom)));
  await page.mouse.up();
}

function sameMask(got, wanted, what) {
  const share = iou(unpacked(got.mask), unpacked(wanted.mask));
  assert.ok(share >= SAME, `${what}: IoU ${share}`);
  assert.ok(Math.abs(got.score - wanted.score) < 1e-3, `${what}: score ${got.score}, not ${wanted.score}`);
}

function sameInstances(got, wanted, what) {
  const order = (all) => [...all].sort((a, b) => (a.phrase ?? "").localeCompare(b.phrase ?? "") || b.score - a.score);
  const [ours, theirs] = [order(got), order(wanted)];
  assert.deepEqual(ours.map((one) => one.phrase), theirs.map((one) => one.phrase), what);
  ours.forEach((one, i) => sameMask(one, theirs[i], `${what} ${i}`));
}

/** The answer to the last of several quick choices. */
async function lastAnswer(page) {
  await page.waitForSelector("#canvas:not(.busy)");
  return event(page, "answer");
}

async function least(page, score) {
  await page.locator("#threshold").fill(String(score));
}

async function chooseWords(page, phrases) {
  for (const phrase of phrases) await page.locator("#chips label", { hasText: new RegExp(`^${phrase}$`) }).click();
}

for (const name of ["mobile", "tracker"]) { // the tracker's files have fixed axes
  test(`${name}: a click, a corrective click, undo and a box`, () =>
    withPage(folderOf(name), async (page) => {
      const about = await event(page, "ready");
      assert.equal(about.family, "promptable");
      await choosePhoto(page);
      await click(page, inside);
      sameMask((await event(page, "answer", 1)).instances[0], answers[name].click, "click");
      await page.getByText("Not object", { exact: true }).click();
      await click(page, outside);
      sameMask((await event(page, "answer", 2)).instances[0], answers[name].corrected, "corrected");
      await page.click("#undo");
      sameMask((await event(page, "answer", 3)).instances[0], answers[name].click, "undone");
      await page.click("#clear");
      await drag(page, box);
      sameMask((await event(page, "answer", 4)).instances[0], answers[name].box, "box");
      assert.match(await page.textContent("#times"), /mask decoder/);
    }));
}

test("the keyboard marks an object", () =>
  withPage(folderOf("mobile"), async (page) => {
    await event(page, "ready");
    await choosePhoto(page);
    await page.focus("#canvas");
    for (const key of ["ArrowRight", "ArrowRight", "Shift+ArrowUp", "Enter"]) await page.keyboard.press(key);
    const answer = await event(page, "answer");
    assert.equal(answer.instances.length, 1);
    await page.keyboard.press("Backspace");
    await page.waitForSelector("#results", { state: "hidden" });
  }));

test("a finger marks an object with a tap", async () => {
  await withPage(folderOf("mobile"), async (page) => {
    await event(page, "ready");
    await choosePhoto(page);
    const [x, y] = await place(page, inside[0] + 0.5, inside[1] + 0.5);
    const session = await page.context().newCDPSession(page);
    await session.send("Input.dispatchTouchEvent", { type: "touchStart", touchPoints: [{ x, y }] });
    await session.send("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
    sameMask((await event(page, "answer")).instances[0], answers.mobile.click, "tap");
  });
});

describe("words", () => {
  test("of a baked vocabulary in one file", () =>
    withPage(folderOf("words"), async (page) => {
      const about = await event(page, "ready");
      assert.deepEqual(about.phrases, words);
      await least(page, answers.low);
      await choosePhoto(page);
      await chooseWords(page, words);
      sameInstances((await lastAnswer(page)).instances, answers.words, "words");
    }));

  for (const [name, axes] of [["memory", ""], ["fixed", " of fixed axes"]]) {
    test(`and an example box with several files${axes}`, () =>
      withPage(folderOf(name), async (page) => {
        await event(page, "ready");
        await least(page, answers.low);
        await choosePhoto(page);
        if (axes) await drag(page, [10, 10, 40, 40]); // where a file takes one box, it is the last one
        await drag(page, example);
        sameInstances((await lastAnswer(page)).instances, answers.memory.box, "box");
        await page.click("#clear");
        await chooseWords(page, words);
        sameInstances((await lastAnswer(page)).instances, answers.memory.words, "words");
      }));
  }
});

/** Follow the video to its end and compare every frame. */
async function sameVideo(page, { words: asked, boxes, threshold, frames: wanted }) {
  await event(page, "ready");
  await least(page, threshold);
  await page.setInputFiles("#video-file", join(BUILD, "scene.webm"));
  await page.waitForSelector("#transport:not([hidden])");
  await chooseWords(page, asked);
  for (const [left, top, right, bottom] of boxes) {
    const { x, y, width } = await page.locator("#canvas").boundingBox();
    const scale = width / 168;
    await page.mouse.move(x + left * scale, y + top * scale);
    await page.mouse.down();
    await page.mouse.move(x + right * scale, y + bottom * scale, { steps: 3 });
    await page.mouse.up();
  }
  await page.click("#follow");
  await event(page, "end");
  assert.equal(await page.evaluate(() => window.seen.answer.length), wanted.length);
  for (const [number, frame] of wanted.entries()) {
    await page.evaluate((at) => window.seen.frame = [window.seen.answer[at]], number);
    const got = (await event(page, "frame")).instances;
    assert.deepEqual(got.map((one) => one.id), frame.map((one) => one.id), `ids of frame ${number}`);
    assert.deepEqual(got.map((one) => one.visible), frame.map((one) => one.visible), `frame ${number}`);
    assert.deepEqual(got.map((one) => one.phrase), frame.map((one) => one.phrase));
    got.forEach((one, i) => sameMask(one, frame[i], `frame ${number}, object ${one.id}`));
  }
}

describe("a video", () => {
  test("with words and a box, with a memory: same ids and masks as the package's session", () =>
    withPage(folderOf("memory"), (page) => sameVideo(page, answers.remembered)));

  test("with files of fixed axes", () => withPage(folderOf("fixed"), (page) => sameVideo(page, answers.remembered)));

  test("with words, without a memory", () =>
    withPage(folderOf("words"), (page) => sameVideo(page, answers.seen)));

  test("of the camera", () =>
    withPage(folderOf("memory"), async (page) => {
      await event(page, "ready");
      await page.click("#camera");
      await page.waitForSelector("#transport:not([hidden])");
      await chooseWords(page, ["circle"]);
      await page.click("#follow");
      await event(page, "answer", 2);
      await page.click("#follow");
      assert.match(await page.textContent("#frame"), /frame \d+/);
      await page.click("#take");
      await page.waitForSelector("#transport", { state: "hidden" });
    }));
});

test("several threads where the server isolates the page", () =>
  withPage(folderOf("mobile"), async (page) => {
    const about = await event(page, "ready");
    assert.ok(about.threads > 1 || (await page.evaluate(() => navigator.hardwareConcurrency)) === 1);
    await choosePhoto(page);
    await click(page, inside);
    sameMask((await event(page, "answer")).instances[0], answers.mobile.click, "click");
  }, { start: serveIsolated }));

test("WebGPU answers alike, where there is one", async (context) => {
  const other = await browser(GPU);
  try {
    await withPage(folderOf("mobile"), async (page) => {
      await event(page, "ready");
      await page.waitForFunction(() => document.querySelector("#facts").textContent.split("·").length > 2);
      const facts = await page.textContent("#facts");
      if (facts.includes("no WebGPU")) return context.skip("this Chromium has no WebGPU");
      assert.equal(await page.getAttribute("#facts", "data-backend"), "webgpu", facts);
      await choosePhoto(page);
      await click(page, inside);
      sameMask((await event(page, "answer")).instances[0], answers.mobile.click, "click");
    }, { query: "?backend=webgpu", context: other.context });
  } finally {
    await other.stop();
  }
});

describe("what can go wrong is one clear line", () => {
  const copy = join(BUILD, "exports", "broken");
  const model = join(copy, "onnx", "vision_encoder.onnx");
  const trouble = (change, line) => {
    rmSync(copy, { recursive: true, force: true });
    cpSync(folderOf("mobile"), copy, { recursive: true });
    change();
    return withPage(copy, async (page) => {
      assert.match(await event(page, "trouble"), line);
      assert.match(await page.textContent("#trouble"), line);
      assert.ok(!(await page.textContent("#trouble")).includes("\n"));
    });
  };
  after(() => rmSync(copy, { recursive: true, force: true }));

  test("a model file with one changed byte", () =>
    trouble(() => {
      const content = readFileSync(model);
      content[content.length >> 1] ^= 1;
      writeFileSync(model, content);
    }, /vision_encoder\.onnx is damaged/));

  test("a model file that is cut off", () =>
    trouble(() => writeFileSync(model, readFileSync(model).subarray(0, 1000)), /vision_encoder\.onnx is damaged/));

  test("a missing model file", () => trouble(() => rmSync(model), /vision_encoder\.onnx is missing/));

  test("a missing runtime", () => trouble(() => rmSync(join(copy, "web", "ort"), { recursive: true }), /ort.*is missing/));

  test("an export of a newer version", () =>
    trouble(() => {
      const path = join(copy, "export.json");
      writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, "utf8")), format: 99 }));
    }, /format 99/));

  test("a file that is no picture", () =>
    withPage(folderOf("mobile"), async (page) => {
      await event(page, "ready");
      await page.setInputFiles("#photo", { name: "notes.png", mimeType: "image/png", buffer: Buffer.from("no picture") });
      assert.match(await event(page, "trouble"), /notes\.png is no picture/);
    }));

  test("a file that is no video", () =>
    withPage(folderOf("words"), async (page) => {
      await event(page, "ready");
      await page.setInputFiles("#video-file", { name: "film.mp4", mimeType: "video/mp4", buffer: Buffer.from("no video") });
      assert.match(await event(page, "trouble"), /film\.mp4 is no video/);
    }));

  test("no WebGPU: wasm stays, and the page says so", () =>
    withPage(folderOf("mobile"), async (page) => {
      await event(page, "ready");
      await page.waitForFunction(() => document.querySelector("#facts").textContent.includes("no WebGPU"));
      assert.equal(await page.getAttribute("#facts", "data-backend"), "wasm");
    }));
});
