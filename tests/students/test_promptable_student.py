"""MobileSAM as a Hugging Face model: its grids, its two necks, what is saved, what is trained, what is refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, SamModel

from samdistill.config import PromptableConfig
from samdistill.students import MobileSamConfig, MobileSamModel, StudentTrunk, build_promptable
from samdistill.types import UserError

SMALL = {"image_size": 64, "width": 16, "heads": 2}
BACKBONES = {"last": "tiny_vit_5m_224", "fused": "es_ev_s"}


@pytest.fixture(scope="module", params=["last", "fused"])
def model(request) -> MobileSamModel:
    torch.manual_seed(0)
    return build_promptable(PromptableConfig(backbone=BACKBONES[request.param], **SMALL)).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_defaults_are_the_published_model():
    with torch.device("meta"):
        whole = MobileSamModel(MobileSamConfig())
        trunk = whole.vision_encoder.trunk.image_embedding(torch.empty(1, 3, 1024, 1024))
        embedding = whole.vision_encoder(torch.empty(1, 3, 1024, 1024)).last_hidden_state
    assert isinstance(whole, SamModel) and whole.config.neck == "last"
    assert trunk.shape == (1, 320, 64, 64) and embedding.shape == (1, 256, 64, 64)
    counts = [sum(p.numel() for p in part.parameters()) for part in (whole.mask_decoder, whole.prompt_encoder)]
    assert counts[0] == 4_058_340  # of SAM's mask decoder, as its authors count it (4.06M)
    # TinyViT-5M without its classifier (5.07M in timm), and the neck's two convolutions and norms
    classifier = timm.create_model("tiny_vit_5m_224", num_classes=0)
    expected = sum(p.numel() for p in classifier.parameters()) - 2 * 320  # its last norm
    neck = 320 * 256 + 256 * 256 * 9 + 4 * 256
    assert sum(p.numel() for p in whole.vision_encoder.parameters()) == expected + neck


@pytest.mark.parametrize("size", [64, 96, 224])
def test_a_tiny_vit_keeps_its_resolution_in_the_last_stage(size):
    """Against timm's own modules, the last downsampling done by hand without a stride."""
    torch.manual_seed(0)
    config = MobileSamConfig(**{**SMALL, "image_size": size})
    net = MobileSamModel(config).eval().vision_encoder.trunk
    plain = timm.create_model("tiny_vit_5m_224", features_only=True).eval()
    plain.load_state_dict(net.backbone.state_dict())
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        x = plain(images)[2]
        down = plain.stages_3.downsample
        x = F.gelu(down.conv1(x))
        x = F.conv2d(x, down.conv2.conv.weight, stride=1, padding=1, groups=320)
        x = down.conv3(F.gelu(down.conv2.bn(x)))
        expected = plain.stages_3.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found = net.image_embedding(images)
    assert found.shape == (1, 320, size // 16, size // 16)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_neck_stands_on_the_trunk(model, pixels):
    encoder = model.vision_encoder
    if model.config.neck == "fused":
        assert isinstance(encoder.trunk, StudentTrunk)
        assert encoder.trunk.config.host_mean == model.config.image_mean
    x = encoder.neck.conv1(encoder.trunk.image_embedding(pixels))
    for norm, conv in ((encoder.neck.layer_norm1, encoder.neck.conv2), (encoder.neck.layer_norm2, nn.Identity())):
        x = conv(F.layer_norm(x.permute(0, 2, 3, 1), (16,), norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2))
    torch.testing.assert_close(encoder(pixels).last_hidden_state, x)
    assert x.shape == (2, 16, 4, 4)


@torch.no_grad()
def test_saved_and_opened_by_transformers_it_is_the_same_model(model, pixels, tmp_path, near):
    model.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is MobileSamModel and not any(report.values())
    states = again.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[1])
    asked = {"pixel_values": pixels, "input_boxes": torch.tensor([[[3.0, 4.0, 40.0, 50.0]]] * 2)}
    for expected, found in zip(model(**asked).to_tuple(), again.eval()(**asked).to_tuple(), strict=True):
        near(found, expected)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "samdistill_mobile_sam" and not any(name.endswith("_config") for name in saved)
    assert AutoConfig.from_pretrained(tmp_path).mask_decoder_config.hidden_size == 16
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(**{**asked, "pixel_values": pixels.bfloat16()}).pred_masks.dtype == torch.bfloat16


def test_image_and_prompts_share_their_fourier_features(model, tmp_path):
    model.save_pretrained(tmp_path)
    for one in (model, AutoModel.from_pretrained(tmp_path)):
        table = one.shared_image_embedding.positional_embedding
        assert table is one.prompt_encoder.shared_embedding.positional_embedding
    wide = MobileSamModel(MobileSamConfig(backbone="es_ev_s", image_size=64))
    table = wide.shared_image_embedding.positional_embedding
    assert 0.8 < table.std() < 1.2  # the original's scale; transformers starts SAM with hundreds


def asked_of(model: MobileSamModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Answers to every kind of prompt, so that each table of the prompt encoder is used."""
    embedding = model.vision_encoder(pixels).last_hidden_state
    points = {"input_points": torch.rand(2, 1, 2, 2) * 60, "input_labels": torch.tensor([[[1, 0]]] * 2)}
    box = {"input_boxes": torch.tensor([[[3.0, 4.0, 40.0, 50.0]]] * 2)}
    kinds = (points, box, {**points, "input_masks": torch.randn(2, 1, 16, 16)})
    return [
        value
        for prompts in kinds
        for multimask in (False, True)
        for value in model(image_embeddings=embedding, multimask_output=multimask, **prompts).to_tuple()
    ]


def test_gradients_reach_every_parameter(model, pixels):
    trained = MobileSamModel(model.config).train()
    loss = sum((value * torch.randn_like(value)).sum() for value in asked_of(trained, pixels))
    loss.backward()
    blind = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # timm starts each residual branch of TinyViT's first stage at zero, and what lies before that scale waits a step
    waiting = [name for name in blind if "stages_0.blocks" in name]
    assert set(blind) == set(waiting) and all(".conv3.bn.weight" not in name for name in waiting)


def test_the_same_weights_read_other_sizes(model):
    other = MobileSamConfig.from_dict({**model.config.to_dict(), "image_size": 96})
    larger = MobileSamModel(other).eval()
    larger.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = larger(torch.randn(1, 3, 96, 96), input_boxes=torch.tensor([[[3.0, 4.0, 40.0, 50.0]]]))
    assert out.pred_masks.shape[-2:] == (24, 24)


def test_statistics_are_the_backbones_unless_given():
    assert MobileSamConfig().image_mean == pytest.approx([0.485, 0.456, 0.406])  # SAM's and TinyViT's
    other = MobileSamConfig(backbone="vit_tiny_patch16_224.augreg_in21k")
    assert other.neck == "fused" and other.image_mean == other.image_std == [0.5] * 3
    assert MobileSamConfig(image_mean=[0, 0.1, 0.2]).image_mean == [0, 0.1, 0.2]


def test_trunk_weights_come_from_a_file(tmp_path):
    source = timm.create_model("tiny_vit_5m_224")
    torch.save(source.state_dict(), tmp_path / "tiny.pth")
    found = build_promptable(PromptableConfig(**SMALL, pretrained=tmp_path / "tiny.pth"))
    ours = found.vision_encoder.backbone.state_dict()
    assert torch.equal(ours["stages_3.blocks.1.mlp.fc1.weight"], source.stages[3].blocks[1].mlp.fc1.weight)
    with pytest.raises(UserError, match="saved from another backbone"):
        build_promptable(PromptableConfig(**SMALL, backbone="es_ev_s", pretrained=tmp_path / "tiny.pth"))


@torch.no_grad()
def test_edge_sams_neck_adds_the_ends_of_the_last_two_stages(near):
    """By hand, module by module. timm counts the last block of a stage to the next one."""
    model = MobileSamModel(MobileSamConfig(**{**SMALL, "backbone": "repvit_m1", "neck": "summed"})).eval()
    trunk, pixels = model.vision_encoder.trunk, torch.randn(1, 3, 128, 128)
    x = trunk.backbone.stem(pixels)
    for stage in (trunk.backbone.stages_0, trunk.backbone.stages_1, trunk.backbone.stages_2):
        x = stage(x)
    last = trunk.backbone.stages_3
    fine = last.downsample.pre_block(x)
    down = last.downsample.channel_downsample(last.downsample.spatial_downsample(fine))
    coarse = last.blocks(down + last.downsample.ffn(down))
    grown = torch.nn.functional.interpolate(trunk.coarse(coarse), scale_factor=2, mode="bicubic", align_corners=False)
    near(trunk.image_embedding(pixels), trunk.fine(fine) + grown)
    assert sum(name.startswith("vision_encoder.trunk.") for name in model.state_dict()) == 676 + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "not a multiple of patch_size 16; use 96 or 112"),
        ({"image_size": 8}, "use 16 or 32"),
        ({"backbone": "es_rv_s", "neck": "last"}, "32 px per cell .* set patch_size to 32 and image_size .* fused"),
        ({"patch_size": 32}, "16 px per cell"),
        ({"neck": "middle"}, "neck must be one of last, fused, summed, got 'middle'"),
        ({"backbone": "es_ev_s", "neck": "summed"}, "not a RepViT, so neck cannot be summed; set it to fused"),
        ({"backbone": "repvit_m1", "neck": "summed", "patch_size": 32}, "16 px per cell in its finer map"),
        ({"width": 20}, "multiple of 8"),
        ({"width": 24, "heads": 5}, "a multiple of heads"),
        ({"backbone": "tiny_vitt"}, "no backbone is called 'tiny_vitt'"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        MobileSamModel(MobileSamConfig(**{**SMALL, **settings}))
    assert "\n" not in str(error.value)
