"""Loading and embedding, against transformers' own path through the model."""

from __future__ import annotations

import json

import pytest
import torch

from samdistill.checkpoints.promptable import load_promptable, load_sam3
from samdistill.ops.promptable import embed, embed_trunk, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.sandbox.teacher import build_teacher
from samdistill.students import StudentTrunkConfig, build_trunk
from samdistill.types import ImageBatch, Prompts, UserError


@pytest.fixture(scope="module")
def model():
    return build_teacher(1).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tracker")
    model.save_pretrained(path)
    return path


@torch.no_grad()
def test_embeds_and_predicts_as_transformers_does(model):
    images = render_scenes(range(2), 126, seed=4).images
    pixels = images.float() / 127.5 - 1
    boxes = torch.tensor([[[10.0, 12.0, 60.0, 70.0], [30.0, 30.0, 90.0, 100.0]]] * 2)
    expected = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False)
    embeddings = embed(model, ImageBatch.full(images))
    found = predict(model, embeddings, Prompts(torch.ones(2, 2, dtype=torch.bool), boxes=boxes))
    torch.testing.assert_close(found.low_res_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    tokens = model.vision_encoder.backbone(pixels).last_hidden_state
    for row, column in ((0, 0), (2, 7), (8, 8)):
        torch.testing.assert_close(embeddings.trunk[:, :, row, column], tokens[:, row * 9 + column])
    torch.testing.assert_close(embed_trunk(model, ImageBatch.full(images)), embeddings.trunk)
    one = embeddings.one_image(1)
    torch.testing.assert_close(one.image_embedding, embeddings.image_embedding[1:])


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
        "single file": lambda: load_promptable(folder / "config.json"),
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
    with pytest.raises(UserError, match="missing, such as mask_decoder"):
        load_sam3(tmp_path)


def test_never_reads_a_pickle(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(build_teacher(1).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_promptable(tmp_path)
