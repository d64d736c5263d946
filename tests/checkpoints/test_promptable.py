"""Opening promptable models of every kind: what comes back, at which size, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from original_names import sam_to_original as to_original
from transformers import Sam3Model, SamConfig, SamModel

from samdistill.checkpoints import files
from samdistill.checkpoints.promptable import load_model, load_promptable
from samdistill.ops.promptable import embed, embedding_grid, image_size, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.students import MobileSamConfig, MobileSamModel, StudentTrunkConfig, build_trunk
from samdistill.types import ImageBatch, Prompts, UserError
from tracker_model import build_teacher


@pytest.fixture(scope="module")
def model():
    return build_teacher(1).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tracker")
    model.save_pretrained(path)
    return path


def test_loads_in_float32_and_eval_mode(model, folder, tmp_path):
    build_teacher(1).half().save_pretrained(tmp_path / "half")
    loaded = load_promptable(tmp_path / "half")
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    again = load_promptable(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_loads_a_folder_whose_trunk_is_a_student(tmp_path):
    host = build_teacher(1)
    trunk = build_trunk(StudentTrunkConfig(backbone="repvit_m0_9", hidden_size=192, image_size=126))
    host.vision_encoder.backbone, host.config.vision_config.backbone_config = trunk, trunk.config
    host.eval().save_pretrained(tmp_path)
    batch = ImageBatch.full(render_scenes(range(1), 126, seed=4).images)
    torch.testing.assert_close(embed(load_promptable(tmp_path), batch).trunk, embed(host, batch).trunk)


def test_refuses_what_it_cannot_load_in_one_line(folder, tmp_path):
    def config(kind: str):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        return tmp_path

    cases = {
        "no such": lambda: load_promptable(tmp_path / "nowhere"),
        "'bert'": lambda: load_promptable(config("bert")),
        "not a plain table of tensors": lambda: load_promptable(folder / "config.json"),
        "has no config.json": lambda: load_promptable(folder.parent),
    }
    for words, load in cases.items():
        with pytest.raises(UserError, match=words) as error:
            load()
        assert "\n" not in str(error.value)


def test_refuses_missing_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "mask_decoder" in name)
    del weights[gone]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing keys for a Sam3TrackerModel .* such as mask_decoder"):
        load_model(tmp_path)


def test_never_reads_a_pickle(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(build_teacher(1).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_promptable(tmp_path)


# other kinds than trackers


@pytest.fixture(scope="module")
def sam() -> SamModel:
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {
        **sizes, "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8, "initializer_range": 0.2,
    }  # fmt: skip
    # eight heads and this epsilon are the original code's, which its files do not tell
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 8, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision, prompt_encoder_config={**sizes, "hidden_size": 16},
        mask_decoder_config={**decoder, "layer_norm_eps": 1e-5},
    )  # fmt: skip
    return SamModel(config).eval()


@pytest.fixture(scope="module")
def mobile() -> MobileSamModel:
    torch.manual_seed(0)
    return MobileSamModel(MobileSamConfig(backbone="es_ev_s", image_size=64, width=16, heads=2)).eval()


@torch.no_grad()
def answer(model, size: int = 64) -> torch.Tensor:
    images = render_scenes(range(1), size, seed=4).images
    box = Prompts(torch.ones(1, 1, dtype=torch.bool), boxes=torch.tensor([[[10.0, 12.0, 50.0, 40.0]]]))
    return predict(model, embed(model, ImageBatch.full(images)), box).low_res_masks


@pytest.mark.parametrize("place", [".", "student", "merged"])
def test_opens_sam_and_mobile_sam_and_runs_that_hold_them(sam, mobile, tmp_path, place, near):
    for number, model in enumerate((sam, mobile)):
        run = tmp_path / str(number)
        model.save_pretrained(run / place)
        found = load_promptable(run)
        assert type(found) is type(model) and not found.training
        near(answer(found), answer(model))


def test_a_run_of_the_encoder_job_is_its_merged_model_or_sent_to_be_merged(model, tmp_path):
    build_trunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=126)).save_pretrained(
        tmp_path / "student"
    )
    with pytest.raises(UserError, match=r"a distilled trunk .* `samdistill merge .* makes a model"):
        load_promptable(tmp_path)
    model.save_pretrained(tmp_path / "merged")
    assert type(load_promptable(tmp_path)) is type(model)


def original(model: SamModel, path: Path, **changes: torch.Tensor) -> Path:
    state, left = to_original(model.state_dict())
    assert not left
    torch.save({**{name: value.clone() for name, value in state.items()}, **changes}, path)
    return path


@torch.no_grad()
def test_opens_an_original_sam_by_its_shapes(sam, tmp_path, near):
    found = load_promptable(original(sam, tmp_path / "sam_vit_x.pth"))
    assert type(found) is SamModel
    near(answer(found), answer(sam))
    half = {name: value.half() for name, value in to_original(sam.state_dict())[0].items()}
    torch.save(half, tmp_path / "half.pth")
    (tmp_path / "sam_vit_x.pth").unlink()
    assert {p.dtype for p in load_promptable(tmp_path / "half.pth").parameters()} == {torch.float32}
    near(answer(found), answer(sam))  # the file is gone


@torch.no_grad()
def test_opens_an_original_mobile_sam_at_any_size(tmp_path, near):
    torch.manual_seed(0)
    whole = MobileSamModel(MobileSamConfig(image_size=64)).eval()
    spare = {"image_encoder.head.weight": torch.zeros(5, 320), "image_encoder.norm_head.bias": torch.zeros(320)}
    path = original(whole, tmp_path / "mobile_sam.pt", **spare)
    assert image_size(load_promptable(path)) == 1024
    found = load_promptable(path, 64)
    assert type(found) is MobileSamModel
    near(answer(found), answer(whole))
    with pytest.raises(UserError, match="image_size 100 is not a multiple of patch_size 16"):
        load_promptable(path, 100)


@torch.no_grad()
def test_opens_an_original_edge_sam_at_any_size(tmp_path, near):
    torch.manual_seed(0)
    whole = MobileSamModel(MobileSamConfig(image_size=64, backbone="repvit_m1", neck="summed")).eval()
    path = original(whole, tmp_path / "edge_sam.pth")
    assert any(name.startswith("image_encoder.features.25.") for name in torch.load(path))
    assert image_size(load_promptable(path)) == 1024
    near(answer(load_promptable(path, 64)), answer(whole))
    original(whole, path, **{"rpn_head.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="1 unknown tensors for an original EdgeSAM, such as rpn_head"):
        load_promptable(path)


def test_an_original_with_too_little_or_too_much_is_refused(sam, tmp_path):
    state = to_original(sam.state_dict())[0]
    more = original(sam, tmp_path / "more.pth", **{"mask_decoder.hf_token.weight": torch.zeros(1, 16)})
    with pytest.raises(UserError, match=r"1 unknown tensors for an original SAM, such as mask_decoder.hf_token.weight"):
        load_promptable(more)
    cases = {
        "mask_decoder.mask_tokens.weight": "1 missing keys for a SamModel .* such as mask_decoder.mask_tokens",
        "image_encoder.pos_embed": "its architecture does not follow from its tensors",
        "image_encoder.blocks.0.attn.qkv.weight": "not an original SAM, MobileSAM, EdgeSAM, SAM 2 or SAM 3, by its",
    }
    for gone, words in cases.items():
        torch.save({name: value for name, value in state.items() if name != gone}, tmp_path / "less.pth")
        with pytest.raises(UserError, match=words) as error:
            load_promptable(tmp_path / "less.pth")
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_sizes_follow_the_positions(model, folder, sam, mobile, tmp_path):
    assert embedding_grid(load_promptable(folder, 168)) == (12, 12)
    assert answer(load_promptable(folder, 168), 168).shape[-2:] == (48, 48)
    mobile.save_pretrained(tmp_path / "mobile")
    larger = load_promptable(tmp_path / "mobile", 96)
    assert image_size(larger) == 96 and answer(larger, 96).shape[-2:] == (24, 24)
    sam.save_pretrained(tmp_path / "sam")
    assert image_size(load_promptable(tmp_path / "sam", 64)) == 64
    for place in (tmp_path / "sam", original(sam, tmp_path / "sam.pth")):
        with pytest.raises(UserError, match="learned positions for 64 px and cannot read images of 96 px"):
            load_promptable(place, 96)
    with pytest.raises(UserError, match="not a multiple of patch_size 16; use 96 or 112"):
        load_promptable(tmp_path / "mobile", 100)
    with pytest.raises(UserError, match="not a multiple of the patch size 14"):
        load_promptable(folder, 100)


def test_the_sandbox_has_three_names(sam, mobile, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match="lacks the sandbox's sam; install it again"):
        load_promptable("sandbox-sam")
    for name, packaged in (("sam", sam), ("mobile", mobile)):
        packaged.save_pretrained(tmp_path / "sandbox" / "weights" / name)
        assert type(load_promptable(f"sandbox-{name}")) is type(packaged)
    with pytest.raises(UserError, match="no such file or folder"):
        load_promptable("sandbox-sim")


def test_a_detector_is_opened_for_its_features_and_refused_for_prompts(hosts):
    folder = hosts["sam3"][1]
    assert type(load_model(folder)) is Sam3Model
    with pytest.raises(UserError, match="a Sam3Model has no prompt decoder"):
        load_promptable(folder)
