"""What a video student remembers with: past frames resampled into a few tokens, and the current frame reading them.

Both modules are transformers' SAM 3 attention and MLP in the arrangement of Perceiver (Jaegle et al., 2021) and of
Flamingo's resampler (Alayrac et al., 2022). Where and when a token of the past was seen is added to it as sines;
without them a memory holds what there was, and cannot say where.

Both begin as something that works, by ``warm_start``: a latent as the mean of what it looks at, and reading as a look
at what was in the same place. With random weights the detector learns to ignore its memory before it learns to use it.
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
_LONGEST = 10_000.0  # as the positions of a transformer (Vaswani et al., 2017)


def age_embedding(ages: Float[Tensor, "b t"], width: int) -> Float[Tensor, "b t c"]:
    """Sines and cosines of how long ago a frame was; any real number, in the unit that the model was trained with."""
    rates = torch.exp(torch.arange(0, width, 2, device=ages.device) * (-math.log(_LONGEST) / width))
    phase = ages[..., None].float() * rates
    return torch.stack((phase.sin(), phase.cos()), -1).flatten(-2)[..., :width].to(ages.dtype)


def window_of(grid: tuple[int, int], windows: int, device: torch.device) -> Bool[Tensor, "w n"]:
    """Which cells of a grid (row-major) lie in each of ``windows`` x ``windows`` equal windows (row-major).

    A cell belongs to the window that its centre lies in, so every cell has one window. A grid narrower than
    ``windows`` would leave some of them empty: ``ValueError``.
    """
    if min(grid) < windows:
        raise ValueError(f"{windows} x {windows} windows on a grid of {grid[0]} x {grid[1]} leave some without a cell")
    rows, columns = (((torch.arange(n, device=device) + 0.5) * (windows / n)).long() for n in grid)
    of_cell = (rows[:, None] * windows + columns[None, :]).flatten()
    return of_cell[None] == torch.arange(windows**2, device=device)[:, None]


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention of the latents to the past, then a pre-norm MLP; both residual."""

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
    """Feature maps of past frames to ``latents`` tokens, however many frames there are.

    windows: 0 lets every latent look everywhere. Otherwise the last ``windows`` x ``windows`` latents look at one
    window each, in every frame, and carry its place; the others stay global. A window keeps "here" apart from "there",
    which latents that may look everywhere have to learn (2-D perceiver of EdgeTAM, Zhou et al., 2025).
    Raises ``ValueError`` where the windows leave no global latent.
    """

    def __init__(self, config: Sam3LiteTextDETREncoderConfig, latents: int, layers: int, windows: int = 0) -> None:
        super().__init__()
        if windows**2 >= latents:
            raise ValueError(f"{windows} x {windows} windows leave none of {latents} latents to look everywhere")
        self.windows = windows
        self.latents = nn.Parameter(torch.randn(latents, config.hidden_size) * LATENT_STD)
        # as large as what it is added to, normalised features: a smaller one is lost among them
        self.target = nn.Parameter(torch.randn(config.hidden_size))
        self.positions = Sam3LiteTextSinePositionEmbedding(config.hidden_size // 2, normalize=True)
        self.input_norm, self.output_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(layers))

    def forward(
        self, features: Float[Tensor, "b t c h w"], ages: Float[Tensor, "b t"],
        valid: Bool[Tensor, "b t"] | None = None, masks: Float[Tensor, "b t mh mw"] | None = None,
    ) -> Float[Tensor, "b l c"]:  # fmt: skip
        """features: of the past frames; ages: how long ago each was; valid: False for frames that only pad the batch.
        masks: where the thing that is asked about was in each, as shares of cells of any grid.

        The features of a frame do not say which of the things in it is meant: to tell a thing from its look-alikes a
        memory needs the masks. The cells they cover are marked, and some latents look at those alone (as the object
        memory of Cutie does, Cheng et al., 2024). A clip without any valid frame has no memory to speak of: leave it
        out.
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
        """Nothing for the global latents, the sines of its window for each other one."""
        places = torch.zeros_like(self.latents)
        if self.windows:
            own = self._sines((self.windows, self.windows), like).flatten(1).T
            places = torch.cat([places[: -(self.windows**2)], own])
        return places

    def _bias(
        self, shape: tuple[int, int, int, int], ages: Float[Tensor, "b t"], valid: Bool[Tensor, "b t"] | None,
        share: Float[Tensor, "b t h w"] | None, like: Tensor,
    ) -> Float[Tensor, "b heads l n"]:  # fmt: skip
        """What is added to the logits of attention: nearly -inf where a latent may not look, and less the older a frame
        is, by a slope of each head's own (ALiBi, Press et al., 2022): the first sees the last frames, the last all.

        Not a bool mask: transformers' eager attention adds whatever mask it gets.
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
        slopes = 0.5 ** torch.arange(self.layers[0].attention.num_attention_heads, device=device)
        older = (slopes[:, None, None, None] * ages[:, None, None, :, None]).to(like.dtype)
        recency = -older.expand(b, -1, 1, t, h * w)
        return recency.masked_fill(~seen[:, None], torch.finfo(like.dtype).min).flatten(3)

    def _followed(self, share: Float[Tensor, "b t h w"], valid: Bool[Tensor, "b t"] | None) -> Bool[Tensor, "b l t n"]:
        """The first half of the global latents looks at the marked cells alone, where there are any."""
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
        """positions: where each token is, added to the query alone."""
        past = self.memory_norm(memory)
        return tokens + self.attention(self.query_norm(tokens) + positions, past, past)[0]


@torch.no_grad()
def warm_start(resampler: PerceiverResampler, attention: MemoryCrossAttention) -> None:
    """Let modules with small random weights begin as something that works.

    Queries and keys that are what they are compare places and looks; values that are what they are hand them on. The
    random weights stay on top. What later layers add is small at first.
    """
    first, *later = resampler.layers
    same = [first.attention.v_proj, first.attention.o_proj, attention.attention.q_proj, attention.attention.k_proj]
    for linear in same:
        linear.weight += torch.eye(len(linear.weight), device=linear.weight.device)
    for linear in (*(layer.mlp.fc2 for layer in resampler.layers), *(layer.attention.o_proj for layer in later)):
        linear.weight *= _SMALL
