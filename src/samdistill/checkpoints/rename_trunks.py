"""Names of trunks in the code that their authors published, and in timm: rows of (original, timm) prefixes.

``{i}`` and ``{j}`` match numbers, and the part after a prefix is kept. No value differs. timm's names are those of its
``features_only`` models, without a prefix. Original and timm divide the networks differently: a downsampling is the end
of a stage in the original TinyViT and the start of the next one in timm, and the original RepViT numbers all of its
blocks in one list.
"""

from __future__ import annotations

from collections.abc import Sequence

Rows = list[tuple[str, str]]

EFFICIENT_VIT: Rows = [
    ("input_stem.op_list.0.", "stem_in_conv."),
    ("input_stem.op_list.1.", "stem_res0."),
    ("stages.{i}.op_list.{j}.", "stages_{i}.blocks.{j}."),
]


def _convolution(there: str, here: str) -> Rows:
    """Return the rows of a TinyViT convolution and its batch norm."""
    return [(f"{there}.c.", f"{here}.conv."), (f"{there}.bn.", f"{here}.bn.")]


TINY_VIT: Rows = [
    *_convolution("patch_embed.seq.0", "patch_embed.conv1"),
    *_convolution("patch_embed.seq.2", "patch_embed.conv2"),
    *_convolution("layers.0.blocks.{i}.conv{j}", "stages_0.blocks.{i}.conv{j}"),
    *_convolution("layers.{i}.blocks.{j}.local_conv", "stages_{i}.blocks.{j}.local_conv"),
    *((f"layers.{{i}}.blocks.{{j}}.{name}.", f"stages_{{i}}.blocks.{{j}}.{name}.") for name in ("attn", "mlp")),
]
for _stage in range(3):
    TINY_VIT += _convolution(f"layers.{_stage}.downsample.conv{{j}}", f"stages_{_stage + 1}.downsample.conv{{j}}")


def rep_vit(depths: Sequence[int]) -> Rows:
    """Return the rows of a RepViT.

    Args:
        depths: Blocks of each stage in timm. Every stage but the first also has a downsampling, which is two numbers in
            the original: a block, and the downsampling itself with its feed-forward network.
    """
    rows: Rows = [("features.0.0.", "stem.conv1."), ("features.0.2.", "stem.conv2.")]
    number = 1
    for stage, depth in enumerate(depths):
        here = f"stages_{stage}."
        if stage:
            down, there = f"{here}downsample.", f"features.{number + 1}."
            rows += _block(number, f"{down}pre_block.")
            rows += [
                (f"{there}token_mixer.0.", f"{down}spatial_downsample."),
                (f"{there}token_mixer.2.", f"{down}channel_downsample."),
                *_mixer(there, f"{down}ffn."),
            ]
            number += 2
        for block in range(depth):
            rows += _block(number + block, f"{here}blocks.{block}.")
        number += depth
    return rows


def _block(number: int, here: str) -> Rows:
    there = f"features.{number}."
    return [
        (f"{there}token_mixer.0.", f"{here}token_mixer."),
        (f"{there}token_mixer.1.", f"{here}se."),
        *_mixer(there, f"{here}channel_mixer."),
    ]


def _mixer(there: str, here: str) -> Rows:
    return [(f"{there}channel_mixer.m.0.", f"{here}conv1."), (f"{there}channel_mixer.m.2.", f"{here}conv2.")]
