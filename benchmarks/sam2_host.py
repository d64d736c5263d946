"""A trunk distilled for a SAM 2.1, merged into it, and tracked with SAM 2's own memory on a real video.

    python benchmarks/sam2_host.py --photos DIR --data DIR

``--photos``: a folder of images to train on. ``--data``: a folder with an annotated video in SA-V's layout.
The teacher is the architecture of SAM 2.1 tiny with random weights, so the masks mean nothing. Measured are the signal
that reaches the student, the tensors that the merge keeps, the agreement of the merged model with the teacher's own
modules on the trunk's levels, and time and memory of both models.
"""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import Sheet, arguments, use_device
from rename_equality import scramble
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, Sam2VideoConfig, Sam2VideoModel

import samdistill
from samdistill.checkpoints.processors import write_processor
from samdistill.data.sav import SavSource
from samdistill.pipeline import check

STUDENT = "es_rv_m"
TABLES = (
    "pos_embed", "point_embed", "not_a_point", "no_mask", "iou_token.", "mask_tokens.", "no_m", "no_obj", "maskmem",
    "obj_score_token", "positional_embedding", "_encoding",
)  # fmt: skip
"""In the names of what is looked up or added; anything else of two or more dimensions multiplies its input."""


def build_teacher(size: int, folder: Path) -> Sam2VideoModel:
    """SAM 2.1 tiny for images of ``size`` px with random weights, in a Hugging Face folder."""
    grid = size // 16
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model", "backbone_config": {
                "model_type": "sam2_hiera_det_model", "image_size": [size, size],
            },
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        prompt_encoder_config={"image_size": size}, image_size=size, memory_attention_rope_feat_sizes=[grid, grid],
    )  # fmt: skip
    torch.manual_seed(0)
    model = scramble(Sam2VideoModel(config), 0, TABLES)
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(10.0)  # the object counts as present
    model.save_pretrained(folder)
    write_processor(folder)
    return model


@torch.inference_mode()
def track(model: Sam2VideoModel, processor: Any, frames: Any, box: list[float]) -> tuple[list[Tensor], float]:
    """Mask logits (1, h, w) of every frame for a box on the first one, and seconds per frame."""
    session = processor.init_video_session(video=list(frames), inference_device="cpu", dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=1, input_boxes=[[box]])
    begun, found = time.perf_counter(), []
    for number in range(len(frames)):
        answer = model(inference_session=session, frame_idx=number)
        (masks,) = processor.post_process_masks([answer.pred_masks], [frames.shape[1:3]], binarize=False)
        found.append(masks[:, 0])
    return found, (time.perf_counter() - begun) / len(frames)


def first_box(source: SavSource, key: str) -> list[float]:
    """The box around the first object of the first frame, in pixels."""
    mask = torch.as_tensor(source.masks(key, 0)[0])
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def main() -> None:
    parser = arguments(__doc__, "sam2_host")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (256)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    sheet = Sheet(use_device(args.device))
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    teacher, place = build_teacher(args.size, args.work / "teacher"), args.work / "run"
    settings = ["data.workers=0", "train.log_every=1", "evaluate.prompts=[box]", "evaluate.images=4"]
    begun = time.perf_counter()
    result = samdistill.distill("encoder", args.photos, teacher=str(args.work / "teacher"), student=STUDENT, out=place,
                                train={"epochs": args.epochs}, overrides=settings)  # fmt: skip
    seconds = time.perf_counter() - begun
    reached = {term.name: term.grad_norm for term in check(result.config).terms}
    merged = Sam2VideoModel.from_pretrained(place / "merged").eval()
    before, after = (
        load_file(args.work / "teacher" / "model.safetensors"),
        load_file(place / "merged" / "model.safetensors"),
    )
    kept = [name for name in before if not name.startswith("vision_encoder.")]
    equal = sum(torch.equal(before[name], after[name]) for name in kept)
    source = SavSource(args.data)
    key = source.keys[0]
    frames, box = source.frames(key, range(args.frames)), first_box(source, key)
    processor = AutoProcessor.from_pretrained(place / "merged")
    _, slow = track(teacher, processor, frames, box)
    masks, fast = track(merged, processor, frames, box)
    teacher.vision_encoder = merged.vision_encoder  # the teacher's own modules on the levels of the trunk
    stitched, _ = track(teacher, processor, frames, box)
    drawn = sum(bool(frame.std() > 0) for frame in masks)
    apart = max(float((a - b).abs().max()) for a, b in zip(masks, stitched, strict=True))
    figures = report(sheet, result, reached, (equal, len(kept)), merged, (slow, fast), (drawn, apart), seconds)
    sheet.save(args.out, figures | {"size": args.size, "encoder": encoder_sizes(before, after)})


def encoder_sizes(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """Elements of the image encoder of the teacher and of the merged model."""
    return {
        name: sum(tensor.numel() for key, tensor in state.items() if key.startswith("vision_encoder."))
        for name, state in (("teacher", before), ("merged", after))
    }


def report(
    sheet: Sheet, result: Any, reached: dict[str, float], kept: tuple[int, int], merged: Sam2VideoModel,
    per_frame: tuple[float, float], tracked: tuple[int, float], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Print the figures and return them."""
    trunk = merged.vision_encoder.backbone
    figures = {
        "steps": result.trained.steps, "images": result.cached.records,
        "record_bytes": result.planned.bytes_per_record, "gradient norms": reached,
        "terms at the end": result.trained.terms, "kept tensors equal": kept[0], "kept tensors": kept[1],
        "trunk parameters": sum(p.numel() for p in trunk.parameters()),
        "seconds per frame": {"teacher": per_frame[0], "merged": per_frame[1]}, "frames with a mask": tracked[0],
        "largest difference to the teacher's modules": tracked[1], "seconds of the run": seconds,
        "peak memory GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    sheet.table("SAM 2.1 tiny with random weights hosts a distilled trunk", ["", "figure"], rows)
    sheet.say()
    sheet.say("Not measured: quality, because the teacher's weights are random.")
    return figures


if __name__ == "__main__":
    main()
