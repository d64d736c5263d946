"""Memory of a video student: past frames are resampled to a few tokens, and the current frame attends to them.

Both modules use transformers' SAM 3 attention and MLP in the arrangement of Perceiver and of Flamingo's resampler. Sine
embeddings of position and time are added to the tokens of past frames. Without them the memory contains no information
about where or when an object was.

``warm_start`` initialises both modules so that they work before training: a latent is roughly the mean of the tokens
that it attends to, and a token of the current frame attends to the memory of its own position. With random weights the
detector learns to ignore the memory before it learns to use it.

Source:
    Jaegle et al., Perceiver, 2021. Alayrac et al., Flamingo, 2022.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam3_lite_text.configuration_sam3_lite_text import Sam3LiteTextDETREncoderConfig
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import (
    Sam3LiteTextAttention,
    Sam3LiteTextMLP,
    Sam3LiteTextSinePositionEmbedding,
)

LATENT_STD = 0.02
_SMALL = 0.1
_LONGEST = 10_000.0  # base of the frequencies, as in the position encoding of Vaswani et al., 2017


def age_embedding(ages: Float[Tensor, "b t"], width: int) -> Float[Tensor, "b t c"]:
    """Sine and cosine embedding of the ages of frames.

    Args:
        ages: Age of each frame, any real number, in the unit that the model was trained with.
        width: Number of channels c.

    Returns:
        Embeddings of shape (b, t, c).
    """
    rates = torch.exp(torch.arange(0, width, 2, device=ages.device) * (-math.log(_LONGEST) / width))
    phase = ages[..., None].float() * rates
    return torch.stack((phase.sin(), phase.cos()), -1).flatten(-2)[..., :width].to(ages.dtype)


def window_of(grid: tuple[int, int], windows: int, device: torch.device) -> Bool[Tensor, "w n"]:
    """Assign the cells of a grid to ``windows`` x ``windows`` equal windows. Cells and windows are in row-major order.

    A cell is in the window that contains its centre, so it is in exactly one.

    Returns:
        Bool mask (windows * windows, cells).

    Raises:
        ValueError: The grid is narrower than ``windows``, so some windows would be empty.
    """
    if min(grid) < windows:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} cells is too small for {windows} x {windows} windows")
    rows, columns = (((torch.arange(n, device=device) + 0.5) * (windows / n)).long() for n in grid)
    of_cell = (rows[:, None] * windows + columns[None, :]).flatten()
    return of_cell[None] == torch.arange(windows**2, device=device)[:, None]


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention of the latents to the past frames, then a pre-norm MLP, both residual."""

    def __init__(self, config: Sam3LiteTextDETREncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.latent_norm, self.memory_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.mlp = Sam3LiteTextAttention(config), Sam3LiteTextMLP(config)

    def forward(
        self, latents: Float[Tensor, "b l c"], memory: Float[Tensor, "b n c"], bias: Float[Tensor, "b heads l n"]
    ) -> Float[Tensor, "b l c"]:
        past = self.memory_norm(memory)
        latents = latents + self.attention(self.latent_norm(latents), past, past, bias)[0]
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverResampler(nn.Module):
    """Resample the feature maps of any number of past frames to ``latents`` tokens.

    Windows make it unnecessary for the latents to learn to separate positions (2-D perceiver of EdgeTAM, Zhou et al.,
    2025).

    Args:
        config: Width, heads and feed-forward width of the attention layers.
        latents: Number of output tokens.
        layers: Number of resampler layers.
        windows: 0 lets every latent attend to all positions. Otherwise the last ``windows`` x ``windows`` latents
            attend to one window each, in every frame, and have its position embedding. The others stay global.

    Raises:
        ValueError: The windows leave no global latent.
    """

    def __init__(self, config: Sam3LiteTextDETREncoderConfig, latents: int, layers: int, windows: int = 0) -> None:
        super().__init__()
        if windows**2 >= latents:
            raise ValueError(f"{windows} x {windows} windows need more than {windows**2} latents, got {latents}")
        self.windows = windows
        self.latents = nn.Parameter(torch.randn(latents, config.hidden_size) * LATENT_STD)
        # It has unit variance like the normalised features that it is added to; a smaller one would have no effect.
        self.target = nn.Parameter(torch.randn(config.hidden_size))
        self.positions = Sam3LiteTextSinePositionEmbedding(config.hidden_size // 2, normalize=True)
        self.input_norm, self.output_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(layers))

    def forward(
        self, features: Float[Tensor, "b t c h w"], ages: Float[Tensor, "b t"],
        valid: Bool[Tensor, "b t"] | None = None, masks: Float[Tensor, "b t mh mw"] | None = None,
    ) -> Float[Tensor, "b l c"]:  # fmt: skip
        """Resample past frames to memory tokens.

        The features of a frame do not indicate which object is meant, so the masks are needed to tell an object from
        similar ones. The cells under the masks get a learned embedding, and half of the global latents attend only to
        them (as in the object memory of Cutie, Cheng et al., 2024).

        Args:
            features: Feature maps of t past frames.
            ages: Age of each frame, see ``age_embedding``.
            valid: False for frames that are padding. Every item of the batch needs a valid frame.
            masks: Object masks per frame on any grid, as the covered share of each cell in 0..1.

        Returns:
            Memory tokens (b, latents, c).
        """
        b, t, _, h, w = features.shape
        seen, share = self.input_norm(features.permute(0, 1, 3, 4, 2)), None
        if masks is not None:
            share = F.interpolate(masks.to(features.dtype), (h, w), mode="area")
            seen = seen + share[..., None] * self.target
        place = self._sines((h, w), features).permute(1, 2, 0)
        when = age_embedding(ages, features.shape[2]).to(features.dtype)[:, :, None, None]
        memory = (seen + place + when).flatten(1, 3)
        bias = self._bias((b, t, h, w), ages, valid, share, features)
        latents = (self.latents + self._latent_places(features)).expand(b, -1, -1)
        for layer in self.layers:
            latents = layer(latents, memory, bias)
        return self.output_norm(latents)

    def _sines(self, grid: tuple[int, int], like: Tensor) -> Float[Tensor, "c h w"]:
        return self.positions(torch.Size((1, like.shape[2], *grid)), like.device, like.dtype)[0]

    def _latent_places(self, like: Tensor) -> Float[Tensor, "l c"]:
        """Position embeddings of the latents: zero for global ones, that of the window for the others."""
        places = torch.zeros_like(self.latents)
        if self.windows:
            own = self._sines((self.windows, self.windows), like).flatten(1).T
            places = torch.cat([places[: -(self.windows**2)], own])
        return places

    def _bias(
        self, shape: tuple[int, int, int, int], ages: Float[Tensor, "b t"], valid: Bool[Tensor, "b t"] | None,
        share: Float[Tensor, "b t h w"] | None, like: Tensor,
    ) -> Float[Tensor, "b heads l n"]:  # fmt: skip
        """Additive attention bias: the lowest finite value where a latent must not attend, else a penalty on age.

        The penalty has a slope per head (ALiBi, Press et al., 2022): the first head attends to recent frames, the last
        one to all. The bias is not a bool mask, because transformers' eager attention adds every mask.
        """
        (b, t, h, w), device = shape, like.device
        count, special = len(self.latents), self.windows**2
        own = torch.ones(count, h * w, dtype=torch.bool, device=device)
        if special:
            own = torch.cat([own[:-special], window_of((h, w), self.windows, device)])
        seen = own[None, :, None].expand(b, -1, t, -1)
        if valid is not None:
            seen = seen & valid[:, None, :, None]
        if share is not None:
            seen = seen & self._followed(share, valid)
        # float32 exponents: a power of whole numbers is float64 in litert-torch, which LiteRT does not have
        slopes = 0.5 ** torch.arange(self.layers[0].attention.num_attention_heads, device=device, dtype=torch.float32)
        older = (slopes[:, None, None, None] * ages[:, None, None, :, None]).to(like.dtype)
        recency = -older.expand(b, -1, 1, t, h * w)
        return recency.masked_fill(~seen[:, None], torch.finfo(like.dtype).min).flatten(3)

    def _followed(self, share: Float[Tensor, "b t h w"], valid: Bool[Tensor, "b t"] | None) -> Bool[Tensor, "b l t n"]:
        """Restrict the first half of the global latents to the marked cells, if there are any."""
        marked = share.flatten(2) > 0
        if valid is not None:
            marked = marked & valid[..., None]
        marked = marked | ~marked.flatten(1).any(1)[:, None, None]
        follows = torch.arange(len(self.latents), device=share.device) < (len(self.latents) - self.windows**2 + 1) // 2
        return marked[:, None] | ~follows[None, :, None, None]


class MemoryCrossAttention(nn.Module):
    """Pre-norm cross-attention of the current frame's tokens to the memory, residual."""

    def __init__(self, config: Sam3LiteTextDETREncoderConfig) -> None:
        super().__init__()
        self.query_norm, self.memory_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = Sam3LiteTextAttention(config)

    def forward(
        self, tokens: Float[Tensor, "p n c"], positions: Float[Tensor, "p n c"], memory: Float[Tensor, "p l c"]
    ) -> Float[Tensor, "p n c"]:
        """Attend to the memory.

        Args:
            tokens: n tokens of the current frame per prompt.
            positions: Position embeddings of the tokens. They are added to the query only.
            memory: Memory tokens of ``PerceiverResampler``.
        """
        past = self.memory_norm(memory)
        return tokens + self.attention(self.query_norm(tokens) + positions, past, past)[0]


@torch.no_grad()
def warm_start(resampler: PerceiverResampler, attention: MemoryCrossAttention) -> None:
    """Adjust small random weights so that the modules work before training.

    The identity is added to the value and output projections of the resampler's first layer, which pass tokens on
    unchanged, and to the query and key projections of the memory attention, which compare content and position. The
    random weights remain as an offset. The outputs of MLPs and of later layers' attention are scaled down.
    """
    first, *later = resampler.layers
    same = [first.attention.v_proj, first.attention.o_proj, attention.attention.q_proj, attention.attention.k_proj]
    for linear in same:
        linear.weight += torch.eye(len(linear.weight), device=linear.weight.device)
    for linear in (*(layer.mlp.fc2 for layer in resampler.layers), *(layer.attention.o_proj for layer in later)):
        linear.weight *= _SMALL
