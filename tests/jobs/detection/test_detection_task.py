"""Detection distillation: both models are asked the same about the same pixels, and every phase trains what it says."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_detection import OUTPUTS, TERMS, Recipe
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from samdistill.config import TrainConfig
from samdistill.data import open_source
from samdistill.data.skipped import read_skipped
from samdistill.engine import Checkpoint, Interrupted, check_terms, fit
from samdistill.engine.task import Phase
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.task import DetectionBatch, DetectionTask
from samdistill.students import EfficientSam3Model
from samdistill.teachers import Sam3Detector
from samdistill.types import Terms, UserError

ALIGN, FEATURES, OUTPUT = range(3)
PHASES = (Phase(0, "align", frozenset({"fpn"})), Phase(1, "features"), Phase(2, "outputs", frozenset(OUTPUTS)))
WORDS_ALONE = "questions.boxes=0"


def parts_of(config: DetectionRunConfig, teacher: Sam3Detector) -> DetectionParts:
    """With a teacher that is loaded already."""
    parts = DetectionParts(config)
    vars(parts)["teacher"] = teacher
    return parts


@pytest.fixture(scope="module")
def task(detection: Recipe, tmp_path_factory: pytest.TempPathFactory) -> DetectionTask:
    return DetectionParts(detection(tmp_path_factory.mktemp("base"), WORDS_ALONE)).task()


@pytest.fixture(scope="module")
def student(task: DetectionTask) -> EfficientSam3Model:
    torch.manual_seed(0)
    return task.build_student().train()


@pytest.fixture
def variant(detection: Recipe, task: DetectionTask, tmp_path: Path):
    """variant(*overrides): the task with other settings and the same teacher."""

    def make(*overrides: str) -> DetectionTask:
        return parts_of(detection(tmp_path / "run", WORDS_ALONE, *overrides), task.teacher).task()

    return make


def batch_of(task: DetectionTask, epoch: int, count: int = 2) -> DetectionBatch:
    data = task.dataset(epoch)
    return task.to(task.collate([data[i] for i in range(count)], PHASES[epoch]), torch.device("cpu"))


def assert_trainable(terms: Terms, student: nn.Module) -> None:
    """Finite values, and a finite gradient that is not zero."""
    assert not terms.nonfinite()
    grads = torch.autograd.grad(terms.total, list(student.parameters()), allow_unused=True)
    found = [grad for grad in grads if grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in found) and any(bool(grad.any()) for grad in found)


def few(task: DetectionTask, path: Path, count: int, *also: str) -> str:
    """An override: train on ``also`` and the first keys, ``count`` in all."""
    keys = [*also, *(key for key in open_source(task.config.data, "train").keys if key not in also)][:count]
    path.write_text("\n".join(keys))
    return f"data.ids={path}"


def test_the_phase_decides_which_terms_there_are(task: DetectionTask, student: EfficientSam3Model) -> None:
    assert tuple(Phase.of(task.config.train, epoch) for epoch in range(3)) == PHASES
    names = {epoch: task.terms(student, batch_of(task, epoch), PHASES[epoch]) for epoch in (ALIGN, FEATURES, OUTPUT)}
    assert [tuple(terms) for terms in names.values()] == [("fpn",), TERMS, OUTPUTS]
    for terms in names.values():
        assert {name: term.weight for name, term in terms.items()} == {
            name: getattr(task.config.loss, name) for name in terms
        }


def test_levels_alone_are_compared_without_asking_anybody_anything(
    task: DetectionTask, student: EfficientSam3Model
) -> None:
    calls: list[str] = []
    names = ("vision_encoder", "text_encoder", "detr_encoder", "detr_decoder")
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, who=who, name=name: calls.append(f"{who} {name}"))
        for who, model in (("teacher", task.teacher.model), ("student", student)) for name in names
    ]  # fmt: skip
    batch = batch_of(task, ALIGN)
    alone = task.terms(student, batch, PHASES[ALIGN])
    assert sorted(calls) == ["student vision_encoder", "teacher vision_encoder"]
    calls.clear()
    among = task.terms(student, batch, PHASES[FEATURES])
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(f"{who} {name}" for who in ("teacher", "student") for name in names)
    assert alone["fpn"].value.item() == pytest.approx(among["fpn"].value.item(), rel=1e-5)


def test_each_model_normalises_for_itself(task: DetectionTask, student: EfficientSam3Model) -> None:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    models = (task.teacher.model, student)
    hooks = [model.vision_encoder.register_forward_pre_hook(keep, with_kwargs=True) for model in models]
    batch = batch_of(task, OUTPUT)
    task.terms(student, batch, PHASES[OUTPUT])
    for hook in hooks:
        hook.remove()
    unit = batch.images.images.double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert len(seen) == 2 and unit.std() > 0.05
    assert torch.allclose(seen[0].double(), (unit - 0.5) / 0.5, atol=1e-5)
    assert torch.allclose(seen[1].double(), (unit - mean) / std, atol=1e-5)


def test_every_term_of_every_phase_has_a_gradient_of_its_own(task: DetectionTask) -> None:
    report = check_terms(task, "cpu", 2, train=task.config.train)
    wanted = [("align", "fpn"), *(("features", n) for n in TERMS), *(("outputs", n) for n in OUTPUTS)]
    assert [(row.phase, row.name) for row in report.terms] == wanted
    assert report.ok, report.problems
    norms = [row.grad_norm for row in report.terms]
    assert min(norms) > 0 and len(set(norms)) == len(norms)
    # no box is shown, nobody reads stride 32, and SAM 3 reads the words' tokens, not their pooled vector
    idle = ("geometry_encoder.", "vision_encoder.adapters.3.smooth.", "text_encoder.projection.")
    assert all(name.startswith(idle) for name in report.dead), report.dead


def test_losses_are_float32_when_the_students_weights_are_not(task: DetectionTask, student: EfficientSam3Model) -> None:
    half, batch = copy.deepcopy(student).to(torch.bfloat16), batch_of(task, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        terms = task.terms(half, batch, PHASES[FEATURES])
    assert tuple(terms) == TERMS and {term.value.dtype for term in terms.values()} == {torch.float32}
    assert_trainable(terms, half)
    full = task.terms(student, batch, PHASES[FEATURES])
    for name in ("fpn", "logit", "semantic"):
        assert terms[name].value.item() == pytest.approx(full[name].value.item(), rel=0.05), name


def test_the_same_teacher_gives_the_same_terms(task: DetectionTask, student: EfficientSam3Model) -> None:
    again = DetectionParts(task.config).task()
    assert again.teacher.fingerprint == task.teacher.fingerprint
    values = [
        [term.value.item() for term in each.terms(student, batch_of(each, FEATURES), PHASES[FEATURES]).values()]
        for each in (task, again)
    ]
    assert values[0] == values[1]


def test_without_a_single_detection_every_query_learns_that_there_is_nothing(variant, student) -> None:
    task = variant("match.floor=1.0")
    batch = batch_of(task, OUTPUT)
    assert task.teacher.answer(batch.images, batch.prompts).scores.max() < 1
    logits: list[Tensor] = []
    hook = student.register_forward_hook(lambda _, args, out: logits.append(out.pred_logits))
    terms = task.terms(student, batch, PHASES[OUTPUT])
    hook.remove()
    assert [terms[name].value.item() for name in ("mask", "box_l1", "giou")] == [0, 0, 0]
    assert terms["logit"].value.item() == pytest.approx(F.softplus(logits[0]).mean().item(), rel=1e-5)
    assert_trainable(terms, student)


def test_a_student_with_more_queries_than_its_teacher_learns(variant) -> None:
    task = variant("student.queries=12")
    assert task.teacher.info.queries == 10
    student, batch = task.build_student().train(), batch_of(task, OUTPUT)
    adam = torch.optim.Adam(student.parameters(), 1e-3)
    totals = []
    for _ in range(4):
        adam.zero_grad()
        terms = task.terms(student, batch, PHASES[OUTPUT])
        terms.total.backward()
        adam.step()
        totals.append(terms.total.item())
    assert totals[-1] < totals[0] and torch.tensor(totals).isfinite().all()


def test_images_without_an_object_are_trained_on(variant, student, tmp_path: Path) -> None:
    for number, shade in enumerate((0, 255, 128, 60)):
        Image.new("RGB", (90, 60), (shade,) * 3).save(tmp_path / f"{number}.jpg")
    folder = ("data.kind=folder", f"data.root={tmp_path}", "data.held_out=null", "data.held_out_fraction=0.5")
    task = variant(*folder, "questions={source: generic, negatives: 0, generic: [red circle, square]}")
    batch = batch_of(task, FEATURES, 1)
    assert set(batch.prompts.texts) <= {"red circle", "square"}
    assert_trainable(task.terms(student, batch, PHASES[FEATURES]), student)


def test_an_unreadable_image_is_named_once_and_training_goes_on(
    variant, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, task: DetectionTask
) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    broken = sorted((tmp_path / "scenes" / "images" / "train").iterdir())[2]
    broken.write_bytes(b"no image")
    ids = few(task, tmp_path / "ids.txt", 2, broken.stem)
    phases = "train.phases=[{name: align, epochs: 2, lr: 1e-3, terms: [fpn]}]"
    job = variant(f"data.root={tmp_path / 'scenes'}", ids, "train.batch_size=2", phases)
    with caplog.at_level(logging.WARNING, "samdistill"):
        assert fit(job, job.config.train, tmp_path / "run", workers=0).steps == 2
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(lines) == 1 and broken.stem in lines[0]
    (listed,) = read_skipped(tmp_path / "run" / "skipped.jsonl")
    assert listed["key"] == broken.stem and listed["stage"] == "train"
    assert f"train: left out: {broken.stem}: " in (tmp_path / "run" / "log_rank0.txt").read_text()


def test_a_phrase_beyond_the_context_is_reported_and_asked_of_nobody(variant, caplog) -> None:
    long = "the very red circle over there"
    with caplog.at_level(logging.WARNING, "samdistill"):
        task = variant(f"questions={{source: generic, negatives: 0, per_image: 4, generic: [circle, {long}]}}")
    assert any(f"left out: {long!r}: longer than a text" in record.getMessage() for record in caplog.records)
    assert set(batch_of(task, OUTPUT, 4).prompts.texts) == {"circle"}
    with pytest.raises(UserError, match="no image has a phrase"):
        variant(f"questions={{source: generic, negatives: 0, generic: [{long}]}}")


def test_a_teacher_at_another_size_brings_the_student_to_it(detection: Recipe, tmp_path: Path) -> None:
    config = detection(tmp_path, WORDS_ALONE, "teacher.image_size=168")
    task = DetectionParts(config).task()
    student, batch = task.build_student().train(), batch_of(task, FEATURES)
    assert batch.images.images.shape[-2:] == (168, 168) and student.config.vision_config.image_size == 168
    assert_trainable(task.terms(student, batch, PHASES[FEATURES]), student)
    with pytest.raises(UserError, match="126 or 140"):
        DetectionParts(detection(tmp_path, "teacher.image_size=130")).task()


def test_a_tokenizer_of_another_vocabulary_is_refused(detection: Recipe, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "circle": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path / "words")
    config = detection(tmp_path / "run", f"teacher.tokenizer={tmp_path / 'words'}")
    with pytest.raises(UserError, match="the tokenizer has 3 tokens"):
        DetectionParts(config).task()


def test_every_question_teaches_the_cls_token_and_a_box_the_box_encoder_too(variant, task, student) -> None:
    shown = variant("questions.boxes=1.0")
    encoder = student.geometry_encoder
    parts = {"cls": [encoder.cls_embed.weight], "boxes": list(encoder.boxes_direct_project.parameters())}
    for each, boxes in ((task, 0), (shown, 1)):
        batch = batch_of(each, OUTPUT)
        assert batch.prompts.boxes.shape == (4, boxes, 4)
        terms = each.terms(student, batch, PHASES[OUTPUT])
        for part, parameters in parts.items():
            grads = torch.autograd.grad(terms.total, parameters, allow_unused=True, retain_graph=True)
            reached = any(grad is not None and bool(grad.any()) for grad in grads)
            assert reached is (part == "cls" or bool(boxes)), part
        assert not terms.nonfinite()


def test_validation_is_the_mean_over_the_held_out_batches(task: DetectionTask, student: EfficientSam3Model) -> None:
    student.eval()
    found, rows = task.validate(student, PHASES[OUTPUT]), []
    assert task.held_out is not None and len(task.held_out) == 4 and task.config.evaluate.batch_size == 2
    for first in (0, 2):
        batch = task.collate([task.held_out[i] for i in (first, first + 1)], PHASES[OUTPUT])
        with torch.no_grad():
            rows.append({name: term.value.item() for name, term in task.terms(student, batch, PHASES[OUTPUT]).items()})
    student.train()
    total = found.pop("total")
    assert total == pytest.approx(sum(getattr(task.config.loss, n) * v for n, v in found.items()), rel=1e-5)
    assert found == pytest.approx({name: (rows[0][name] + rows[1][name]) / 2 for name in OUTPUTS}, rel=1e-5)
    made = (task.config, task.teacher, task.kind, task.maps, task.words, task.questions)
    assert DetectionTask(*made).validate(student) == {}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_held_out_figures_do_not_depend_on_the_size_of_a_batch(task, student, variant, size: int) -> None:
    """Four images: whole batches, a smaller last one, less than one batch."""
    other = variant(f"evaluate.batch_size={size}")
    found = []
    for each in (task, other):
        found.append(each.validate(student.eval(), PHASES[FEATURES]))
    student.train()
    assert set(found[0]) == {*TERMS, "total"} and found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)


class StopAt(DetectionTask):
    """Sends itself a signal while computing its third batch."""

    seen = 0

    def terms(self, student: nn.Module, batch: DetectionBatch, phase: Phase = Phase()) -> Terms:
        self.seen += 1
        if self.seen == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().terms(student, batch, phase)


def test_interrupted_in_a_phase_and_resumed_it_is_the_uninterrupted_run(
    variant, task: DetectionTask, tmp_path: Path
) -> None:
    settings = "train.phases=[{name: align, epochs: 1, lr: 1e-3, terms: [fpn]}, {name: all, epochs: 1, lr: 1e-3}]"
    job = variant(few(task, tmp_path / "ids.txt", 4), "train.batch_size=2", settings, "questions.boxes=0.3")
    train: TrainConfig = job.config.train
    made = (job.config, job.teacher, job.kind, job.maps, job.words, job.questions)
    whole, stopped = (each(*made) for each in (DetectionTask, StopAt))
    assert fit(whole, train, tmp_path / "whole", workers=0).steps == 4
    with pytest.raises(Interrupted) as stop:
        fit(stopped, train, tmp_path / "run", workers=0)
    assert Checkpoint.load(stop.value.checkpoint).step == 3
    again = DetectionTask(*made)
    assert fit(again, train, tmp_path / "run", workers=0).steps == 4
    one, other = (Checkpoint.load(tmp_path / name / "ckpt_epoch_2.pt") for name in ("whole", "run"))
    assert one.terms == other.terms and set(one.terms) == set(TERMS)
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
