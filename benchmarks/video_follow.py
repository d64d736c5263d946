"""J&F on whole videos, tracked from one mask per object, by students without memory, with their own and with the
teacher's feature maps as memory.

    python benchmarks/video_follow.py --work runs/video_memory --seeds 3 --out benchmarks/results/video_follow.txt

The students are those of benchmarks/video_memory.py. Every object is given by its mask in the first annotated frame
that shows it. All later frames are pushed through ``VideoSession`` and scored by the rules of SA-V. Without memory, an
object is the instance of its name with the greatest IoU with its last visible mask.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, run_python, spread, use_device

from samdistill.evaluation.evaluate_videos import evaluate_videos

MEASURES = ("jf", "j", "f", "reappeared", "occluded")


def child(run: Path, data: Path, videos: int | None, kept: Path) -> None:
    torch.set_num_threads(1)
    found = evaluate_videos(run, data, teacher="sandbox", videos=videos, progress=False)
    kept.write_text(json.dumps(found.to_dict()))


def main() -> None:
    parser = arguments(__doc__, "video_memory")
    parser.add_argument("--names", default="memory,described", help="variants, separated by commas (memory,described)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--data", type=Path, help="rendered videos (those in --work)")
    parser.add_argument("--videos", type=int, help="at most so many (all)")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = args.data if args.data is not None else next(args.work.glob("videos-*"))
    if args.child is not None:
        child(args.child[0], data, args.videos, args.child[1])
        return
    sheet = Sheet(use_device(args.device))
    kept: dict[str, list[dict[str, Any]]] = {}
    for name in args.names.split(","):
        for seed in range(args.seeds):
            run = args.work / "trained" / f"{name}-seed{seed}"
            file = args.work / "followed" / f"{run.name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                more = [] if args.videos is None else ["--videos", str(args.videos)]
                words = [__file__, "--work", str(args.work), "--data", str(data), *more, "--child", str(run)]
                run_python([*words, str(file)], args.work / "logs" / f"followed-{run.name}.txt", 1)
            kept.setdefault(name, []).append(json.loads(file.read_text()))
    one = kept[args.names.split(",")[0]][0]["models"][0]
    sheet.say()
    sheet.say(
        f"{args.seeds} seeds; {one['objects']:.0f} objects in {one['frames']:.0f} counted frames of "
        f"{args.videos or 'all'} held-out rendered videos, SA-V's rules"
    )
    for name, results in kept.items():
        rows = []
        for place, row in enumerate(results[0]["models"]):
            values = [[result["models"][place][m] for result in results] for m in MEASURES]
            rows.append([row["name"], *(spread(v, ".3f") if None not in v else "-" for v in values)])
        sheet.table(name, ["", "J&F", "J", "F", "J&F reappeared", "J&F occluded"], rows)
    sheet.say()
    sheet.say("Not measured: real videos, the published SAM 3, objects that start from a phrase or a box.")
    sheet.save(args.out, {"results": kept})


if __name__ == "__main__":
    main()
