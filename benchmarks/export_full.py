"""Time of exported image encoders and of the full detector at full size, beside eager and beside other exports.

    python benchmarks/export_full.py --peers DIR --out benchmarks/results/export_full.txt
    python benchmarks/export_full.py --cases repvit_m0_9 --sizes 504      # a part, without other exports

All weights are random. Encoders are trunk and head of encoder students, on one image; ``detector`` is the 35M detection
student with three phrases as constants, on one image and one phrase. ``--peers`` is a folder with clones of the
repositories in ``PEERS``: their image encoders with the same backbone, exported as their scripts do it (or, where they
have none, by ``torch.onnx.export`` with its tracer), and run in the same rounds. Eager, our files and theirs alternate
with the same threads; a ratio is the median over the rounds, with the smallest and the largest. Each case is a process
of its own, and finished cases in ``--work`` are not repeated.
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
CASES = (*BACKBONES, "detector", "mobile_sam", "edge_sam")
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
    """Trunk and head of an encoder student."""

    def __init__(self, backbone: str, size: int) -> None:
        super().__init__()
        from samdistill.students.trunk import StudentTrunkConfig, build_trunk

        self.trunk = build_trunk(StudentTrunkConfig(backbone=backbone, image_size=size))

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


def onnx_session(path: Path) -> Any:
    from samdistill.deployment.targets import target

    return target("onnx").open(path)


def measure(case: str, size: int, rounds: int, peers: Path | None) -> dict[str, Any]:
    """Convert, compare and time all files of a case."""
    from samdistill.deployment.targets import target

    torch.manual_seed(0)
    runs: dict[str, Run] = {}
    row: dict[str, Any] = {
        "case": case,
        "size": size,
        "threads": torch.get_num_threads(),
        "difference": {},
        "bytes": {},
    }
    with TemporaryDirectory() as folder, torch.no_grad():
        if case != "edge_sam":
            part = part_of(case, size)
            given = part.example({"batch": 1, "prompts": 1}, 0)
            arrays, wanted = [one.numpy() for one in given], [one.numpy() for one in part.module(*given)]
            row["parameters"] = sum(one.numel() for one in part.module.parameters())
            runs["eager"] = partial(part.module, *given)
            for name in TARGETS:
                path = Path(folder) / f"ours{target(name).extension}"
                target(name).convert(part, path, False)
                session = target(name).open(path)
                row["difference"][name] = apart(session(*arrays), wanted)
                row["bytes"][name] = sum(one.stat().st_size for one in path.parent.glob("ours.*"))
                runs[name] = partial(session, *arrays)
            if case == "detector" and size == SIZED:
                row["bytes"] |= reduced_bytes(part, Path(folder) / "ours.onnx", size)
        if peers is not None and (found := peer_of(case, size, peers)) is not None:
            add_peer(*found, size, Path(folder) / "theirs.onnx", runs, row)
        row["ms"] = alternate(runs, rounds)
    return row


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
    name: str, encoder: nn.Module, options: dict[str, Any], size: int, path: Path, runs: dict[str, Run],
    row: dict[str, Any],
) -> None:  # fmt: skip
    """Export another project's encoder and add its runs, or the reason why that fails."""
    pixels = torch.randn(1, 3, size, size)
    encoder.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(encoder, (pixels,), path, dynamo=False, **options)
        session, wanted = onnx_session(path), encoder(pixels)
    except Exception as error:  # of any library
        row["peer"] = {"name": name, "reason": str(error).strip().splitlines()[-1][:200]}
        return
    row["peer"] = {"name": name, "parameters": sum(one.numel() for one in encoder.parameters())}
    row["difference"][name] = apart(session(pixels.numpy()), [wanted.numpy()])
    row["bytes"][name] = path.stat().st_size
    runs |= {f"{name} eager": partial(encoder, pixels), name: partial(session, pixels.numpy())}


def apart(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Return the largest difference of any output, relative to the output's largest value."""
    pairs = zip(found, wanted, strict=True)
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
                f"{told}, {name}", f"{row['parameters'] / 1e6:.1f}", f"{row['bytes'][name] / 1e6:.1f}",
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
                f"{told}, {name}", f"{peer['parameters'] / 1e6:.1f}", f"{row['bytes'][name] / 1e6:.1f}",
                f"{row['difference'][name]:.1e}", f"{statistics.median(row['ms'][name]):.0f}",
                ratio(row, name, f"{name} eager")[1], ours,
            ])  # fmt: skip
    columns = ["case", "M parameters", "MB", "difference", "eager ms", "file ms", "file / eager", f"<= {GOAL}"]
    sheet.table("our files, random weights, one image", columns, cells)
    columns = ["case, project", "M parameters", "MB", "difference", "their file ms", "their file / their eager",
               "our ONNX / their ONNX"]  # fmt: skip
    sheet.table("image encoders of other projects, their export, onnxruntime", columns, others)
    sized = [row["bytes"] for row in rows if "int8" in row["bytes"]][:1]
    cells = [
        [name, f"{one[name] / 1e6:.1f}", str(most), "met" if one[name] <= most * 1e6 else "missed"]
        for one in sized for name, most in MOST_MB.items()
    ]  # fmt: skip
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
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def stages(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return case, size and threads of each process."""
    cases = args.cases.split(",")
    return [
        (case, size, threads) for case in cases
        for size in ([str(SAM_SIDE)] if case.endswith("_sam") else args.sizes.split(","))
        for threads in args.threads.split(",") if case != "edge_sam" or args.peers
    ]  # fmt: skip


def main() -> None:
    args = parse()
    if args.stage:
        case, size, threads = args.stage
        torch.set_num_threads(int(threads))
        args.result.write_text(json.dumps(measure(case, int(size), args.rounds, args.peers)))
        return
    args.work, sheet, rows = args.work.resolve(), Sheet("cpu"), []
    open_work(args.work, "export_full", {"rounds": args.rounds})
    for words in stages(args):
        kept = args.work / "stages" / f"{'_'.join(words)}.json"
        if not kept.is_file():
            note(" ".join(words))
            result = kept.with_suffix(".partial")
            options = ["--rounds", str(args.rounds), *(["--peers", str(args.peers)] if args.peers else [])]
            command = [sys.executable, __file__, "--stage", *words, "--result", str(result), *options]
            subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": words[2]})
            result.rename(kept)
        rows.append(json.loads(kept.read_text()))
    say(sheet, rows)
    sheet.save(args.out, {"goal": GOAL, "rows": rows})


if __name__ == "__main__":
    main()
