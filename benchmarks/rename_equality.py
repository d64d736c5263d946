"""Comparison of SAM and MobileSAM, loaded from original files, with the original code: names, shapes and outputs.

    python benchmarks/rename_equality.py --segment-anything DIR --mobile-sam DIR

DIR: check-outs of facebookresearch/segment-anything and ChaoningZhang/MobileSAM. Their models are built with random
weights, saved by their code, and opened with ``load_promptable``. Both get one image with padding and six prompts, and
all intermediate outputs are compared. Names and shapes are compared for all four models; ``--models`` selects those
that are run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import Sheet, arguments, use_device
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from samdistill.checkpoints.files import TensorInfo
from samdistill.checkpoints.loading import skeleton
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.rename_sam import MOBILE, layout, our_names, sam_settings
from samdistill.ops.promptable import Embeddings, Promptable, embed, predict
from samdistill.students import MobileSamConfig, MobileSamModel
from samdistill.types import ImageBatch, Prompts

SIZE, HEIGHT, WIDTH = 1024, 681, 1024  # of the canvas, and of the image on it
NAMES = {"vit_b": "SAM ViT-B", "vit_l": "SAM ViT-L", "vit_h": "SAM ViT-H", "vit_t": "MobileSAM"}
TABLES = ("pos_embed", "point_embed", "not_a_point", "no_mask", "iou_token.", "mask_tokens.", "gaussian")
"""In the names of what is looked up or added; anything else of two or more dimensions multiplies its input."""
Differences = dict[str, tuple[float, float]]
"""Largest absolute difference of a tensor, and the largest magnitude in the original's."""


@contextmanager
def _timm_left_alone() -> Iterator[None]:
    """MobileSAM's code would put its own TinyViT in the place of timm's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module's place is deprecated, the original code's import is of it
        import timm.models.registry as registry

    kept, registry.register_model = registry.register_model, lambda build: build
    try:
        yield
    finally:
        registry.register_model = kept


def original_code(folder: Path, package: str) -> ModuleType:
    """The package in ``folder``, or ``SystemExit``."""
    if not (folder / package).is_dir():
        raise SystemExit(f"{folder}: no {package} in it; give a check-out of the original code")
    sys.path.insert(0, str(folder.resolve()))
    with warnings.catch_warnings(), _timm_left_alone():
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


@torch.no_grad()
def scramble(model: nn.Module, seed: int, tables: tuple[str, ...] = TABLES) -> nn.Module:
    """Every tensor random, scaled so that activations stay of order one; zeros and ones at the start hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked") or not value.is_floating_point():
            continue
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(1 + 0.2 * noise.clamp(-2, 2))
        elif value.ndim == 1 or "rel_pos" in name or "attention_biases" in name:
            value.copy_(0.2 * noise)
        else:
            value.copy_(noise if any(part in name for part in tables) else noise / value[0].numel() ** 0.5)
    return model.eval()


def coverage(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Counts of the original's tensors and of ours, and the names that do not meet (no name, no place, or a shape)."""
    info = {name: TensorInfo.of(tensor) for name, tensor in model.state_dict().items()}
    settings = MOBILE.get(layout(info) or "")
    with torch.device("meta"):
        ours = (
            SamModel(SamConfig(**sam_settings(info)))
            if settings is None
            else MobileSamModel(MobileSamConfig(**settings))
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    found, faults, ignored = {}, [], 0
    for name, about in info.items():
        targets = our_names(name)
        if targets is None:
            faults.append(f"{name}: unknown")
        elif not targets:
            ignored += 1
        found |= dict.fromkeys(targets or (), about.shape)
    faults += [f"{name}: missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name}: has no place" for name in found.keys() - wanted.keys()]
    faults += [f"{name}: {found[name]}, not {shape}" for name, shape in wanted.items() if found.get(name) != shape]
    counts = {"original": len(info), "not needed": ignored, "ours": len(wanted), "faults": len(faults)}
    return counts, faults


def picture(device: str) -> ImageBatch:
    """Smooth colours with noise on them, padded at the bottom."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1) * 235
    image = (image + 20 * torch.rand(image.shape, generator=generator)).to(torch.uint8)
    canvas = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    canvas[..., :HEIGHT, :WIDTH] = image
    size = torch.tensor([[HEIGHT, WIDTH]])
    return ImageBatch(canvas, size, size, ("picture",), torch.zeros(1, dtype=torch.int64)).to(device)


def prompts(device: str) -> dict[str, Prompts]:
    """By name, about two objects each, in pixels of the canvas."""
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(1, 2, 3, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    labels = torch.tensor([[[1, 0, 1], [1, 1, 0]]])
    boxes = torch.tensor([[[100.0, 80.0, 400.5, 300.0], [350.0, 200.0, 1000.0, 660.25]]])
    masks = torch.randn(1, 2, 256, 256, generator=generator) * 4
    valid = torch.ones(1, 2, dtype=torch.bool)
    made = {
        "one point": Prompts(valid, points[:, :, :1], labels[:, :, :1]), "three points": Prompts(valid, points, labels),
        "box": Prompts(valid, boxes=boxes), "box and points": Prompts(valid, points, labels, boxes),
        "points and mask": Prompts(valid, points, labels, masks=masks),
        "box and mask": Prompts(valid, boxes=boxes, masks=masks),
    }  # fmt: skip
    return {name: prompt.to(device) for name, prompt in made.items()}


def _kept(module: nn.Module, keep: Callable[[tuple[Any, ...], Any], None]) -> Any:
    return module.register_forward_hook(lambda _, args, result: keep(args, result))


@torch.no_grad()
def ask_original(model: Any, batch: ImageBatch, asked: dict[str, Prompts]) -> dict[str, Tensor]:
    """Everything that is compared, by the original's own code."""
    seen: dict[str, Tensor] = {}
    hooks = [
        _kept(model.image_encoder.neck, lambda args, _: seen.update(trunk=args[0])),
        _kept(model.mask_decoder.transformer, lambda args, out: seen.update(entered=args[0], queries=out[0])),
    ]
    embedding = model.image_encoder(model.preprocess(batch.images[:, :, :HEIGHT, :WIDTH].float()))
    found = {"trunk": seen["trunk"], "image embedding": embedding}
    for name, prompt in asked.items():
        points = None if prompt.points is None or prompt.labels is None else (prompt.points[0], prompt.labels[0])
        boxes = None if prompt.boxes is None else prompt.boxes[0]
        masks = None if prompt.masks is None else prompt.masks[0][:, None]
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=masks)
        for multimask in (False, True):
            low, iou = model.mask_decoder(
                image_embeddings=embedding, image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask,
            )  # fmt: skip
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            found |= {f"masks: {end}": low[None], f"predicted IoU: {end}": iou[None]}
        entered = seen["entered"] if masks is not None else seen["entered"][:1]
        found |= {f"prompt embed: {name}": entered[None], f"mask tokens: {name}": seen["queries"][None, :, 1:5]}
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def ask_ours(model: Promptable, batch: ImageBatch, asked: dict[str, Prompts]) -> dict[str, Tensor]:
    """The same through the package's functions."""
    embedded: Embeddings = embed(model, batch)
    found = {"trunk": embedded.trunk, "image embedding": embedded.image_embedding}
    for name, prompt in asked.items():
        for multimask in (False, True):
            said = predict(model, embedded, prompt, multimask)
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            found |= {f"masks: {end}": said.low_res_masks, f"predicted IoU: {end}": said.iou_scores}
        found |= {f"prompt embed: {name}": said.prompt_embed, f"mask tokens: {name}": said.mask_tokens}
    return found


def compare(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Differences:
    """By name; shapes have to be the same."""
    found = {}
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            raise SystemExit(f"{name}: {tuple(ours[name].shape)}, the original has {tuple(expected.shape)}")
        found[name] = (float((ours[name] - expected).abs().max()), float(expected.abs().max()))
    return found


def run(build: Callable[[], nn.Module], device: str) -> Differences:
    """One model, opened from a file that the original's own state dict was saved to."""
    torch.manual_seed(0)
    original = scramble(build(), 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(original.state_dict(), path)
        ours = load_promptable(path).to(device)
    original.eval().to(device)  # again: the original's attention keeps its biases when it turns to eval
    batch, asked = picture(device), prompts(device)
    return compare(ask_original(original, batch, asked), ask_ours(ours, batch, asked))


def say_differences(sheet: Sheet, found: Differences, title: str) -> None:
    """The largest difference of each kind of tensor, absolute and as a share of its magnitude."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pair in found.items():
        kinds.setdefault(name.partition(":")[0], []).append(pair)
    rows = [
        [kind, str(len(pairs)), f"{max(d for d, _ in pairs):.1e}", f"{max(size for _, size in pairs):.3g}",
         f"{max(d / size for d, size in pairs):.1e}"] for kind, pairs in kinds.items()
    ]  # fmt: skip
    sheet.table(title, ["", "tensors", "largest difference", "largest value", "relative"], rows)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--segment-anything", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mobile-sam", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", default="vit_b,vit_t", help="which to run, of vit_b, vit_l, vit_h, vit_t")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = use_device(args.device)
    sheet = Sheet(device)
    sam, mobile = original_code(args.segment_anything, "segment_anything"), original_code(args.mobile_sam, "mobile_sam")
    builders = {name: (mobile if name == "vit_t" else sam).sam_model_registry[name] for name in NAMES}
    covered, differences, faults = {}, {}, []
    for name, build in builders.items():
        covered[name], own = coverage(skeleton(build))
        faults += [f"{NAMES[name]}: {fault}" for fault in own]
    columns = ["", *next(iter(covered.values()))]
    rows = [[NAMES[name], *map(str, counts.values())] for name, counts in covered.items()]
    sheet.table("tensors by name and shape", columns, rows)
    for fault in faults[:20]:
        sheet.say(f"  {fault}")
    for name in args.models.split(","):
        differences[name] = run(builders[name], device)
        say_differences(sheet, differences[name], f"{NAMES[name]}, {SIZE} px, float32")
    sheet.say()
    sheet.say(
        "One image of 681 x 1024 px on its canvas; six prompts about two objects each. Not measured: the published "
        "weights, and the outputs of models that are covered by name and shape alone."
    )
    sheet.save(args.out, {"coverage": covered, "faults": faults, "differences": differences})


if __name__ == "__main__":
    main()
