from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tensors import assert_same_tensors, scramble, tensors
from torchvision.transforms.functional import normalize
from transformers import AutoConfig, AutoModel, Sam3Config, Sam3Model, Sam3TrackerConfig, Sam3TrackerModel

from samdistill.students import HEADS, STUDENTS, StudentTrunk, StudentTrunkConfig, build_trunk
from samdistill.types import UserError

SMALLEST = "es_ev_s"


def tiny(backbone: str = SMALLEST, head: str = "fused", image_size: int = 70, hidden_size: int = 32) -> StudentTrunk:
    torch.manual_seed(0)
    config = StudentTrunkConfig(backbone=backbone, head=head, hidden_size=hidden_size, image_size=image_size)
    return build_trunk(config)


@pytest.mark.parametrize(
    ("name", "head"), [*((n, "fused") for n in STUDENTS), *((SMALLEST, h) for h in HEADS if h != "fused")]
)
def test_every_parameter_gets_a_gradient(name: str, head: str) -> None:
    trunk = tiny(name, head).train()
    scramble(trunk)  # timm starts residual branches at zero scale, which holds back gradients in the first step only
    out = trunk(torch.randn(2, 3, 70, 70)).last_hidden_state
    assert out.shape == (2, 25, 32)
    assert out.isfinite().all()
    (out * torch.randn(out.shape)).sum().backward()
    assert [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize(("name", "head"), [*((name, "fused") for name in STUDENTS), (SMALLEST, "published")])
def test_saved_and_loaded_again_it_computes_the_same(name: str, head: str, tmp_path) -> None:
    trunk = tiny(name, head).eval()
    scramble(trunk)
    trunk.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, StudentTrunk)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_tensors(loaded, trunk)
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():  # memory-mapped weights are aligned otherwise: the last bit may differ
        torch.testing.assert_close(loaded(pixels).last_hidden_state, trunk(pixels).last_hidden_state)


@pytest.mark.parametrize(("name", "head"), [*((name, "fused") for name in STUDENTS), (SMALLEST, "published")])
def test_runs_under_bf16_autocast(name: str, head: str) -> None:
    trunk = tiny(name, head).eval()
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        exact = trunk(pixels).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            rough = trunk(pixels).last_hidden_state
    assert rough.isfinite().all()
    assert torch.nn.functional.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("name", ["es_ev_s", "es_rv_s", "es_tv_s"])
@pytest.mark.parametrize("image_size", [98, 126, 182])
def test_any_multiple_of_the_patch_size_works(name: str, image_size: int) -> None:
    trunk = tiny(name).eval()
    out = trunk.image_embedding(torch.randn(1, 3, image_size, image_size + 14))
    assert out.shape == (1, 32, image_size // 14, image_size // 14 + 1)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["es_ev_s", "es_tv_s"])
def test_half_of_the_full_size_works(name: str) -> None:
    with torch.no_grad():
        assert tiny(name).eval()(torch.randn(1, 3, 504, 504)).last_hidden_state.shape == (1, 36 * 36, 32)


def test_missing_weights_get_what_the_constructor_would_give(tmp_path) -> None:
    """Not the uninitialised memory that from_pretrained hands over."""
    trunk = tiny("es_tv_s")
    scramble(trunk)
    trunk.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [k for k in state if k.startswith("head.") or "stages_1.blocks.0" in k]
    save_file({k: v for k, v in state.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = StudentTrunk.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost)
    have, want, fresh = tensors(loaded), tensors(trunk), tensors(tiny("es_tv_s"))
    for name, tensor in have.items():
        if name not in lost:
            assert torch.equal(tensor, want[name]), name
        elif tensor.is_floating_point():  # weights are drawn anew, with the spread of the constructor
            torch.testing.assert_close(tensor.std(correction=0), fresh[name].std(correction=0), rtol=0.5, atol=0.05)
            assert tensor.abs().max() <= 2 * fresh[name].abs().max() + 0.1, name
        else:
            assert torch.equal(tensor, fresh[name]), name


def test_loads_in_half_precision(tmp_path) -> None:
    trunk = tiny("es_tv_s").eval()
    trunk.save_pretrained(tmp_path)
    half = StudentTrunk.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        out, exact = half(pixels).last_hidden_state, trunk(pixels).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(out.float().flatten(), exact.flatten(), dim=0) > 0.98


def test_tokens_are_the_embedding_row_by_row() -> None:
    trunk = tiny().eval()
    pixels = torch.randn(1, 3, 56, 84)
    with torch.no_grad():
        grid, tokens = trunk.image_embedding(pixels), trunk(pixels).last_hidden_state
    assert grid.shape == (1, 32, 4, 6)
    for row in range(4):
        for column in range(6):
            assert torch.equal(tokens[0, row * 6 + column], grid[0, :, row, column])


def test_the_backbone_sees_imagenet_statistics_whatever_the_host_uses() -> None:
    image = torch.rand(2, 3, 70, 70)
    wanted = normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for host_mean, host_std in (([0.5] * 3, [0.5] * 3), ([0.1, 0.2, 0.3], [0.4, 0.6, 0.9])):
        config = StudentTrunkConfig(
            backbone=SMALLEST, hidden_size=32, image_size=70, host_mean=host_mean, host_std=host_std
        )
        trunk, seen = build_trunk(config).eval(), []
        trunk.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        trunk(normalize(image, host_mean, host_std))
        torch.testing.assert_close(seen[0], wanted)


def test_backbones_with_other_statistics_and_layouts() -> None:
    """A ViT tied to its size with 0.5/0.5 statistics, and a Swin that gives channel-last maps."""
    config = StudentTrunkConfig(backbone="vit_tiny_patch16_224", hidden_size=16, image_size=112)
    assert config.input_mean == [0.5, 0.5, 0.5]
    assert build_trunk(config).eval()(torch.randn(1, 3, 112, 112)).last_hidden_state.shape == (1, 64, 16)
    swin = tiny("swin_tiny_patch4_window7_224", image_size=126)
    assert [level.channels for level in swin.levels] == [96, 192, 384, 768]
    assert swin.eval()(torch.randn(1, 3, 126, 126)).last_hidden_state.shape == (1, 81, 32)


@pytest.mark.parametrize("name", ["es_tv_m", "swin_tiny_patch4_window7_224"])
def test_nothing_is_random_while_training(name: str) -> None:
    """timm gives these stochastic depth; a regression of a fixed target wants none."""
    trunk = tiny(name).train()
    pixels = torch.randn(2, 3, 70, 70)
    first = trunk(pixels).last_hidden_state
    assert torch.equal(first, trunk(pixels).last_hidden_state)


@pytest.mark.parametrize("name", ["es_ev_s", "es_rv_s", "es_tv_s"])
def test_weights_changed_in_place_or_copied_are_the_ones_used(name: str, near: Callable) -> None:
    """As an average of the weights does, between two evaluations without a call of train()."""
    trunk, other = tiny(name).eval(), tiny(name).eval()
    scramble(other)
    pixels = torch.randn(1, 3, 70, 70)
    trunk(pixels)
    with torch.no_grad():
        for tensor, value in zip(trunk.state_dict().values(), other.state_dict().values(), strict=True):
            tensor.copy_(value)
    near(trunk(pixels).last_hidden_state, other(pixels).last_hidden_state)
    twin = copy.deepcopy(trunk)
    trunk.backbone.load_state_dict(tiny(name).backbone.state_dict())
    near(twin(pixels).last_hidden_state, other(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 100}, ["100", "98", "112"]),
        ({"image_size": 7}, ["14"]),
        ({"backbone": "es_rv_x"}, ["es_rv_x", "es_rv_m"]),
        ({"backbone": "repvit_m1_2"}, ["repvit_m1_1"]),
        ({"head": "fusd"}, ["fusd", "fused"]),
    ],
)
def test_mistakes_in_the_config_are_explained(fields: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        StudentTrunkConfig(**{"backbone": SMALLEST, "image_size": 70, **fields})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_an_image_that_does_not_fit_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match="64 is not a multiple of 14"):
        tiny()(torch.randn(1, 3, 64, 70))


def test_a_backbone_that_cannot_run_at_the_size_is_refused() -> None:
    with pytest.raises(UserError, match="'coat_tiny' cannot run on 126 px"):
        tiny("coat_tiny", image_size=126)


def test_config_is_registered_and_stores_the_timm_name() -> None:
    config = AutoConfig.for_model("samdistill_student_trunk", backbone="es_rv_m", image_size=126)
    assert isinstance(config, StudentTrunkConfig)
    assert config.backbone == "repvit_m1_1" and timm.is_model(config.backbone)
    assert StudentTrunkConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# --- hosted by SAM 3 -------------------------------------------------------------------------------------------------


def backbone_config(name: str, head: str) -> dict:
    return StudentTrunkConfig(backbone=name, head=head, hidden_size=32, image_size=126).to_dict()


def sam3(name: str, head: str) -> Sam3Model:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = Sam3Config(
        vision_config={"backbone_config": backbone_config(name, head), "fpn_hidden_size": 32},
        text_config={**small, "vocab_size": 1000, "num_hidden_layers": 1, "projection_dim": 32},
        geometry_encoder_config={**small, "num_layers": 1, "roi_size": 3},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 1, "num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    torch.manual_seed(0)
    return Sam3Model(config).eval()


def tracker(name: str, head: str) -> Sam3TrackerModel:
    sizes = [[36, 36], [18, 18], [9, 9]]
    config = Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": backbone_config(name, head),
            "fpn_hidden_size": 32,
            "scale_factors": [4.0, 2.0, 1.0],
            "backbone_feature_sizes": sizes,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 126, "patch_size": 14},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    return Sam3TrackerModel(config).eval()


@pytest.mark.parametrize(("name", "head"), [("es_tv_s", "fused"), ("es_rv_s", "published"), ("es_ev_s", "fused")])
def test_sam3_hosts_it_and_round_trips(name: str, head: str, tmp_path) -> None:
    model = sam3(name, head)
    assert isinstance(model.vision_encoder.backbone, StudentTrunk)
    scramble(model.vision_encoder)
    inputs = {"pixel_values": torch.randn(1, 3, 126, 126), "input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        before = model(**inputs)
    assert before.pred_masks.shape == (1, 10, 36, 36)
    model.save_pretrained(tmp_path)
    loaded, info = Sam3Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_tensors(loaded, model)
    with torch.no_grad():
        after = loaded.eval()(**inputs)
    torch.testing.assert_close(after.pred_masks, before.pred_masks, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "head"), [("es_tv_s", "fused"), ("es_rv_s", "published")])
def test_the_tracker_hosts_it_and_round_trips(name: str, head: str, tmp_path) -> None:
    model = tracker(name, head)
    scramble(model.vision_encoder)
    inputs = {"pixel_values": torch.randn(1, 3, 126, 126), "input_boxes": torch.tensor([[[10.0, 10.0, 60.0, 80.0]]])}
    with torch.no_grad():
        before = model(**inputs, multimask_output=False).pred_masks
    model.save_pretrained(tmp_path)
    loaded, info = Sam3TrackerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_tensors(loaded, model)
    with torch.no_grad():
        after = loaded.eval()(**inputs, multimask_output=False).pred_masks
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_building_a_host_keeps_the_weights_timm_drew() -> None:
    """A host initialises what it holds with its own rule; the trunk must come out as it was built alone."""
    assert_same_tensors(sam3("es_tv_s", "fused").vision_encoder.backbone, tiny("es_tv_s", image_size=126))
