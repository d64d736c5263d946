"""Does training with the roundings of int8 (``train.qat``) help the int8 export of the detection student?

    python benchmarks/qat.py --out benchmarks/results/qat.txt

The bundled detection student is trained on from its weights with the sandbox's recipe, once with and once without
``train.qat``: the same scenes, steps and seed, all terms, fixed batch norm statistics. Each, and the student as it was,
is exported to int8 with the words of the held-out questions as constants, calibrated on training images. The file is
compared with its model on held-out scenes: cgF1 of both, and the IoU of what they find. Finished stages are not
repeated.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from common import Sheet, arguments, note, setting, train_once, use_device

import samdistill
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.deployment.opened import open_detector
from samdistill.deployment.quality import union_iou
from samdistill.engine import read_lines
from samdistill.evaluation.concepts import evaluate_concepts
from samdistill.inference.concepts import load_concept_model

RECIPE = "detection/sandbox"
VARIANTS = {"trained on": "null", "trained on with train.qat": "true"}
START = "bundled student"


def settings(args: argparse.Namespace, run: Path, start: Path, qat: str) -> list[str]:
    """Settings of one run."""
    phase = {"name": "on", "epochs": args.epochs, "lr": args.lr, "warmup_steps": 10}
    return [
        setting("output", run), setting("data.root", args.work / "scenes"), setting("student.start", start),
        "student.inherit=false", f"train.phases={json.dumps([phase])}", f"train.qat={qat}", "train.batch_norm=frozen",
        f"train.seed={args.seed}", f"data.seed={args.seed}", "data.workers=0", f"train.batch_size={args.batch}",
    ]  # fmt: skip


def questions(scenes: Path) -> ConceptSet:
    listing = find_concepts(scenes)
    assert listing is not None
    return ConceptSet.load(listing)


def phrases(scenes: Path, student: Path) -> list[str]:
    """Return the phrases of the held-out questions that the student can read."""
    words = load_concept_model(student).words
    asked = dict.fromkeys(pair.text for pair in questions(scenes).pairs)
    return [text for text in asked if words.fits(text) and not words.unknown(text)]


def exported(args: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    """Export a student and compare its int8 file with it on all held-out questions."""
    kept, place, scenes = args.work / f"{name}.json", args.work / f"{name}-exported", args.work / "scenes"
    if not kept.is_file():
        note(f"exporting {name}")
        samdistill.export(
            model, place, precision=("fp32", "int8"), calibrate=scenes / "images" / "train", keep_failed=True,
            vocabulary=phrases(scenes, model), progress=False,
        )  # fmt: skip
        detectors = {"model": load_concept_model(model), "file": open_detector(place, "int8")[0]}
        found = evaluate_concepts(detectors, questions(scenes), pictures=0, repeats=0)
        sizes = {row["precision"]: row["bytes"] for row in json.loads((place / "export.json").read_text())["files"]}
        row = {
            "cgf1": {row.name: row.cgf1 for row in found.rows}, "questions": found.questions,
            "positives": found.positives, "images": found.images, "size": sizes["int8"] / sizes["fp32"],
            "agreement": union_iou(found.predictions["model"], found.predictions["file"]),
        }  # fmt: skip
        kept.write_text(json.dumps(row))
    return json.loads(kept.read_text())


def say(sheet: Sheet, found: dict[str, dict[str, Any]]) -> None:
    rows = [
        [name, f"{one['cgf1']['model']:.3f}", f"{one['cgf1']['file']:.3f}",
         f"{one['cgf1']['model'] - one['cgf1']['file']:+.3f}", f"{one['agreement']:.3f}", f"{one['size']:.3f}"]
        for name, one in found.items()
    ]  # fmt: skip
    one = next(iter(found.values()))
    title = (
        f"int8 export of the detection student: {one['questions']} questions, {one['images']} held-out scenes, "
        f"{one['positives']} of them for something that is there"
    )
    sheet.table(title, ["", "cgF1", "cgF1 int8", "lost", "IoU with its model", "size of fp32"], rows)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "qat")
    parser.add_argument("--scenes", type=int, default=800, help="to train on (800)")
    parser.add_argument("--held-out", type=int, default=128, help="scenes (128)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    sheet = Sheet(use_device(args.device))
    args.work = args.work.resolve()
    scenes = args.work / "scenes"
    if not (scenes / "concepts_val.json").is_file():  # written last
        samdistill.render_sandbox(scenes, train=args.scenes, val=args.held_out, format="coco", progress=False)
    start = Path(str(files("samdistill") / "sandbox" / "weights" / "student"))
    runs, found = {name: args.work / f"qat-{qat}-seed{args.seed}" for name, qat in VARIANTS.items()}, {}
    for name, run in runs.items():
        train_once(RECIPE, settings(args, run, start, VARIANTS[name]), args.work / f"{run.name}.txt", 1)
    for name, model in {START: start, **runs}.items():
        found[name] = exported(args, model, model.name)
    last = {
        name: [line for line in read_lines(run / "metrics.jsonl") if "seconds" in line][-1]
        for name, run in runs.items()
    }  # fmt: skip
    sheet.say()
    for name, line in last.items():
        sheet.say(
            f"{name}: {line['step']} steps of {args.batch} images, {line['seconds'] / 60:.1f} minutes in them by the "
            "wall clock on one core that was shared"
        )
    say(sheet, found)
    sheet.say()
    sheet.say("Not measured: further seeds, longer runs, photographs, other students.")
    figures = {"rows": found, "steps": {name: line["step"] for name, line in last.items()}, "seed": args.seed}
    sheet.save(args.out, figures)


if __name__ == "__main__":
    main()
