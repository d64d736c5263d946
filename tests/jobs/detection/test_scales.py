"""Units of features: numpy's standard deviations, and terms that do not depend on the scale of a channel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_detection import PHASES, Recipe

from samdistill.engine import check_terms
from samdistill.engine.task import Phase
from samdistill.jobs.detection.losses import feature_terms
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.jobs.detection.scales import ITEMS, SMALLEST, Scales
from samdistill.types import DetectorOutput

WIDE = torch.tensor([100.0, 1.0, 0.01, 3.0])[:, None, None]
"""Scales of the channels. The third one is below ``SMALLEST``."""


def features(seed: int, images: int = 2, questions: int = 3, wide: torch.Tensor = WIDE) -> DetectorOutput:
    g, none = torch.Generator().manual_seed(seed), torch.zeros(questions, 1)
    fpn = tuple(5 + wide * torch.randn(images, 4, side, side, generator=g) for side in (8, 4, 2))
    return DetectorOutput(none, none, none, none, none, fpn, wide * torch.randn(questions, 4, 2, 2, generator=g))


def test_units_are_the_standard_deviations_of_all_batches() -> None:
    batches = [features(0), features(1, 1, 2)]
    found = Scales.measure(batches)
    for level in range(3):
        values = [np.moveaxis(batch.fpn[level].double().numpy(), 1, 0).reshape(4, -1) for batch in batches]
        wanted = np.concatenate(values, 1).std(1)
        wanted = np.maximum(wanted, SMALLEST * wanted.mean())  # the third channel is below it
        np.testing.assert_allclose(found.fpn[level][:, 0, 0], wanted, rtol=1e-5)
        assert wanted[2] > 0.02
    assert found.encoder is not None and found.encoder.shape == (4, 1, 1)


def test_terms_in_these_units_do_not_depend_on_the_scale_of_a_channel() -> None:
    def values(wide: torch.Tensor) -> dict[str, float]:
        student, teacher = (features(seed, wide=wide) for seed in (2, 3))
        student, teacher = (replace(x, fpn=tuple(level - 5 for level in x.fpn)) for x in (student, teacher))
        units = Scales.measure([teacher])
        return {name: value.item() for name, value in feature_terms(units.of(student), units.of(teacher)).items()}

    assert values(torch.tensor([2.0, 0.5, 3.0, 7.0])[:, None, None]) == pytest.approx(
        values(torch.ones(4, 1, 1)), rel=1e-4
    )
    none, student = Scales(), features(2)
    assert none.of(student) is student and none.levels(student.fpn) == student.fpn


@pytest.mark.parametrize("kind", ["detection", "hosted"])
def test_a_run_measures_its_teacher_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe: Recipe = request.getfixturevalue(kind)
    task = DetectionParts(recipe(tmp_path, "loss.standardise=true", "questions.boxes=0", PHASES)).task()
    cpu, seen = torch.device("cpu"), []
    answer = task.teacher.answer
    task.teacher.answer = lambda images, prompts, *text: seen.append(len(images)) or answer(images, prompts, *text)
    units = task.scales(cpu)
    assert sum(seen) == ITEMS == 16 and task.scales(cpu) is units and len(seen) == 4
    student = task.build_student()
    plain = DetectionParts(recipe(tmp_path, "questions.boxes=0", PHASES)).task()
    for phase in (Phase(0, "align", frozenset({"fpn"})), Phase(1, "features")):
        items = [task.dataset(phase.epoch)[i] for i in range(2)]
        own, usual = (
            each.terms(student.eval(), each.to(each.collate(items, phase), cpu), phase) for each in (task, plain)
        )
        images = task.collate(items, phase)
        taught = answer(images.images, images.prompts).fpn
        ours = student((images.images.images.float() / 255 - torch.tensor(task.kind.mean)[:, None, None])
                       / torch.tensor(task.kind.std)[:, None, None]).fpn_hidden_states  # fmt: skip
        errors = [
            ((torch.nn.functional.interpolate(a, b.shape[-2:], mode="bilinear") - b) / u).square().mean().item()
            for a, b, u in zip(ours, taught, units.fpn, strict=True)
        ]
        assert own["fpn"].value.item() == pytest.approx(sum(errors) / 3, rel=1e-3)
        assert own["fpn"].value.item() != pytest.approx(usual["fpn"].value.item(), rel=1e-3)
    report = check_terms(task, "cpu", 2, train=task.config.train)
    assert report.ok, report.problems
