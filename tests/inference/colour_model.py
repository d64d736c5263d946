"""A stand-in for a student of videos whose answers are known: it sees squares by their colour."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from samdistill.inference.concepts import StudentDetector
from samdistill.inference.video import VideoSession
from samdistill.ops.sights import Tracked
from samdistill.sandbox.concepts import build_tokenizer, sandbox_words
from samdistill.types import DetectorOutput

SIDE, GRID, QUERIES = 64, 8, 32
COLOURS = {"red": 0, "green": 1, "blue": 2}
TOKENS = {build_tokenizer()(colour)["input_ids"][1]: channel for colour, channel in COLOURS.items()}
MEMORY = {"memory_features", "memory_ages", "memory_valid", "memory_masks"}
Corner = tuple[int, int]


def parts(channel: torch.Tensor) -> list[torch.Tensor]:
    """Masks of what is in one piece."""
    labels, count = ndimage.label((channel > 0.5).numpy())
    return [torch.from_numpy(labels == number) for number in range(1, count + 1)]


class ColourModel:
    """A colour's name means all squares of it, any other word all squares; a memory with marks means the nearest square
    of the colour that was marked last. Every second answer comes in the opposite order."""

    device = torch.device("cpu")

    def __init__(self, **memory: Any) -> None:
        vision = SimpleNamespace(image_size=SIDE, image_mean=(0, 0, 0), image_std=(1, 1, 1), fpn_hidden_size=3)
        settings = {"latents": 4, "marks": True, "context": 3, "stride": 2, "level": 3, "phrase": "thing", **memory}
        memory = {f"memory_{name}": value for name, value in settings.items()}
        self.config = SimpleNamespace(model_type="efficient_sam3", vision_config=vision, **memory)
        self.calls: list[dict[str, Any]] = []
        self.encoded, self.read = 0, 0

    def get_vision_features(self, pixels: torch.Tensor) -> SimpleNamespace:
        self.encoded += 1
        return SimpleNamespace(fpn_hidden_states=(pixels, None, None, F.avg_pool2d(pixels, SIDE // GRID)))

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor, return_dict: bool) -> SimpleNamespace:
        self.read += len(ids)
        return SimpleNamespace(pooler_output=ids[..., None].float())

    def claimed(self, pixels: torch.Tensor, row: int) -> list[torch.Tensor]:
        """Mask logits of what question ``row`` finds, best first."""
        asked = self.calls[-1]
        if asked["memory_masks"] is not None:
            marks = asked["memory_masks"][row]
            latest = int(marks.flatten(1).any(1).nonzero().max())
            mark, features = marks[latest], asked["memory_features"][0, latest]
            centre = np.array(ndimage.center_of_mass(mark.numpy())) * (SIDE // GRID)
            squares = parts(pixels[int((features * mark).sum((1, 2)).argmax())])
            away = [np.abs(ndimage.center_of_mass(one.numpy()) - centre).sum() for one in squares]
            return [squares[int(np.argmin(away))].float() * 10 - 5] if squares else []
        channel = TOKENS.get(int(asked["text_embeds"].pooler_output[row, 1, 0]))
        found = [one for c in range(3) if channel in (None, c) for one in parts(pixels[c])]
        return [one.float() * 10 - 5 for one in found[:: 1 if len(self.calls) % 2 else -1]]

    def forward_video(self, **asked: Any) -> SimpleNamespace:
        self.calls.append(asked)
        questions, pixels = len(asked["text_embeds"].pooler_output), asked["vision_embeds"].fpn_hidden_states[0][0]
        masks = torch.full((questions, QUERIES, SIDE, SIDE), -5.0)
        logits, boxes = torch.full((questions, QUERIES), -9.0), torch.zeros(questions, QUERIES, 4)
        presence = torch.full((questions, 1), -20.0)
        for row in range(questions):
            for query, mask in enumerate(self.claimed(pixels, row), 2):
                presence[row] = 20.0
                rows, columns = (mask > 0).nonzero().T
                edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                masks[row, query], logits[row, query] = mask, 4 - query / 10
                boxes[row, query] = torch.stack(edges) / SIDE
        empty = torch.zeros(questions, 1, 1, 1)
        output = DetectorOutput(masks, boxes, logits, presence, empty, (empty,), empty)
        return SimpleNamespace(answer=lambda: output)


def session(model: ColourModel | None = None, **settings: Any) -> tuple[VideoSession, ColourModel]:
    model = ColourModel() if model is None else model
    return VideoSession(StudentDetector(model, sandbox_words()), **settings), model  # type: ignore[arg-type]


def picture(side: int = 8, **squares: Corner | list[Corner]) -> np.ndarray:
    """Squares by colour and corner (top, left), on black; the last one given is in front."""
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    for colour, corners in squares.items():
        for top, left in corners if isinstance(corners, list) else [corners]:
            frame[top : top + side, left : left + side] = 0
            frame[top : top + side, left : left + side, COLOURS[colour]] = 255
    return frame


def square(top: int, left: int, side: int = 8) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def where(found: tuple[Tracked, ...]) -> dict[int, tuple[int, int] | None]:
    """Top left corner of each object, None where it is invisible."""
    return {one.object_id: (int(one.box[1]), int(one.box[0])) if one.visible else None for one in found}
