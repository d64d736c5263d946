"""mIoU of the bundled SAM and MobileSAM on held-out scenes by kind of prompt, and the quality of SAM's predicted IoU.

    python benchmarks/sam_teachers.py --out benchmarks/results/sam_teachers.txt

No teacher was trained on these scenes. Kinds of prompts: box (tight box of the object); point (pixel farthest from the
object's outline, one mask); multimask (same point, three masks, the one with the highest predicted IoU); best of three
(the mask with the highest true IoU, an upper bound); refine and refine2 (the point and one or two corrective clicks).
The models are trained by ``python tools/sandbox/train.py sam`` and ``mobile``. Their logs are
``results/sam_training.jsonl`` and ``results/mobile_training.jsonl``.
"""

from __future__ import annotations

import torch
from common import Sheet, arguments, use_device
from torch import Tensor

from samdistill.checkpoints.promptable import load_promptable
from samdistill.inference.prompting import Targets, prompted_masks
from samdistill.ops.masks import mask_iou
from samdistill.ops.promptable import Promptable, embed, image_size, predict, to_canvas
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.types import ImageBatch
from tracker_model import HELD_OUT_SEED, score

KINDS = ("box", "point", "multimask", "best of three", "refine", "refine2")
TARGETS = {"sandbox-sam": (0.80, 1.0), "sandbox-mobile": (0.60, 0.70)}
BATCH = 64


@torch.inference_mode()
def further(model: Promptable, scenes: Scenes) -> dict[str, Tensor]:
    """IoU per annotated object of the best of a point's three masks, and after two corrective clicks."""
    targets, embeddings = Targets.of(scenes.masks, scenes.valid), embed(model, ImageBatch.full(scenes.images))
    three = predict(model, embeddings, targets.point, multimask=True).low_res_masks.unbind(2)
    ious = [mask_iou(to_canvas(each, scenes.masks.shape[-2:]), scenes.masks) for each in three]
    clicked = prompted_masks(model, embeddings, targets, ("refine2",))["refine2"]
    found = {"best of three": torch.stack(ious).amax(0), "refine2": mask_iou(clicked, scenes.masks)}
    return {kind: values[scenes.valid] for kind, values in found.items()}


def measure(model: Promptable, count: int) -> dict[str, float]:
    """mIoU by kind over all annotated objects of ``count`` scenes."""
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        scenes = render_scenes(numbers, image_size(model), HELD_OUT_SEED, device=model.device)
        for kind, ious in (score(model, scenes) | further(model, scenes)).items():
            found.setdefault(kind, []).append(ious)
    return {kind: torch.cat(found[kind]).mean().item() for kind in KINDS}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes (512)")
    parser.add_argument("--models", default=",".join(TARGETS), help=f"folders or names ({','.join(TARGETS)})")
    args = parser.parse_args()
    device = use_device(args.device)
    sheet = Sheet(device)
    rows, measured = [], {}
    for name in args.models.split(","):
        model = load_promptable(name).to(device)
        parameters, miou = sum(p.numel() for p in model.parameters()), measure(model, args.scenes)
        low, high = TARGETS.get(name, (0.0, 1.0))
        measured[name] = {"parameters": parameters, "miou": miou, "box_target": [low, high]}
        met = "met" if low <= miou["box"] <= high else "MISSED"
        target = f"{low:.2f} to {high:.2f}: {met}" if name in TARGETS else "-"
        rows.append((name, f"{parameters / 1e6:.2f}", *(f"{miou[kind]:.4f}" for kind in KINDS), target))
    sheet.table(f"mIoU on {args.scenes} scenes", ("", "parameters (M)", *KINDS, "target for a box"), rows)
    sheet.save(args.out, {"scenes": args.scenes, "models": measured})


if __name__ == "__main__":
    main()
