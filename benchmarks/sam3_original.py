"""The original SAM 3 on a CPU, for ``sam3_equality.py``: a patched copy of its code, a random model, and its outputs.

The code is copied into a temporary folder, where the places that need CUDA are replaced. It needs
``pip install einops ftfy regex`` in addition to this package.
"""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rename_equality import scramble
from torch import Tensor, nn

from samdistill.types import ImageBatch, Prompts

SIZE, CONTEXT = 1008, 32
TABLES = (
    "pos_embed", "positional_embedding", "token_embedding", "query_embed", "reference_points", "presence_token.",
    "label_embed", "cls_embed", "point_embed", "not_a_point", "no_mask", "no_mem", "no_obj", "maskmem_tpos",
    "iou_token", "mask_tokens", "obj_score_token", "gaussian",
)  # fmt: skip
"""In the names of what is looked up or added; anything else of two or more dimensions multiplies its input."""
CPU = {
    'device="cuda"': 'device="cpu"',
    ".pin_memory()": "",
    ".cuda(non_blocking=True)": "",
    ".cuda()": "",
    "from decord import cpu, VideoReader": "cpu = VideoReader = None",
    "import pkg_resources\n": "",
    "from iopath.common.file_io import g_pathmgr": "import builtins as g_pathmgr",
}
"""What keeps the code from a CPU, or asks for a package that only reads files or videos."""
INTERACTIVE = "inst_interactive_predictor.model."


@dataclass(frozen=True)
class Depth:
    """Layers of the model that is built; everything else is as published."""

    name: str
    vit: int
    attend_everywhere: tuple[int, ...]
    text: int
    detr: int

    def replaced(self) -> dict[str, str]:
        """In the original's builder."""
        return {
            "depth=32,": f"depth={self.vit},",
            "global_att_blocks=(7, 15, 23, 31),": f"global_att_blocks={self.attend_everywhere},",
            "layers=24,": f"layers={self.text},",
            "num_layers=6,": f"num_layers={self.detr},",
        }

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of a SAM 3 of this depth, as it lies beside ``sam3.pt`` on the hub."""
        trunk = {
            "model_type": "sam3_vit_model", "num_hidden_layers": self.vit,
            "global_attn_indexes": list(self.attend_everywhere),
        }  # fmt: skip
        vision = {"model_type": "sam3_vision_model", "backbone_config": trunk}
        detector = {
            "model_type": "sam3", "vision_config": vision, "text_config": {
                "model_type": "clip_text_model", "hidden_size": 1024, "intermediate_size": 4096, "hidden_act": "gelu",
                "projection_dim": 512, "num_attention_heads": 16, "num_hidden_layers": self.text,
                "max_position_embeddings": CONTEXT,
            },
            "detr_encoder_config": {"num_layers": self.detr}, "detr_decoder_config": {"num_layers": self.detr},
        }  # fmt: skip
        tracker = {"model_type": "sam3_tracker_video", "vision_config": vision}
        return {"model_type": "sam3_video", "detector_config": detector, "tracker_config": tracker}


REDUCED = Depth("reduced", 4, (1, 3), 2, 2)
FULL = Depth("full", 32, (7, 15, 23, 31), 24, 6)


def copy_code(checkout: Path, to: Path, everywhere: Mapping[str, str], in_builder: Mapping[str, str]) -> None:
    """The package in ``checkout`` with the replacements; ``SystemExit`` where it no longer has what is replaced."""
    if not (checkout / "sam3" / "model_builder.py").is_file():
        raise SystemExit(f"{checkout}: no sam3/model_builder.py in it; give a check-out of the original code")
    shutil.copytree(checkout / "sam3", to / "sam3")
    unseen = {*everywhere, *in_builder}
    for path in (to / "sam3").rglob("*.py"):
        text = changed = path.read_text()
        for old, new in {**everywhere, **(in_builder if path.name == "model_builder.py" else {})}.items():
            if old in changed:
                unseen.discard(old)
                changed = changed.replace(old, new)
        if changed != text:
            path.write_text(changed)
    if unseen:
        raise SystemExit(f"{checkout}: another version of the code: nothing to replace for {sorted(unseen)}")


@contextmanager
def imported(folder: Path) -> Iterator[Any]:
    """The copy's ``sam3.model_builder``; afterwards nothing of the package is imported any more."""
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            builder = importlib.import_module("sam3.model_builder")
        logging.disable(logging.INFO)
        yield builder
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "sam3"]:
            del sys.modules[name]


def build(builder: Any, words: Path, seed: int) -> nn.Module:
    """The image model with its interactive tracker, every weight random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no CUDA for autocast
        model = builder.build_sam3_image_model(
            bpe_path=str(words), device="cpu", load_from_HF=False, enable_inst_interactivity=True
        )
    return scramble(model, seed, TABLES)


def save(model: nn.Module, path: Path) -> None:
    """As ``sam3.pt`` has it: ``detector.`` and ``tracker.`` before the names, all in a ``model``."""
    state = {
        f"tracker.{name.removeprefix(INTERACTIVE)}" if name.startswith(INTERACTIVE) else f"detector.{name}": value
        for name, value in model.state_dict().items()
    }
    torch.save({"model": state}, path)


def save_words(bpe: Path, folder: Path) -> None:
    """The original's vocabulary as the files of transformers' tokenizer for CLIP."""
    lines = gzip.decompress(bpe.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in letters] + [chr(256 + number) for number in range(256 - len(letters))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(line.split()) for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    about = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@dataclass(frozen=True)
class Question:
    """Words, and boxes as normalised cxcywh with labels: 1 like this, 0 not like this."""

    text: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()


class Original:
    """Answers of the original code, each stage by name. frames: normalised pixels come from these."""

    def __init__(self, model: Any, frames: ImageBatch) -> None:
        self.model, self.tracker = model, model.inst_interactive_predictor.model
        self.found: dict[str, Tensor] = {}
        with self._recording(model.backbone.vision_backbone.trunk) as seen:
            self.backbone = model.backbone.forward_image((frames.images[:1] / 255 - 0.5) / 0.5)
        self.found["trunk"] = seen[0][-1]
        self.found |= {f"FPN level {n}": level for n, level in enumerate(self.backbone["backbone_fpn"])}
        second = model.backbone.forward_image((frames.images[1:2] / 255 - 0.5) / 0.5)
        self.frames = [self._prepared(found["sam2_backbone_out"]) for found in (self.backbone, second)]

    @contextmanager
    def _recording(self, module: nn.Module) -> Iterator[list[Any]]:
        seen: list[Any] = []
        hook = module.register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            yield seen
        finally:
            hook.remove()

    def _prepared(self, tracked: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
        """As ``Sam3TrackerBase.forward_image`` does: the finer levels go through the mask decoder's convolutions."""
        decoder, levels = self.tracker.sam_mask_decoder, list(tracked["backbone_fpn"])
        levels[:2] = decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1])
        return self.tracker._prepare_backbone_features({**tracked, "backbone_fpn": levels})[1:]

    def ask(self, name: str, question: Question) -> None:
        """The detector, as its own ``Sam3Processor`` asks it."""
        from sam3.model.sam3_image_processor import Sam3Processor  # the copy that is imported now

        model, stage = self.model, Sam3Processor(self.model, device="cpu").find_stage
        backbone = {**self.backbone, **model.backbone.forward_text([question.text], device="cpu")}
        prompt = model._get_dummy_prompt()
        for box, label in zip(question.boxes, question.labels, strict=True):
            prompt.append_boxes(torch.tensor(box).view(1, 1, 4), torch.tensor([[bool(label)]]))
        with self._recording(model.geometry_encoder) as seen:
            out = model.forward_grounding(backbone, stage, None, prompt)
        tokens, hidden = seen[0]
        self.found |= {
            f"text features: {name}": backbone["language_features"][:, 0][~backbone["language_mask"][0]],
            f"geometry tokens: {name}": tokens[:, 0][~hidden[0]],
            f"DETR encoder: {name}": out["encoder_hidden_states"][:, 0].T.unflatten(1, (72, 72))[None],
            f"logits: {name}": out["pred_logits"][..., 0], f"boxes: {name}": out["pred_boxes_xyxy"],
            f"masks: {name}": out["pred_masks"], f"semantic: {name}": out["semantic_seg"],
            f"presence: {name}": out["presence_logit_dec"].view(1, 1),
        }  # fmt: skip

    def embedding(self) -> list[Tensor]:
        """The tracker's maps of the first frame, as ``predict_inst`` shapes them."""
        maps, _, sizes = self.frames[0]
        whole = [*maps[:-1], maps[-1] + self.tracker.no_mem_embed]
        return [m.permute(1, 2, 0).view(1, -1, *size) for m, size in zip(whole, sizes, strict=True)]

    def prompt(self, name: str, prompts: Prompts) -> None:
        """The tracker on one image, as ``SAM3InteractiveImagePredictor._predict`` asks it: a box is two points."""
        tracker, embedding = self.tracker, self.embedding()
        self.found |= {f"tracker level {n}": level for n, level in enumerate(embedding)}
        points, labels = [], []
        if prompts.boxes is not None:
            points.append(prompts.boxes[0].view(-1, 2, 2))
            labels.append(torch.tensor([[2, 3]]).expand(len(points[0]), 2))
        if prompts.points is not None and prompts.labels is not None:
            points.append(prompts.points[0])
            labels.append(prompts.labels[0])
        sparse, dense = tracker.sam_prompt_encoder(
            points=(torch.cat(points, 1), torch.cat(labels, 1)), boxes=None,
            masks=None if prompts.masks is None else prompts.masks[0][:, None],
        )  # fmt: skip
        for multimask in (False, True):
            with self._recording(tracker.sam_mask_decoder.transformer) as seen:
                masks, scores, _, present = tracker.sam_mask_decoder(
                    image_embeddings=embedding[-1], image_pe=tracker.sam_prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask,
                    repeat_image=True, high_res_features=embedding[:-1],
                )  # fmt: skip
            end = f"{name}, {'three masks' if multimask else 'one mask'}"
            self.found |= {f"tracker masks: {end}": masks[None], f"tracker predicted IoU: {end}": scores[None]}
        self.found |= {
            f"tracker mask tokens: {name}": seen[0][0][None, :, 2:6],
            f"tracker object score: {name}": present[None],
        }

    def step(self, points: Tensor, labels: Tensor) -> None:
        """Points on the first frame, then the second from memory in float32."""
        tracker = self.tracker
        given: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        about: dict[str, Any] = {"image": None, "mask_inputs": None, "output_dict": given, "num_frames": 2}
        with self._recording(tracker.maskmem_backbone) as seen:
            first = tracker.track_step(
                0, True, *self.frames[0], point_inputs={"point_coords": points, "point_labels": labels}, **about
            )
        given["cond_frame_outputs"][0] = first
        with (
            self._recording(tracker.transformer.encoder) as attended,
            self._recording(tracker.sam_mask_decoder) as decoded,
        ):
            second = tracker.track_step(1, False, *self.frames[1], point_inputs=None, **about)
        self.found |= {
            "video: masks of frame 0": first["pred_masks"], "video: object pointer": first["obj_ptr"],
            "video: memory encoder": seen[0]["vision_features"],
            "video: memory positions": seen[0]["vision_pos_enc"][0],
            "video: memory attention": attended[0]["memory"],
            "video: masks of frame 1": decoded[0][0], "video: object score": second["object_score_logits"],
        }  # fmt: skip
