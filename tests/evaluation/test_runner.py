"""The whole evaluation on rendered scenes: identities that must hold, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import Sam3Config, Sam3Model

from samdistill.data import CocoSource, FolderSource, Geometry, Sa1bSource
from samdistill.data.sources import evenly
from samdistill.evaluation import evaluate_models
from samdistill.evaluation.examples import load_example
from samdistill.evaluation.latency import encoder_latency, trunk_gflops
from samdistill.sandbox.scenes import render_scenes
from samdistill.sandbox.write import write_coco, write_sa1b
from samdistill.types import UserError
from tracker_model import build_teacher, score

GEOMETRY = Geometry(126)


@pytest.fixture(scope="module")
def models():
    return {"teacher": build_teacher(0).eval(), "twin": build_teacher(0).eval(), "other": build_teacher(1).eval()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("sa1b")
    write_sa1b(root, 5, size=126, seed=3, split="val")
    return root


@pytest.fixture(scope="module")
def labelled(models, tree):
    seen = []
    result = evaluate_models(
        models, Sa1bSource(tree, "val"), GEOMETRY, teacher="teacher", batch_size=2, pictures=3, repeats=2,
        progress=seen.append,
    )  # fmt: skip
    assert sum(seen) == 5
    return result


@pytest.fixture(scope="module")
def detector():
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    backbone = build_teacher(0).config.vision_config.backbone_config.to_dict()
    vision = {"backbone_config": backbone, "fpn_hidden_size": 32,
              "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]]}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
            "vocab_size": 100, "projection_dim": 32}  # fmt: skip
    heads = {**tiny, "num_layers": 1}
    config = Sam3Config(
        vision_config=vision, text_config=text, geometry_encoder_config={**heads, "roi_size": 3},
        detr_encoder_config=heads, detr_decoder_config={**heads, "num_queries": 4},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )  # fmt: skip
    return Sam3Model(config).eval()


def test_a_model_agrees_fully_with_itself(labelled):
    twin = labelled.row("twin")
    assert twin.cosine == pytest.approx(1.0, abs=1e-6) and twin.mse == pytest.approx(0, abs=1e-9)
    assert twin.agreement == {"box": 1.0, "point": 1.0, "refine": 1.0}
    assert twin.kept == {"box": 1.0, "point": 1.0, "refine": 1.0}
    other = labelled.row("other")
    assert other.cosine < 0.5 and max(other.agreement.values()) < 0.95
    teacher = labelled.row("teacher")
    assert teacher.agreement == {} and teacher.cosine is None and set(teacher.miou) == {"box", "point", "refine"}


def test_miou_is_the_sandboxs_own_score(tmp_path, models):
    """The same scenes as COCO with lossless images, against scoring the rendered tensors."""
    write_coco(tmp_path, 4, size=126, seed=9, split="val")
    scenes = render_scenes(range(4), 126, seed=9)
    for image, file in zip(scenes.images, sorted((tmp_path / "images" / "val").iterdir()), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file.with_suffix(".png"))
        file.with_suffix(".png").rename(file)  # decoders look at the bytes, not at the name
    result = evaluate_models(
        {"teacher": models["teacher"]}, CocoSource(tmp_path, "val"), GEOMETRY, batch_size=3, pictures=0, repeats=0
    )
    expected = score(models["teacher"], scenes)
    assert result.objects == len(expected["box"])
    for kind, ious in expected.items():
        assert result.row("teacher").miou[kind] == pytest.approx(ious.mean().item(), abs=2e-3), kind


def test_cost_is_counted(labelled, models):
    row, teacher = labelled.row("teacher"), models["teacher"]
    trunk = teacher.vision_encoder.backbone
    assert row.trunk_parameters == sum(p.numel() for p in trunk.parameters())
    assert row.parameters == sum(p.numel() for p in teacher.parameters())
    # 81 tokens, 6 layers of 192: qkv and output 4 d^2, MLP 8 d^2 (d x 768 twice), attention 2 t d; two per multiply-add
    tokens, d = 81, 192
    layers = 6 * (2 * tokens * 12 * d**2 + 2 * 2 * tokens**2 * d)
    patches = 2 * tokens * 3 * 14 * 14 * d
    assert trunk_gflops(teacher) == pytest.approx((layers + patches) / 1e9, rel=1e-3)
    assert row.latency_ms > 0 and labelled.conditions.repeats == 2 and labelled.conditions.threads >= 1


def test_latency_takes_turns_and_keeps_to_its_time(models):
    order = []
    hooks = [
        m.vision_encoder.register_forward_pre_hook(lambda *_, name=n: order.append(name)) for n, m in models.items()
    ]
    try:
        took, conditions = encoder_latency(models, 126, repeats=3)
        assert order == list(models) * 4 and set(took) == set(models) and conditions.repeats == 3
        assert encoder_latency(models, 126, repeats=50, seconds=0.0)[1].repeats == 1
    finally:
        for hook in hooks:
            hook.remove()


def test_unlabelled_images_are_measured_against_the_teachers_objects(models, tree):
    source = FolderSource(tree / "images" / "val", None)
    result = evaluate_models(models, source, GEOMETRY, teacher="teacher", batch_size=3, pictures=2, repeats=0)
    assert result.objects > 0 and not result.labelled and result.conditions is None
    assert result.row("twin").agreement == {"box": 1.0, "point": 1.0, "refine": 1.0}
    assert all(row.miou == {} and row.kept == {} for row in result.rows)
    assert "that the teacher itself segments" in result.caption()
    assert [p.title for p in result.pictures[0].panels] == ["image", "teacher", "twin", "other"]
    assert result.pictures[0].panels[2].iou == pytest.approx(1.0)
    with pytest.raises(UserError, match="compared with a teacher"):
        evaluate_models({"alone": models["twin"]}, source, GEOMETRY)


def test_batch_size_changes_no_figure(models, tree, labelled):
    again = evaluate_models(
        models, Sa1bSource(tree, "val"), GEOMETRY, teacher="teacher", batch_size=5, pictures=0, repeats=0
    )
    for row in again.rows:
        before = labelled.row(row.name)
        for kind in again.prompts:
            assert row.miou[kind] == pytest.approx(before.miou[kind], abs=2e-3)
        assert (row.cosine or 0) == pytest.approx(before.cosine or 0, abs=1e-5)


def test_pictures_have_a_panel_for_everyone_and_prompts_in_turn(labelled):
    assert [p.prompt for p in labelled.pictures] == ["box", "point", "refine"]
    panels = labelled.pictures[0].panels
    assert [p.title for p in panels] == ["image", "ground truth", "teacher", "twin", "other"]
    assert {p.image.shape for p in panels} == {(384, 384, 3)} and panels[1].iou is None
    assert panels[2].iou == pytest.approx(panels[3].iou)


def test_unreadable_images_are_listed_and_the_rest_measured(models, tree, tmp_path):
    images = tmp_path / "photos"
    images.mkdir()
    for file in sorted((tree / "images" / "val").iterdir())[:3]:
        (images / file.name).write_bytes(file.read_bytes())
    broken = sorted(images.iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:200])
    pair = {"teacher": models["teacher"], "student": models["other"]}
    result = evaluate_models(pair, FolderSource(images, None), GEOMETRY, teacher="teacher", pictures=0, repeats=0)
    assert result.images == 2 and len(result.skipped) == 1 and broken.stem in result.skipped[0].key
    assert result.to_dict()["skipped"][0]["reason"]
    for file in images.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no image could be read, 3 inputs skipped"):
        evaluate_models(pair, FolderSource(images, None), GEOMETRY, teacher="teacher", repeats=0)


def test_a_detector_is_compared_by_features_or_refused(models, detector, tree):
    source = Sa1bSource(tree, "val")
    pair = {"teacher": models["teacher"], "detector": detector}
    result = evaluate_models(pair, source, GEOMETRY, teacher="teacher", images=2, pictures=1, repeats=1)
    row = result.row("detector")
    assert row.cosine is not None and row.miou == {} and row.agreement == {} and row.latency_ms is not None
    assert result.row("teacher").miou
    with pytest.raises(UserError, match="no prompt decoder"):
        evaluate_models({"detector": detector}, source, GEOMETRY)


def test_another_image_size_or_an_unknown_teacher_is_refused(models, tree):
    source = Sa1bSource(tree, "val")
    with pytest.raises(UserError, match="126 px"):
        evaluate_models(models, source, Geometry(252), teacher="teacher")
    with pytest.raises(ValueError, match="one of the models"):
        evaluate_models(models, source, GEOMETRY, teacher="nobody")


def test_training_mode_is_put_back(models, tree):
    models["other"].train()
    try:
        evaluate_models(models, Sa1bSource(tree, "val"), GEOMETRY, teacher="teacher", images=1, pictures=0, repeats=0)
        assert models["other"].training and not models["twin"].training
    finally:
        models["other"].eval()


def test_result_is_json_and_fits_a_terminal(labelled):
    from rich.console import Console

    data = json.loads(json.dumps(labelled.to_dict()))
    assert [m["name"] for m in data["models"]] == ["teacher", "twin", "other"]
    assert data["models"][2]["kept"].keys() == {"box", "point", "refine"}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(labelled.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "IoU with the teacher's masks" in text and "100.0 %" in text and "…" not in text


def test_a_subset_spans_the_whole_list():
    assert evenly(range(10), 3) == [0, 3, 6] and evenly("ab", None) == ["a", "b"] and evenly("ab", 5) == ["a", "b"]


def test_objects_above_the_limit_are_counted(tree):
    source = Sa1bSource(tree, "val")
    key = max(source.keys, key=lambda k: len(source.instances(k)))
    total = len(source.instances(key))
    example = load_example(source, GEOMETRY, key, 1)
    assert total > 1 and len(example.masks) == 1 and example.left_out == total - 1
    assert torch.equal(example.image, GEOMETRY.canvas(source.load(key))[0])
