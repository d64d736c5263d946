"""Text student: a MobileCLIP text encoder with a projection to SAM 3's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Sam3LiteTextTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import (
    Sam3LiteTextPreTrainedModel,
    Sam3LiteTextTextModel,
)

from ..ops.phrases import end_token, follow_padding

TEXT_STUDENT = "samdistill_text"
"""Model type of a text student."""
_TWELVE = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "use_repmixer_blocks": False,
}  # fmt: skip
TEXT_SIZES: Mapping[str, Mapping[str, Any]] = {
    "s0": _TWELVE | {"num_hidden_layers": 6, "use_repmixer_blocks": True},
    "s1": _TWELVE,
    # MobileCLIP-B has the sizes of S1. Its causal mask, which Sam3LiteTextTextModel lacks, is the only difference.
    "b": _TWELVE,
    "l": _TWELVE | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
"""Sizes of MobileCLIP's text encoders by name, as fields of transformers' ``Sam3LiteTextTextConfig``. S0 has four
transformer layers between two convolutional ones.
"""


@strict
class TextStudentConfig(Sam3LiteTextTextConfig):
    """``Sam3LiteTextTextConfig`` with the width of the SAM 3 that hosts the encoder.

    Args:
        width: Channels after the projection, those of SAM 3's heads.
        attend_padding: Tokens attend to padding, which has the id 0, as in EfficientSAM3's code. transformers' own
            class masks padding. See ``follow_padding``.

    Example:
        >>> TextStudentConfig(max_position_embeddings=16, **TEXT_SIZES["s0"]).num_hidden_layers
        6
    """

    model_type = TEXT_STUDENT

    width: int = 256
    attend_padding: bool = False


def text_student_config(
    size: str | Mapping[str, Any], *, context: int, vocab_size: int, width: int, attend_padding: bool = False
) -> TextStudentConfig:
    """Return the configuration of a text student.

    Args:
        size: Name in ``TEXT_SIZES``, or fields as in it.
        context: Largest number of tokens of a phrase.
        vocab_size: Rows of the token table.
        width: Channels after the projection.
        attend_padding: See ``TextStudentConfig``.
    """
    fields = TEXT_SIZES[size] if isinstance(size, str) else size
    return TextStudentConfig(
        **fields, projection_dim=fields["hidden_size"], vocab_size=vocab_size, max_position_embeddings=context,
        width=width, attend_padding=attend_padding,
    )  # fmt: skip


class TextStudent(Sam3LiteTextPreTrainedModel):
    """Text encoder and projection, with the names that they have in ``Sam3LiteTextModel``.

    The first and the last layer of some sizes are convolutions over the tokens, and the position table is interpolated
    to the length of the input. Pad every phrase to ``config.max_position_embeddings`` tokens, as ``Words`` does.

    Args:
        config: Configuration of the model.
    """

    config_class = TextStudentConfig
    config: TextStudentConfig
    main_input_name = "input_ids"
    base_model_prefix = "text_student"

    def __init__(self, config: TextStudentConfig) -> None:
        super().__init__(config)
        self.text_encoder = Sam3LiteTextTextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.width)
        self.post_init()
        follow_padding(self)
        # no output of SAM 3 reads MobileCLIP's own projection
        self.text_encoder.projection.requires_grad_(False)

    def forward(self, input_ids: Int[Tensor, "p t"], attention_mask: Int[Tensor, "p t"]) -> BaseModelOutputWithPooling:
        """Encode phrases.

        Args:
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding on the right.

        Returns:
            ``last_hidden_state``, the tokens after the projection (p, t, width), and ``pooler_output``, the end token
            of each phrase (p, width).
        """
        found = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        tokens = self.text_projection(found.last_hidden_state)
        return BaseModelOutputWithPooling(tokens, end_token(tokens, attention_mask))


AutoConfig.register(TEXT_STUDENT, TextStudentConfig)
AutoModel.register(TextStudentConfig, TextStudent)
