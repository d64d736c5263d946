"""A hosted student: a small trunk inside the teacher, whose other tensors stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hosted_students import TRUNK, assert_equal, built, heads, questions, saved_trunk
from original_names import to_original
from safetensors.torch import save_file
from tiny_detection import TERMS, Recipe
from transformers import Sam3Model

import samdistill as sd
from samdistill.cli import main
from samdistill.deployment.parts_detector import bake, detector_parts
from samdistill.engine import Checkpoint
from samdistill.inference.concepts import load_concept_model
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.plan import plan_detection
from samdistill.jobs.loading import load_config
from samdistill.pipeline import check, train
from samdistill.students import StudentTrunk
from samdistill.types import UserError


@pytest.fixture(scope="module")
def trained(hosted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> DetectionRunConfig:
    """A finished run: an epoch of each phase."""
    config = hosted(tmp_path_factory.mktemp("hosted"), "train.batch_size=8")
    train(config)
    return config


def test_all_but_the_trunk_is_the_teachers_before_and_after_training(trained: DetectionRunConfig, detector) -> None:
    teacher, _ = detector
    start, found = built(trained), Sam3Model.from_pretrained(trained.output / "student")
    for state in (start.state_dict(), found.state_dict()):
        assert_equal(heads(state), heads(teacher.state_dict()))
    assert isinstance(found.vision_encoder.backbone, StudentTrunk)
    before, after = (dict(model.vision_encoder.backbone.named_parameters()) for model in (start, found))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    saved = Checkpoint.load(trained.output / "ckpt_epoch_3.pt")
    left_out = found.state_dict().keys() - saved.model.keys()  # these are the model's own names
    assert left_out == {name for name, _ in found.named_parameters() if not name.startswith(TRUNK)}
    assert len(saved.optimizer["state"]) == len(before)  # and moments of the trunk alone


def test_check_finds_a_gradient_for_every_term_at_the_trunk_alone(hosted: Recipe, tmp_path: Path) -> None:
    config = hosted(tmp_path, "train.batch_size=2")
    report = check(config, device="cpu")
    assert report.ok, report.problems
    names = {phase: {t.name for t in report.terms if t.phase == phase} for phase in ("trunk", "features")}
    assert names == {"trunk": {"trunk"}, "features": {*TERMS, "trunk"}}
    assert report.trainable and all(name.startswith(TRUNK) for name in report.trainable) and report.dead == ()
    student = built(config)
    names = [name for name, _ in student.named_parameters()]
    (rule,) = config.train.freeze
    frozen = [name for name in names if any(fnmatchcase(name, glob) for glob in rule.match)]
    assert sorted([*frozen, *report.trainable]) == sorted(names)


def test_a_config_can_unfreeze_heads_by_name_and_epoch(hosted: Recipe, tmp_path: Path) -> None:
    rules = [{"match": ["text_encoder.*", "text_projection.*"]}, {"match": ["detr_decoder.*"], "until": 1}]
    config = hosted(tmp_path, f"train.freeze={json.dumps(rules)}", "train.batch_size=2")
    assert len(config.train.freeze) == 2 and config.match.method == "index"
    report = check(config, device="cpu")
    trained = {name.split(".")[0] for name in report.trainable}
    assert trained == {
        "vision_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder", "dot_product_scoring"
    }  # fmt: skip
    assert hosted(tmp_path, "match.method=hungarian").match.method == "hungarian"
    assert len(hosted(tmp_path, "train.freeze=[]").train.freeze) == 0


def test_the_saved_student_answers_as_the_one_in_memory(trained: DetectionRunConfig) -> None:
    parts, (images, prompts) = DetectionParts(trained), questions()
    whole = parts.task().build_student()
    whole.load_state_dict(Checkpoint.load(trained.output / "ckpt_epoch_3.pt").model, strict=False)
    whole.to(memory_format=torch.contiguous_format)  # as a model from a file; channels last round differently
    wanted = parts.kind.detector(whole.eval(), parts.words).answer(images, prompts)
    asked = parts.words.inputs(prompts, "cpu")
    pixels = (images.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        called = whole(pixels, prompt_images=prompts.image, **asked).answer()
        levels = whole(pixels).fpn_hidden_states
    opened = load_concept_model(trained.output)
    found = opened.answer(images, prompts)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg", "encoder"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        torch.testing.assert_close(getattr(called, name), getattr(wanted, name))
    assert all(torch.equal(a, b) for a, b in zip(found.fpn, wanted.fpn, strict=True)) and len(levels) == 3
    assert opened.words.context == parts.words.context and sd.load(trained.output).kind == "detector"


def test_a_trained_trunk_gives_the_model_that_a_merge_writes(
    hosted: Recipe, detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_trunk(tmp_path / "trunk")
    student = built(hosted(tmp_path / "run", f"student.trunk={run}"))
    sd.merge(run, detector[1], tmp_path / "merged")
    merged = load_concept_model(tmp_path / "merged")
    assert_equal(student.state_dict(), merged.model.state_dict())
    parts, (images, prompts) = DetectionParts(hosted(tmp_path / "run")), questions(1)
    own = parts.kind.detector(student.eval(), parts.words).answer(images, prompts)
    theirs = merged.answer(images, prompts)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
        torch.testing.assert_close(getattr(own, name), getattr(theirs, name))
    start = built(hosted(tmp_path / "run", f"student.start={tmp_path / 'merged'}"))
    assert_equal(start.state_dict(), merged.model.state_dict())


@torch.no_grad()
def test_a_trunk_that_reads_the_teachers_statistics_keeps_them(hosted: Recipe, detector, tmp_path: Path) -> None:
    statistics = {"input_mean": [0.5] * 3, "input_std": [0.5] * 3}
    run = saved_trunk(tmp_path / "trunk", **statistics)
    sd.merge(run, detector[1], tmp_path / "merged")
    wanted = load_concept_model(tmp_path / "merged").model.vision_encoder.backbone
    pixels = torch.randn(1, 3, 126, 126)
    for setting in (f"student.trunk={run}", f"student.start={tmp_path / 'merged'}"):
        trunk = built(hosted(tmp_path / "run", setting)).model.vision_encoder.backbone.eval()
        assert {name: getattr(trunk.config, name) for name in statistics} == statistics
        torch.testing.assert_close(trunk.image_embedding(pixels), wanted.image_embedding(pixels))


def test_a_teacher_at_another_size_brings_the_student_to_it(hosted: Recipe, tmp_path: Path) -> None:
    config = hosted(tmp_path, "teacher.image_size=168")
    model = built(config).model
    assert model.config.vision_config.backbone_config.image_size == 168
    assert model.config.vision_config.backbone_feature_sizes == [[48, 48], [24, 24], [12, 12]]
    assert check(config, device="cpu").ok


def test_plan_splits_the_student_and_counts_what_trains(
    hosted: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hosted(tmp_path / "run")
    found, student = plan_detection(config), built(config)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in student.named_children()}
    assert found.parts["trunk"] + found.parts["neck"] == sizes.pop("vision_encoder")
    assert {name: found.parts[name] for name in sizes} == sizes
    assert found.student_params == sum(p.numel() for p in student.parameters()) == sum(found.parts.values())
    assert found.trained_params == found.parts["trunk"] and found.queries == found.teacher_queries == 10
    rest = found.student_params - found.trained_params
    assert found.weights_and_optimiser_bytes == 4 * (rest + 4 * found.trained_params)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    trunk = f"{found.trained_params / 1e6:.2f}M"
    frozen = ", ".join(name for name in found.parts if name != "trunk")
    assert f"trained {trunk} parameters: trunk {trunk}; frozen: {frozen}" in said
    assert sum(found.teacher_parts.values()) == found.teacher_params and "sam3.pt" not in said
    assert {name: found.teacher_parts[name] for name in sizes} == sizes  # the heads are the teacher's


@pytest.mark.parametrize("phrases", [(), ("red circle", "star")], ids=["words", "baked"])
def test_its_files_answer_as_the_model(trained: DetectionRunConfig, phrases: tuple[str, ...]) -> None:
    """What is exported, before any format: each part against the model's own forward pass."""
    opened = load_concept_model(trained.output)
    baked = bake(opened, phrases) if phrases else None
    parts = detector_parts(opened, baked, static=False)
    assert [part.name for part in parts] == (
        ["detector"] if phrases else ["vision_encoder", "text_encoder", "decoder", "decoder_boxes"]
    )
    for part in parts:
        given = part.example(part.cases[0], 3)
        with torch.no_grad():
            for own, wanted in zip(part.module(*given), part.reference(*given), strict=True):
                torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["student.kind=stitched"], "student.kind"),
        (["student.queries=4"], "a hosted student has no student.queries; leave that out"),
        (["student.inherit=true"], "a hosted student has no student.inherit"),
        (
            ["student.kind=described", "student.head=fused", "match.method=index"],
            "only a hosted student has the queries of its teacher",
        ),
        (["student.kind=described", "student.head=published"], "a described student has no student.head"),
        (["match.method=indx"], "no matcher is called 'indx'; did you mean 'index'?"),
        (
            ["train.phases=[{name: one, epochs: 1, lr: 1e-3, terms: [trunk]}]", "loss.trunk=0"],
            "phase 'one' has no term with a weight; set loss.trunk above 0",
        ),
        (["student.backbone=es_ev_x"], "es_ev_x"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(
    hosted: Recipe, tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        plan_detection(hosted(tmp_path, *settings))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("trunk", "said"),
    [
        ({"hidden": 48}, "the student gives 48 channels, but the configuration of .* reads 64; train the student"),
        ({"patch": 16}, "the student's patch size is 16, but that of .* is 14"),
        (
            {"backbone": "es_ev_m"},
            "a trunk with the backbone 'efficientvit_b1' and the head 'strided', but this student",
        ),
        ({"head": "published"}, "and the head 'published', but this student has .* the head 'strided'"),
    ],
)
def test_a_trunk_for_another_host_is_refused(hosted: Recipe, tmp_path: Path, trunk: dict, said: str) -> None:
    run = saved_trunk(tmp_path / "trunk", **trunk)
    with pytest.raises(UserError, match=said) as refused:
        built(hosted(tmp_path / "run", f"student.trunk={run}"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trunk_of_a_run_with_another_teacher_is_refused(
    hosted: Recipe, detector, scenes: Path, tmp_path: Path, precision: str
) -> None:
    teacher, folder = detector
    run, other = tmp_path / "trunk", tmp_path / "other"
    train(load_config("encoder/sandbox", [
        f"output={run}", f"teacher.path={folder}", f"teacher.precision={precision}", "student.backbone=es_ev_s",
        "student.head=strided", "data.kind=coco", f"data.root={scenes}", "data.workers=0", "cache.mode=online",
        "train.batch_size=8", "train.epochs=1",
    ]))  # fmt: skip
    shutil.copytree(folder, other)
    model = copy.deepcopy(teacher)
    model.vision_encoder.backbone.layers[0].mlp.fc1.bias.data[0] += 0.5
    model.save_pretrained(other)
    last = run / "ckpt_epoch_1.pt"
    for place in (run, run / "student", last):
        built(hosted(tmp_path / "run", f"student.trunk={place}"))
        with pytest.raises(
            UserError, match=r"was trained against another ViT \(teacher\.path=.*\) than that of "
        ) as no:
            built(hosted(tmp_path / "run", f"student.trunk={place}", f"teacher.path={other}"))
        assert str(folder) in str(no.value) and str(other) in str(no.value) and "\n" not in str(no.value)
    saved = Checkpoint.load(last)
    dataclasses.replace(saved, teacher="0" * 64, config=saved.config.replace(str(folder), "sandbox")).save(last)
    with pytest.raises(UserError, match="the encoder job's 'sandbox' is the bundled tracker; give a trunk that was"):
        built(hosted(tmp_path / "run", f"student.trunk={run}"))


def test_heads_come_from_a_file_in_any_layout(hosted: Recipe, detector, tmp_path: Path) -> None:
    model, folder = detector
    video, original = tmp_path / "video", tmp_path / "original" / "sam3.pt"
    for place in (video, original.parent):
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = {"model_type": "sam3_video", "detector_config": json.loads((folder / "config.json").read_text())}
    (video / "config.json").write_text(json.dumps(whole))
    state = {f"detector_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(
        state | {"tracker_model.no_memory_embedding": torch.ones(3)}, video / "model.safetensors", {"format": "pt"}
    )
    torch.save({"model": {name: t.clone() for name, t in to_original(model.state_dict())[0].items()}}, original)
    for place in (video, original):
        config = hosted(tmp_path / "run", f"teacher.path={place}", "teacher.precision=bf16")
        student = built(config)
        assert_equal(heads(student.state_dict()), heads(model.state_dict()))
        student.model.save_pretrained(tmp_path / place.parent.name / "saved")
        again = Sam3Model.from_pretrained(tmp_path / place.parent.name / "saved")
        assert_equal(again.state_dict(), student.state_dict())


def test_neck_words_and_heads_can_be_another_models(hosted: Recipe, detector, tmp_path: Path) -> None:
    teacher, folder = detector
    other, config = tmp_path / "other", copy.deepcopy(teacher.config)
    config.text_config.num_hidden_layers = 2
    torch.manual_seed(3)
    model = Sam3Model(config).eval()
    model.save_pretrained(other)
    for path in folder.glob("token*"):
        shutil.copy(path, other)
    student = built(hosted(tmp_path / "run", f"student.host={other}"))
    assert_equal(heads(student.state_dict()), heads(model.state_dict()))
    config.detr_decoder_config.num_queries = 7
    Sam3Model(config).save_pretrained(other)
    with pytest.raises(UserError, match=r"student.host=.*: queries is 7, but that of .* is 10; give a model with"):
        plan_detection(hosted(tmp_path / "run", f"student.host={other}"))


def test_a_described_student_is_no_start_of_a_hosted_one(hosted: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no student of kind sam3 here"):
        built(hosted(tmp_path, f"student.start={saved_trunk(tmp_path / 'trunk')}"))
