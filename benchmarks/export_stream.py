"""Time, memory and ids over a stream of 1000 frames through an export's ``predict.py``.

    python benchmarks/export_stream.py --run runs/video/sandbox --out benchmarks/results/export_stream.txt

A video student is exported to ONNX, and its ``predict.py`` tracks the objects of the video of ``video_stream.py`` from
their masks in the first frame. Time is that of ``Video.push`` alone. Memory is the resident set of the process after
every hundred frames, and the bytes of all arrays that the session references. On the first frames, ids and masks are
compared with those of ``VideoSession``, whose time is measured on the same frames, alternating.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Sheet, arguments, use_device
from video_stream import PART, pictures, reachable, resident

from samdistill import export
from samdistill.deployment.runtime import Model
from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.inference.video import VideoSession


def timed(push: Callable[[np.ndarray], Any], frame: np.ndarray) -> tuple[Any, float]:
    """Return what a session found in a frame, and the milliseconds."""
    start = time.perf_counter()
    found = push(frame)
    return found, 1000 * (time.perf_counter() - start)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the IoU of two masks. 1 if both are empty."""
    either = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / either if either else 1.0


def compare(student: StudentDetector, model: Model, args: argparse.Namespace) -> dict[str, float]:
    """Follow the first frames with both sessions."""
    sessions: list[Any] = [VideoSession(student), model.video()]
    took: list[list[float]] = [[], []]
    least, other, visible = 1.0, 0, 0
    for number, (frame, masks) in enumerate(pictures(args.frames, args.size, args.seed)):
        if number == args.compared:
            break
        if number == 0:
            for session in sessions:
                for mask in masks:
                    if mask.any():
                        session.add_mask(mask)
        rows = []
        for session, times in zip(sessions, took, strict=True):
            found, spent = timed(session.push, frame)
            times.append(spent)
            rows.append(found)
        wanted, found = ([(one.object_id, one.visible) for one in row] for row in rows)
        other += wanted != found
        visible += sum(one.visible for one in rows[0])
        least = min(least, *(overlap(a.mask, b.mask) for a, b in zip(*rows, strict=True)))
    return {
        "frames": args.compared, "frames with other ids": other, "visible objects": visible, "least IoU": least,
        "ms of VideoSession": statistics.median(took[0]), "ms of predict.py": statistics.median(took[1]),
    }  # fmt: skip


def stream(model: Model, args: argparse.Namespace) -> list[dict[str, float]]:
    """One row per hundred frames."""
    session, rows, took = model.video(), list[dict[str, float]](), list[float]()
    for number, (frame, masks) in enumerate(pictures(args.frames, args.size, args.seed)):
        if number == 0:
            for mask in masks:
                if mask.any():
                    session.add_mask(mask)
        took.append(timed(session.push, frame)[1])
        if (number + 1) % PART == 0:
            gc.collect()
            rows.append({
                "frames": number + 1, "ms": statistics.median(took), "p90": float(np.percentile(took, 90)),
                "rss": resident(), "session": reachable(session, model),
            })  # fmt: skip
            took.clear()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run of the video job, or its student/")
    parser.add_argument("--exported", type=Path, help="its export, if there is one already")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=200, help="first frames that VideoSession follows too (200)")
    parser.add_argument("--size", type=int, default=126, help="side of a frame (126)")
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    sheet = Sheet(use_device(args.device))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.exported or export(args.run, Path(scratch) / "exported", progress=False).folder
        student, model = load_concept_model(args.run), Model(folder, threads=torch.get_num_threads())
        assert isinstance(student, StudentDetector)
        config = student.model.config
        sheet.say()
        sheet.say(
            f"{sum(p.numel() for p in student.model.parameters()) / 1e6:.2f}M parameters, {config.memory_context} "
            f"remembered frames, every {config.memory_stride}th; onnxruntime with as many threads as PyTorch"
        )
        rows = stream(model, args)
        both = compare(student, model, args)
    sheet.table(
        "predict.py: frames, ms a frame (median and 90th percentile of the last hundred), resident set and session",
        ["frames", "ms", "p90", "resident MiB", "session MiB"],
        [[f"{r['frames']:.0f}", f"{r['ms']:.1f}", f"{r['p90']:.1f}", f"{r['rss'] / 2**20:.1f}",
          f"{r['session'] / 2**20:.3f}"] for r in rows],
    )  # fmt: skip
    first, last = rows[0], rows[-1]
    grown, held = (last["rss"] - rows[1]["rss"]) / 2**20, last["session"] - rows[1]["session"]
    sheet.say(
        f"  last hundred against the first: {last['ms'] / first['ms']:.2f} x the time; against the second: "
        f"{grown:+.1f} MiB resident, {held:+.0f} bytes in the session"
    )
    sheet.table("first frames, predict.py against VideoSession", ["", "figure"],
                [[name, f"{value:.4g}"] for name, value in both.items()])  # fmt: skip
    sheet.say()
    sheet.say("Not measured: a GPU, real videos of this length, many objects that come and go.")
    sheet.save(args.out, {"frames": args.frames, "rows": {"with memory": rows}, "compared": both})


if __name__ == "__main__":
    main()
