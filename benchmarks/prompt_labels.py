"""Gain from a teacher when labels are few: fine-tuning on labels alone compared with labels and distillation.

    python benchmarks/prompt_labels.py --jobs 2 --out benchmarks/results/prompt_labels.txt
    python benchmarks/prompt_labels.py --only "task + dense_mask_logits" --seeds 1    # some variants now, others later
    python benchmarks/prompt_labels.py --counts 2 4 --val 4 --epochs 1 --seeds 1      # to try this script

The sandbox recipe on 16, 64 and 256 labelled scenes of the world of ``prompt_terms.py``, which neither student nor
teacher was trained on. All trainings have the same number of steps and of different prompts: a small set of scenes is
repeated until it has the length of the largest. Each seed has its own scenes; a smaller set is a subset of a larger
one. Variants per number of scenes:

    task only            no teacher
    task + all four      all four terms from the tiny SAM
    task + TERM          one term, with --only

All other settings are those of ``prompt_terms.py``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from common import Sheet, setting, use_device
from prompt_terms import (
    MEASURES,
    SAM,
    TERMS,
    arguments_of,
    prompt_study,
    render,
    say_conditions,
    taught,
    teachers,
)
from study import say_differences, say_figures

WAYS = {"task only": taught(), "task + all four": taught(*TERMS), **{f"task + {term}": taught(term) for term in TERMS}}
PLAIN, COPY = "task only", 10**9


def few(pool: Path, root: Path, count: int, total: int, seed: int) -> None:
    """A COCO set of ``total`` training images in ``root``, which are ``count`` of the pool's over and over, beside its
    held-out ones; images are links."""
    record: dict[str, Any] = json.loads((pool / "annotations" / "instances_train.json").read_text())
    images = sorted(record["images"], key=lambda image: image["id"])
    random.Random(seed).shuffle(images)
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in record["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    folder, target = root / "images" / "train", root / "annotations" / "instances_train.json"
    for place in (folder, target.parent):
        place.mkdir(parents=True, exist_ok=True)
    shown, annotations = [], []
    for number in range(total):
        image, offset = images[number % count], number // count * COPY
        name = f"{number // count}-{image['file_name']}"
        link(folder / name, pool / "images" / "train" / image["file_name"])
        shown.append({**image, "id": image["id"] + offset, "file_name": name})
        annotations += [
            {**a, "id": a["id"] + 100 * offset, "image_id": a["image_id"] + offset}
            for a in objects.get(image["id"], [])
        ]
    link(root / "images" / "val", pool / "images" / "val")
    link(target.with_name("instances_val.json"), pool / "annotations" / "instances_val.json")
    target.write_text(json.dumps({**record, "images": shown, "annotations": annotations}))


def link(place: Path, to: Path) -> None:
    if not place.exists():
        place.symlink_to(to)


def parse() -> argparse.Namespace:
    parser = arguments_of(__doc__, "prompt_labels")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64, 256], help="labelled images (16 64 256)")
    parser.add_argument("--only", default="task + all four",
                        help=f"what is compared with {PLAIN!r}, separated by commas (task + all four)")  # fmt: skip
    return parser.parse_args()


def ways(only: str) -> list[str]:
    """Names of the ways to train."""
    names = [PLAIN, *(name.strip() for name in only.split(","))]
    if unknown := [name for name in names if name not in WAYS]:
        raise SystemExit(f"--only: nothing is called {unknown[0]!r}; there is: {', '.join(WAYS)}")
    return [name for name in WAYS if name in names]


def main() -> None:
    args = parse()
    args.work, most = args.work.resolve(), max(args.counts)
    device = use_device(args.device)
    sheet = Sheet(device)
    pool = render(args.work / f"scenes-{2 * most}-{args.val}", 2 * most, args.val)
    chosen, compared = {}, []
    for count in args.counts:
        root = args.work / f"labels-{count}-of-{most}-{args.val}"
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            few(pool, root / str(seed), count, most, seed)
        for way in ways(args.only):
            chosen[f"{count}: {way}"] = [setting("data.root", root / "{seed}"), *WAYS[way]]
            compared.append((f"{count}: {way}", "untuned" if way == PLAIN else f"{count}: {PLAIN}"))
    study = prompt_study(args, chosen, pool, ["data.kind=coco", teachers(SAM)])
    study.run()
    say_conditions(sheet, study)
    sheet.say(f"labelled images: {', '.join(map(str, args.counts))}, other ones for every seed")
    say_figures(sheet, study, MEASURES)
    say_differences(sheet, study, MEASURES, compared)
    sheet.say()
    sheet.say(
        "mIoU with ground truth. The teacher sees the same images and prompts and no label. Both ways take the same "
        "number of steps with the same rates; neither was tuned for its number of labels."
    )
    sheet.say(
        "Not measured: photographs, published weights, stopping early, augmentation, unlabelled images that a teacher "
        "could label. The spread covers the choice of labelled scenes, order and prompts."
    )
    sheet.save(args.out, {"counts": args.counts, "held_out": args.val, **study.to_dict()})


if __name__ == "__main__":
    main()
