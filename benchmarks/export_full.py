"""Time of exported image encoders and of the full detector at full size, beside eager and beside other exports.

    python benchmarks/export_full.py --peers DIR --out benchmarks/results/export_full.txt
    python benchmarks/export_full.py --cases repvit_m0_9 --sizes 504      # a part, without other exports

All weights are random. Encoders are trunk and published head of encoder students, on one image, and one with the
default head (``+fused``); ``detector`` is the 35M detection student with three phrases as constants, on one image and
one phrase. ``--peers`` is a folder with clones of the
repositories in ``PEERS``: their image encoders with the same backbone, exported as their scripts do it (or, where they
have none, by ``torch.onnx.export`` with its tracer), and run in the same rounds. Eager, our files and theirs alternate
with the same threads; a ratio is the median over the rounds, with the smallest and the largest. Each case and size is a
process of its own, and finished cases in ``--work`` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from common import Sheet, arguments, note, open_work
from torch import Tensor, nn

BACKBONES = ("repvit_m0_9", "repvit_m1_1", "efficientvit_b0", "efficientvit_b1", "tiny_vit_5m_224")
FUSED = "repvit_m0_9+fused"
CASES = (*BACKBONES, FUSED, "detector", "mobile_sam", "edge_sam")
TARGETS = ("onnx", "openvino")
PHRASES = ("red circle", "blue square", "green star")
PEERS = {
    "efficientsam3": "github.com/SimonZeng7108/efficientsam3",
    "samexporter": "github.com/vietanhdev/samexporter",
    "EdgeSAM": "github.com/chongzhou96/EdgeSAM",
}
SAM_SIDE = 1024
SIZED = 504
"""Side at which the detector is also written in fp16 and int8."""
MOST_MB = {"onnx": 145, "fp16": 75, "int8": 40}
"""Largest sizes of the detector's file."""
GOAL = 0.7
"""Largest ratio of exported to eager time."""

Run = Callable[[], Any]


class Encoder(nn.Module):
    """Trunk and head of an encoder student, the published head or the one that its name ends with."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        from samdistill.students.trunk import StudentTrunkConfig, build_trunk

        backbone, _, head = name.partition("+")
        self.trunk = build_trunk(StudentTrunkConfig(backbone=backbone, image_size=size, head=head or "published"))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.trunk.image_embedding(pixel_values),)


def part_of(case: str, size: int) -> Any:
    """Return our part of a case, as ``samdistill export`` makes it."""
    from samdistill.deployment.folder import parts_of
    from samdistill.deployment.parts import Part, pictures, ports
    from samdistill.deployment.parts_detector import bake
    from samdistill.inference.concepts import StudentDetector
    from samdistill.students.promptable import MobileSamConfig, MobileSamModel
    from samdistill.students.sam3 import build_detector
    from samdistill.students.sam3_config import efficient_sam3_config

    if case == "mobile_sam":
        return parts_of(MobileSamModel(MobileSamConfig()).eval())[0]
    if case == "detector":
        words = sandbox_words()
        text = {"vocab_size": len(words.tokenizer), "max_position_embeddings": words.context}
        detector = StudentDetector(build_detector(efficient_sam3_config(image_size=size, text=text)).eval(), words)
        return parts_of(detector, bake(detector, PHRASES))[0]
    module, grid = Encoder(case, size).eval(), size // 14
    return Part(
        "vision_encoder", module, ports(["pixel_values"], "batch", 3, size, size),
        ports(["image_embeddings"], "batch", 1024, grid, grid),
        lambda sizes, seed: (pictures(sizes["batch"], size, seed),), {"batch": 2}, ({"batch": 1},), module,
    )  # fmt: skip


def sandbox_words() -> Any:
    from samdistill.sandbox.concepts import sandbox_words as words

    return words()


def stub(name: str, path: Path) -> None:
    """Make a package importable without running its ``__init__``, which needs libraries that are not needed here."""
    package = ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package


def peer_of(case: str, size: int, peers: Path) -> tuple[str, nn.Module, dict[str, Any]] | None:
    """Return the name of another project's image encoder, the encoder, and the options of its export."""
    if case in BACKBONES:
        root = peers / "efficientsam3" / "sam3" / "sam3"
        stub("sam3", root)
        stub("sam3.backbones", root / "backbones")
        return "efficientsam3", their_student(case, size), {"opset_version": 18}
    if case == "mobile_sam":
        root = peers / "samexporter" / "samexporter"
        stub("samexporter", root)
        stub("samexporter.mobile_encoder", root / "mobile_encoder")
        encoder = import_module("samexporter.mobile_encoder.tiny_vit_sam").TinyViT(
            img_size=SAM_SIDE, in_chans=3, num_classes=1000, embed_dims=[64, 128, 160, 320], depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10], window_sizes=[7, 7, 14, 7], mlp_ratio=4.0,
        )  # fmt: skip
        return "samexporter", encoder, {"opset_version": 18}
    if case == "edge_sam":
        root = peers / "EdgeSAM" / "edge_sam"
        stub("edge_sam", root)
        stub("edge_sam.modeling", root / "modeling")
        encoder = import_module("edge_sam.modeling.rep_vit").RepViT(
            "m1", img_size=SAM_SIDE, fuse=True, upsample_mode="bilinear"
        )
        return "EdgeSAM", encoder, {"opset_version": 11}
    return None


def their_student(backbone: str, size: int) -> nn.Module:
    """Return EfficientSAM3's image student: its own trunk, a head of two convolutions and a resize to SAM 3's grid."""
    builders = {
        "repvit_m0_9": ("repvit", "repvit_m0_9"), "repvit_m1_1": ("repvit", "repvit_m1_1"),
        "efficientvit_b0": ("efficientvit", "efficientvit_backbone_b0"),
        "efficientvit_b1": ("efficientvit", "efficientvit_backbone_b1"),
        "tiny_vit_5m_224": ("tiny_vit", "tiny_vit_5m_224"),
    }  # fmt: skip
    module, name = builders[backbone]
    build = getattr(import_module(f"sam3.backbones.{module}"), name)
    if module == "efficientvit":
        return TheirEncoder(build(), lambda trunk, pixels: trunk(pixels)["stage_final"], size)
    if module == "tiny_vit":
        return TheirEncoder(build(img_size=size), tokens_as_map, size)
    trunk = build(num_classes=0, distillation=False)
    return TheirEncoder(trunk, lambda trunk, pixels: nn.Sequential(*trunk.features)(pixels), size)


def tokens_as_map(trunk: Any, pixels: Tensor) -> Tensor:
    """Return the last tokens of a TinyViT as a map."""
    found = nn.Sequential(trunk.patch_embed, *trunk.layers)(pixels)
    side = int(found.shape[1] ** 0.5)
    return found.transpose(1, 2).reshape(found.shape[0], found.shape[2], side, side)


class TheirEncoder(nn.Module):
    """EfficientSAM3's image student, whose file imports the whole of SAM 3. Only head and map are written again."""

    def __init__(self, trunk: nn.Module, last_map: Callable[[Any, Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.trunk, self.last_map, self.grid = trunk.eval(), last_map, size // 14
        width = last_map(trunk, torch.zeros(1, 3, size, size)).shape[1]
        self.head = nn.Sequential(
            nn.Conv2d(width, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.GELU(), nn.Conv2d(1024, 1024, 3, padding=1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.head(self.last_map(self.trunk, pixels))
        return nn.functional.interpolate(found, (self.grid, self.grid), mode="bilinear", align_corners=False)


def measure(case: str, size: int, threads: list[int], rounds: int, peers: Path | None) -> list[dict[str, Any]]:
    """Convert and compare all files of a case, and time them with each number of threads. Returns a row for each."""
    from samdistill.deployment.targets import target

    torch.manual_seed(0)
    row: dict[str, Any] = {"case": case, "size": size, "difference": {}, "bytes": {}}
    paths: dict[str, Path] = {}
    eager: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    with TemporaryDirectory() as folder, torch.no_grad():
        if case != "edge_sam":
            part = part_of(case, size)
            eager["eager"] = part.module, part.example({"batch": 1, "prompts": 1}, 0)
            for name in TARGETS:
                paths[name] = Path(folder) / f"ours{target(name).extension}"
                target(name).convert(part, paths[name], False)
                row["bytes"][name] = sum(one.stat().st_size for one in _files(paths[name]))
            if case == "detector" and size == SIZED:
                row["bytes"] |= reduced_bytes(part, paths["onnx"], size)
        if peers is not None and (found := peer_of(case, size, peers)) is not None:
            add_peer(*found, size, Path(folder), paths, eager, row)
        return [row | time_all(paths, eager, number, rounds) for number in threads]


def _files(path: Path) -> list[Path]:
    """Return a file and the weights beside it."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def time_all(
    paths: dict[str, Path], eager: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], threads: int, rounds: int
) -> dict[str, Any]:
    """Open all files with a number of threads, compare them, and return differences and milliseconds."""
    from samdistill.deployment.targets import target

    torch.set_num_threads(threads)
    runs, apart = dict[str, Run](), dict[str, float]()
    for name, (module, given) in eager.items():
        runs[name] = partial(module, *given)
    for name, path in paths.items():
        module, given = eager["eager" if name in TARGETS else f"{name} eager"]
        session, arrays = target("openvino" if name == "openvino" else "onnx").open(path), [x.numpy() for x in given]
        wanted = module(*given)
        apart[name] = difference(session(*arrays), wanted if isinstance(wanted, tuple) else (wanted,))
        runs[name] = partial(session, *arrays)
    return {"threads": threads, "difference": apart, "ms": alternate(runs, rounds)}


def reduced_bytes(part: Any, source: Path, size: int) -> dict[str, int]:
    """Return the sizes of an ONNX file in fp16 and int8. The ranges are of four random images."""
    from samdistill.deployment.parts import pictures
    from samdistill.deployment.targets import target

    found = {}
    for precision in ("fp16", "int8"):
        path = source.with_name(f"reduced_{precision}.onnx")
        target("onnx").reduce(part, source, path, precision, pictures(4, size, 0))
        found[precision] = path.stat().st_size
    return found


def add_peer(
    name: str, encoder: nn.Module, options: dict[str, Any], size: int, folder: Path, paths: dict[str, Path],
    eager: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], row: dict[str, Any],
) -> None:  # fmt: skip
    """Export another project's encoder, or keep the reason why that fails."""
    pixels, path = torch.randn(1, 3, size, size), folder / "theirs.onnx"
    encoder.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(encoder, (pixels,), path, dynamo=False, **options)
    except Exception as error:  # of any library
        row["peer"] = {"name": name, "reason": str(error).strip().splitlines()[-1][:200]}
        return
    row["peer"] = {"name": name}
    row["bytes"][name] = path.stat().st_size
    paths[name], eager[f"{name} eager"] = path, (encoder, (pixels,))


def difference(found: list[np.ndarray], wanted: tuple[Tensor, ...]) -> float:
    """Return the largest difference of any output, relative to the output's largest value."""
    pairs = [(one, true.numpy()) for one, true in zip(found, wanted, strict=True)]
    return max(float(np.abs(one - true).max() / max(np.abs(true).max(), 1e-12)) for one, true in pairs)


def alternate(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each run in each round, after one round that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                spent[name].append(1000 * (time.perf_counter() - start))
    return spent


def ratio(row: dict[str, Any], over: str, under: str) -> tuple[float, str]:
    """Return the median over the rounds of ``over`` / ``under``, alone and with the range."""
    each = [a / b for a, b in zip(row["ms"][over], row["ms"][under], strict=True)]
    middle = statistics.median(each)
    return middle, f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"


def say(sheet: Sheet, rows: list[dict[str, Any]]) -> None:
    cells, others, failed = [], [], []
    for row in rows:
        told = f"{row['case']}, {row['size']} px, {row['threads']} thread(s)"
        for name in (name for name in TARGETS if name in row["ms"]):
            middle, text = ratio(row, name, "eager")
            cells.append([
                f"{told}, {name}", f"{row['bytes'][name] / 1e6:.1f}",
                f"{row['difference'][name]:.1e}", f"{statistics.median(row['ms']['eager']):.0f}",
                f"{statistics.median(row['ms'][name]):.0f}", text, "met" if middle <= GOAL else "missed",
            ])  # fmt: skip
        peer = row.get("peer")
        if peer and "reason" in peer:
            failed.append(f"{told}: {peer['name']} cannot be exported: {peer['reason']}")
        elif peer:
            name = peer["name"]
            ours = ratio(row, "onnx", name)[1] if "onnx" in row["ms"] else "-"
            others.append([
                f"{told}, {name}", f"{row['bytes'][name] / 1e6:.1f}",
                f"{row['difference'][name]:.1e}", f"{statistics.median(row['ms'][name]):.0f}",
                ratio(row, name, f"{name} eager")[1], ours,
            ])  # fmt: skip
    columns = ["case", "MB", "difference", "eager ms", "file ms", "file / eager", f"<= {GOAL}"]
    sheet.table("our files, random weights, one image", columns, cells)
    columns = ["case, project", "MB", "difference", "their file ms", "their file / their eager",
               "our ONNX / their ONNX"]  # fmt: skip
    sheet.table("image encoders of other projects, their export, onnxruntime", columns, others)
    sized = [row["bytes"] for row in rows if "int8" in row["bytes"]][:1]
    cells = [
        [name, f"{one[name] / 1e6:.1f}", str(most), "met" if one[name] <= most * 1e6 else "missed"]
        for one in sized for name, most in MOST_MB.items()
    ]  # fmt: skip
    if cells:
        sheet.table(f"size of the detector at {SIZED} px (onnx: fp32)", ["file", "MB", "at most", "goal"], cells)
    for line in failed:
        sheet.say(line)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "export_full")
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--sizes", default="504,1008", help="in pixels; those of the SAMs is 1024")
    parser.add_argument("--threads", default="1,2", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=Path, help="a folder with clones of the other projects")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def stages(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return case and size of each process."""
    cases = [case for case in args.cases.split(",") if case != "edge_sam" or args.peers]
    return [
        (case, size) for case in cases
        for size in ([str(SAM_SIDE)] if case.endswith("_sam") else args.sizes.split(","))
    ]  # fmt: skip


def main() -> None:
    args = parse()
    threads = [int(number) for number in args.threads.split(",")]
    if args.stage:
        case, size = args.stage
        args.result.write_text(json.dumps(measure(case, int(size), threads, args.rounds, args.peers)))
        return
    args.work, sheet, rows = args.work.resolve(), Sheet("cpu"), []
    open_work(args.work, "export_full", {"rounds": args.rounds, "threads": args.threads})
    for words in stages(args):
        kept = args.work / "stages" / f"{'_'.join(words)}.json"
        if not kept.is_file():
            note(" ".join(words))
            result = kept.with_suffix(".partial")
            options = ["--rounds", str(args.rounds), "--threads", args.threads]
            options += ["--peers", str(args.peers)] if args.peers else []
            command = [sys.executable, __file__, "--stage", *words, "--result", str(result), *options]
            environment = {**os.environ, "OMP_NUM_THREADS": str(max(threads))}
            subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
            result.rename(kept)
        rows += json.loads(kept.read_text())
    say(sheet, rows)
    sheet.save(args.out, {"goal": GOAL, "rows": rows})


if __name__ == "__main__":
    main()
