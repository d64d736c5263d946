"""The sandbox's SAM and MobileSAM: their geometry, and what they are given to start with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_models import build_sam
from samdistill.checkpoints.promptable import load_promptable
from samdistill.ops.promptable import Embeddings, decoder_width, embed, embedding_grid, image_size, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import ImageBatch, Prompts
from tracker_model import HELD_OUT_SEED, IMAGE_SIZE


@pytest.fixture(scope="module")
def sam():
    return build_sam(0).eval()


@pytest.fixture(scope="module")
def tracker():
    return load_promptable("sandbox")


def test_it_has_the_tracker_s_geometry_and_a_sam_s_decoder(sam, tracker) -> None:
    assert image_size(sam) == image_size(tracker) == IMAGE_SIZE
    assert embedding_grid(sam) == embedding_grid(tracker) == (9, 9)
    assert decoder_width(sam) == decoder_width(tracker) == 128
    assert 2 * sum(p.numel() for p in sam.parameters()) < 10e6  # bytes as float16
    with torch.no_grad():
        found = embed(sam, ImageBatch.full(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)))
    assert [tuple(level.shape) for level in found.levels] == [(1, 128, 9, 9)]
    assert found.trunk.shape == (1, 192, 9, 9)


class Affine(nn.Module):
    """What a SAM can have in the place of the tracker's first norm."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.scale, self.shift = norm.weight, norm.bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.scale + self.shift


def test_its_trunk_is_the_tracker_s_without_rotations(sam, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageBatch.full(render_scenes([3], IMAGE_SIZE, HELD_OUT_SEED).images)
    still = load_promptable("sandbox")
    backbone = still.vision_encoder.backbone
    backbone.layer_norm = Affine(backbone.layer_norm)
    for module in backbone.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.zero_()
            monkeypatch.setattr(module, "forward", lambda x, at: (torch.ones(81, 32), torch.zeros(81, 32)))
    with torch.no_grad():
        ours, theirs = embed(sam, images).trunk, embed(still, images).trunk
    assert theirs.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "most"), [("box", 0.2), ("points", 0.06), ("mask", 0.06)])
def test_its_decoder_answers_as_the_tracker_s_on_a_map_without_finer_ones(sam, tracker, kind: str, most: float) -> None:
    """Nearly: the tracker has one token more, for the object's score, and pads a box with a token that says nothing.

    A layer of the decoder in noise makes it 0.3 and more.
    """
    draws = torch.Generator().manual_seed(0)
    image = torch.randn(1, 128, 9, 9, generator=draws)
    finer = (torch.zeros(1, 16, 36, 36), torch.zeros(1, 32, 18, 18))
    valid, labels = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[[1, 0], [1, 1]]])
    corners = torch.tensor([[[10.0, 20, 60, 90], [33, 30, 120, 80]]])
    points = corners.view(1, 2, 2, 2)
    prompts = {
        "box": Prompts(valid, boxes=corners),
        "points": Prompts(valid, points=points, labels=labels),
        "mask": Prompts(valid, points=points, labels=labels, masks=torch.randn(1, 2, 36, 36, generator=draws)),
    }[kind]
    with torch.no_grad():
        ours = predict(sam, Embeddings((image,), image), prompts).low_res_masks
        theirs = predict(tracker, Embeddings((*finer, image), image), prompts).low_res_masks
    assert (ours - theirs).norm() < most * theirs.norm()


def test_fresh_parts_follow_from_the_seed(sam) -> None:
    same, other = build_sam(0).state_dict(), build_sam(1).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in sam.state_dict().items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in same.items())
