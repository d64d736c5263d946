"""What the command line prints: each function takes the parsed arguments, calls a verb, returns the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .data import prepare_sa1b
from .dist import process_rank, world_size
from .inference.predict import BATCH, THRESHOLD, parse_box, parse_point
from .jobs import JOBS
from .jobs.loading import load_config
from .report import human_bytes
from .types import UserError

if TYPE_CHECKING:
    from .evaluation.concept_result import ConceptResult
    from .evaluation.result import EvaluationResult
    from .evaluation.video_result import VideoResult

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2, default=str)
    print()


def _facts(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}")


def plan(args: argparse.Namespace) -> int:
    from .pipeline import plan as run

    found = run(load_config(args.config, args.overrides))
    if args.json:
        print_json(found.to_dict())
        return 0
    _facts(found.facts())
    if found.steps_per_epoch == 0:
        raise UserError(f"{found.trained_on} are less than one batch: lower train.batch_size")
    return 0


def check(args: argparse.Namespace) -> int:
    from .pipeline import check as run

    report = run(load_config(args.config, args.overrides))
    if args.json:
        print_json(report.to_dict())
    else:
        table = Table("term", "value", "weight", "gradient norm at the student")
        for term in report.terms:
            name = f"{term.phase}: {term.name}" if term.phase else term.name
            table.add_row(name, f"{term.value:.6g}", f"{term.weight:g}", f"{term.grad_norm:.6g}")
        console.print(table)
        modules = Counter(name.partition(".")[0] for name in report.trainable)
        told = ", ".join(f"{name} {count}" for name, count in modules.items())
        console.print(
            f"{len(report.trainable)} trainable tensors: {told}; {len(report.dead)} without gradient in this batch"
        )
    for problem in report.problems:
        print(f"samdistill check: {problem}", file=sys.stderr)
    return 0 if report.ok else 1


def cache(args: argparse.Namespace) -> int:
    from .pipeline import cache as run

    rank, world = process_rank(), world_size()
    report = run(
        load_config(args.config, args.overrides), rank=rank, world=world, verify=args.verify, layout=args.layout
    )
    if rank == 0:
        console.print(
            f"{report.store}: {report.records} records ({report.written} new), {human_bytes(report.bytes)}, "
            f"{human_bytes(report.bytes_per_record)} each, in {report.seconds:.1f} s"
        )
        if report.renewed:
            console.print(f"renewed: {report.renewed} records whose image or video had changed")
        for line in report.recovered:
            console.print(f"mended: {line}", markup=False)
        if args.verify:
            console.print(
                f"verified: all checksums; {report.verified} records recomputed, worst relative difference "
                f"{report.worst_error:.2g}"
            )
    return 0


def train(args: argparse.Namespace) -> int:
    from .pipeline import train as run

    result = run(load_config(args.config, args.overrides), resume=args.resume)
    if process_rank() == 0:
        terms = "  ".join(f"{name} {value:.4g}" for name, value in result.terms.items())
        console.print(
            f"{result.steps} steps, {result.epochs} epochs in {result.seconds:.1f} s "
            f"({result.images_per_second:.1f} images/s); at the end: {terms}"
        )
        console.print(f"student: {result.student}\ncheckpoint: {result.checkpoint}")
    return 0


def merge(args: argparse.Namespace) -> int:
    from .checkpoints.merge import merge as run

    report = run(
        args.source, args.into, args.out, args.target_prefix, args.replace_prefix, args.names, args.text
    )  # fmt: skip
    console.print(str(report), markup=False)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from .checkpoints.inspect import inspect_path

    found = inspect_path(args.path)
    if args.json:
        print_json(found.to_dict())
    else:
        console.print(str(found), markup=False)
    return 0


def models(args: argparse.Namespace) -> int:
    from .students.catalogue import PUBLISHED, Breakdown, breakdown, list_students, part_rows

    found = list_students() if args.name is None else breakdown(args.name)
    if args.json:
        print_json(asdict(found) if isinstance(found, Breakdown) else [asdict(row) for row in found])
    elif isinstance(found, Breakdown):
        console.print(
            f"{found.name}: {found.backbone}, trunk {found.trunk_params / 1e6:.3f}M, {found.trunk_gflops:.1f} GFLOP; "
            f"{found.head} head {found.head_params / 1e6:.3f}M and {found.head_gflops:.1f} GFLOP, at 1008 px"
        )
        table = Table("module", "parameters", "GFLOP")
        for module in found.modules:
            table.add_row(module.module, f"{module.params:,}", f"{module.gflops:.2f}")
        console.print(table)
    else:
        table = Table("student", "timm backbone", "config", "trunk M", "head M", "share of the teacher's trunk")
        for row in found:
            sizes = f"{row.trunk_params / 1e6:.3f}", f"{row.head_params / 1e6:.3f}", f"{row.teacher_share:.2%}"
            table.add_row(row.name, row.backbone, row.config, *sizes)
        parts = Table("part", "SAM 3 M", "detection/hosted M", "trains")
        for cells in part_rows():
            parts.add_row(*cells)
        console.print(table, parts, f"sam3.pt: {PUBLISHED}", sep="\n")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from .evaluation.evaluate_videos import video_kind

    result: ConceptResult | EvaluationResult | VideoResult
    if args.concepts and args.masks:
        raise UserError("--masks and --concepts do not go together: give one of them")
    if not args.concepts:
        if len(args.data) > 1:
            raise UserError("several files of data go with --concepts, one per annotator")
        (args.data,) = args.data
    if args.concepts:
        result = _concepts(args)
    elif args.masks:
        result = _masks(args)
    elif video_kind(args.data) is not None:
        result = _videos(args)
    else:
        result = _prompts(args)
    if args.json:
        print_json(result.to_dict())
    else:
        console.print(result.table())
    return 0


def _videos(args: argparse.Namespace) -> VideoResult:
    from .evaluation.evaluate_videos import evaluate_videos as run

    others = (args.threshold, args.out, args.iou, args.prompts, args.images)
    if any(option is not None for option in others):
        raise UserError(
            "--prompts, --images, --threshold, --iou and --out do not go with videos; --videos takes some of them"
        )
    return run(
        args.model, args.data, teacher=args.teacher, convention=args.convention, videos=args.videos,
        every_frame=args.every_frame, geometry=args.geometry, workers=args.workers, progress=not args.json,
    )  # fmt: skip


def _masks(args: argparse.Namespace) -> VideoResult:
    from .evaluation.evaluate_masks import evaluate_masks as run

    others = (args.threshold, args.out, args.iou, args.prompts, args.images, args.teacher)
    if args.every_frame or any(option is not None for option in others):
        raise UserError("--masks goes with --convention, --videos, --workers and --json alone: no model runs")
    return run(
        args.model, args.data, convention=args.convention, videos=args.videos, workers=args.workers,
        progress=not args.json,
    )  # fmt: skip


def _no_videos(args: argparse.Namespace) -> None:
    """Refuse what only videos have a use for."""
    if args.videos is not None or args.convention is not None or args.every_frame or args.workers != 1:
        raise UserError(
            f"--videos, --convention, --every-frame and --workers go with a folder of videos, and {args.data} is none"
        )


def _prompts(args: argparse.Namespace) -> EvaluationResult:
    from .evaluation.evaluate import evaluate as run
    from .inference.prompting import PROMPTS

    _no_videos(args)
    if args.threshold is not None or args.out is not None or args.iou is not None:
        raise UserError("--threshold, --out and --iou go with --concepts")
    names = PROMPTS if args.prompts is None else [n.strip() for n in args.prompts.split(",") if n.strip()]
    return run(
        args.model, args.data, teacher=args.teacher, prompts=names, images=args.images, geometry=args.geometry,
        progress=not args.json,
    )  # fmt: skip


def _concepts(args: argparse.Namespace) -> ConceptResult:
    from .evaluation.evaluate import evaluate_concepts as run

    _no_videos(args)
    if args.prompts is not None:
        raise UserError("--prompts does not go with --concepts, which asks in words alone")
    return run(
        args.model, args.data, teacher=args.teacher, threshold=0.5 if args.threshold is None else args.threshold,
        images=args.images, geometry=args.geometry, out=args.out, iou=args.iou or "masks", progress=not args.json,
    )  # fmt: skip


def predict(args: argparse.Namespace) -> int:
    from .inference.predict import predict as run
    from .inference.predict_video import is_video

    if args.format is not None:
        return _label(args)
    if args.batch_size is not None or args.no_pictures:
        raise UserError("--batch-size and --no-pictures go with --format")
    if is_video(args.image):
        return _predict_video(args)
    if args.frames is not None:
        raise UserError(f"--frames goes with a video, and {args.image} is none")
    boxes, points = [parse_box(text) for text in args.box], [parse_point(text) for text in args.point]
    found = run(args.image, args.model, args.text, boxes, args.threshold, args.geometry, args.out, points)
    if args.json:
        print_json(found.to_dict())
        return 0
    for score, box, mask in zip(found.scores, found.boxes, found.masks, strict=True):
        corners = ",".join(f"{value:.0f}" for value in box.tolist())
        console.print(f"{score:.3f}  box {corners}  {int(mask.sum())} pixels", markup=False)
    asked = [repr(args.text)] if args.text is not None else []
    asked += [f"{len(points)} point" + "s" * (len(points) > 1)] if points else []
    asked += [f"{len(boxes)} box" + "es" * (len(boxes) > 1)] if boxes else []
    if found.presence is not None:
        number = f"{len(found)} instance" + "s" * (len(found) != 1)
        least = THRESHOLD if args.threshold is None else args.threshold
        scores = f"scores from {least:g}, presence {found.presence:.3f}"
    else:
        number, scores = f"{len(found)} mask" + "s" * (len(found) != 1), "scores are predicted IoU"
    drawn = f"; drawn in {args.out}" if args.out is not None else ""
    console.print(
        f"{args.image}: {number} for {' and '.join(asked)}, {scores}{drawn}", markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _label(args: argparse.Namespace) -> int:
    from .inference.label import label_images

    if args.text is None or args.out is None or args.point or args.box or args.frames is not None:
        raise UserError("--format goes with --text and --out, a folder; not with --box, --point or --frames")
    texts = [text.strip() for text in args.text.split(",")]
    found = label_images(
        args.image, args.model, texts, args.out, format=args.format, threshold=args.threshold, geometry=args.geometry,
        batch_size=BATCH if args.batch_size is None else args.batch_size, pictures=not args.no_pictures,
        progress=not args.json,
    )  # fmt: skip
    if args.json:
        print_json({"out": str(found.out), "images": found.images, "instances": found.instances,
                    "skipped": [bad._asdict() for bad in found.skipped]})  # fmt: skip
    else:
        left = f"; {len(found.skipped)} images could not be read" if found.skipped else ""
        console.print(
            f"{found.out}: {found.instances} instances in {found.images} images, {args.format}{left}", markup=False
        )
    return 0


def _predict_video(args: argparse.Namespace) -> int:
    from .inference.predict_video import predict_video as run

    found = run(
        args.image, args.model, args.text, [parse_box(text) for text in args.box],
        points=[parse_point(text) for text in args.point],
        threshold=THRESHOLD if args.threshold is None else args.threshold, geometry=args.geometry,
        out=args.out, frames=args.frames, progress=not args.json,
    )  # fmt: skip
    if args.json:
        print_json(found.to_dict())
        return 0
    for one in found.objects:
        name = "" if one.phrase is None else f"  {one.phrase}"
        console.print(
            f"object {one.object_id}{name}  in {one.frames} frames, from {one.first} to {one.last}", markup=False
        )
    per_frame = ", ".join(f"{part} {1000 * s / max(found.frames, 1):.1f} ms" for part, s in found.seconds.items())
    drawn = f"; drawn in {found.out}" if found.out is not None else ""
    count = f"{len(found.objects)} object" + "s" * (len(found.objects) != 1)
    console.print(
        f"{found.video}: {count} in {found.frames} frames, memory of {found.context}; a frame: {per_frame}{drawn}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if found.crowded:
        console.print("more instances were seen than a session follows; the later ones were left out")
    return 0


def export(args: argparse.Namespace) -> int:
    from .deployment.folder import export as run

    found = run(
        args.model, args.out, to=args.to, precision=args.precision, calibrate=args.calibrate,
        vocabulary=() if args.vocabulary is None else args.vocabulary, image_size=args.image_size, static=args.static,
        web=args.web, keep_failed=args.keep_failed, progress=not args.json,
    )  # fmt: skip
    if args.json:
        print_json(found.to_dict())
    else:
        console.print(found.table())
        console.print(found.summary(), markup=False)
    return 0 if found.passed else 1


def prepare(args: argparse.Namespace) -> int:
    report = prepare_sa1b(args.source, args.target, args.val_fraction)
    console.print(str(report), markup=False)
    return 0


def sandbox(args: argparse.Namespace) -> int:
    from .sandbox.render import LAYOUTS, render_sandbox

    counts = render_sandbox(
        args.target, train=args.train, val=args.val, size=args.size, seed=args.seed, format=args.format
    )
    made = f"{counts['train']} training and {counts['val']} held-out {LAYOUTS[args.format].things}"
    console.print(f"{args.target}: {made}, {args.format}")
    return 0


def run(args: argparse.Namespace) -> int:
    from .pipeline import distill

    result = distill(
        args.job,
        args.images,
        teacher=args.teacher,
        student=args.student,
        out=args.out,
        overrides=args.overrides,
        export=args.export,
        web=args.web,
        vocabulary=() if args.vocabulary is None else args.vocabulary,
    )
    print(result.summary())
    return 0


def demo(args: argparse.Namespace) -> int:
    from .pipeline import demo as whole

    out = args.out or Path("runs/demo" if args.job == next(iter(JOBS)) else f"runs/demo-{args.job}")
    result = whole(out, args.job, export=args.export, web=args.web)
    print(result.summary())
    if args.web and result.exported is not None:
        from .deployment.page import serve_page

        serve_page(result.exported.folder, lambda line: console.print(line, markup=False, soft_wrap=True))
    return 0
