"""Comparison of SAM 2 and SAM 2.1, loaded from original files, with the original code: names, shapes and outputs.

    python benchmarks/sam2_equality.py --sam2 DIR --data DIR

``--sam2``: a check-out of facebookresearch/sam2. ``--data``: a folder with one video in SA-V's layout, whose first
frames are used. The original model is built with random weights and saved by its own code. It is opened with
``load_promptable`` (image and prompts) and with ``open_sam`` as a ``Sam2VideoModel`` (memory). Both get the pixels that
the original prepares. Names and shapes are compared for all eight published models, outputs for those of ``--models``.

The original needs hydra and iopath only to read its configurations and weight files, so both are replaced here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Sheet, arguments, use_device
from PIL import Image
from rename_equality import Differences, compare, say_differences, scramble
from torch import Tensor, nn
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from samdistill.checkpoints.files import TensorInfo
from samdistill.checkpoints.loading import pretrained
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.rename_sam2 import sam2_config, to_sam2
from samdistill.checkpoints.sam import open_sam
from samdistill.data.sav import SavSource
from samdistill.ops.promptable import decode, encode
from samdistill.types import Prompts

MODELS = {
    f"{version} {size}": f"{folder}/{folder}_hiera_{short}.yaml"
    for version, folder in (("SAM 2.1", "sam2.1"), ("SAM 2", "sam2"))
    for size, short in (("tiny", "t"), ("small", "s"), ("base+", "b+"), ("large", "l"))
}
TABLES = ("pos_embed", "point_embed", "not_a_point", "no_mask", "iou_token.", "mask_tokens.", "gaussian", "no_mem",
          "no_obj", "maskmem_tpos", "obj_score_token")  # fmt: skip
"""In the names of what is looked up or added; anything else of two or more dimensions multiplies its input."""
BOX, POINTS, LABELS = [300.0, 200.0, 700.0, 800.0], [[450.0, 500.0], [900.0, 100.0]], [1, 0]


def prepare(folder: Path) -> Path:
    """Make the original package importable and return the folder of its configurations."""
    if not (folder / "sam2" / "modeling").is_dir():
        raise SystemExit(f"{folder}: no sam2 in it; give a check-out of the original code")
    package, files = types.ModuleType("sam2"), types.ModuleType("iopath.common.file_io")
    package.__path__ = [str((folder / "sam2").resolve())]  # without its __init__, which starts hydra
    files.g_pathmgr = open
    sys.modules |= {"sam2": package, "iopath": types.ModuleType("iopath"),
                    "iopath.common": types.ModuleType("iopath.common"), "iopath.common.file_io": files}  # fmt: skip
    return folder / "sam2" / "configs"


def instantiate(node: Any) -> Any:
    """Build what a configuration describes, as hydra does: ``_target_`` is called with the other entries."""
    if isinstance(node, list):
        return [instantiate(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {key: instantiate(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return inner
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**inner)


def build(configs: Path, name: str) -> nn.Module:
    """Build the original video predictor with the settings of its own builder that concern a model's answers."""
    settings = yaml.safe_load((configs / MODELS[name]).read_text())["model"]
    settings["_target_"] = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    settings["memory_encoder"]["fuser"]["layer"]["layer_scale_init_value"] = 1e-6  # YAML reads it as text
    settings["sam_mask_decoder_extra_args"] = {
        "dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }  # fmt: skip
    return instantiate(settings | {"binarize_mask_from_pts_for_mem_enc": True}).eval()


def coverage(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Counts of the original's tensors and of ours, and the names that do not meet (no name, no place, or a shape)."""
    state = model.state_dict()
    info = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
    with torch.device("meta"):
        wanted = {n: tuple(t.shape) for n, t in Sam2VideoModel(sam2_config(info, "this model")).state_dict().items()}
    renamed, unknown = to_sam2(state)
    found = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    faults = [f"{name}: unknown" for name in unknown]
    faults += [f"{name}: missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name}: has no place" for name in found.keys() - wanted.keys()]
    faults += [
        f"{name}: {found[name]}, not {shape}" for name, shape in wanted.items() if found.get(name, shape) != shape
    ]
    return {"original": len(info), "ours": len(wanted), "faults": len(faults)}, faults


def save_frames(data: Path, folder: Path, count: int) -> None:
    """Write the first frames of the only video of ``data`` as the JPEG files that the original reads."""
    source = SavSource(data)
    for number, frame in enumerate(source.frames(source.keys[0], range(count))):
        Image.fromarray(frame).save(folder / f"{number:05}.jpg", quality=95)


@torch.inference_mode()
def ask_original(model: Any, folder: Path) -> tuple[dict[str, Tensor], Tensor, tuple[int, int]]:
    """The original's levels, answers to prompts on the first frame, and masks of a tracked box; its pixels and size."""
    state = model.init_state(str(folder))
    pixels, size = state["images"], (state["video_height"], state["video_width"])
    features = model.forward_image(pixels[:1])
    *fine, last = features["backbone_fpn"]
    last = last + model.no_mem_embed.view(1, -1, 1, 1)
    found = {f"level: {n}": level for n, level in enumerate((*fine, last))}
    for name, (points, labels) in prompts().items():
        sparse, dense = model.sam_prompt_encoder(points=(points[0], labels[0]), boxes=None, masks=None)
        for multimask in (False, True):
            low, iou, *_ = model.sam_mask_decoder(
                image_embeddings=last, image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask,
                repeat_image=False, high_res_features=fine,
            )  # fmt: skip
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            found |= {f"masks: {end}": low[None], f"predicted IoU: {end}": iou[None]}
    scale = torch.tensor([size[1], size[0]] * 2) / model.image_size
    model.add_new_points_or_box(state, 0, 1, box=torch.tensor(BOX) * scale)
    for number, _, logits in model.propagate_in_video(state):
        found[f"tracked masks: frame {number}"] = logits
    return found, pixels, size


def prompts() -> dict[str, tuple[Tensor, Tensor]]:
    """Points and labels by name; a box is two points labelled 2 and 3."""
    corners = torch.tensor(BOX).view(1, 1, 2, 2)
    points, labels = torch.tensor(POINTS)[None, None], torch.tensor(LABELS)[None, None]
    return {"two points": (points, labels), "box": (corners, torch.tensor([[[2, 3]]]))}


@torch.inference_mode()
def ask_ours(path: Path, pixels: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """The same through the package's functions, and transformers' video model for the memory."""
    model = load_promptable(path)
    embedded = encode(model, pixels[:1])
    found = {f"level: {n}": level for n, level in enumerate(embedded.levels)}
    for name, (points, labels) in prompts().items():
        asked = Prompts(torch.ones(1, 1, dtype=torch.bool), points, labels)
        if name == "box":
            asked = Prompts(torch.ones(1, 1, dtype=torch.bool), boxes=points.view(1, 1, 4))
        for multimask in (False, True):
            said = decode(model, embedded, asked, multimask)
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            found |= {f"masks: {end}": said.low_res_masks[0], f"predicted IoU: {end}": said.iou_scores[0]}
    opened = open_sam(path)
    video = pretrained(Sam2VideoModel, opened.config, {n: t.clone() for n, t in opened.weights.items()}, path)
    session = Sam2VideoInferenceSession(video=pixels, video_height=size[0], video_width=size[1], dtype=torch.float32)
    session.obj_id_to_idx(1)
    session.obj_with_new_inputs = [1]
    corners, labels = prompts()["box"]
    session.add_point_inputs(0, 0, {"point_coords": corners, "point_labels": labels.int()})
    for frame in range(len(pixels)):
        masks = video(inference_session=session, frame_idx=frame).pred_masks
        found[f"tracked masks: frame {frame}"] = nn.functional.interpolate(masks, size, mode="bilinear")
    return found


def run(model: nn.Module, data: Path, frames: int, seed: int) -> Differences:
    """One model, opened from a file that the original's own state dict was saved to."""
    scramble(model, seed, TABLES)
    if seed:  # otherwise the random score counts the object as absent in the first frame
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(10.0)
    with tempfile.TemporaryDirectory() as folder:
        path, images = Path(folder) / "model.pt", Path(folder) / "frames"
        images.mkdir()
        save_frames(data, images, frames)
        torch.save({"model": model.state_dict()}, path)
        theirs, pixels, size = ask_original(model, images)
        ours = ask_ours(path, pixels.clone(), size)
    theirs = {name: tensor.reshape(ours[name].shape) for name, tensor in theirs.items()}
    return compare(theirs, ours)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--sam2", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", default="SAM 2.1 tiny", help=f"which to run, of {', '.join(MODELS)}")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="numbers of random models (3)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    configs = prepare(args.sam2)
    covered, differences, faults = {}, {}, []
    for name in MODELS:
        covered[name], own = coverage(build(configs, name))
        faults += [f"{name}: {fault}" for fault in own]
    columns = ["", *next(iter(covered.values()))]
    sheet.table("tensors by name and shape", columns, [[n, *map(str, c.values())] for n, c in covered.items()])
    for fault in faults[:20]:
        sheet.say(f"  {fault}")
    for name in args.models.split(","):
        differences[name] = [run(build(configs, name), args.data, args.frames, seed) for seed in range(args.seeds)]
        for seed, found in enumerate(differences[name]):
            say_differences(sheet, found, f"{name}, weights {seed}, 1024 px, float32")
    sheet.say()
    sheet.say(
        "A box tracked through a real video. With weights 0 the object is absent in the first frame, whose masks are "
        "then -1024; with the others it is always present. Not measured: the published weights."
    )
    sheet.save(args.out, {"coverage": covered, "faults": faults, "differences": differences})


if __name__ == "__main__":
    main()
