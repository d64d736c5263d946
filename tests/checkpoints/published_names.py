"""Names and shapes of published files' tensors, written down from the descriptions of the architectures."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

REPVIT = {  # widths; blocks of each stage, without the downsampling before it
    "repvit_m0_9": ((48, 96, 192, 384), (3, 3, 15, 2)),
    "repvit_m1_1": ((64, 128, 256, 512), (3, 3, 13, 2)),
    "repvit_m2_3": ((80, 160, 320, 640), (7, 7, 35, 2)),
}
EFFICIENTVIT = {  # widths and depths of the stem and the stages, channels of a head
    "efficientvit_b0": ((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), 16),
    "efficientvit_b1": ((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16),
    "efficientvit_b2": ((24, 48, 96, 192, 384), (1, 3, 4, 4, 6), 32),
}
TINY_VIT = {  # widths, and the windows of the last three stages
    "tiny_vit_5m_224": (64, 128, 160, 320), "tiny_vit_11m_224": (64, 128, 256, 448),
    "tiny_vit_21m_224": (96, 192, 384, 576),
}  # fmt: skip
TEXTS = {  # layers, width, whether the first and the last layer are convolutions
    "s0": (6, 512, True), "s1": (12, 512, False), "l": (12, 768, False),
}  # fmt: skip


def affine(name: str, *shape: int) -> Shapes:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def neck(inputs: int, c: int) -> Shapes:
    at = "image_encoder.neck"
    convolutions = {f"{at}.0.weight": (c, inputs, 1, 1), f"{at}.2.weight": (c, c, 3, 3)}
    return convolutions | affine(f"{at}.1", c) | affine(f"{at}.3", c)


def normed(name: str, *shape: int) -> Shapes:
    """TinyViT's convolution without bias, and its batch norm."""
    statistics = {f"{name}.bn.{which}": shape[:1] for which in ("running_mean", "running_var")}
    return {f"{name}.c.weight": shape, f"{name}.bn.num_batches_tracked": (), **statistics} | affine(
        f"{name}.bn", shape[0]
    )


def norm(name: str, width: int) -> Shapes:
    statistics = {f"{name}.{which}": (width,) for which in ("weight", "bias", "running_mean", "running_var")}
    return statistics | {f"{name}.num_batches_tracked": ()}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def divisible(value: float) -> int:
    """The nearest multiple of eight, and not 10 % less, as in MobileNet."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 * (rounded < 0.9 * value)


def repvit(widths: tuple[int, ...], depths: tuple[int, ...], fused_norm: bool = True) -> Shapes:
    """``fused_norm``: one norm after the sum of the branches. EdgeSAM's has one in each branch instead."""
    first = widths[0]
    found = normed("features.0.0", first // 2, 3, 3, 3) | normed("features.0.2", first, first // 2, 3, 3)
    number = 1

    def mixer(at: str, width: int) -> Shapes:
        return normed(f"{at}.channel_mixer.m.0", 2 * width, width, 1, 1) | normed(
            f"{at}.channel_mixer.m.2", width, 2 * width, 1, 1
        )

    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            at, before = f"features.{number}", widths[stage - 1]
            found |= normed(f"{at}.token_mixer.0", before, 1, 3, 3) | normed(f"{at}.token_mixer.2", width, before, 1, 1)
            found |= mixer(at, width)
            number += 1
        last = depth - (stage < 3)  # the last block before a downsampling never squeezes
        for block in range(depth):
            at = f"features.{number}"
            found |= normed(f"{at}.token_mixer.0.conv", width, 1, 3, 3) | mixer(at, width)
            if fused_norm:
                found |= affine(f"{at}.token_mixer.0.conv1", width, 1, 1, 1) | norm(f"{at}.token_mixer.0.bn", width)
            else:
                found |= normed(f"{at}.token_mixer.0.conv1", width, 1, 1, 1)
            if block % 2 == 0 and block < last:
                inner = divisible(width / 4)
                found |= affine(f"{at}.token_mixer.1.fc1", inner, width, 1, 1)
                found |= affine(f"{at}.token_mixer.1.fc2", width, inner, 1, 1)
            number += 1
    return found


def tiny_vit(widths=(64, 128, 160, 320), depths=(2, 2, 6, 2), windows=(7, 7, 14, 7)) -> Shapes:
    first = widths[0]
    found = normed("patch_embed.seq.0", first // 2, 3, 3, 3)
    found |= normed("patch_embed.seq.2", first, first // 2, 3, 3)
    for stage, (width, depth, window) in enumerate(zip(widths, depths, windows, strict=True)):
        for i in range(depth):
            block = f"layers.{stage}.blocks.{i}"
            if stage == 0:
                found |= normed(f"{block}.conv1", 4 * width, width, 1, 1) | normed(
                    f"{block}.conv3", width, 4 * width, 1, 1
                )
                found |= normed(f"{block}.conv2", 4 * width, 1, 3, 3)
                continue
            found[f"{block}.attn.attention_biases"] = (width // 32, window * window)
            found |= affine(f"{block}.attn.norm", width) | affine(f"{block}.mlp.norm", width)
            found |= affine(f"{block}.attn.qkv", 3 * width, width) | affine(f"{block}.attn.proj", width, width)
            found |= affine(f"{block}.mlp.fc1", 4 * width, width) | affine(f"{block}.mlp.fc2", width, 4 * width)
            found |= normed(f"{block}.local_conv", width, 1, 3, 3)
        if stage < 3:
            down, out = f"layers.{stage}.downsample", widths[stage + 1]
            found |= normed(f"{down}.conv1", out, width, 1, 1) | normed(f"{down}.conv2", out, 1, 3, 3)
            found |= normed(f"{down}.conv3", out, out, 1, 1)
    return found


def efficientvit(widths: tuple[int, ...], depths: tuple[int, ...], head: int) -> Shapes:
    def layer(at: str, *shape: int, bias: bool = False, normal: bool = True) -> Shapes:
        found: Shapes = {f"{at}.conv.weight": shape} | ({f"{at}.conv.bias": shape[:1]} if bias else {})
        return found | (norm(f"{at}.norm", shape[0]) if normal else {})

    def bottleneck(at: str, inputs: int, outputs: int, late: bool) -> Shapes:
        """``late``: with biases instead of the first two norms, as in the last two stages."""
        inner, plain = 4 * inputs, {"bias": late, "normal": not late}
        return (
            layer(f"{at}.inverted_conv", inner, inputs, 1, 1, **plain)
            | layer(f"{at}.depth_conv", inner, 1, 3, 3, **plain)
            | layer(f"{at}.point_conv", outputs, inner, 1, 1)
        )

    first = widths[0]
    found = layer("input_stem.op_list.0", first, 3, 3, 3)
    for block in range(1, depths[0] + 1):
        at = f"input_stem.op_list.{block}.main"
        found |= layer(f"{at}.depth_conv", first, 1, 3, 3) | layer(f"{at}.point_conv", first, first, 1, 1)
    for stage in range(4):
        inputs, width, late = widths[stage], widths[stage + 1], stage >= 2
        at = f"stages.{stage}.op_list"
        found |= bottleneck(f"{at}.0.main", inputs, width, late)
        for block in range(1, depths[stage + 1] + (1 if late else 0)):
            if not late:
                found |= bottleneck(f"{at}.{block}.main", width, width, False)
                continue
            attention = f"{at}.{block}.context_module.main"
            found |= layer(f"{attention}.qkv", 3 * width, width, 1, 1, normal=False)
            found |= {
                f"{attention}.aggreg.0.0.weight": (3 * width, 1, 5, 5),
                f"{attention}.aggreg.0.1.weight": (3 * width, head, 1, 1),
            }
            found |= layer(f"{attention}.proj", width, 2 * width, 1, 1)
            found |= bottleneck(f"{at}.{block}.local_module.main", width, width, True)
    return found


def trunk(name: str, hidden: int = 1024) -> Shapes:
    """The file of a student of EfficientSAM3's first stage."""
    if name in REPVIT:
        own, deepest = repvit(*REPVIT[name]), REPVIT[name][0][-1]
    elif name in EFFICIENTVIT:
        own, deepest = efficientvit(*EFFICIENTVIT[name]), EFFICIENTVIT[name][0][-1]
    else:
        own, deepest = tiny_vit(TINY_VIT[name]), TINY_VIT[name][-1]
    head: Shapes = {"head.0.weight": (hidden, deepest, 1, 1)}
    return under("backbone.model.", own) | head | norm("head.1", hidden) | affine("head.3", hidden, hidden, 3, 3)


def text(layers: int, width: int, mixers: bool, context: int = 16, vocabulary: int = 49408, out: int = 256) -> Shapes:
    """The file of a text student of EfficientSAM3's first stage."""
    found: Shapes = {
        "encoder.embedding_layer.weight": (vocabulary, width),
        "encoder.positional_embedding.pos_embed.pos_embed": (1, 1, context, width),
        "encoder.projection_layer": (width, width),
    }
    for number in range(layers):
        at = f"encoder.transformer.{number}"
        if mixers and number in (0, layers - 1):
            found |= {f"{at}.layer_scale": (width, 1, 1), f"{at}.token_mixer.layer_scale": (width, 1, 1)}
            found |= norm(f"{at}.token_mixer.norm.rbr_skip", width) | norm(f"{at}.token_mixer.mixer.rbr_skip", width)
            found |= {f"{at}.token_mixer.mixer.rbr_conv.0.conv.weight": (width, 1, 1, 11)}
            found |= norm(f"{at}.token_mixer.mixer.rbr_conv.0.bn", width)
            found |= {f"{at}.convffn.conv.conv.weight": (width, 1, 1, 11)} | norm(f"{at}.convffn.conv.bn", width)
            found |= affine(f"{at}.convffn.fc1", 4 * width, width, 1, 1)
            found |= affine(f"{at}.convffn.fc2", width, 4 * width, 1, 1)
            continue
        found |= affine(f"{at}.pre_norm_mha.0", width) | affine(f"{at}.pre_norm_ffn.0", width)
        found |= affine(f"{at}.pre_norm_mha.1.qkv_proj", 3 * width, width)
        found |= affine(f"{at}.pre_norm_mha.1.out_proj", width, width)
        found |= affine(f"{at}.pre_norm_ffn.1", 4 * width, width) | affine(f"{at}.pre_norm_ffn.4", width, 4 * width)
    return found | affine("encoder.final_layer_norm", width) | affine("projector", out, width)


def edge_sam() -> Shapes:
    """EdgeSAM's image encoder."""
    own = repvit((48, 96, 192, 384), (3, 3, 15, 2), fused_norm=False)
    fused: Shapes = {"fuse_stage2.weight": (256, 192, 1, 1), "fuse_stage3.op_list.0.weight": (256, 384, 1, 1)}
    return under("image_encoder.", own | fused) | neck(256, 256)
