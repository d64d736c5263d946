"""SAM and MobileSAM side by side: what is compared where trunks differ, and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import SamConfig, SamModel

from samdistill.data import Geometry, Sa1bSource
from samdistill.evaluation import evaluate_models
from samdistill.evaluation.evaluate import evaluate
from samdistill.evaluation.examples import load_example, to_batch
from samdistill.evaluation.latency import trunk_gflops
from samdistill.ops.flops import count_flops
from samdistill.ops.promptable import embed
from samdistill.sandbox.write import write_sa1b
from samdistill.students import MobileSamConfig, MobileSamModel
from samdistill.types import UserError

SIZE, WIDTH = 64, 16
GEOMETRY = Geometry(SIZE, "longest_side")


def sam(seed: int) -> SamModel:
    torch.manual_seed(seed)
    sizes = {"image_size": SIZE, "patch_size": 16}
    vision = {
        **sizes, "hidden_size": 24, "output_channels": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8, "initializer_range": 0.2,
    }  # fmt: skip
    decoder = {"hidden_size": WIDTH, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": WIDTH}
    prompts = {**sizes, "hidden_size": WIDTH}
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()


def mobile(width: int = WIDTH) -> MobileSamModel:
    torch.manual_seed(2)
    return MobileSamModel(MobileSamConfig(backbone="es_ev_s", image_size=SIZE, width=width, heads=2)).eval()


@pytest.fixture(scope="module")
def models():
    return {"teacher": sam(0), "twin": sam(0), "mobile": mobile(), "wide": mobile(24)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sa1b")
    write_sa1b(root, 3, size=80, seed=3, split="val")
    return root


@pytest.fixture(scope="module")
def source(root):
    return Sa1bSource(root, "val")


@pytest.fixture(scope="module")
def result(models, source):
    return evaluate_models(models, source, GEOMETRY, teacher="teacher", batch_size=2, pictures=1, repeats=1)


def test_masks_are_measured_of_each(result):
    assert result.row("twin").agreement == {"box": 1.0, "point": 1.0, "refine": 1.0}
    for name in ("mobile", "wide"):
        row = result.row(name)
        assert row.miou.keys() == row.agreement.keys() == {"box", "point", "refine"} and row.latency_ms > 0
        assert max(row.agreement.values()) < 1
    assert [panel.title for panel in result.pictures[0].panels][2:] == ["teacher", "twin", "mobile", "wide"]


def test_the_score_is_the_mean_over_prompts_and_is_known_without_each_image(result, models, source):
    for name in ("teacher", "mobile"):
        score, row = result.score(name), result.row(name)
        assert score.name == "mIoU (mean of box, point, refine prompts)"
        assert score.value == pytest.approx(sum(row.miou.values()) / 3)
        assert score.measured_on == f"{result.objects} objects in 3 images"
        assert list(score.without) == list(source.keys)
    left = score.without[source.keys[1]]
    rest = copy.copy(source)
    rest.keys = [key for key in source.keys if key != source.keys[1]]
    alone = evaluate_models({"mobile": models["mobile"]}, rest, GEOMETRY, pictures=0, repeats=0)
    assert left == pytest.approx(alone.score("mobile").value, abs=1e-6)


def test_embeddings_are_compared_and_nothing_where_these_differ_too(result, models, source):
    found = {row.name: row.compared for row in result.rows}
    assert found == {"teacher": None, "twin": "embedding", "mobile": "embedding", "wide": None}
    assert models["wide"].vision_encoder.neck.conv1.in_channels == 24  # as wide as the teacher's trunk, by chance
    assert result.row("twin").cosine == pytest.approx(1.0, abs=1e-6)
    assert result.row("wide").cosine is None and result.row("wide").mse is None
    batch = to_batch([load_example(source, GEOMETRY, key, 8) for key in source.keys])[0]
    with torch.no_grad():
        theirs, ours = (embed(models[name], batch).image_embedding for name in ("teacher", "mobile"))
    assert result.row("mobile").cosine == pytest.approx(
        F.cosine_similarity(ours, theirs, dim=1).mean().item(), abs=1e-5
    )
    assert result.row("mobile").mse == pytest.approx(F.mse_loss(ours, theirs).item(), rel=1e-4)


def test_the_table_says_which_features(result, models, source):
    said = {measure.name: measure.cells for measure in result.measures() if measure.group == "features"}
    assert said["compared"] == ["-", "embedding", "embedding", "-"] and said["cosine"][0] == said["cosine"][3] == "-"
    alone = evaluate_models({"student": models["mobile"]}, source, GEOMETRY, images=1, pictures=0, repeats=0)
    assert not [measure for measure in alone.measures() if measure.group == "features"]


def flops_of_the_tiny_sam() -> int:
    """Of its ViT by hand, two per multiply-add: 4x4 tokens of 24 channels, windows of 2x2 in layer 0 and none in 1."""
    tokens, d, mlp = (SIZE // 16) ** 2, 24, 48
    patches = tokens * (3 * 16 * 16) * d
    layers = 2 * tokens * (3 * d * d + d * d + 2 * d * mlp)
    attention = sum(2 * tokens * side**2 * d for side in (2, 4))  # the scores, and the values they weigh
    positions = sum(tokens * (side + side) * d for side in (2, 4))  # relative ones, of rows and of columns
    return 2 * (patches + layers + attention + positions)


def test_cost_is_counted_without_the_neck(result, models):
    for name in ("teacher", "mobile"):
        model, row = models[name], result.row(name)
        encoder, trunk_channels = model.vision_encoder, model.vision_encoder.neck.conv1.in_channels
        neck = trunk_channels * WIDTH + WIDTH * WIDTH * 9 + 4 * WIDTH
        assert row.trunk_parameters == sum(p.numel() for p in encoder.parameters()) - neck
        assert row.parameters == sum(p.numel() for p in model.parameters())  # the shared table once
        with count_flops() as counter:
            encoder(torch.zeros(1, 3, SIZE, SIZE))
        cells = (SIZE // 16) ** 2
        work = counter.get_total_flops() - 2 * cells * (trunk_channels * WIDTH + WIDTH * WIDTH * 9)
        assert trunk_gflops(model) == pytest.approx(work / 1e9, rel=1e-9) and row.trunk_gflops == trunk_gflops(model)
    assert trunk_gflops(models["teacher"]) == flops_of_the_tiny_sam() / 1e9


def test_the_verb_takes_folders_and_runs(models, root, tmp_path):
    models["teacher"].save_pretrained(tmp_path / "sam")
    models["mobile"].save_pretrained(tmp_path / "run" / "student")
    asked = {"teacher": str(tmp_path / "sam"), "prompts": ["box"], "geometry": "longest_side", "progress": False}
    found = evaluate(tmp_path / "run", root, **asked)
    assert found.images == 3 and found.row("student").agreement.keys() == {"box"}
    MobileSamModel(MobileSamConfig(backbone="es_ev_s", image_size=96, width=16, heads=2)).save_pretrained(
        tmp_path / "96"
    )
    with pytest.raises(UserError, match="learned positions for 64 px and cannot read images of 96 px"):
        evaluate(tmp_path / "96", root, **asked)
