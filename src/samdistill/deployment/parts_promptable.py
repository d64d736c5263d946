"""Files of a promptable model: image encoder and prompt decoder, with the names that transformers.js reads."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..ops.outputs import recorded
from ..ops.promptable import Promptable, Pyramidal, embedding_grid, image_size, levels_of
from .parts import Part, Sizes, pictures, ports
from .workarounds import regroup

_CASES = (
    {"batch": 2, "prompts": 2, "points": 1, "boxes": 0},
    {"batch": 1, "prompts": 1, "points": 3, "boxes": 0},
    {"batch": 1, "prompts": 2, "points": 0, "boxes": 2},
    {"batch": 2, "prompts": 3, "points": 0, "boxes": 3},
    {"batch": 1, "prompts": 1, "points": 2, "boxes": 1},
)
"""Points alone, boxes alone, and both."""


class ImageEncoder(nn.Module):
    """Image encoder of a promptable model, with the constant that its decoder adds."""

    def __init__(self, model: Promptable) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, ...]:
        """Return the levels, finest first, of a tracker, or the embedding and the positions of a SAM."""
        model, batch = self.model, pixel_values.shape[0]
        if not isinstance(model, Pyramidal):
            positions = model.get_image_wide_positional_embeddings()
            return model.vision_encoder(pixel_values).last_hidden_state, positions.expand(batch, -1, -1, -1)
        return levels_of(model, model.get_image_features(pixel_values, return_dict=True))


class PromptDecoder(nn.Module):
    """Prompt encoder and mask decoder for any number of points and boxes, also none.

    transformers' forward pass has a branch for each combination of prompts; this module has one that gives the same
    tokens. It returns the three masks of an ambiguous prompt and the single mask.

    Args:
        model: The model.
        names: Names of the inputs, in their order.
    """

    def __init__(self, model: Promptable, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return scores and masks; the outputs of the part have their names and shapes."""
        given = dict(zip(self.names, inputs, strict=True))
        levels = [given[name] for name in self.names if name.startswith("image_embeddings")]
        batch, prompts = levels[-1].shape[0], _prompt_count(given)
        positions = given.get("image_positional_embeddings")
        if positions is None:
            positions = self.model.get_image_wide_positional_embeddings().expand(batch, -1, -1, -1)
        sparse, masks = self._sparse(given, batch, prompts), given.get("input_masks")
        if masks is not None:  # the decoder adds a mask to the whole image, so each prompt gets its own image
            levels, positions = [_each(level, prompts) for level in levels], _each(positions, prompts)
            sparse = sparse.flatten(0, 1)[:, None]
        found = self._decode(levels, positions, sparse, self._dense(masks, levels[-1].shape[0]))
        return tuple(one.reshape(batch, prompts, *one.shape[2:]) for one in found)

    def _sparse(self, given: dict[str, Tensor], batch: int, prompts: int) -> Float[Tensor, "b n t c"]:
        """Embed points, then the two corners of each box or a token for no point. A tracker has that token always."""
        encoder, parts = self.model.prompt_encoder, []
        if (labels := given.get("input_labels")) is not None:
            points = regroup(given["input_points"], (*labels.shape, 2))
            parts.append(encoder._embed_points(points, labels, pad=False))
        nothing = encoder.not_a_point_embed.weight.expand(batch, prompts, -1)
        width = nothing.shape[-1]
        if (boxes := given.get("input_boxes")) is None:
            return torch.cat([*parts, nothing[:, :, None]], 2)
        count, side = boxes.shape[1], encoder.input_image_size  # as many as prompts, or none
        corners = encoder.shared_embedding(boxes.reshape(batch, count, 2, 2) + 0.5, (side, side))
        corners = (corners + self._corners()).flatten(1, 2)
        if isinstance(self.model, Pyramidal):
            parts.append(regroup(corners, (batch, prompts, 2 * (count // prompts), width)))
            return torch.cat([*parts, nothing[:, :, None]], 2)
        extra = torch.cat([corners, nothing], 1)[:, : prompts + count]
        return torch.cat([*parts, regroup(extra, (batch, prompts, 1 + count // prompts, width))], 2)

    def _corners(self) -> Float[Tensor, "2 c"]:
        table = self.model.prompt_encoder.point_embed
        return table.weight[2:4] if isinstance(table, nn.Embedding) else torch.cat([e.weight for e in table[2:4]])

    def _dense(self, masks: Tensor | None, batch: int) -> Float[Tensor, "b c gh gw"]:
        encoder = self.model.prompt_encoder
        if masks is not None:
            return encoder.mask_embed(masks.reshape(-1, 1, *masks.shape[2:]))
        height, width = encoder.image_embedding_size
        return encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(batch, -1, height, width)

    def _decode(self, levels: list[Tensor], positions: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        """Run the mask decoder. Its single mask is taken from inside, because it returns either that or the others."""
        decoder = self.model.mask_decoder
        tracker = isinstance(self.model, Pyramidal)
        more = {"high_resolution_features": levels[:-1]} if tracker else {}
        with (
            recorded(decoder.activation) as grown, recorded(decoder.iou_prediction_head) as scored,
            recorded(decoder.output_hypernetworks_mlps[0]) as token,
        ):  # fmt: skip
            masks, scores, *rest = decoder(
                image_embeddings=levels[-1], image_positional_embeddings=positions, sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense, multimask_output=True, **more,
            )  # fmt: skip
        batch, prompts = sparse.shape[:2]
        cells = grown.output.flatten(2).reshape(batch, prompts, grown.output.shape[1], -1)
        single = (token.output[:, :, None] @ cells).reshape(batch, prompts, 1, *masks.shape[-2:])
        best = scored.output[:, :, :1]
        if getattr(decoder, "dynamic_multimask_via_stability", False):
            single, best = decoder._dynamic_multimask_via_stability(torch.cat([single, masks], 2), scored.output)
        return scores, masks, *rest[1:], best, single


def _prompt_count(given: dict[str, Tensor]) -> int:
    """Return the number of prompts of each image."""
    return given["input_labels" if "input_labels" in given else "input_boxes"].shape[1]


def _each(tensor: Tensor, count: int) -> Tensor:
    """Repeat each image of a batch ``count`` times, in the order of its prompts."""
    return tensor[:, None].expand(-1, count, *tensor.shape[1:]).flatten(0, 1)


def promptable_parts(model: Promptable, static: bool) -> list[Part]:
    """Return the files of a promptable model.

    A file with fixed axes has a fixed number of points and boxes, and points cannot be padded. ``static`` therefore
    gives one decoder for a point and one for a box.

    Args:
        model: The model, in float32 on the CPU.
        static: Whether all axes are fixed.
    """
    encoder = _encoder_part(model, static)
    fixed = (("points",), ("boxes",), ("points", "masks"))
    kinds = fixed if static else (("points", "boxes"), ("points", "boxes", "masks"))
    return [encoder, *(_decoder_part(model, encoder, kind, static) for kind in kinds)]


def _encoder_part(model: Promptable, static: bool) -> Part:
    side, module = image_size(model), ImageEncoder(model).eval()
    one = {"batch": 1}

    def example(sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
        return (pictures(sizes["batch"], side, seed),)

    names = ("image_embeddings", "image_positional_embeddings")
    with torch.no_grad():
        found = module(*example(one, 0))
    if isinstance(model, Pyramidal):
        names = tuple(f"image_embeddings.{level}" for level in range(len(found)))
    outputs = (port for name, x in zip(names, found, strict=True) for port in ports([name], "batch", *x.shape[1:]))
    return Part(
        "vision_encoder", module, ports(["pixel_values"], "batch", 3, side, side), tuple(outputs), example,
        traced=one if static else {"batch": 2}, cases=(one,) if static else (one, {"batch": 2}, {"batch": 3}),
        reference=module, probe=partial(_probe, model),
    )  # fmt: skip


def _probe(model: Promptable, *outputs: Tensor) -> Tensor:
    """Return the masks of four points of each image."""
    tracker, side = isinstance(model, Pyramidal), image_size(model)
    places = torch.tensor([[0.3, 0.3], [0.7, 0.3], [0.3, 0.7], [0.7, 0.7]]) * side
    batch = outputs[0].shape[0]
    found = model(
        image_embeddings=list(outputs) if tracker else outputs[0], multimask_output=True,
        input_points=places[None, :, None].expand(batch, -1, -1, -1), input_labels=torch.ones(batch, 4, 1).long(),
    )  # fmt: skip
    return found.pred_masks


def _decoder_part(model: Promptable, encoder: Part, kinds: tuple[str, ...], static: bool) -> Part:
    grid = 4 * embedding_grid(model)[0]
    prompts = {
        "points": (
            *ports(["input_points"], "batch", "prompts_of_points", "points", 2),
            *ports(["input_labels"], "batch", "prompts", "points", dtype=torch.int64),
        ),
        "boxes": ports(["input_boxes"], "batch", "prompts_of_boxes", 4),
        "masks": ports(["input_masks"], "batch", "prompts", grid, grid),
    }
    inputs = (*(port for kind in kinds for port in prompts[kind]), *encoder.outputs)
    names = tuple(port.name for port in inputs)
    masks = ("batch", "prompts")
    outputs = [*ports(["iou_scores"], *masks, 3), *ports(["pred_masks"], *masks, 3, grid, grid)]
    if isinstance(model, Pyramidal):
        outputs += ports(["object_score_logits"], *masks, 1)
    outputs += [*ports(["single_iou_scores"], *masks, 1), *ports(["single_masks"], *masks, 1, grid, grid)]
    ending = "_".join(kind for kind in kinds if kind == "masks" or (static and kind == "boxes"))
    sizes = {"batch": 2, "prompts": 3, "points": 5, "boxes": 3}
    fixed = {"batch": 1, "prompts": 1, "points": int("points" in kinds), "boxes": int("boxes" in kinds)}
    return Part(
        f"prompt_encoder_mask_decoder{ending and '_' + ending}", PromptDecoder(model, names).eval(), inputs,
        tuple(outputs), partial(_prompts, model, encoder, names), traced=fixed if static else sizes,
        cases=(fixed,) if static else _CASES, reference=partial(_forward, model, names),
        masks=("pred_masks", "single_masks"),
    )  # fmt: skip


def _prompts(model: Promptable, encoder: Part, names: tuple[str, ...], sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
    """Return random prompts on images that ``encoder`` has encoded."""
    generator, side = torch.Generator().manual_seed(seed), image_size(model)
    batch, prompts, points, boxes = (sizes[name] for name in ("batch", "prompts", "points", "boxes"))
    grid = 4 * embedding_grid(model)[0]
    with torch.no_grad():
        levels = encoder.module(*encoder.example({"batch": batch}, seed))
    corners = torch.rand(batch, boxes, 2, 2, generator=generator).sort(2).values.flatten(2) * side
    given = {
        "input_points": torch.rand(batch, prompts if points else 1, points, 2, generator=generator) * side,
        "input_labels": torch.randint(2, (batch, prompts, points), generator=generator),
        "input_boxes": corners,
        "input_masks": 4 * pictures(batch * prompts, grid, seed)[:, 0].reshape(batch, prompts, grid, grid),
        **{port.name: level for port, level in zip(encoder.outputs, levels, strict=True)},
    }
    return tuple(given[name] for name in names)


def _forward(model: Promptable, names: tuple[str, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs with transformers' forward pass, one prompt per image if there are mask prompts."""
    given = dict(zip(names, inputs, strict=True))
    levels = [given[name] for name in names if name.startswith("image_embeddings")]
    points, labels, boxes, masks = (
        one if (one := given.get(f"input_{kind}")) is not None and one.numel() else None
        for kind in ("points", "labels", "boxes", "masks")
    )
    batch = levels[-1].shape[0]
    prompts = _prompt_count(given)
    if masks is not None:
        levels = [_each(level, prompts) for level in levels]
        points, labels, boxes, masks = (
            None if one is None else one.flatten(0, 1)[:, None] for one in (points, labels, boxes, masks)
        )
    three, one = (
        model(
            image_embeddings=levels if isinstance(model, Pyramidal) else levels[-1], input_points=points,
            input_labels=labels, input_boxes=boxes, input_masks=masks, multimask_output=many,
        )
        for many in (True, False)
    )  # fmt: skip
    logits = [three.object_score_logits] if isinstance(model, Pyramidal) else []
    found = (three.iou_scores, three.pred_masks, *logits, one.iou_scores, one.pred_masks)
    return tuple(each.reshape(batch, prompts, *each.shape[2:]) for each in found)
