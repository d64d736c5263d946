"""Every model x file x target: does it convert, does it run, how far is it from eager, how large, how fast.

    python benchmarks/export.py --out benchmarks/results/export.txt
    python benchmarks/export.py --full --out benchmarks/results/export_full.txt     # encoders at 504 and 1008 px
    python benchmarks/export.py --models mobile --targets onnx,openvino             # a part

The models are the bundled ones: the tracker, MobileSAM, SAM, the detection student, the same with the words of the
sandbox as constants, and the same with a memory of random weights. ``--full`` measures the speed of image encoders at
full size with random weights.

Each model and target is a stage in its own process, and finished stages in ``--work`` are not repeated. A file is
compared with eager by the gate of ``samdistill export``. Its time and that of eager alternate, with the same threads;
the ratio is the median over the rounds, with the smallest and the largest. LiteRT needs an environment of its own:
``--litert-python`` is its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Sheet, arguments, note, open_work

MODELS = ("tracker", "mobile", "sam", "student", "baked", "memory")
TARGETS = ("onnx", "openvino", "executorch", "coreml", "litert")
STATIC = ("executorch", "coreml", "litert")
BACKBONES = ("repvit_m0_9", "repvit_m1_1", "efficientvit_b0", "efficientvit_b1", "tiny_vit_5m_224")
PHRASES = ("red circle", "blue square", "green star")
GOAL = 0.7
"""Largest ratio of exported to eager time at full size."""


def parts_of(model: str, static: bool) -> list[Any]:
    """Return the files of a bundled model."""
    from samdistill.checkpoints.promptable import load_promptable
    from samdistill.deployment import folder
    from samdistill.deployment.parts_detector import bake
    from samdistill.inference.concepts import load_concept_model

    if model in ("tracker", "mobile", "sam"):
        weights = files("samdistill") / "sandbox" / "weights" / model
        return folder.parts_of(load_promptable(str(weights), None), None, static)
    detector = load_concept_model("sandbox-student", None, "cpu")
    if model == "memory":
        detector = with_memory(detector)
        return [one for one in folder.parts_of(detector, None, static) if one.name in ("memory", "decoder_memory")]
    baked = bake(detector, PHRASES) if model == "baked" else None
    return folder.parts_of(detector, baked, static)


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


def ratios(file: Callable[[], Any], eager: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Return milliseconds of both, alternating, and the ratio of each round."""
    spent: dict[str, list[float]] = {"file": [], "eager": []}
    with torch.no_grad():
        file(), eager()
        for _ in range(rounds):
            for name, run in (("file", file), ("eager", eager)):
                start = time.perf_counter()
                run()
                spent[name].append(1000 * (time.perf_counter() - start))
    each = [ours / theirs for ours, theirs in zip(spent["file"], spent["eager"], strict=True)]
    return {
        **{f"{name}_ms": statistics.median(times) for name, times in spent.items()}, "ratio": statistics.median(each),
        "ratio_low": min(each), "ratio_high": max(each), "rounds": rounds,
    }  # fmt: skip


def measure(part: Any, name: str, rounds: int) -> dict[str, Any]:
    """Convert one part and compare it. The reason is returned if it cannot be converted."""
    from samdistill.deployment.gate import LIMITS, check
    from samdistill.deployment.targets import target
    from samdistill.types import UserError

    static, start = name in STATIC, time.monotonic()
    kind = target(name)
    row: dict[str, Any] = {"part": part.name, "target": name, "precision": "fp32", "static": static}
    with TemporaryDirectory() as place:
        path = Path(place) / f"{part.name}{kind.extension}"
        try:
            kind.convert(part, path, static)
        except UserError as error:
            return {**row, "reason": str(error)}
        row["seconds"] = time.monotonic() - start
        verdict, contents = check(part, path, kind, static, LIMITS["fp32"])
        row |= {
            "bytes": sum(one.stat().st_size for one in Path(place).iterdir()), "ran": verdict.ran,
            "difference": verdict.difference, "agreement": verdict.agreement, "comparisons": verdict.comparisons,
            "reason": "; ".join(verdict.problems), "inputs": contents.inputs, "operators": contents.operators,
        }  # fmt: skip
        if verdict.ran and verdict.passed:
            session, given = kind.open(path), part.example(part.cases[-1] if static else part.cases[0], 0)
            arrays = [one.numpy() for one in given]
            row |= ratios(partial(session, *arrays), partial(part.module, *given), rounds)
    return row


def full_size(name: str, size: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the image encoder of an encoder student, trunk and head, on one image with random weights."""
    from torch import nn

    from samdistill.deployment.parts import Part, pictures, ports
    from samdistill.deployment.targets import target
    from samdistill.students.trunk import StudentTrunkConfig, build_trunk

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = build_trunk(StudentTrunkConfig(backbone=name, image_size=size)).eval()

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.trunk.image_embedding(pixel_values),)

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    module, grid = Encoder().eval(), size // 14
    part = Part(
        "vision_encoder", module, ports(["pixel_values"], "batch", 3, size, size),
        ports(["image_embeddings"], "batch", 1024, grid, grid),
        lambda sizes, seed: (pictures(sizes["batch"], size, seed),), {"batch": 2}, ({"batch": 1},), module,
    )  # fmt: skip
    given = part.example({"batch": 1}, 0)
    rows = []
    for kind in ("onnx", "openvino"):
        with TemporaryDirectory() as place:
            path = Path(place) / f"encoder{target(kind).extension}"
            target(kind).convert(part, path, False)
            session, arrays = target(kind).open(path), [one.numpy() for one in given]
            with torch.no_grad():
                wanted = module(*given)[0].numpy()
            apart = float(abs(session(*arrays)[0] - wanted).max() / abs(wanted).max())
            spent = ratios(partial(session, *arrays), partial(module, *given), rounds)
            rows.append({"model": name, "size": size, "threads": threads, "target": kind, "difference": apart, **spent})
    return rows


def stage(work: Path, python: str, words: list[str], threads: int) -> list[dict[str, Any]]:
    """Run one stage in its own process, unless an earlier call finished it."""
    kept = work / "stages" / f"{'_'.join(words)}.json"
    if not kept.is_file():
        note(" ".join(words))
        result, environment = kept.with_suffix(".partial"), {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [python, __file__, "--stage", *words, "--result", str(result)]
        done = subprocess.run(command, env=environment, stdout=sys.stderr)
        if done.returncode:
            result.write_text(json.dumps([{"part": "all", "reason": f"the process ended with {done.returncode}"}]))
        result.rename(kept)
    return json.loads(kept.read_text())


def cell(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row: size, difference, agreement, ratio, and the reason of a failure."""
    if "bytes" not in row:
        return ["-", "-", "-", "-", row["reason"]]
    ran = [f"{row['difference']:.1e}", f"{row['agreement']:.4f}"] if row["ran"] else ["not run", "not run"]
    speed = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if "ratio" in row else "-"
    return [f"{row['bytes'] / 1e6:.2f}", *ran, speed, row["reason"] or "passed"]


def say(sheet: Sheet, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        title = f"{name}{', fixed axes' if name in STATIC else ''}: compared with eager"
        columns = ["model, file", "MB", "difference", "agreement", "time x eager (least to most)", "gate"]
        sheet.table(title, columns, [[f"{row['model']}, {row['part']}", *cell(row)] for row in own])


def say_full(sheet: Sheet, rows: list[dict[str, Any]]) -> None:
    cells = [
        [f"{row['model']}, {row['size']} px, {row['threads']} thread(s), {row['target']}", f"{row['difference']:.1e}",
         f"{row['eager_ms']:.0f}", f"{row['file_ms']:.0f}",
         f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
         "met" if row["ratio"] <= GOAL else "missed"] for row in rows
    ]  # fmt: skip
    columns = ["encoder (trunk and head to 1024 channels)", "difference", "eager ms", "file ms", "ratio", f"<= {GOAL}"]
    sheet.table("image encoders at full size, random weights, one image", columns, cells)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "export")
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--targets", default=",".join(TARGETS), help="which, separated by commas")
    parser.add_argument("--litert-python", help="Python of the environment that has litert-torch")
    parser.add_argument("--full", action="store_true", help="image encoders at full size instead")
    parser.add_argument("--sizes", default="504,1008", help="of --full, in pixels")
    parser.add_argument("--threads", default="1", help="separated by commas; several only with --full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_part(args: argparse.Namespace) -> None:
    kind, model, which, rounds = args.stage
    if kind == "full":
        size, threads = which.split("x")
        rows = full_size(model, int(size), int(threads), int(rounds))
    else:
        rows = [
            {"model": model, **measure(part, which, int(rounds))} for part in parts_of(model, which in STATIC)
        ]  # fmt: skip
    args.result.write_text(json.dumps(rows, default=str))


def main() -> None:
    args = parse()
    if args.stage:
        return run_part(args)
    args.work = args.work.resolve()
    open_work(args.work, "export", {"rounds": args.rounds})
    sheet, rounds, rows = Sheet("cpu"), str(args.rounds), []
    if args.full:
        for model in BACKBONES:
            for size in args.sizes.split(","):
                for threads in args.threads.split(","):
                    words = ["full", model, f"{size}x{threads}", rounds]
                    rows += stage(args.work, sys.executable, words, int(threads))
        say_full(sheet, rows)
    else:
        for model in args.models.split(","):
            for name in args.targets.split(","):
                python = args.litert_python if name == "litert" else sys.executable
                if python is None:
                    continue
                found = stage(args.work, python, ["files", model, name, rounds], int(args.threads))
                rows += [{"model": model, "target": name, **row} for row in found]
        say(sheet, rows)
    sheet.save(args.out, {"full": args.full, "rows": rows})


if __name__ == "__main__":
    main()
