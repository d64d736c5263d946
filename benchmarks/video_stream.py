"""Time and memory per frame over a stream of 1000 frames, to show that they do not grow with the length of the video.

    python benchmarks/video_stream.py --run runs/video/sandbox --out benchmarks/results/video_stream.txt

A video student tracks the objects of a rendered video from their masks in the first frame. Time is that of
``VideoSession.push`` alone. Memory is the resident set of the process after every hundred frames, and the bytes of all
tensors that the session references. The baseline is the same video without memory (``context=0``).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Sheet, arguments, use_device

from samdistill.inference.concepts import StudentDetector, load_concept_model
from samdistill.inference.video import VideoSession
from samdistill.sandbox.videos import VideoStyle, render_video

PART = 100


def pictures(count: int, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames and masks of one long video, drawn a hundred at a time."""
    style = VideoStyle(frames=count)
    for start in range(0, count, PART):
        part = render_video(0, size, seed, style, frames=list(range(start, min(start + PART, count))))
        yield from zip(part.images.permute(0, 2, 3, 1).numpy(), part.masks.numpy(), strict=True)


def resident() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def reachable(session: Any, model: Any) -> int:
    """Bytes of the tensors and arrays that a session holds, without its model and the weights of a module."""
    own = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
    weights = {id(tensor) for tensor in own}
    seen, queue, found = set[int](), [session], 0
    while queue:
        one: Any = queue.pop()
        if id(one) in seen or one is model or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor | np.ndarray):
            found += 0 if id(one) in weights else one.nbytes
        elif isinstance(one, dict | list | tuple | set) or hasattr(one, "__dict__"):
            queue += gc.get_referents(one)
    return found


def stream(student: StudentDetector, args: argparse.Namespace, context: int | None) -> list[dict[str, float]]:
    """One row per hundred frames."""
    session, rows, took = VideoSession(student, context=context), list[dict[str, float]](), list[float]()
    for number, (frame, masks) in enumerate(pictures(args.frames, args.size, args.seed)):
        if number == 0:
            for mask in masks:
                if mask.any():
                    session.add_mask(mask)
        start = time.perf_counter()
        session.push(frame)
        took.append(time.perf_counter() - start)
        if (number + 1) % PART == 0:
            gc.collect()
            rows.append({
                "frames": number + 1, "ms": 1000 * statistics.median(took), "p90": 1000 * np.percentile(took, 90),
                "rss": resident(), "session": reachable(session, student.model),
            })  # fmt: skip
            took.clear()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run of the video job, or its student/")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--size", type=int, default=126, help="side of a frame (126)")
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    sheet = Sheet(use_device(args.device))
    student = load_concept_model(args.run)
    assert isinstance(student, StudentDetector)
    config = student.model.config
    sheet.say()
    sheet.say(
        f"{sum(p.numel() for p in student.model.parameters()) / 1e6:.2f}M parameters, {config.memory_latents} latents, "
        f"{config.memory_context} remembered frames, every {config.memory_stride}th"
    )
    found = {}
    for name, context in (("with memory", None), ("without memory", 0)):
        rows = found[name] = stream(student, args, context)
        sheet.table(
            f"{name}: frames, ms a frame (median and 90th percentile of the last hundred), resident set and session",
            ["frames", "ms", "p90", "resident MiB", "session MiB"],
            [[f"{r['frames']:.0f}", f"{r['ms']:.1f}", f"{r['p90']:.1f}", f"{r['rss'] / 2**20:.1f}",
              f"{r['session'] / 2**20:.3f}"] for r in rows],
        )  # fmt: skip
        first, last = rows[1], rows[-1]
        grown, held = (last["rss"] - first["rss"]) / 2**20, last["session"] - first["session"]
        sheet.say(
            f"  last hundred against the second: {last['ms'] / first['ms']:.2f} x the time, {grown:+.1f} MiB resident, "
            f"{held:+.0f} bytes in the session"
        )
    sheet.say()
    sheet.say("Not measured: a GPU, real videos of this length, many objects that come and go.")
    sheet.save(args.out, {"frames": args.frames, "rows": found})


if __name__ == "__main__":
    main()
