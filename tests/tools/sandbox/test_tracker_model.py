"""The sandbox's teacher: how it starts, and how it is scored."""

from __future__ import annotations

import pytest
import torch

from samdistill.checkpoints.promptable import load_promptable
from samdistill.inference.prompting import PROMPTS
from samdistill.ops.promptable import embed
from samdistill.sandbox.scenes import render_scenes
from samdistill.types import ImageBatch
from tracker_model import HELD_OUT_SEED, IMAGE_SIZE, TRAIN_SEED, build_teacher, score, teacher_config


@pytest.fixture(scope="module")
def fresh():
    return build_teacher(0).eval()


def test_points_and_image_share_their_positional_encoding(fresh) -> None:
    """transformers draws the two apart; a point then means no place in the image."""
    image, prompts = fresh.shared_image_embedding, fresh.prompt_encoder.shared_embedding
    assert torch.equal(image.positional_embedding, prompts.positional_embedding)
    grid = IMAGE_SIZE // 14
    centre = torch.tensor([[[[(4 + 0.5) * 14, (2 + 0.5) * 14]]]])  # column 4, row 2
    place = prompts(centre, (IMAGE_SIZE, IMAGE_SIZE))[0, 0, 0]
    found = fresh.get_image_wide_positional_embeddings()[0]
    assert found.shape[-2:] == (grid, grid)
    distance = (found - place[:, None, None]).norm(dim=0)
    assert divmod(int(distance.argmin()), grid) == (2, 4) and distance.min() < 1e-4


def test_the_seed_decides_the_weights() -> None:
    first, same, other = build_teacher(3).state_dict(), build_teacher(3).state_dict(), build_teacher(4).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_cross_attentions_start_with_equal_queries_and_keys(fresh) -> None:
    pairs = [
        m for n, m in fresh.mask_decoder.transformer.named_modules() if n.endswith(("image", "attn_token_to_image"))
    ]
    pairs = [m for m in pairs if hasattr(m, "q_proj")]
    assert len(pairs) >= 3
    assert all(torch.equal(m.q_proj.weight, m.k_proj.weight) for m in pairs)


def test_it_is_small_and_of_the_documented_geometry(fresh) -> None:
    config = teacher_config()
    trunk = config.vision_config.backbone_config
    assert (trunk.image_size, trunk.patch_size, trunk.hidden_size) == (126, 14, 192)
    assert 2 * sum(p.numel() for p in fresh.parameters()) < 10e6  # bytes as float16
    with torch.no_grad():
        found = embed(fresh, ImageBatch.full(torch.zeros(1, 3, 126, 126, dtype=torch.uint8)))
    assert [tuple(level.shape[-2:]) for level in found.levels] == [(36, 36), (18, 18), (9, 9)]
    assert found.trunk.shape == (1, 192, 9, 9)


def test_score_has_one_iou_per_annotated_object(fresh) -> None:
    scenes = render_scenes(range(3), IMAGE_SIZE, HELD_OUT_SEED)
    found = score(fresh.train(), scenes)
    assert tuple(found) == PROMPTS and not fresh.training
    for ious in found.values():
        assert ious.shape == (int(scenes.valid.sum()),) and bool(((ious >= 0) & (ious <= 1)).all())


def test_the_packaged_teacher_opens_and_knows_what_an_untrained_one_does_not(fresh) -> None:
    assert TRAIN_SEED != HELD_OUT_SEED
    scenes = render_scenes(range(12), IMAGE_SIZE, HELD_OUT_SEED)
    trained, untrained = score(load_promptable("sandbox"), scenes), score(fresh, scenes)
    assert all(trained[kind].mean() > untrained[kind].mean() + 0.2 for kind in PROMPTS)
