"""Every model x file x target x precision: does it convert, does it run, how far is it from eager, how large, how fast.

    python benchmarks/export.py --out benchmarks/results/export.txt
    python benchmarks/export.py --models mobile --targets onnx,openvino             # a part

The models are the bundled ones: the tracker, MobileSAM, SAM, the detection student, the same with three phrases as
constants (``baked``), and the same with a memory of random weights. Images for int8 are sandbox scenes: one half gives
the ranges, the other half is used for all comparisons. mIoU and cgF1 of the ONNX files and of the model are measured on
held-out scenes of another world.

Each model and target is a stage in its own process, and finished stages in ``--work`` are not repeated. A file is
compared with eager by the gate of ``samdistill export``, which also times it: file and eager alternate, with the same
threads; the ratio is the median over the rounds, with the smallest and the largest. LiteRT needs an environment of its
own: ``--litert-python`` is its interpreter. Full size is in ``export_full.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Sheet, arguments, note, open_work

MODELS = ("tracker", "mobile", "sam", "student", "baked", "memory")
TARGETS = ("onnx", "openvino", "executorch", "coreml", "litert")
STATIC = ("executorch", "coreml", "litert")
PHRASES = ("red circle", "blue square", "green star")
SEED = 700
"""World of the scenes for int8; the held-out scenes are of the next but one."""
SCENES = 128
"""Scenes for int8, and held-out scenes."""


def place_of(model: str) -> str:
    """Return what ``samdistill export`` is given for a model."""
    if model in ("tracker", "mobile", "sam"):
        return str(files("samdistill") / "sandbox" / "weights" / model)
    return "sandbox-student"


def network_of(model: str) -> Any:
    """Load a bundled model."""
    from samdistill.checkpoints.promptable import load_promptable
    from samdistill.inference.concepts import load_concept_model

    if model in ("tracker", "mobile", "sam"):
        return load_promptable(place_of(model), None)
    detector = load_concept_model(place_of(model), None, "cpu")
    return with_memory(detector) if model == "memory" else detector


def with_memory(detector: Any) -> Any:
    """Return the detection student with a memory of random weights."""
    from samdistill.inference.concepts import StudentDetector
    from samdistill.students.memory import warm_start
    from samdistill.students.sam3 import EfficientSam3Model

    config = detector.model.config
    config.memory_latents, config.memory_windows, config.memory_context = 8, 2, 4
    torch.manual_seed(0)
    model = EfficientSam3Model(config).eval()
    model.load_state_dict(detector.model.state_dict(), strict=False)
    warm_start(model.memory_resampler, model.memory_attention)
    return StudentDetector(model, detector.words)


def convert(model: str, name: str, scenes: Path) -> list[dict[str, Any]]:
    """Return a row for each file and precision of a model in one format."""
    from samdistill.deployment.folder import parts_of
    from samdistill.deployment.part_files import Order, write_part
    from samdistill.deployment.parts_detector import bake
    from samdistill.deployment.quality import calibration
    from samdistill.deployment.targets import target
    from samdistill.types import UserError

    network, kind, static = network_of(model), target(name), name in STATIC
    images = calibration(network, scenes)
    parts = parts_of(network, bake(network, PHRASES) if model == "baked" else None, static)
    if model == "memory":
        parts = [part for part in parts if part.name in ("memory", "decoder_memory")]
    rows: list[dict[str, Any]] = []
    for part in parts:
        left = list(kind.precisions)
        while left:  # a precision that cannot be made is a row with the reason
            with TemporaryDirectory() as place:
                order = Order({name: kind}, tuple(left), static, True, images)
                start = time.monotonic()
                try:
                    for file in write_part(part, name, order, Path(place)):
                        rows.append(row_of(file.to_dict()) | {"seconds": time.monotonic() - start})
                        left.remove(file.precision)
                        start = time.monotonic()
                except UserError as error:
                    rows.append({"part": part.name, "precision": left.pop(0), "reason": str(error)})
    return [{"model": model, "target": name, **row} for row in rows]


def export_all(model: str, scenes: Path, held_out: Path) -> list[dict[str, Any]]:
    """Export a model to ONNX in every precision. Returns the rows of its files, and one of their quality."""
    from samdistill import export
    from samdistill.deployment.targets import target

    with TemporaryDirectory() as place:
        done = export(
            place_of(model), Path(place) / "exported", precision=target("onnx").precisions, calibrate=scenes,
            vocabulary=PHRASES if model == "baked" else (), keep_failed=True, progress=False,
        )  # fmt: skip
        record = json.loads((done.folder / "export.json").read_text())
        rows = [row_of(row) for row in record["files"]]
        found = quality(model, done.folder, held_out)
    return [{"model": model, "target": "onnx", **row} for row in [*rows, {"quality": found}]]


def quality(model: str, folder: Path, held_out: Path) -> dict[str, dict[str, float]]:
    """Return mIoU by prompt kind, or cgF1, of the model and of its exported files by precision."""
    from samdistill.data.layouts import held_out_images
    from samdistill.data.saco import ConceptSet, find_concepts
    from samdistill.data.transforms import Geometry
    from samdistill.deployment.opened import open_detector, open_promptable
    from samdistill.evaluation.concepts import evaluate_concepts
    from samdistill.evaluation.runner import evaluate_models
    from samdistill.inference.geometry import own_geometry
    from samdistill.ops.promptable import Promptable, image_size
    from samdistill.types import UserError

    network = network_of(model)
    opener = open_promptable if isinstance(network, Promptable) else open_detector
    models: dict[str, Any] = {"eager": network}
    for precision in ("fp32", "fp16", "int8"):
        try:
            models[precision] = opener(folder, precision)[0]
        except UserError as error:
            note(str(error))
    if isinstance(network, Promptable):
        source = held_out_images(held_out)
        assert source is not None
        place = Geometry(image_size(network), own_geometry(network))
        found = evaluate_models(models, source, place, teacher="eager", pictures=0, repeats=0)
        return {name: {f"mIoU {kind}": value for kind, value in found.row(name).miou.items()} for name in models}
    concepts = ConceptSet.load(find_concepts(held_out))
    rows = evaluate_concepts(models, concepts, pictures=0, repeats=0).rows
    return {row.name: {"cgF1": row.cgf1} for row in rows}


def row_of(file: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of a file, from its entry in ``export.json``."""
    gate = file["gate"]
    kept = {name: file[name] for name in ("part", "precision", "bytes", "opset", "operators")}
    told = {name: gate[name] for name in ("ran", "difference", "agreement", "comparisons", "milliseconds")}
    return kept | told | {"reason": "; ".join(gate["problems"])}


def stage(work: Path, python: str, words: list[str], threads: int) -> list[dict[str, Any]]:
    """Run one stage in its own process, unless an earlier call finished it."""
    kept = work / "stages" / f"{'_'.join(words)}.json"
    if not kept.is_file():
        note(" ".join(words))
        result, environment = kept.with_suffix(".partial"), {**os.environ, "OMP_NUM_THREADS": str(threads)}
        options = ["--work", str(work), "--threads", str(threads), "--result", str(result)]
        done = subprocess.run([python, __file__, "--stage", *words, *options], env=environment, stdout=sys.stderr)
        if done.returncode:
            row = dict(zip(("model", "target"), words, strict=True)) | {"part": "all", "precision": "-"}
            result.write_text(json.dumps([row | {"reason": f"the process ended with {done.returncode}"}]))
        result.rename(kept)
    return json.loads(kept.read_text())


def cell(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row: size, difference, agreement, ratio, and the reason of a failure."""
    if "bytes" not in row:
        return ["-", "-", "-", "-", row["reason"]]
    ran = [f"{row['difference']:.1e}", f"{row['agreement']:.4f}"] if row["ran"] else ["not run", "not run"]
    spent = row["milliseconds"]
    speed = f"{spent['ratio']:.2f} ({spent['least']:.2f} to {spent['greatest']:.2f})" if spent else "-"
    return [f"{row['bytes'] / 1e6:.2f}", *ran, speed, row["reason"] or "passed"]


def say(sheet: Sheet, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name and "quality" not in row]
        title = f"{name}{', fixed axes' if name in STATIC else ''}: compared with eager"
        columns = ["model, file, precision", "MB", "difference", "agreement", "time x eager (least to most)", "gate"]
        cells = [[f"{row['model']}, {row['part']}, {row.get('precision', '')}", *cell(row)] for row in own]
        sheet.table(title, columns, cells)
    precisions = ("eager", "fp32", "fp16", "int8")
    cells = [
        [f"{row['model']}, {metric}", *(f"{row['quality'][p][metric]:.4f}" if p in row["quality"] else "-"
                                        for p in precisions)]
        for row in rows if "quality" in row for metric in row["quality"]["eager"]
    ]  # fmt: skip
    sheet.table(f"quality of the ONNX files on {SCENES} held-out scenes", ["model, metric", *precisions], cells)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "export")
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--targets", default=",".join(TARGETS), help="which, separated by commas")
    parser.add_argument("--litert-python", help="Python of the environment that has litert-torch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    (model, name), (scenes, held_out) = args.stage, scenes_of(args.work)
    whole = name == "onnx" and model != "memory"
    rows = export_all(model, scenes, held_out) if whole else convert(model, name, scenes)
    args.result.write_text(json.dumps(rows, default=str))


def scenes_of(work: Path) -> tuple[Path, Path]:
    """Render the scenes for int8 and the held-out scenes, unless they are there."""
    from samdistill.sandbox.render import render_sandbox

    for place, seed in (found := {work / "scenes": SEED, work / "held_out": SEED + 2}).items():
        if not (place / "concepts_val.json").is_file():
            render_sandbox(place, train=1, val=SCENES, seed=seed, format="coco", progress=False)
    scenes, held_out = found
    return scenes, held_out


def main() -> None:
    args = parse()
    args.work = args.work.resolve()
    if args.stage:
        return run_stage(args)
    open_work(args.work, "export", {"threads": args.threads})
    scenes_of(args.work)
    sheet, rows = Sheet("cpu"), []
    for name in args.targets.split(","):
        python = args.litert_python if name == "litert" else sys.executable
        for model in args.models.split(",") if python else ():
            rows += stage(args.work, python, [model, name], args.threads)
    say(sheet, rows)
    sheet.save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
