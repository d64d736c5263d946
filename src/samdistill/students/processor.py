"""The processor of detectors whose text encoder reads fewer tokens than SAM 3's, as a Hugging Face class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoProcessor, Sam3Processor

from .sam3_config import EfficientSam3Config

SAM3_CONTEXT = 32
"""Tokens to which ``Sam3Processor`` pads every phrase."""


class ConceptProcessor(Sam3Processor):
    """``Sam3Processor`` for a shorter context. A phrase is padded to ``context`` tokens, as in training.

    Args:
        image_processor: Image processor of the detector.
        tokenizer: Tokenizer that pads on the right.
        context: Tokens of a phrase with its start and end, at most 32.
        target_size, point_pad_value: As in ``Sam3Processor``.

    Raises:
        ValueError: A call has a phrase that is longer than ``context``.

    Example:
        >>> from transformers import AutoProcessor
        >>> processor = AutoProcessor.from_pretrained("runs/detection/student")  # doctest: +SKIP
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, context: int = SAM3_CONTEXT, target_size: int | None = None,
        point_pad_value: int = -10, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(image_processor, tokenizer, target_size, point_pad_value, **kwargs)
        self.context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        if "attention_mask" not in found:
            return found
        longest = int(torch.as_tensor(found["attention_mask"]).sum(-1).max())
        if longest > self.context:
            raise ValueError(f"a phrase has {longest} tokens with start and end, but at most {self.context} fit")
        found.update({name: self._cut(found[name]) for name in ("input_ids", "attention_mask")})
        return found

    def _cut(self, tokens: Any) -> Any:
        if not isinstance(tokens, list):
            return tokens[..., : self.context]
        return [self._cut(row) for row in tokens] if isinstance(tokens[0], list) else tokens[: self.context]


AutoProcessor.register(EfficientSam3Config, ConceptProcessor)
