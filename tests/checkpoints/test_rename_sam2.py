"""SAM 2's table against names that another table gives, written after the original code, and the published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_names import sam2_to_original
from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

from samdistill.checkpoints.files import TensorInfo
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.rename_sam2 import is_sam2, sam2_config, to_sam2
from samdistill.checkpoints.sam import open_sam, sam_kind
from samdistill.types import UserError

SIZES = {  # width, heads, blocks, global blocks, windows, background, tensors in the published files of 2.1 and 2
    "tiny": (96, 1, [1, 2, 7, 2], [5, 7, 9], [8, 4, 14, 7], [7, 7], 471, 468),
    "small": (96, 1, [1, 2, 11, 2], [7, 10, 13], [8, 4, 14, 7], [7, 7], 519, 516),
    "base+": (112, 2, [2, 3, 16, 3], [12, 16, 20], [8, 4, 14, 7], [14, 14], 615, 612),
    "large": (144, 2, [2, 6, 36, 4], [23, 33, 43], [8, 4, 16, 8], [7, 7], 903, 900),
}


def published(size: str, new: bool = True) -> Sam2VideoConfig:
    width, heads, blocks, everywhere, windows, background, *_ = SIZES[size]
    widths = [width, 2 * width, 4 * width, 8 * width]
    trunk = {
        "model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads,
        "blocks_per_stage": blocks, "embed_dim_per_stage": widths, "global_attention_blocks": everywhere,
        "num_attention_heads_per_stage": [heads, 2 * heads, 4 * heads, 8 * heads], "window_size_per_stage": windows,
        "window_positional_embedding_background_size": background,
    }  # fmt: skip
    vision = {"model_type": "sam2_vision_model", "backbone_config": trunk, "backbone_channel_list": widths[::-1]}
    return Sam2VideoConfig(vision_config=vision, enable_occlusion_spatial_embedding=new,
                           enable_temporal_pos_encoding_for_object_pointers=new)  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_has_its_place_and_the_architecture_follows(size: str, new: bool) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in Sam2VideoModel(published(size, new)).state_dict().items()}
    original = sam2_to_original({name: torch.empty(shape, device="meta") for name, shape in wanted.items()})
    assert len(original) == SIZES[size][-2 if new else -1] and is_sam2(original)
    info = {name: TensorInfo.of(tensor) for name, tensor in original.items()}
    assert sam2_config(info, "file").to_dict() == published(size, new).to_dict()
    found, unknown = to_sam2(original)
    assert not unknown and {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted


def test_an_original_file_opens_with_its_values(tmp_path: Path) -> None:
    model = Sam2VideoModel(published("tiny")).eval()
    fourier = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding.copy_(fourier)  # one tensor in the original
    torch.save({"model": sam2_to_original(model.state_dict())}, tmp_path / "sam2.1_hiera_tiny.pt")
    assert sam_kind(tmp_path / "sam2.1_hiera_tiny.pt") == "sam2_video"
    opened = open_sam(tmp_path / "sam2.1_hiera_tiny.pt")
    state = model.state_dict()
    assert set(opened.weights) == set(state) and all(torch.equal(opened.weights[n], state[n]) for n in state)
    image = load_promptable(tmp_path / "sam2.1_hiera_tiny.pt")
    assert type(image) is Sam2Model and all(torch.equal(tensor, state[n]) for n, tensor in image.state_dict().items())
    with pytest.raises(UserError, match="has learned positions for 1024 px"):
        load_promptable(tmp_path / "sam2.1_hiera_tiny.pt", 512)


def test_another_trunk_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = Sam2VideoModel(published("tiny")).state_dict()
    original = {name: torch.zeros(tensor.shape) for name, tensor in sam2_to_original(state).items()}
    shallow = {name: tensor for name, tensor in original.items() if ".blocks.11." not in name}
    torch.save(shallow, tmp_path / "shallow.pt")
    with pytest.raises(UserError, match="a Hiera of 11 blocks and 96 channels is none of the published SAM 2 trunks"):
        open_sam(tmp_path / "shallow.pt")
    torch.save(original | {"extra.weight": torch.zeros(2)}, tmp_path / "extra.pt")
    with pytest.raises(UserError, match=r"1 unknown tensors for an original SAM 2, such as extra\.weight"):
        open_sam(tmp_path / "extra.pt")
