"""A SAM with a distilled trunk: everything but the image encoder is the teacher's, in transformers' own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_names import sam_to_original
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, SamConfig, SamModel, SamProcessor, pipeline

import samdistill
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.promptable import load_promptable
from samdistill.cli import main
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.ops.promptable import embed, predict
from samdistill.students import HostedSamModel, StudentTrunk, StudentTrunkConfig
from samdistill.types import ImageBatch, Prompts, UserError

VISION = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
    "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8,
}  # fmt: skip
TRUNK = {
    "hidden_size": 16, "patch_size": 16, "image_size": 64, "geometry": "longest_side", "host_mean": IMAGENET_MEAN,
    "host_std": IMAGENET_STD,
}  # fmt: skip


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    made = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=made) * 0.1
    return model.eval()


def make_student(**settings) -> StudentTrunk:
    torch.manual_seed(1)
    return StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", **settings)).eval()


def build_sam() -> SamModel:
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 8, "iou_head_hidden_dim": 16,
               "layer_norm_eps": 1e-5}  # fmt: skip
    model = scramble(
        SamModel(SamConfig(vision_config=VISION, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    )
    model.prompt_encoder.shared_embedding.positional_embedding = model.shared_image_embedding.positional_embedding
    return model


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> tuple[SamModel, Path]:
    model, folder = build_sam(), tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> tuple[StudentTrunk, Path]:
    model, folder = make_student(**TRUNK), tmp_path_factory.mktemp("trunk")
    model.save_pretrained(folder / "student")
    return model, folder


@pytest.fixture(scope="module")
def merged(sam, trunk, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    merge(trunk[1], sam[1], out)
    return out


def ask(model: SamModel, **given) -> torch.Tensor:
    points, boxes = torch.tensor([[[[20.0, 30.0]]]]), torch.tensor([[[5.0, 6.0, 50.0, 40.0]]])
    with torch.no_grad():
        return model(input_points=points, input_boxes=boxes, multimask_output=True, **given).pred_masks


def test_the_answers_are_those_of_the_teachers_heads_on_the_trunks_embedding(sam, trunk, merged: Path, near) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))[:1]
    model, found = AutoModel.from_pretrained(merged, output_loading_info=True)
    assert type(model) is HostedSamModel and not any(found.values())
    with torch.no_grad():
        embedding = trunk[0].image_embedding(pixels)
    near(ask(model.eval(), pixel_values=pixels), ask(sam[0], image_embeddings=embedding))
    before, after = load_file(sam[1] / "model.safetensors"), load_file(merged / "model.safetensors")
    kept = {name for name in before if not name.startswith("vision_encoder.")}
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)
    own = trunk[0].state_dict()
    assert {name for name in after if name not in kept} == {f"vision_encoder.backbone.{name}" for name in own}
    assert all(torch.equal(after[f"vision_encoder.backbone.{name}"], tensor) for name, tensor in own.items())


def test_an_original_file_gives_the_same_folder(sam, trunk, merged: Path, tmp_path: Path) -> None:
    state, left = sam_to_original(sam[0].state_dict())
    assert not left
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "sam_vit.pth")
    merge(trunk[1], tmp_path / "sam_vit.pth", tmp_path / "merged")
    first, second = load_file(merged / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first) and set(second) >= set(first)
    model = load_promptable(tmp_path / "merged")
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ask(model, pixel_values=pixels), ask(load_promptable(merged), pixel_values=pixels))


def test_a_merged_folder_predicts_and_hosts_another_trunk(trunk, merged: Path, tmp_path: Path) -> None:
    canvas = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    size = torch.tensor([[40, 64]])
    batch = ImageBatch(canvas, size, size, ("a",), torch.zeros(1, dtype=torch.int64))
    model = load_promptable(merged)
    prompts = Prompts(torch.ones(1, 1, dtype=torch.bool), boxes=torch.tensor([[[5.0, 5.0, 40.0, 30.0]]]))
    with torch.no_grad():
        assert predict(model, embed(model, batch), prompts).low_res_masks.shape == (1, 1, 1, 16, 16)
        other = canvas.clone()
        other[:, :, 40:] = 0  # padding does not count
        again = embed(model, ImageBatch(other, size, size, ("a",), batch.seeds))
        assert torch.equal(embed(model, batch).image_embedding, again.image_embedding)
    assert samdistill.load(merged).kind == "promptable"
    assert type(AutoProcessor.from_pretrained(merged)) is SamProcessor
    assert type(pipeline("mask-generation", model=str(merged), device="cpu").model) is HostedSamModel
    report = merge(trunk[1], merged, tmp_path / "again")
    assert report.totals["removed"]["elements"] == report.totals["added"]["elements"]
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(merged / "model.safetensors").keys()


def test_a_trunk_that_does_not_fit_is_refused_in_one_line(sam, trunk, hosts, tmp_path: Path, capsys) -> None:
    for name, value, words in (
        ("hidden_size", 32, "channels: 32, but"), ("patch_size", 8, "pixels per cell: 8, but"),
        ("image_size", 128, "pixels per side of an image: 128, but"),
        ("host_mean", (0.5, 0.5, 0.5), r"mean of its images: \[0\.5, 0\.5, 0\.5\], but"),
        ("fine_channels", (2, 4), r"fine levels of these channels: \[2, 4\], but"),
    ):  # fmt: skip
        make_student(**TRUNK | {name: value}).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"a trunk for another host: {words}"):
            merge(tmp_path / name, sam[1], tmp_path / "out")
    with pytest.raises(UserError, match="shape conflict"):  # a SAM 3
        merge(trunk[1], hosts["tracker"][1], tmp_path / "out")
    for option in ("--target-prefix", "--replace-prefix"):
        assert main(["merge", str(trunk[1]), "--into", str(sam[1]), "--out", str(tmp_path / "out"), option, "x."]) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "for the trunk of a SAM 3 only" in said
    assert not (tmp_path / "out").exists()


def test_sam_model_refuses_the_folder_and_does_not_build_a_random_encoder(merged: Path) -> None:
    with pytest.raises(Exception, match="num_hidden_layers") as refused:
        SamModel.from_pretrained(merged)
    assert "NoneType" in str(refused.value)
