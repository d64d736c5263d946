"""SAM 3's text encoder as a teacher: phrases in, the tokens that its heads read out.

Only the text encoder and the projection are built and read, not the rest of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextModel

from ..checkpoints.files import TensorInfo, locate, open_weights
from ..checkpoints.loading import fill, parameter_count, skeleton
from ..checkpoints.rename import hf_names, to_hf
from ..checkpoints.text import text_tensors
from ..checkpoints.words import WORD_FILES, Words
from ..config import TeacherConfig
from ..ops.phrases import follow_padding
from ..reading import foreign, running
from .base import DTYPES, Maps
from .loading import digest_of, freeze, settings
from .sam3_detector import DetectorInfo, Host, find_detector


@dataclass(frozen=True)
class TextInfo:
    """Description of a text encoder in a SAM 3, read without its weights.

    Attributes:
        path: Path or hub id.
        width: Channels of a token after the projection.
        params: Parameters of the text encoder and the projection.
        vocab_size: Rows of the token table.
        context: Rows of the position table.
    """

    path: str
    width: int
    params: int
    vocab_size: int
    context: int


def describe_text(config: TeacherConfig) -> TextInfo:
    """Read the sizes of a SAM 3's text encoder from its ``config.json``, without weights.

    Raises:
        UserError: The checkpoint is not a SAM 3 that takes words.
    """
    _, host = find_detector(config)
    with foreign(config.path, "no model can be built from its configuration"), torch.device("meta"):
        tower = _Tower(host)
    text = host.text_config
    width = tower.text_projection.out_features
    return TextInfo(config.path, width, parameter_count(tower), text.vocab_size, text.max_position_embeddings)


def text_words(config: TeacherConfig, info: TextInfo | DetectorInfo) -> Words:
    """Load the tokenizer of a SAM 3. Nothing else is downloaded.

    Raises:
        UserError: See ``Words.load``.
    """
    if config.tokenizer is not None:
        return Words.load(config.tokenizer, info.vocab_size, info.context)
    place = locate(config.path, WORD_FILES, packaged="detector")
    return Words.load(place.parent if place.is_file() else place, info.vocab_size, info.context)


class Sam3Text:
    """A frozen text encoder of SAM 3 with its projection and tokenizer.

    Attributes:
        info: Sizes.
        words: Tokenizer.
        fingerprint: Hex digest of weights, settings, precision and tokenizer. Encoders with the same fingerprint give
            the same tokens.

    Raises:
        UserError: See ``describe_text`` and ``Words.load``; or the weights are incomplete or do not fit the
            configuration.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu") -> None:
        _, host = find_detector(config)
        self.info, self.device = describe_text(config), torch.device(device)
        self.words = text_words(config, self.info)
        self.model = _load(locate(config.path, packaged="detector"), host)
        freeze(self.model, DTYPES[config.precision])
        behaviour = {"text": settings(host.text_config.to_dict()), "words": self.words.digest}
        self.fingerprint = digest_of(self.model, {"behaviour": behaviour})
        self.model.to(self.device)

    def tokens(self, texts: Sequence[str]) -> tuple[Float[Tensor, "p t c"], Int[Tensor, "p t"]]:
        """Return the projected tokens of phrases and their mask (1 for tokens, 0 for padding).

        The tokens are float32 without gradient, and zeros at padding.

        Raises:
            UserError: A phrase is empty or too long.
        """
        ids, mask = (part.to(self.device) for part in self.words.encode(texts))
        with running(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = self.model(ids, mask)
        # copied outside inference mode, because autograd cannot save an inference tensor for a backward pass
        return found.to(torch.float32, copy=True) * mask[..., None], mask

    def features(self, texts: Sequence[str]) -> Maps:
        """Return ``(tokens,)`` as a map (p, c, 1, t), in the form that ``RunningMaps`` and the cache expect."""
        tokens, _ = self.tokens(texts)
        return (tokens.transpose(1, 2)[:, :, None].contiguous(),)

    def to(self, device: torch.device | str) -> Sam3Text:
        """Move the model to ``device``. Does nothing if it is there."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            self.model.to(self.device)
        return self


class _Tower(nn.Module):
    """Text encoder and projection of a ``Sam3Model`` or ``Sam3LiteTextModel``, under their names there."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        text = host.text_config
        clip = text.model_type == "clip_text_model"
        self.text_encoder = CLIPTextModelWithProjection(text) if clip else Sam3LiteTextTextModel(text)
        self.text_projection = nn.Linear(text.hidden_size, host.detr_encoder_config.hidden_size)
        follow_padding(self)

    def forward(self, input_ids: Int[Tensor, "p t"], attention_mask: Int[Tensor, "p t"]) -> Float[Tensor, "p t c"]:
        found = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return self.text_projection(found.last_hidden_state)


def _load(place: Path, host: Host) -> nn.Module:
    """Load the text encoder of ``host`` in float32 on the CPU, reading only its tensors."""
    weights, tower = open_weights(place), skeleton(lambda: _Tower(host), place)
    if place.is_file():
        state, _ = to_hf(weights, [name for name in weights if text_tensors(hf_names(name))])
        info = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
        fill(tower, info, state.__getitem__, str(place), "the text encoder")
    else:
        names = text_tensors(weights)
        info = {own: weights.info[name] for own, name in names.items()}
        fill(tower, info, lambda name: weights[names[name]], str(place), "the text encoder")
    return tower.float()
