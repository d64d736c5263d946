"""mIoU of the bundled sandbox teacher on held-out scenes for a box, a point, and a point with one corrective click.

    python benchmarks/teacher.py --out benchmarks/results/teacher.txt

No teacher was trained on these scenes. The teacher is trained by ``python tools/sandbox/train.py tracker``. The log of
the bundled weights is ``results/teacher_training.jsonl``.
"""

from __future__ import annotations

from common import Sheet, arguments, use_device

from prompt_training import held_out_miou
from samdistill.checkpoints.promptable import load_promptable

TARGETS = {"box": 0.85, "point": 0.70}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes (512)")
    parser.add_argument("--weights", default="sandbox", help="a Sam3TrackerModel folder (the bundled teacher)")
    args = parser.parse_args()
    device = use_device(args.device)
    sheet = Sheet(device)
    model = load_promptable(args.weights).to(device)
    miou = held_out_miou(model, args.scenes)
    rows = [(kind, f"{value:.4f}", f"{TARGETS[kind]:.2f}" if kind in TARGETS else "-") for kind, value in miou.items()]
    parameters = sum(p.numel() for p in model.parameters())
    sheet.table(
        f"{args.weights}: {parameters / 1e6:.2f}M parameters, {args.scenes} scenes",
        ("prompt", "mIoU", "target with a GPU"),
        rows,
    )
    sheet.save(args.out, {"scenes": args.scenes, "parameters": parameters, "miou": miou, "targets": TARGETS})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
