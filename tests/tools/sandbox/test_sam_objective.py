"""What a SAM is trained on beside the tracker's prompts: three masks of a point, several points, boxes with a point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import prompt_objective
from prompt_objective import teacher_terms
from sam_models import build_sam
from samdistill.ops.promptable import Embeddings, MaskPrediction
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.types import Prompts
from tracker_model import IMAGE_SIZE, TRAIN_SEED

Asked = list[tuple[Prompts, bool, MaskPrediction]]


@pytest.fixture(scope="module")
def model():
    return build_sam(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spied(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every question that follows, with its answer."""
    asked: Asked = []
    predict = prompt_objective.predict

    def spy(model: object, embeddings: Embeddings, prompts: Prompts, multimask: bool = False) -> MaskPrediction:
        found = predict(model, embeddings, prompts, multimask)
        asked.append((prompts, multimask, found))
        return found

    monkeypatch.setattr(prompt_objective, "predict", spy)
    return asked


def one_object(count: int) -> Scenes:
    """Scenes of which only the frontmost object may be asked for."""
    scenes = render_scenes(range(count), IMAGE_SIZE, TRAIN_SEED)
    valid = torch.zeros_like(scenes.valid)
    for scene, row in enumerate(scenes.valid):
        valid[scene, row.nonzero()[-1]] = True
    return Scenes(scenes.images, scenes.masks, valid, scenes.concepts)


def test_every_term_is_finite_and_reaches_trunk_and_decoder(model) -> None:
    scenes = render_scenes(range(2), IMAGE_SIZE, TRAIN_SEED)
    terms = teacher_terms(model, scenes, generator(), prompts_per_image=2, multimask=True)
    kinds = ("box", "point", "points", "refine")
    assert sorted(terms) == sorted(f"{kind}/{part}" for kind in kinds for part in ("bce", "dice", "iou"))
    assert terms.nonfinite() == []
    for part in (model.vision_encoder, model.mask_decoder):
        weights = [p for p in part.parameters() if p.requires_grad]
        for name, term in terms.items():
            gradients = torch.autograd.grad(term.value, weights, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.abs().max() > 0) for g in gradients), name


def test_only_a_point_is_answered_by_three_masks_and_the_best_alone_learns(
    model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spied(monkeypatch)
    scenes = one_object(3)
    terms = teacher_terms(model, scenes, generator(1), prompts_per_image=2, multimask=True)
    assert [multimask for _, multimask, _ in asked] == [False, True, False, False]
    found = asked[1][2]
    masks, scores = torch.autograd.grad(
        terms["point/bce"].value + terms["point/iou"].value, (found.low_res_masks, found.iou_scores), retain_graph=True
    )
    assert bool((scores != 0).all())
    truth = scenes.masks[scenes.valid].float()
    up = torch.nn.functional.interpolate(found.low_res_masks.flatten(0, 1), truth.shape[-2:], mode="bilinear")
    squares = []
    for prompt, answers in enumerate(up.detach().double()):
        target = truth[prompt // 2].double()
        costs, ious = [], []
        for answer in answers:
            p = 1 / (1 + (-answer).exp())
            dice = ((p - target) ** 2).sum() / ((p**2).sum() + target.sum() + 1)
            costs.append(dice - (target * p.log() + (1 - target) * (1 - p).log()).mean())
            inside = answer > 0
            ious.append((inside & (target > 0)).sum() / (inside | (target > 0)).sum())
        moved = masks[prompt // 2, prompt % 2].flatten(1).abs().sum(1)
        assert (moved > 0).nonzero().tolist() == [[int(np.argmin(costs))]]
        said = found.iou_scores.detach().flatten(0, 1)[prompt].tolist()
        squares += [(float(iou) - score) ** 2 for iou, score in zip(ious, said, strict=True)]
    assert terms["point/iou"].value.item() == pytest.approx(np.mean(squares), rel=1e-3)


def test_mixed_prompts_are_drawn_as_documented(model, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.zeros(2, 128, 9, 9)

    def flat(_: object, __: Embeddings, prompts: Prompts, multimask: bool = False) -> MaskPrediction:
        b, n = prompts.valid.shape
        m = 3 if multimask else 1
        return MaskPrediction(
            torch.zeros(b, n, m, 36, 36), torch.zeros(b, n, m), torch.zeros(b, n, 4, 8), nothing[:, None]
        )

    monkeypatch.setattr(prompt_objective, "predict", flat)
    monkeypatch.setattr(prompt_objective, "embed", lambda *_: Embeddings((nothing,), nothing))
    asked, scenes = spied(monkeypatch), one_object(2)
    for seed in range(150):
        teacher_terms(model, scenes, generator(seed), prompts_per_image=1, multimask=True)
    boxes, several = [each[0] for each in asked[::4]], [each[0] for each in asked[3::4]]
    assert 0.15 < np.mean([prompts.points is not None for prompts in boxes]) < 0.35
    assert {prompts.points.shape[2] for prompts in several} == {1, 2, 3, 4}
    assert 0.4 < np.mean([bool((prompts.labels == 0).any()) for prompts in several]) < 0.6
    truth = scenes.masks[scenes.valid]
    for prompts in several + [prompts for prompts in boxes if prompts.points is not None]:
        assert int((prompts.labels == 0).sum(2).max()) <= 1
        for image, (points, labels) in enumerate(zip(prompts.points[:, 0].long(), prompts.labels[:, 0], strict=True)):
            assert truth[image, points[:, 1], points[:, 0]].tolist() == (labels == 1).tolist()
