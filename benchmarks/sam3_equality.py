"""Comparison of SAM 3, loaded from its original file, with the original code: detector, tracker and memory by stage.

    python benchmarks/sam3_equality.py --sam3 DIR

DIR: a check-out of facebookresearch/sam3, which needs ``pip install einops ftfy regex``. The original is built on the
CPU with random weights, saved by its code, and opened with this package: the detector with ``Sam3Detector``, the
tracker with ``load_promptable``, its memory with ``load_original``. Both get the same prompts on two frames of noise.
Layers have their real shapes, and ``--depth`` sets their number. Names and shapes are compared at full depth.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from common import Sheet, arguments, note, use_device
from sam3_original import CPU, FULL, REDUCED, SIZE, Depth, Original, Question, build, copy_code, imported, save
from sam3_original import save_words as save_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Sam3Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoModel,
    Sam3ViTConfig,
    Sam3ViTModel,
)
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

from samdistill.checkpoints.layout import HF_TRUNK, ORIGINAL_TRUNK
from samdistill.checkpoints.loading import quiet_transformers
from samdistill.checkpoints.original import load_original, original_config
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.rename import to_hf
from samdistill.checkpoints.rename_tracker import to_tracker
from samdistill.config import TeacherConfig
from samdistill.ops.outputs import PADDING, recorded
from samdistill.ops.promptable import Promptable, embed, predict
from samdistill.teachers.sam3_detector import Sam3Detector
from samdistill.types import ConceptPrompts, ImageBatch, Prompts

GOAL = 1e-4
DEPTHS = {depth.name: depth for depth in (REDUCED, FULL)}
QUESTIONS = {
    "words": Question("a red car"),
    "box": Question("visual", ((0.4, 0.5, 0.3, 0.2),), (1,)),
    "words + boxes": Question("striped cat", ((0.3, 0.4, 0.2, 0.5), (0.7, 0.6, 0.25, 0.3)), (1, 0)),
}
BEYOND = "transformers alone: "
"""Begins the names of stages that are shown without a goal: where transformers differs and nothing here follows it."""
Stages = dict[str, Tensor]
Differences = dict[str, tuple[float, float]]
"""Largest absolute difference of a stage, and the largest magnitude in the original's."""


def frames() -> ImageBatch:
    """Two pictures of smooth colours with noise on them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 14, 18, generator=generator)
    image = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1) * 235
    return ImageBatch.full((image + 20 * torch.rand(image.shape, generator=generator)).to(torch.uint8))


def prompts() -> dict[str, Prompts]:
    """By name, two objects each, in pixels of the canvas."""
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(1, 2, 3, 2, generator=generator) * SIZE
    labels = torch.tensor([[[1, 0, 1], [1, 1, 0]]])
    boxes = torch.tensor([[[100.0, 80.0, 400.5, 300.0], [350.0, 200.0, 1000.0, 660.25]]])
    masks = torch.randn(1, 2, 288, 288, generator=generator) * 4
    valid = torch.ones(1, 2, dtype=torch.bool)
    return {
        "one point": Prompts(valid, points[:, :, :1], labels[:, :, :1]), "three points": Prompts(valid, points, labels),
        "box": Prompts(valid, boxes=boxes), "box and points": Prompts(valid, points, labels, boxes),
        "points and mask": Prompts(valid, points, labels, masks=masks),
    }  # fmt: skip


def clicks() -> tuple[Tensor, Tensor]:
    """Of one object in the first frame of a video."""
    return torch.tensor([[[300.0, 420.0], [610.0, 80.0]]]), torch.tensor([[1, 0]])


def coverage(builder: Any, words: Path) -> dict[str, dict[str, int]]:
    """Counts of tensors of the original and of ours, and how many of ours have no source or one of another shape."""
    moved, nn.Module.to = nn.Module.to, lambda self, *_, **__: self  # there is nothing to move
    try:
        with init_empty_weights(include_buffers=False):
            original = builder.build_sam3_video_model(bpe_path=str(words), load_from_HF=False, device="cpu")
    finally:
        nn.Module.to = moved
    state = {name: value.to("meta") for name, value in original.state_dict().items()}
    found = {}
    for kind, rename in ((Sam3Model, to_hf), (Sam3TrackerModel, to_tracker), (Sam3TrackerVideoModel, to_tracker)):
        with torch.device("meta"), quiet_transformers():
            wanted = {name: value.shape for name, value in kind(kind.config_class()).state_dict().items()}
        renamed, left = rename(state)
        wrong = [name for name, shape in wanted.items() if name not in renamed or renamed[name].shape != shape]
        found[kind.__name__] = {
            "original": len(state), "ours": len(wanted), "missing or of another shape": len(wrong),
            "left over": len(left),
        }  # fmt: skip
    return found


@torch.inference_mode()
def initial_trunk(builder: Any) -> Differences:
    """The trunk with the original's own initial weights, whose small activations show the epsilon more."""
    torch.manual_seed(0)
    original = builder._create_vit_backbone().eval()
    state, _ = to_hf({f"{ORIGINAL_TRUNK}{name}": value for name, value in original.state_dict().items()})
    config = Sam3ViTConfig(num_hidden_layers=len(original.blocks), global_attn_indexes=original.full_attn_ids)
    ours = Sam3ViTModel(config).eval()
    ours.load_state_dict({name.removeprefix(HF_TRUNK): value for name, value in state.items()})
    pixels, found = (frames().images[:1] / 255 - 0.5) / 0.5, {}
    theirs = original(pixels)[-1]
    for name, eps in (("trunk with initial weights", 1e-5), (f"{BEYOND}layer norms with 1e-6, initial weights", 1e-6)):
        with layer_norms(ours, eps):
            said = ours(pixels).last_hidden_state.transpose(1, 2).unflatten(2, (72, 72))
        found[name] = (float((said - theirs).abs().max()), float(theirs.abs().max()))
    return found


def ask_original(builder: Any, words: Path, path: Path, seed: int) -> Original:
    """Build, save as ``path``, and ask everything."""
    model = build(builder, words, seed)
    save(model, path)
    original = Original(model.eval(), frames())
    for name, question in QUESTIONS.items():
        original.ask(name, question)
    for name, prompt in prompts().items():
        original.prompt(name, prompt)
    original.step(*clicks())
    return original


@contextmanager
def layer_norms(model: nn.Module, eps: float) -> Iterator[None]:
    """While open, every layer norm of ``model`` has this epsilon."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    kept = [norm.eps for norm in norms]
    for norm in norms:
        norm.eps = eps
    yield
    for norm, own in zip(norms, kept, strict=True):
        norm.eps = own


def ask_detector(path: Path) -> Stages:
    """The detector, as a teacher is asked: all questions about one image at once."""
    teacher = Sam3Detector(TeacherConfig(kind="sam3", path=str(path)))
    batch, model = frames(), teacher.model
    one = ImageBatch(batch.images[:1], batch.sizes[:1], batch.original_sizes[:1], batch.keys[:1], batch.seeds[:1])
    most = max(len(question.boxes) for question in QUESTIONS.values())
    boxes, labels = torch.zeros(len(QUESTIONS), most, 4), torch.full((len(QUESTIONS), most), PADDING)
    for row, question in enumerate(QUESTIONS.values()):
        for column, (box, label) in enumerate(zip(question.boxes, question.labels, strict=True)):
            boxes[row, column], labels[row, column] = torch.tensor(box), label
    texts = tuple(question.text for question in QUESTIONS.values())
    asked = ConceptPrompts(texts, torch.zeros(len(texts), dtype=torch.int64), boxes, labels)
    with ExitStack() as stack:
        trunk, text, geometry = (
            stack.enter_context(recorded(module))
            for module in (model.vision_encoder.backbone, model.text_projection, model.geometry_encoder)
        )
        said = teacher.answer(one, asked)
    words, shown = teacher.words.encode(texts)[1].bool(), geometry.output.attention_mask.bool()
    found: Stages = {
        "trunk": trunk.output.last_hidden_state.transpose(1, 2).unflatten(2, (72, 72)),
        **{f"FPN level {n}": level for n, level in enumerate(said.fpn)},
    }  # fmt: skip
    for row, name in enumerate(QUESTIONS):
        at = slice(row, row + 1)
        found |= {
            f"text features: {name}": text.output[row][words[row]],
            f"geometry tokens: {name}": geometry.output.last_hidden_state[row][shown[row]],
            f"DETR encoder: {name}": said.encoder[at], f"logits: {name}": said.pred_logits[at],
            f"boxes: {name}": said.pred_boxes[at], f"masks: {name}": said.pred_masks[at],
            f"semantic: {name}": said.semantic_seg[at], f"presence: {name}": said.presence_logits[at],
        }  # fmt: skip
    with layer_norms(model.vision_encoder.backbone, 1e-6), recorded(model.vision_encoder.backbone) as trunk:
        said = teacher.answer(one, ConceptPrompts.words([QUESTIONS["words"].text], [0]))
    begin = f"{BEYOND}layer norms with 1e-6, "
    return found | {
        f"{begin}trunk": trunk.output.last_hidden_state.transpose(1, 2).unflatten(2, (72, 72)),
        f"{begin}logits": said.pred_logits, f"{begin}masks": said.pred_masks, f"{begin}boxes": said.pred_boxes,
    }  # fmt: skip


@torch.inference_mode()
def ask_tracker(model: Promptable) -> Stages:
    """The tracker, through the package's functions."""
    batch = frames()
    one = ImageBatch(batch.images[:1], batch.sizes[:1], batch.original_sizes[:1], batch.keys[:1], batch.seeds[:1])
    embedded = embed(model, one)
    found: Stages = {f"tracker level {n}": level for n, level in enumerate(embedded.levels)}
    for name, prompt in prompts().items():
        for multimask in (False, True):
            with recorded(model.mask_decoder.pred_obj_score_head) as present:
                said = predict(model, embedded, prompt, multimask)
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            found |= {
                f"tracker masks: {end}": said.low_res_masks, f"tracker predicted IoU: {end}": said.iou_scores,
                f"tracker object score: {name}": present.output.view(1, 2, 1),
            }  # fmt: skip
        found[f"tracker mask tokens: {name}"] = said.mask_tokens
    return found


@torch.inference_mode()
def ask_transformers_tracker(path: Path) -> Stages:
    """transformers' own image tracker, with the four levels of its default neck."""
    config = original_config(path, Sam3TrackerConfig)
    config.vision_config.scale_factors = [4.0, 2.0, 1.0, 0.5]
    model, prompt = load_original(path, Sam3TrackerModel, config), prompts()["three points"]
    pixels = (frames().images[:1] / 255 - 0.5) / 0.5
    said = model(pixels, input_points=prompt.points, input_labels=prompt.labels, multimask_output=True)
    begin = f"{BEYOND}no memory added to the level that is not read, "
    return {f"{begin}masks of the tracker": said.pred_masks, f"{begin}predicted IoU": said.iou_scores}


@torch.inference_mode()
def ask_memory(model: Sam3TrackerVideoModel) -> Stages:
    """One step of a video, with the mask prepared for the memory as in the original: first 0 and 1, then resized.

    transformers resizes first and keeps the memory in bfloat16; what follows from that is in the stages that begin with
    ``BEYOND``.
    """
    pixels = (frames().images / 255 - 0.5) / 0.5
    session = Sam3TrackerVideoInferenceSession(
        pixels, SIZE, SIZE, dtype=torch.float32, max_vision_features_cache_size=2
    )
    index = session.obj_id_to_idx(1)
    points, labels = clicks()
    session.add_point_inputs(index, 0, {"point_coords": points[:, None], "point_labels": labels[:, None]})
    session.obj_with_new_inputs = [1]
    with recorded(model.memory_encoder) as own:
        first = model(inference_session=session, frame_idx=0)
    kept = session.output_dict_per_obj[index]["cond_frame_outputs"][0]
    transformers_memory, native = own.output[0].clone(), dict(kept)
    with recorded(model.mask_decoder) as decoded:
        model(inference_session=session, frame_idx=1)
    native_masks = decoded.output[0][:, 0]
    del session.output_dict_per_obj[index]["non_cond_frame_outputs"][1]
    mask = (kept["high_res_masks"] > 0).float() * 20 - 10
    mask = F.interpolate(mask, (1152, 1152), mode="bilinear", align_corners=False, antialias=True)
    maps, _ = model._prepare_vision_features(session, 0, 1)
    memory, positions = model.memory_encoder(maps[-1].permute(1, 2, 0).view(1, -1, 72, 72), mask)
    absent = (kept["object_score_logits"] <= 0).float()[..., None]
    stored = memory + absent * model.occlusion_spatial_embedding_parameter[..., None, None]
    kept["maskmem_features"] = stored.flatten(2).permute(2, 0, 1)
    with recorded(model.memory_attention) as attended, recorded(model.mask_decoder) as decoded:
        second = model(inference_session=session, frame_idx=1)
    begin = f"{BEYOND}mask resized before it is 0 and 1, "
    return {
        "video: masks of frame 0": first.pred_masks, "video: object pointer": native["object_pointer"].view(1, -1),
        "video: memory encoder": memory, "video: memory positions": positions,
        "video: memory attention": attended.output.view(1, SIZE // 14 * SIZE // 14, -1).transpose(0, 1),
        "video: masks of frame 1": decoded.output[0][:, 0], "video: object score": second.object_score_logits,
        f"{begin}memory": transformers_memory, f"{begin}masks of frame 1": native_masks,
    }  # fmt: skip


def counterpart(name: str, theirs: Stages) -> Tensor:
    """What the original has for one of our stages."""
    twins = {"trunk": "trunk", "logits": "logits: words", "masks": "masks: words", "boxes": "boxes: words",
             "memory": "video: memory encoder", "masks of frame 1": "video: masks of frame 1",
             "masks of the tracker": "tracker masks: three points, three masks",
             "predicted IoU": "tracker predicted IoU: three points, three masks"}  # fmt: skip
    return theirs[twins[name.rpartition(", ")[2]] if name.startswith(BEYOND) else name]


def compare(theirs: Stages, ours: Stages) -> Differences:
    """By name; shapes have to be the same."""
    found = {}
    for name, value in ours.items():
        expected = counterpart(name, theirs)
        if value.shape != expected.shape:
            raise SystemExit(f"{name}: {tuple(value.shape)}, the original has {tuple(expected.shape)}")
        found[name] = (float((value - expected).abs().max()), float(expected.abs().max()))
    return found


def run(builder: Any, words: Path, depth: Depth, seed: int) -> Differences:
    """One model with random weights, everything asked of both; only one of them is in memory at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sam3.pt"
        note(f"{depth.name} depth, seed {seed}: the original")
        with torch.inference_mode():
            theirs = ask_original(builder, words, path, seed).found
        save_tokenizer(words, path.parent)
        if depth is not FULL:  # which needs nothing beside it
            (path.parent / "config.json").write_text(json.dumps(depth.config()))
        gc.collect()
        note("the detector")
        ours = ask_detector(path)
        gc.collect()
        note("the tracker")
        ours |= ask_tracker(load_promptable(path))
        gc.collect()
        if depth is not FULL:
            ours |= ask_transformers_tracker(path)
            gc.collect()
        note("the memory")
        ours |= ask_memory(load_original(path, Sam3TrackerVideoModel))
        if unseen := theirs.keys() - ours.keys():
            raise SystemExit(f"not compared: {sorted(unseen)}")
        return compare(theirs, ours)


def say(sheet: Sheet, title: str, runs: list[Differences], beyond: bool) -> None:
    """The worst of each kind of stage over its prompts and all runs; relative to the largest value of that run."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for found in runs:
        for name, pair in found.items():
            if name.startswith(BEYOND) == beyond:
                kind = name.removeprefix(BEYOND) if beyond or name.startswith("video") else name.partition(":")[0]
                kinds.setdefault(kind, []).append(pair)
    rows = [
        [kind, str(len(pairs)), f"{max(d for d, _ in pairs):.1e}", f"{max(size for _, size in pairs):.3g}",
         f"{max(d / size for d, size in pairs):.1e}"] for kind, pairs in kinds.items()
    ]  # fmt: skip
    sheet.table(title, ["", "tensors", "largest difference", "largest value", "relative"], rows)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--sam3", type=Path, required=True, metavar="DIR")
    parser.add_argument("--depth", default="reduced,full", help="which to run, of reduced, full (both)")
    parser.add_argument("--seeds", type=int, default=3, help="random models of reduced depth (3)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if use_device("cpu" if args.device == "auto" else args.device) != "cpu":
        raise SystemExit("--device: the copy of the original runs on a CPU alone")
    sheet = Sheet("cpu")
    figures: dict[str, Any] = {"goal": GOAL, "differences": {}}
    for name in args.depth.split(","):
        depth = DEPTHS[name]
        with tempfile.TemporaryDirectory() as folder:
            copy_code(args.sam3, Path(folder), CPU, depth.replaced())
            words = Path(folder) / "sam3" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
            with imported(Path(folder)) as builder:
                if depth is FULL:
                    figures["coverage"] = coverage(builder, words)
                initial = initial_trunk(builder)
                runs = [run(builder, words, depth, seed) for seed in range(args.seeds if depth is REDUCED else 1)]
        runs[0] |= initial
        figures["differences"][name] = {f"seed {seed}": found for seed, found in enumerate(runs)}
        layers = f"{depth.vit} blocks, {depth.text} text layers, {depth.detr} + {depth.detr} DETR layers"
        say(sheet, f"{name} depth ({layers}), {len(runs)} seed(s), {SIZE} px, float32", runs, beyond=False)
        say(sheet, f"{name} depth: where transformers by itself differs from the original", runs, beyond=True)
    if "coverage" in figures:
        rows = [[name, *map(str, counts.values())] for name, counts in figures["coverage"].items()]
        sheet.table("tensors of the published sam3.pt", ["", *next(iter(figures["coverage"].values()))], rows)
    worst = max(
        (d / size, name) for runs in figures["differences"].values() for found in runs.values()
        for name, (d, size) in found.items() if not name.startswith(BEYOND)
    )  # fmt: skip
    sheet.say()
    sheet.say(f"Goal {GOAL:g} of the largest value at every stage; the worst is {worst[0]:.1e} ({worst[1]}).")
    sheet.say("Not measured: the published weights, half precision, and videos of more than one step.")
    sheet.save(args.out, figures)


if __name__ == "__main__":
    main()
