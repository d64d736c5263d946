"""cgF1 and its factors of the bundled sandbox detector on scenes it was not trained on, by world and kind of prompt.

    python benchmarks/detector_teacher.py --out benchmarks/results/detector_teacher.txt

The prompts of a scene are two phrases that apply, two that do not (half of these are near misses), and the exact box of
one of its objects as an example of all objects of that colour and shape. The validation during the detector's training
used scenes of world 2. No code of the package has used scenes of the other worlds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Sheet, arguments, use_device

from samdistill.data.saco import ConceptPair, ConceptSet, to_rle, write_concepts
from samdistill.data.saco_predictions import PredictedInstance
from samdistill.evaluation.concept_files import mask_ap, score_predictions
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import ConceptModel, ask_image, load_concept_model
from samdistill.sandbox.concepts import GENERIC, VISUAL
from samdistill.sandbox.scenes import COLOURS, SHAPES
from samdistill.sandbox.write import write_coco, write_concept_set

TARGET = 0.6
SIZE = 168
KINDS = ("shape", "colour", "colour and shape", "object", "exemplar box")
MODEL = "detector"
Found = dict[int, list[PredictedInstance]]


def kind_of(phrase: str) -> str:
    """Which of ``KINDS`` a phrase is."""
    if phrase in SHAPES:
        return "shape"
    if phrase in COLOURS:
        return "colour"
    return {GENERIC: "object", VISUAL: "exemplar box"}.get(phrase, "colour and shape")


def figures(truth: ConceptSet, found: Mapping[int, Sequence[PredictedInstance]]) -> dict[str, float | None]:
    """Counts and measures; None for what needs absent concepts where none is asked for."""
    summary = score_predictions(truth, found).summary()
    graded = summary["negatives"] > 0 and summary["positives"] > 0
    both = {name: summary[name] if graded else None for name in ("cgf1", "il_mcc")}
    shares = {name: summary[name] for name in ("positives", "negatives", "pmf1", "precision_50", "recall_50")}
    return {**both, **shares, "ap": mask_ap(truth, found).get("ap")}


def exemplars(root: Path, split: str) -> ConceptSet:
    """One question per scene with an object; its id is that of the annotation whose box is shown."""
    record = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    images = {image["id"]: image for image in record["images"]}
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in record["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    pairs = []
    for image_id, own in objects.items():
        chosen, image = random.Random(image_id).choice(own), images[image_id]
        alike = tuple(a["segmentation"] for a in own if a["category_id"] == chosen["category_id"])
        name = f"{split}/{image['file_name']}"
        pairs.append(ConceptPair(chosen["id"], name, VISUAL, image["height"], image["width"], alike))
    write_concepts(root / f"boxes_{split}.json", pairs)
    return ConceptSet.load(root / f"boxes_{split}.json")


def answer_boxes(model: ConceptModel, truth: ConceptSet, root: Path, split: str) -> Found:
    """What the model finds for the boxes of ``exemplars``."""
    record = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    boxes = {annotation["id"]: annotation["bbox"] for annotation in record["annotations"]}
    found = Found()
    for pair in truth.pairs:
        left, top, width, height = boxes[pair.id]
        box = (left, top, left + width, top + height)
        seen = ask_image(model, truth.path(pair), boxes=[box], threshold=0.0)
        masks = (to_rle(mask.cpu().numpy()) for mask in seen.masks)
        found[pair.id] = [PredictedInstance(s, rle) for s, rle in zip(seen.scores.tolist(), masks, strict=True)]
    return found


def joined(sets: Sequence[ConceptSet]) -> ConceptSet:
    """For scoring alone: the ids of different worlds never meet."""
    pairs = tuple(pair for each in sets for pair in each.pairs)
    return replace(sets[0], pairs=pairs, ids=frozenset(pair.id for pair in pairs))


def measure(model: ConceptModel, root: Path, world: int, scenes: int) -> tuple[ConceptSet, Found, ConceptSet, Found]:
    """Phrases and boxes of one world: questions and answers of each."""
    split = f"world{world}"
    write_coco(root, scenes, SIZE, seed=world, split=split)
    words = ConceptSet.load(write_concept_set(root, scenes, SIZE, seed=world, split=split))
    found = evaluate_concepts({MODEL: model}, words, batch_size=8, pictures=0, repeats=0).predictions[MODEL]
    shown = exemplars(root, split)
    return words, found, shown, answer_boxes(model, shown, root, split)


def cells(name: str, row: Mapping[str, float | None]) -> list[str]:
    shares = ("cgf1", "pmf1", "il_mcc", "ap", "precision_50", "recall_50")
    asked = f"{row['positives']:.0f} + {row['negatives']:.0f}"
    return [name, asked, *("-" if row[key] is None else f"{row[key]:.4f}" for key in shares)]


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "detector_teacher")
    parser.add_argument("--teacher", default="sandbox", help="a detector's folder (the bundled one)")
    parser.add_argument("--scenes", type=int, default=256, help="held-out scenes of each world (256)")
    parser.add_argument("--worlds", default="2,3,4", help="seeds of the worlds, separated by commas (2,3,4)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    model = load_concept_model(args.teacher, device=device)
    worlds = [int(text) for text in args.worlds.split(",")]
    start, root = time.monotonic(), args.work / f"scenes-{args.scenes}"
    measured = []
    for world in worlds:
        print(f"world {world}", file=sys.stderr, flush=True)
        measured.append(measure(model, root, world, args.scenes))
    by_world = {str(world): figures(words, found) for world, (words, found, _, _) in zip(worlds, measured, strict=True)}
    words, boxes = joined([m[0] for m in measured]), joined([m[2] for m in measured])
    # apart: a question in words may have the number of an annotation, which is that of its box
    said, pointed = ({pair: seen for m in measured for pair, seen in m[part].items()} for part in (1, 3))
    whole = figures(words, said)
    by_kind = {}
    for kind in KINDS:
        questions, found = (boxes, pointed) if kind == "exemplar box" else (words, said)
        pairs = tuple(pair for pair in questions.pairs if kind_of(pair.text) == kind)
        if pairs:
            by_kind[kind] = figures(replace(questions, pairs=pairs), {pair.id: found[pair.id] for pair in pairs})
    columns = ["", "present + absent", "cgF1", "pmF1", "IL_MCC", "mask AP", "precision 0.5", "recall 0.5"]
    parameters = sum(p.numel() for p in model.model.parameters())
    sheet.table(
        f"{args.teacher}: {parameters / 1e6:.2f}M parameters, {args.scenes} scenes of {SIZE} px of each world, "
        f"questions in words; {time.monotonic() - start:.0f} s",
        columns,
        [*(cells(f"world {world}", row) for world, row in by_world.items()), cells("all", whole)],
    )
    sheet.table("by kind of question, all worlds", columns, [cells(kind, row) for kind, row in by_kind.items()])
    sheet.say("a dash: nothing absent is asked for in that way, so there is no image-level figure")
    sheet.say()
    met = (whole["cgf1"] or 0.0) >= TARGET
    sheet.say(f"target: cgF1 of at least {TARGET:g} on all worlds: {'met' if met else 'MISSED'} ({whole['cgf1']:.4f})")
    sheet.say(
        "Not measured: phrases and boxes together, several boxes, boxes drawn by hand, scenes of other styles. One "
        "training of the detector, so no spread over its seeds."
    )
    sheet.save(
        args.out,
        {
            "teacher": args.teacher, "parameters": parameters, "scenes": args.scenes, "worlds": worlds, "all": whole,
            "by_world": by_world, "by_kind": by_kind, "target": {"cgf1": TARGET, "met": met},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
