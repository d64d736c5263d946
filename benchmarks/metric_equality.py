"""Comparison of the package's metrics with the official evaluators on random cases that cover all special cases.

    python benchmarks/metric_equality.py --sam3 DIR --davis DIR --sam2 DIR

DIR: check-outs of facebookresearch/sam3, davisvideochallenge/davis2017-evaluation and facebookresearch/sam2. Their code
needs opencv-python-headless, scikit-image and tqdm in addition to this package. Every case is written to files and
scored from there by both. Every figure of the official code is compared. A case that one of them rejects must be
rejected by both; otherwise it is counted by its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import Sheet, arguments
from PIL import Image
from pycocotools import mask as coco_mask

from samdistill.data.saco import to_rle
from samdistill.evaluation.evaluate import evaluate_concepts
from samdistill.evaluation.evaluate_masks import evaluate_masks
from samdistill.evaluation.video_result import PREDICTIONS
from samdistill.types import UserError

GOAL = 1e-6
CONCEPTS = {
    "cgF1": "cgf1", "precision": "all_precision", "recall": "recall", "F1": "all_f1", "positive_macro_F1": "pair_f1",
    "positive_micro_F1": "pmf1", "positive_micro_precision": "precision", "IL_precision": "il_precision",
    "IL_recall": "il_recall", "IL_F1": "il_f1", "IL_FPR": "il_fpr", "IL_MCC": "il_mcc",
}  # fmt: skip
"""The names of cgF1's figures in the official evaluation and here."""
Figures = Mapping[str, float]
Score = Callable[[np.random.Generator, Path], tuple[Figures | Exception, Figures | Exception]]
"""Draws a case into an empty folder; the official figures and ours by the same names, or what was raised."""


def load(path: Path, name: str) -> ModuleType:
    """A single file of a check-out as a module; ``SystemExit`` where it is not there."""
    if not path.is_file():
        raise SystemExit(f"{path}: not there; give a check-out of the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A rectangle; now and then without a pixel."""
    mask = np.zeros((height, width), bool)
    if rng.random() < 0.95:
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + 1 + rng.integers(0, height), left : left + 1 + rng.integers(0, width)] = True
    return mask


def shaken(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Like ``mask``: the same, moved a little, or with a few pixels changed."""
    way = rng.integers(0, 3)
    if way == 0:
        return mask.copy()
    if way == 1:
        return np.roll(mask, rng.integers(-1, 2, 2), (0, 1))
    return mask ^ (rng.random(mask.shape) < 0.1)


def spelled(rng: np.random.Generator, mask: np.ndarray) -> Any:
    """A mask in one of COCO's spellings."""
    rle = to_rle(mask)
    if rng.random() < 0.8:
        return rle
    flat = mask.flatten("F").astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": rle["size"], "counts": np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()}


def truth_file(rng: np.random.Generator, pairs: Sequence[dict[str, Any]], base: dict[int, list[np.ndarray]]) -> Any:
    """One annotator: the objects of ``base`` as this one sees them, with groups, foreign categories and omissions."""
    annotations = []
    for pair in pairs:
        seen = [] if rng.random() < 0.2 else [shaken(rng, mask) for mask in base[pair["id"]] if rng.random() < 0.85]
        crowd_only = rng.random() < 0.1
        for mask in seen:
            box = [float(v) for v in coco_mask.toBbox(to_rle(mask))]
            annotations.append({
                "id": len(annotations) + 1, "image_id": pair["id"], "segmentation": spelled(rng, mask), "bbox": box,
                "area": int(mask.sum()), "iscrowd": int(crowd_only or rng.random() < 0.1),
                "category_id": int(rng.choice([1, 2, 7], p=[0.8, 0.15, 0.05])),
            })  # fmt: skip
    images = [pair | {"is_instance_exhaustive": int(rng.random() < 0.95)} for pair in pairs]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 2, "name": "b"}, {"id": 1, "name": "a"}],
    }


def concept_case(rng: np.random.Generator, folder: Path) -> tuple[list[Path], Path]:
    """Files of one to three annotators and one of predictions."""
    pairs, base = [], {}
    for number in rng.permutation(int(rng.integers(2, 25))).tolist():
        height, width = (int(side) for side in rng.integers(3, 14, 2))
        pairs.append(
            {"id": number, "file_name": "a.png", "text_input": f"thing {number}", "height": height, "width": width}
        )
        base[number] = [blob(rng, height, width) for _ in range(int(rng.choice([0, 1, 2, 5])))]
    truths = []
    for number in range(int(rng.integers(1, 4))):
        truths.append(folder / f"gold_{'abc'[number]}.json")
        truths[-1].write_text(json.dumps(truth_file(rng, pairs, base)))
    predictions = []
    for pair in pairs:
        if rng.random() < 0.25:
            continue
        own = [shaken(rng, mask) for mask in base[pair["id"]] if rng.random() < 0.8]
        own += [blob(rng, pair["height"], pair["width"]) for _ in range(int(rng.choice([0, 0, 1, 3])))]
        own += [mask for mask in own if rng.random() < 0.1]  # twice the same
        for mask in own:
            predictions.append({
                "image_id": pair["id"], "category_id": int(rng.choice([1, 2, 9], p=[0.85, 0.1, 0.05])),
                "segmentation": spelled(rng, mask), "bbox": [float(v) for v in coco_mask.toBbox(to_rle(mask))],
                "score": float(rng.choice([0.1, 0.499999, 0.5, 0.50001, 0.9, 1.0])),
            })  # fmt: skip
    if predictions and rng.random() < 0.1:
        predictions.append({**predictions[0], "image_id": 999})
    rng.shuffle(predictions)
    found = folder / "predictions.json"
    found.write_text(json.dumps(predictions))
    return truths, found


def concepts(official: ModuleType, kind: str, iou: str) -> Score:
    """kind: the official name of what is compared, iou: ours."""

    def score(rng: np.random.Generator, folder: Path) -> tuple[Figures | Exception, Figures | Exception]:
        truths, found = concept_case(rng, folder)

        def ours() -> Figures:
            figures = evaluate_concepts(found, truths, iou=iou, progress=False).figures["student"]
            named = {}
            for name, own in CONCEPTS.items():
                named[name] = figures.get(own, -1.0)  # COCO's value for what is not defined
                if not name.startswith("IL_"):
                    for end, at in (("@0.5", "_50"), ("@0.75", "_75")):
                        named[name + end] = figures.get(("f1" if own == "pmf1" else own) + at, -1.0)
            return named

        def theirs() -> Figures:
            evaluated = official.CGF1Evaluator([str(path) for path in truths], iou_type=kind).evaluate(str(found))
            return {name.removeprefix(f"cgF1_eval_{kind}_"): value for name, value in evaluated.items()}

        return attempt(theirs), attempt(ours)

    return score


def attempt(run: Callable[[], Figures]) -> Figures | Exception:
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            return run()
    except (Exception, SystemExit) as error:  # the official code stops in many ways
        return error if isinstance(error, Exception) else RuntimeError("sys.exit")


def id_video(rng: np.random.Generator, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Maps of ids with gaps between them, objects that come late or leave, and a border that belongs to none."""
    ids = rng.choice(np.arange(1, 7), int(rng.integers(1, 5)), replace=False)
    maps = np.zeros((frames, *size), np.uint8)
    for number in ids:
        shape, start = blob(rng, *size), int(rng.choice([0, 0, 0, 1, frames // 2]))
        for frame in range(start, frames):
            shape = shaken(rng, shape)
            if rng.random() < 0.85:
                maps[frame][shape] = number
    if rng.random() < 0.4:
        maps[rng.random(maps.shape) < 0.05] = 255
    return maps


def predicted_ids(rng: np.random.Generator, maps: np.ndarray, most: int) -> np.ndarray:
    """Something like ``maps``, with ids up to ``most``."""
    found = np.stack([np.roll(grid, rng.integers(-1, 2, 2), (0, 1)) for grid in maps])
    found[rng.random(found.shape) < 0.05] = rng.integers(0, most + 1)
    found[rng.random(len(found)) < 0.1] = 0
    found[found > most] = 0
    return found


def save(folder: Path, maps: Sequence[np.ndarray], skip_ends: bool) -> None:
    folder.mkdir(parents=True)
    for number, grid in enumerate(maps):
        if not (skip_ends and number in (0, len(maps) - 1)):
            image = Image.fromarray(grid)
            if number % 2 and grid.dtype == np.uint8:
                image.putpalette(list(range(256)) * 3)  # every other frame as a palette PNG
            image.save(folder / f"{number:05}.png")


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Tolerances of an outline from 1 to 4 pixels."""
    height, width = rng.integers(5, 40, 2) if rng.random() < 0.8 else rng.integers(150, 330, 2)
    return int(height), int(width)


def davis_case(rng: np.random.Generator, root: Path) -> None:
    names = [f"video{number}" for number in range(int(rng.integers(1, 4)))]
    for name in names:
        frames, size = int(rng.integers(3, 13)), draw_size(rng)
        maps = id_video(rng, frames, size)
        first = maps[0][maps[0] != 255]
        most = int(first.max(initial=0)) + int(rng.random() < 0.03)  # now and then one too many
        save(root / "data" / "Annotations" / "480p" / name, maps, skip_ends=False)
        save(root / "found" / name, predicted_ids(rng, maps, most), skip_ends=bool(rng.random() < 0.5))
        pictures = root / "data" / "JPEGImages" / "480p" / name
        pictures.mkdir(parents=True)
        for number in range(frames):
            (pictures / f"{number:05}.jpg").touch()  # counted, never opened
    listing = root / "data" / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("\n".join(names))


def video_figures(result: Any, statistics: bool) -> Figures:
    """Of the whole set, and of every object."""
    scores = result.scores[PREDICTIONS]
    whole = scores.summary()
    found = {"J&F": whole["jf"], "J": whole["j"], "F": whole["f"]} | (scores.statistics() if statistics else {})
    for video in scores.videos:
        for one in video.objects:
            if one.frames:
                own = one.summary()
                found |= {f"J {video.name} {one.object_id}": own["j"], f"F {video.name} {one.object_id}": own["f"]}
    return found


def davis(evaluation: ModuleType) -> Score:
    def score(rng: np.random.Generator, folder: Path) -> tuple[Figures | Exception, Figures | Exception]:
        davis_case(rng, folder)

        def theirs() -> Figures:
            task = evaluation.DAVISEvaluation(str(folder / "data"), "semi-supervised", "val")
            with contextlib.redirect_stderr(io.StringIO()):
                measured = task.evaluate(str(folder / "found"))
            means = {name: float(np.mean(measured[name]["M"])) for name in "JF"}
            found = {"J&F": (means["J"] + means["F"]) / 2, **means}
            for name in "JF":
                found |= {f"{name.lower()}_{long}": float(np.mean(measured[name][short]))
                          for short, long in (("R", "recall"), ("D", "decay"))}  # fmt: skip
                for key, value in measured[name]["M_per_object"].items():
                    found[f"{name} {key.replace('_', ' ')}"] = float(value)
            return found

        ours = attempt(lambda: video_figures(evaluate_masks(folder / "found", folder / "data", progress=False), True))
        return attempt(theirs), ours

    return score


def sav_case(rng: np.random.Generator, root: Path, per_object: bool) -> None:
    for number in range(int(rng.integers(1, 4))):
        name, size = f"video{number}", draw_size(rng)
        maps = id_video(rng, int(rng.integers(3, 13)), size)
        found = predicted_ids(rng, maps, 8)
        if not per_object:
            save(root / "data" / name, maps, skip_ends=False)
            save(root / "found" / name, found, skip_ends=bool(rng.random() < 0.5))
            continue
        for one in sorted(set(np.unique(maps).tolist()) - {0, 255}):
            rows = slice(0, max(3, int(rng.integers(3, len(maps) + 1))))  # each object has its own frames
            if not (maps[rows] == one)[1:-1].any() and rng.random() < 0.9:
                continue  # the official evaluator stops at an object that no frame that counts shows
            value = 255 if rng.random() < 0.5 else 1
            for place, grids in (("data", maps), ("found", found)):
                masks = ((grids[rows] == one) * value).astype(np.uint8)
                save(root / place / name / f"{one:03}", masks, skip_ends=place == "found" and bool(one % 2))


def sav(benchmark: ModuleType, per_object: bool) -> Score:
    def score(rng: np.random.Generator, folder: Path) -> tuple[Figures | Exception, Figures | Exception]:
        sav_case(rng, folder, per_object)
        truth, found = folder / "data", folder / "found"

        def theirs() -> Figures:
            evaluator = benchmark.VideoEvaluator(str(truth), str(found))
            by_video = [evaluator(path.name) for path in sorted(truth.iterdir())]
            figures: dict[str, float] = {}
            for name, ious, outlines in by_video:
                figures |= {f"J {name} {int(number)}": value / 100 for number, value in ious.items()}
                figures |= {f"F {name} {int(number)}": value / 100 for number, value in outlines.items()}
            # as its function ``benchmark`` does: every object of every video weighs the same
            j, f = (np.array([v for _, *both in by_video for v in both[side].values()]).mean() / 100 for side in (0, 1))
            return {"J&F": (j + f) / 2, "J": j, "F": f, **figures}

        def ours() -> Figures:
            return video_figures(evaluate_masks(found, truth, convention="sav", progress=False), False)

        return attempt(theirs), attempt(ours)

    return score


def compare(score: Score, cases: int) -> dict[str, Any]:
    """The largest difference of each figure; per object they are taken together."""
    worst: dict[str, float] = {}
    refused: Counter[str] = Counter()
    agreed = objects = 0
    for seed in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = score(np.random.default_rng(seed), Path(folder))
        if isinstance(ours, Exception) and not isinstance(ours, UserError):
            raise ours
        if not isinstance(theirs, Exception) and np.isnan(theirs.get("J", 0.0)):
            theirs = RuntimeError("nan")
        if isinstance(theirs, Exception) or isinstance(ours, Exception):
            said = str(theirs) if type(theirs) is RuntimeError else type(theirs).__name__
            official = said if isinstance(theirs, Exception) else "scores"
            refused[f"official: {official}, here: {'UserError' if isinstance(ours, Exception) else 'scores'}"] += 1
            continue
        if theirs.keys() != ours.keys():
            raise SystemExit(f"case {seed}: different figures: {sorted(theirs.keys() ^ ours.keys())}")
        agreed += 1
        for name, value in theirs.items():
            difference = abs(value - ours[name])
            if not np.isfinite(difference):
                raise SystemExit(f"case {seed}: {name} is {value} and {ours[name]}")
            kind = f"{name[0]} of each object" if " " in name else name
            objects += kind == "J of each object"
            worst[kind] = max(worst.get(kind, 0.0), difference)
    return {"cases": agreed, "objects": objects, "refused": dict(refused), "largest difference": worst}


def main() -> None:
    parser = arguments(__doc__)
    for name in ("sam3", "davis", "sam2"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cases", type=int, default=300, help="of each kind (300)")
    args = parser.parse_args()
    sheet = Sheet("cpu")
    cgf1 = load(args.sam3 / "sam3" / "eval" / "cgf1_eval.py", "cgf1_eval")
    load(args.davis / "davis2017" / "__init__.py", "davis2017").__path__ = [str(args.davis / "davis2017")]
    davis2017 = importlib.import_module("davis2017.evaluation")
    davis2017.tqdm = lambda items: items
    sav_benchmark = load(args.sam2 / "sav_dataset" / "utils" / "sav_benchmark.py", "sav_benchmark")
    kinds = {
        "cgF1, masks": concepts(cgf1, "segm", "masks"), "cgF1, boxes": concepts(cgf1, "bbox", "boxes"),
        "DAVIS 2017": davis(davis2017), "SA-V, ids": sav(sav_benchmark, False),
        "SA-V, folders": sav(sav_benchmark, True),
    }  # fmt: skip
    found = {name: compare(score, args.cases) for name, score in kinds.items()}
    rows = [
        [name, str(each["cases"]), str(each["objects"] or "-"), str(len(each["largest difference"])),
         f"{max(each['largest difference'].values()):.1e}"] for name, each in found.items()
    ]  # fmt: skip
    sheet.table(
        "official code and ours on the same files", ["", "cases", "objects", "figures", "largest difference"], rows
    )
    sheet.table("not compared", ["", "cases"], [
        [f"{name}; {reason}", str(number)] for name, each in found.items() for reason, number in each["refused"].items()
    ])  # fmt: skip
    worst = max(value for each in found.values() for value in each["largest difference"].values())
    sheet.say()
    sheet.say(
        f"goal: {GOAL:g}; {'reached' if worst <= GOAL else 'MISSED'}. Not measured: other people's real predictions."
    )
    sheet.save(args.out, found)


if __name__ == "__main__":
    main()
