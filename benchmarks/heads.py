"""Comparison of the ``fused`` and the ``published`` head with the same teacher, embeddings, steps and seeds.

    python benchmarks/heads.py --jobs 2 --out benchmarks/results/heads.txt

The script renders scenes, caches the bundled teacher's embeddings once, trains a student for each head and seed, merges
each into the teacher, and evaluates all heads of a seed together on held-out scenes. Then it measures the cost of the
heads at SAM 3's full size. Finished trainings in --work are not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from common import Sheet, Study, say_study, spread, study, study_arguments, use_device

from samdistill.students import compare_heads

BASELINE = "published"


def say_cost(sheet: Sheet, found: Study) -> None:
    """Parameters, work and encoder latency of the trained students."""
    rows = []
    for head in found.variants:
        row = found.results[found.seeds[0]].row(head)
        milliseconds, work = found.values(head, "latency_ms"), row.trunk_gflops or 0.0
        cells = [f"{row.trunk_parameters / 1e6:.3f}", f"{work:.3f}", spread(milliseconds, ".2f")]
        if BASELINE in found.variants:
            pairs = zip(milliseconds, found.values(BASELINE, "latency_ms"), strict=True)
            cells.append(spread([ours / theirs for ours, theirs in pairs], ".3f"))
        rows.append([head, *cells])
    columns = ["", "trunk + head, M parameters", "GFLOP", "encoder ms", f"x {BASELINE}"]
    sheet.table(
        "cost of the trained students, one image (encoder: trunk, head and the teacher's neck; the models of a seed "
        "take turns)",
        columns[: len(rows[0])],
        rows,
    )


def say_full_size(sheet: Sheet, backbone: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Parameters, work and latency of the heads alone at 1024 channels and 1008 px."""
    costs = compare_heads(backbone, repeats=repeats, device=device)
    base = next(cost.milliseconds for cost in costs if cost.head == BASELINE)
    rows = [
        [cost.head, f"{cost.params / 1e6:.3f}", f"{cost.gflops:.1f}", f"{cost.milliseconds:.0f}",
         f"{cost.milliseconds / base:.3f}"] for cost in costs
    ]  # fmt: skip
    columns = ["", "M parameters", "GFLOP", "ms", f"x {BASELINE}"]
    sheet.table(f"the heads alone on {backbone} for SAM 3: 1024 channels, 1008 px, {repeats} repeats", columns, rows)
    return [asdict(cost) for cost in costs]


def parse() -> argparse.Namespace:
    parser = study_arguments(__doc__, "heads")
    parser.add_argument("--heads", default="published,fused", help="which, separated by commas")
    parser.add_argument("--full-size-repeats", type=int, default=5, help="of the heads at 1008 px; 0 leaves them out")
    return parser.parse_args()


def main() -> None:
    args = parse()
    heads = args.heads.split(",")
    device = use_device(args.device)
    sheet = Sheet(device)
    found = study(args, {head: [f"student.head={head}"] for head in heads})
    found.run()
    found.evaluate(device, args.repeats)
    say_study(sheet, found, BASELINE if BASELINE in heads else heads[0])
    say_cost(sheet, found)
    full = say_full_size(sheet, args.backbone, device, args.full_size_repeats) if args.full_size_repeats else []
    sheet.say()
    sheet.say(
        "Not measured: agreement on photographs and with the real SAM 3, other backbones, longer trainings, the speed "
        "of training. The spread over seeds covers initialisation and order of the data; the scenes stay the same."
    )
    sheet.save(args.out, {**found.to_dict(), "heads_at_full_size": full})


if __name__ == "__main__":
    main()
