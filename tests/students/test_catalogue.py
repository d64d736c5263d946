from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from transformers import AutoModel, Sam3Config, Sam3ViTConfig

from samdistill.students import HEADS, STUDENTS, breakdown, list_students
from samdistill.students.catalogue import PUBLISHED as PUBLISHED_FIGURES
from samdistill.students.catalogue import TEACHER_PARAMS, TEACHER_PARTS, TEACHER_TRUNK_PARAMS, hosted_parts, part_rows
from samdistill.types import UserError

# The published table: trunk parameters in millions, channels of the last map, GFLOP of the trunk at 1008 px.
PUBLISHED = {
    "es_ev_s": ("efficientvit_b0", 0.683, 128, 3.7),
    "es_ev_m": ("efficientvit_b1", 4.644, 256, 20.3),
    "es_ev_l": ("efficientvit_b2", 14.977, 384, 62.9),
    "es_rv_s": ("repvit_m0_9", 4.718, 384, 33.2),
    "es_rv_m": ("repvit_m1_1", 7.775, 512, 54.4),
    "es_rv_l": ("repvit_m2_3", 22.404, 640, 183.4),
    "es_tv_s": ("tiny_vit_5m_224", 5.071, 320, 53.2),
    "es_tv_m": ("tiny_vit_11m_224", 10.547, 448, 86.7),
    "es_tv_l": ("tiny_vit_21m_224", 20.620, 576, 182.0),
}


def test_the_table_is_the_published_one() -> None:
    rows = list_students()
    assert [row.name for row in rows] == list(PUBLISHED) == list(STUDENTS)
    for row in rows:
        backbone, millions, _, gflops = PUBLISHED[row.name]
        assert row.backbone == backbone
        assert round(row.trunk_params / 1e6, 3) == millions
        assert STUDENTS[row.name].gflops == gflops
        assert row.config == f"encoder/{row.name}"
        assert row.teacher_share == pytest.approx(row.trunk_params / 446.237e6, rel=1e-5)
    assert list(asdict(rows[0])) == ["name", "backbone", "config", "trunk_params", "head_params", "teacher_share"]


def test_published_heads_weigh_9_6_to_10_1_million() -> None:
    heads = {row.name: row.head_params for row in list_students("published")}
    for name, (_, _, channels, _) in PUBLISHED.items():
        assert heads[name] == channels * 1024 + 2 * 1024 + 9 * 1024 * 1024 + 1024
    assert min(heads.values()) > 9.55e6 and max(heads.values()) < 10.15e6


def test_the_teacher_is_sam3s_vit() -> None:
    with torch.device("meta"):
        vit = AutoModel.from_config(Sam3ViTConfig())
    assert sum(p.numel() for p in vit.parameters()) == TEACHER_TRUNK_PARAMS


def test_its_parts_are_those_of_transformers_and_explain_the_published_figures() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(Sam3Config())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    neck = sum(p.numel() for p in model.vision_encoder.neck.parameters())
    vision, text = sizes.pop("vision_encoder"), sizes.pop("text_encoder") + sizes.pop("text_projection")
    detr = sizes.pop("detr_encoder") + sizes.pop("detr_decoder")
    geometry, mask, scoring = (sizes.pop(name) for name in ("geometry_encoder", "mask_decoder", "dot_product_scoring"))
    assert list(TEACHER_PARTS.values()) == [vision - neck, neck, text, geometry, detr, mask, scoring] and not sizes
    assert sum(p.numel() for p in model.parameters()) == TEACHER_PARAMS and "has 840.38M" in PUBLISHED_FIGURES
    assert (round((vision + neck) / 1e6, 2), round(text / 1e6, 2)) == (461.84, 353.72)


def test_the_hosted_student_is_the_published_combination_with_sam3s_own_neck() -> None:
    """Published: image features 25.07M, text encoder of MobileCLIP-S0's size, SAM 3's heads: 100.24M in all."""
    parts = hosted_parts()
    changed = {name for name in parts if parts[name] != TEACHER_PARTS[name]}
    assert changed == {"trunk", "text encoder with projection"}
    rows = part_rows()
    assert [row[3] for row in rows] == ["yes", "no", "before, in a text run", *["no"] * 4, ""]
    assert rows[-1][1:3] == ("840.376", "106.875")
    ours, theirs = parts["trunk"] + parts["neck"], 25.07e6
    assert sum(parts.values()) - (ours - theirs) == pytest.approx(100.24e6, abs=0.01e6)


@pytest.mark.parametrize("name", STUDENTS)
def test_breakdown_at_full_size(name: str) -> None:
    _, millions, channels, gflops = PUBLISHED[name]
    parts = breakdown(name)
    assert parts.trunk_gflops == pytest.approx(gflops, abs=0.051)
    assert parts.map_sizes == [252, 126, 63, 32]
    assert parts.channels[-1] == channels
    assert round(parts.trunk_params / 1e6, 3) == millions
    assert sum(m.params for m in parts.modules) == parts.trunk_params + parts.head_params
    assert sum(m.gflops for m in parts.modules) == pytest.approx(parts.trunk_gflops + parts.head_gflops)


@pytest.mark.parametrize("head", HEADS)
def test_breakdown_takes_every_head_and_any_backbone(head: str) -> None:
    parts = breakdown("resnet10t", head, hidden_size=64, image_size=126)
    assert parts.head == head and parts.backbone == "resnet10t"
    assert parts.strides == [4, 8, 16, 32]


def test_unknown_names_are_explained() -> None:
    with pytest.raises(UserError, match="did you mean 'es_rv_"):
        breakdown("es_rv_mm")
    with pytest.raises(UserError, match="did you mean 'fused'"):
        list_students("fuse")
