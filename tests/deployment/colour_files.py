"""The stand-in student of ``tests/inference/colour_model.py`` behind the names of exported files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from samdistill.deployment import runtime
from samdistill.sandbox.concepts import sandbox_words

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from colour_model import SIDE, ColourModel

Arrays = Mapping[str, np.ndarray]


class Stub:
    """A network that a function answers."""

    def __init__(self, answer: Callable[[Arrays], dict[str, np.ndarray]], length: int | str = "frames") -> None:
        self.answer, self.inputs = answer, {"memory_features": SimpleNamespace(shape=("objects", length))}

    def __call__(self, given: Arrays) -> dict[str, np.ndarray]:
        return self.answer(given)

    def rows(self, given: Arrays, shared: Arrays, most: int = 0) -> dict[str, np.ndarray]:
        return self.answer({**shared, **given})


def exported(model: ColourModel, length: int | str = "frames") -> runtime.Model:
    """An exported model whose files answer as ``model`` does. ``length`` is the memory's axis of frames."""
    past: list[Arrays] = []

    def vision(given: Arrays) -> dict[str, np.ndarray]:
        levels = model.get_vision_features(torch.from_numpy(given["pixel_values"])).fpn_hidden_states
        return {"vision_features.0": levels[0].numpy(), "vision_features.3": levels[3].numpy()}

    def memory(given: Arrays) -> dict[str, np.ndarray]:
        past.append(given)
        return {"memory_tokens": np.array([[[len(past) - 1]]])}

    def decoder(given: Arrays) -> dict[str, np.ndarray]:
        asked: dict[str, Any] = {"memory_masks": None}
        if "memory_tokens" in given:
            rows = [past[row] for row in given["memory_tokens"][:, 0, 0]]
            valid = rows[0]["memory_valid"][0]
            asked["memory_features"] = torch.from_numpy(rows[0]["memory_features"][:, valid])
            if "memory_masks" in rows[0]:
                asked["memory_masks"] = torch.from_numpy(
                    np.concatenate([row["memory_masks"][:, valid] for row in rows])
                )
        features = (torch.from_numpy(given["vision_features.0"]),)
        answer = model.forward_video(
            text_embeds=SimpleNamespace(pooler_output=torch.from_numpy(given["text_features"])),
            vision_embeds=SimpleNamespace(fpn_hidden_states=features), **asked,
        ).answer()  # fmt: skip
        names = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits")
        return {name: getattr(answer, name).numpy() for name in names}

    words = sandbox_words()

    def text(given: Arrays) -> dict[str, np.ndarray]:
        return {"text_features": given["input_ids"][..., None].astype(np.float32)}

    found = runtime.Model.__new__(runtime.Model)
    found.folder, found.kind, found.vocabulary = Path("stub"), "detector with memory", None
    found.config, found._concepts = vars(model.config), {}
    found._tokenizer = SimpleNamespace(encode=lambda phrase: tuple(part.numpy() for part in words.encode([phrase])))
    found.canvas = runtime.Canvas(SIDE, True, np.zeros(3, np.float32), np.ones(3, np.float32))
    answers = {"vision_encoder": vision, "text_encoder": text, "memory": memory}
    answers |= dict.fromkeys(("decoder", "decoder_boxes", "decoder_memory"), decoder)
    found.networks = {name: Stub(answer, length) for name, answer in answers.items()}  # type: ignore[misc]
    return found
