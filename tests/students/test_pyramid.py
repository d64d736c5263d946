from __future__ import annotations

import math

import pytest
import torch
from tensors import assert_same_tensors, scramble
from transformers import AutoConfig, AutoModel

from samdistill.students import PyramidConfig, PyramidModel, StudentTrunk, StudentTrunkConfig
from samdistill.types import UserError

KINDS = ["es_ev_s", "es_rv_s", "es_tv_s"]


def tiny(backbone: str = "es_ev_s", image_size: int = 126) -> PyramidModel:
    torch.manual_seed(0)
    return PyramidModel(PyramidConfig(backbone=backbone, image_size=image_size, fpn_hidden_size=32))


@pytest.mark.parametrize(("image_size", "sizes"), [(1008, [252, 126, 63, 32]), (504, [126, 63, 32, 16])])
@pytest.mark.parametrize("backbone", ["es_rv_l", "es_ev_s", "es_tv_s"])
def test_levels_at_full_and_half_size(backbone: str, image_size: int, sizes: list[int]) -> None:
    with torch.device("meta"), torch.no_grad():
        model = PyramidModel(PyramidConfig(backbone=backbone, image_size=image_size)).eval()
        out = model(torch.empty(1, 3, image_size, image_size))
    assert [tuple(level.shape) for level in out.fpn_hidden_states] == [(1, 256, s, s) for s in sizes]
    assert [p.shape for p in out.fpn_position_encoding] == [level.shape for level in out.fpn_hidden_states]
    assert out.last_hidden_state.shape == (1, sizes[-1] ** 2, 256)


def test_size_is_that_of_the_description() -> None:
    """25.075M: the trunk's 22.404M, and per level c x 256 + 9 x 256 x 256 weights and two norms."""
    with torch.device("meta"):
        model = PyramidModel(PyramidConfig())
    adapters = sum(c * 256 + 9 * 256 * 256 + 2 * 2 * 256 for c in (80, 160, 320, 640))
    assert sum(p.numel() for p in model.backbone.parameters()) == 22_404_232
    assert sum(p.numel() for p in model.parameters()) == 22_404_232 + adapters == 25_074_824


def test_levels_are_signed() -> None:
    """A last ReLU could not reach the teacher's values below zero."""
    levels = tiny().eval()(torch.randn(1, 3, 126, 126)).fpn_hidden_states
    assert all(0.2 < (level < 0).float().mean() < 0.8 for level in levels)


def test_positions_are_sines_of_the_cell_for_every_image() -> None:
    position = tiny().eval()(torch.randn(2, 3, 126, 126)).fpn_position_encoding[2]
    assert torch.equal(position[0], position[1])
    row, column = 3, 5  # of 8 x 8; 16 channels of y, then 16 of x, each sine and cosine in turns
    for place, first in ((row, 0), (column, 16)):
        angle = 2 * math.pi * (place + 1) / 8
        for pair in (0, 3):
            scaled = angle / 10000 ** (2 * pair / 16)
            found = position[0, first + 2 * pair : first + 2 * pair + 2, row, column].tolist()
            assert found == pytest.approx([math.sin(scaled), math.cos(scaled)], abs=1e-4)


@pytest.mark.parametrize("backbone", KINDS)
def test_saved_and_loaded_again_it_computes_the_same(backbone: str, tmp_path) -> None:
    model = tiny(backbone).eval()
    scramble(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, PyramidModel)
    assert not any(info.values()), info
    assert_same_tensors(loaded, model)


@pytest.mark.parametrize("backbone", KINDS)
def test_a_trunk_of_the_encoder_job_fits(backbone: str) -> None:
    trunk = StudentTrunk(StudentTrunkConfig(backbone=backbone, hidden_size=32, image_size=126))
    model = tiny(backbone)
    model.backbone.load_state_dict(trunk.backbone.state_dict(), strict=True)
    names = {name for name in trunk.state_dict() if name.startswith("backbone.")}
    assert names == {name for name in model.state_dict() if name.startswith("backbone.")}


def test_statistics_are_the_backbones() -> None:
    config = AutoConfig.for_model("samdistill_pyramid", backbone="es_rv_m")
    assert isinstance(config, PyramidConfig) and config.backbone == "repvit_m1_1"
    assert (config.image_mean, config.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert PyramidConfig(backbone="vit_tiny_patch16_224").image_mean == [0.5, 0.5, 0.5]
    assert PyramidConfig(backbone="es_rv_m", image_mean=[0.1, 0.2, 0.3]).image_mean == [0.1, 0.2, 0.3]


def test_a_backbone_with_other_strides_is_refused() -> None:
    with pytest.raises(UserError, match="'vit_tiny_patch16_224' has strides 16; a pyramid needs 4, 8, 16 and 32"):
        PyramidModel(PyramidConfig(backbone="vit_tiny_patch16_224", image_size=112))
