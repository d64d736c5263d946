// The page's arithmetic equals the package's.

import assert from "node:assert/strict";
import { join } from "node:path";
import { test } from "node:test";

import { SOURCE, expected, unpacked } from "./harness.mjs";

const { Geometry } = await import(join(SOURCE, "pixels.js"));
const { Ring, apart, filled, matched, overlap, sightOf } = await import(join(SOURCE, "tracks.js"));
const { agree } = await import(join(SOURCE, "runtime.js"));
const numbers = expected("arithmetic.json");
const MEAN = [0.485, 0.456, 0.406];
const STD = [0.229, 0.224, 0.225];

function near(got, wanted, least, what) {
  assert.equal(got.length, wanted.length, what);
  let worst = 0;
  for (let i = 0; i < got.length; i++) worst = Math.max(worst, Math.abs(got[i] - wanted[i]));
  assert.ok(worst <= least, `${what}: ${worst}`);
}

function rgba(image, [height, width]) {
  const pixels = unpacked(image);
  const data = new Uint8ClampedArray(height * width * 4).fill(255);
  for (let i = 0; i < height * width; i++) data.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
  return { data, height, width };
}

for (const one of numbers.canvases) {
  test(`a picture of ${one.size[1]} x ${one.size[0]} on a canvas, ${one.kind}`, () => {
    const place = new Geometry(126, one.kind);
    assert.deepEqual(place.placed(one.size), one.valid);
    near(place.input(rgba(one.image, one.size), MEAN, STD), unpacked(one.input), 1e-6, "pixels");
    near(place.points(unpacked(one.xy), one.size), unpacked(one.points), 1e-4, "points");
    assert.deepEqual(place.mask(unpacked(one.mask), one.size), unpacked(one.placed));
    near(place.back(unpacked(one.logits), [36, 36], one.size), unpacked(one.back), 1e-4, "logits");
  });
}

test("padding can be zero after the normalisation", () => {
  const place = new Geometry(8, "longest_side");
  const data = new Uint8ClampedArray(4 * 8 * 4).fill(200);
  const input = place.input({ data, height: 4, width: 8 }, MEAN, STD, true);
  assert.equal(input[4 * 8], 0);
  assert.notEqual(input[0], 0);
});

test("instances are assigned with the greatest sum, each at most once", () => {
  for (const { gains, sum } of numbers.pairs) {
    const pairs = matched(gains);
    assert.equal(new Set(pairs.map(([row]) => row)).size, pairs.length);
    assert.equal(new Set(pairs.map(([, column]) => column)).size, pairs.length);
    near([pairs.reduce((total, [row, column]) => total + gains[row][column], 0)], [sum], 1e-12, "sum");
  }
  assert.deepEqual(matched([]), []);
});

test("boxes, areas, overlaps and distances of masks", () => {
  const { masks, boxes, areas, overlaps, distances } = numbers.sights;
  const sights = masks.map((mask) => sightOf(0.5, unpacked(mask), [40, 60]));
  assert.deepEqual(sights.map((sight) => sight.box), boxes);
  assert.deepEqual(sights.map((sight) => sight.area), areas);
  sights.forEach((one, i) => {
    near(sights.map((other) => overlap(one, other)), overlaps[i], 1e-12, "IoU");
    near(sights.map((other) => apart(one, other)), distances[i], 1e-9, "distance");
  });
  assert.equal(sightOf(0.5, new Uint8Array(2400), [40, 60]), null);
  assert.deepEqual(filled([1.5, 2, 3.2, 4], [6, 6]).box, [1, 2, 4, 4]);
});

test("the memory keeps the same frames", () => {
  for (const { length, steps } of numbers.rings) {
    const ring = new Ring(length);
    for (const { number, marks, ages, marked } of steps) {
      ring.add({ number, features: new Float32Array(4), marks: new Map(marks.map((id) => [id, new Float32Array(4)])) });
      assert.deepEqual(ring.ages(number + 2, 4), ages);
      assert.deepEqual([...ring.marked].sort(), marked);
    }
  }
});

test("two backends agree only if all their numbers do", () => {
  const one = Float32Array.from({ length: 1000 }, (_, i) => Math.sin(i) * 10);
  assert.ok(agree([one], [one.map((value) => value + 1e-3)]));
  assert.ok(!agree([one], [one.map((value, i) => (i === 500 ? value + 1 : value))]));
  assert.ok(!agree([one], [one.map((value, i) => (i === 500 ? NaN : value))]));
  assert.ok(!agree([one], [one.map(() => 0)]));
  assert.ok(!agree([one, one], [one]));
  assert.ok(!agree([one], [one.subarray(1)]));
});
