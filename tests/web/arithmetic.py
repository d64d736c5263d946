"""Expected numbers for the page's arithmetic, computed by the package and by SciPy.

``python tests/web/arithmetic.py FOLDER`` writes ``arithmetic.json`` there; tests/web/arithmetic.test.mjs reads it.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from samdistill.data.transforms import Geometry
from samdistill.inference.tracks import Ring
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from samdistill.ops.sights import Sight, apart, overlap

SIZES = [(480, 640), (126, 126), (90, 300), (60, 60), (17, 333), (1, 5), (126, 200), (900, 1)]


def packed(array: Any) -> dict[str, Any]:
    """Return an array as JSON: its type, shape and bytes."""
    values = np.ascontiguousarray(array)
    return {
        "dtype": str(values.dtype), "shape": values.shape, "data": base64.b64encode(values.tobytes()).decode("ascii")
    }  # fmt: skip


def canvases(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Images on canvases of both geometries, their points, and masks there and back."""
    found = []
    for number, size in enumerate(SIZES):
        kind = ("square", "longest_side")[number % 2]
        place, image = Geometry(126, kind), rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        canvas, valid = place.canvas(Image.fromarray(image))
        logits = torch.from_numpy(rng.normal(size=(36, 36)).astype(np.float32))
        mask = rng.random(size) < 0.5
        xy = (rng.random((5, 2)) * size[::-1]).astype(np.float32)
        whole = F.interpolate(logits[None, None], (126, 126), mode="bilinear", align_corners=False)[0, 0]
        found.append({
            "kind": kind, "size": size, "valid": valid, "image": packed(image),
            "input": packed(normalise(canvas[None], IMAGENET_MEAN, IMAGENET_STD)[0].numpy()),
            "xy": packed(xy), "points": packed(place.points(torch.from_numpy(xy), size).numpy()),
            "mask": packed(mask.view(np.uint8)), "placed": packed(place.mask(mask).numpy().view(np.uint8)),
            "logits": packed(logits.numpy()), "back": packed(place.masks_back(whole, size).numpy()),
        })  # fmt: skip
    return found


def pairs(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Greatest sums of assignments."""
    found = []
    for rows, columns in ((1, 1), (3, 3), (2, 7), (7, 2), (20, 20), (5, 19)):
        gains = rng.random((rows, columns)) * (rng.random((rows, columns)) < 0.6)
        chosen = linear_sum_assignment(gains, maximize=True)
        found.append({"gains": gains.tolist(), "sum": float(gains[chosen].sum())})
    return found


def sights(rng: np.random.Generator) -> dict[str, Any]:
    """Boxes, areas, IoUs and distances of masks."""
    masks = [np.zeros((40, 60), bool) for _ in range(6)]
    for mask in masks:
        top, left = rng.integers(0, 25), rng.integers(0, 40)
        mask[top : top + rng.integers(3, 15), left : left + rng.integers(3, 20)] = True
        mask &= rng.random(mask.shape) < 0.8
    known = [sight for mask in masks if (sight := Sight.of(0.5, mask)) is not None]
    return {
        "masks": [packed(mask.view(np.uint8)) for mask in masks], "boxes": [sight.box for sight in known],
        "areas": [sight.area for sight in known],
        "overlaps": [[overlap(a, b) for b in known] for a in known],
        "distances": [[apart(a, b) for b in known] for a in known],
    }  # fmt: skip


def rings(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Frames that a memory keeps, and their ages."""
    found = []
    for length in (1, 2, 4, 8):
        ring, steps = Ring(length), []
        for number in range(0, 60, 3):
            marks = [int(i) for i in rng.choice(5, rng.integers(0, 4), replace=False)]
            ring.add(number, torch.zeros(1, 2, 2), {i: torch.zeros(2, 2) for i in marks})
            memory = ring.recall(number + 2, 4)
            assert memory.ages is not None
            steps.append({
                "number": number, "marks": marks, "ages": memory.ages[0].tolist(), "marked": sorted(ring.marked)
            })  # fmt: skip
        found.append({"length": length, "steps": steps})
    return found


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {"canvases": canvases(rng), "pairs": pairs(rng), "sights": sights(rng), "rings": rings(rng)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arithmetic.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
