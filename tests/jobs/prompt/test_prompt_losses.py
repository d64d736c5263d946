"""The terms of prompt distillation against loops, scipy, torchvision and cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from samdistill.jobs.prompt.losses import dense_masks, encoder_patch, mask_token, prompt_embed, task_terms
from samdistill.losses.mask import soft_dice, soft_focal, soft_mask_loss

GAMMA, ALPHA = 2.0, 0.25


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def half(*shape: int) -> torch.Tensor:
    """The left half of the last axis."""
    return (torch.arange(shape[-1]) < shape[-1] // 2).expand(shape).clone()


def pairs() -> dict[str, tuple]:
    """Name to (function of student and teacher alone, student, teacher)."""
    return {
        "encoder_patch": (lambda s, t: encoder_patch(s, t, 1.0, 1.0), draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)),
        "prompt_embed": (lambda s, t: prompt_embed(s, t, 0.7, 0.3), draw(2, 3, 5, 3, 4), draw(2, 3, 5, 3, 4, seed=1)),
        "mask_token": (lambda s, t: mask_token(s, t, 1.0, 0.5), draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)),
        "dense_masks": (
            lambda s, t: dense_masks(s, t, 0.6, 0.4, 2.0),
            draw(2, 3, 1, 4, 6),
            draw(2, 3, 1, 4, 6, seed=1),
        ),
    }


@pytest.mark.parametrize("name", pairs())
def test_zero_at_equality_and_nowhere_else(name: str) -> None:
    loss, student, teacher = pairs()[name]
    equal = loss(teacher.clone(), teacher)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-6, rtol=0)
    assert (loss(student, teacher) > 0.01).all()


@pytest.mark.parametrize("name", pairs())
def test_gradients_reach_the_student_alone_and_are_those_of_finite_differences(name: str) -> None:
    loss, student, teacher = pairs()[name]
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).sum().backward()
    assert teacher.grad is None and (student.grad != 0).all()
    step, direction = 1e-2, draw(*student.shape, seed=2)
    with torch.no_grad():
        up, down = (loss(student + sign * step * direction, teacher).double().sum() for sign in (1, -1))
    assert (student.grad * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=2e-3)


@pytest.mark.parametrize("name", pairs())
def test_half_precision_is_computed_in_single(name: str) -> None:
    loss, student, teacher = pairs()[name]
    for dtype in (torch.float16, torch.bfloat16):
        first, second = student.to(dtype), teacher.to(dtype)
        value = loss(first, second)
        assert value.dtype == torch.float32 and torch.equal(value, loss(first.float(), second.float()))


@pytest.mark.parametrize("name", pairs())
def test_no_item_leaks_into_another(name: str) -> None:
    loss, student, teacher = pairs()[name]
    torch.testing.assert_close(loss(student, teacher)[1:], loss(student[1:], teacher[1:]))


def test_encoder_patch_is_its_definition() -> None:
    student, teacher = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    for image in range(2):
        squares, cosines = [], []
        for y in range(2):
            for x in range(2):
                a, b = student[image, :, y, x].numpy(), teacher[image, :, y, x].numpy()
                squares.append(((a - b) ** 2).mean())
                cosines.append(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        value = encoder_patch(student, teacher, 2.0, 0.5)[image].item()
        assert value == pytest.approx(2 * np.mean(squares) + 0.5 * np.mean(cosines), rel=1e-5)


def test_cells_outside_the_image_do_not_count() -> None:
    student, teacher, inside = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1), half(2, 4, 4)
    inside[1] = False
    spoiled = torch.where(inside[:, None], teacher, math.nan)
    value = encoder_patch(student, spoiled, 1.0, 1.0, inside)
    torch.testing.assert_close(value[:1], encoder_patch(student[:1, ..., :2], teacher[:1, ..., :2], 1.0, 1.0))
    assert value[1] == 0
    value.sum().backward()
    assert student.grad[0, ..., :2].all() and not student.grad[0, ..., 2:].any() and not student.grad[1].any()


def test_prompt_embed_by_hand_and_its_scale() -> None:
    student = torch.tensor([3.0, 4.0]).view(1, 1, 2, 1, 1)
    teacher = torch.tensor([0.0, 2.0]).view(1, 1, 2, 1, 1)
    # directions (0.6, 0.8) and (0, 1): squared error (0.36 + 0.04) / 2, cosine 0.8
    assert prompt_embed(student, teacher, 0.7, 0.3).item() == pytest.approx(0.7 * 0.2 + 0.3 * 0.2)
    student, teacher = draw(1, 1, 16, 5, 5), draw(1, 1, 16, 5, 5, seed=1)
    error, angle = prompt_embed(student, teacher, 1.0, 0.0), prompt_embed(student, teacher, 0.0, 1.0)
    torch.testing.assert_close(error, angle * 2 / 16)
    torch.testing.assert_close(prompt_embed(7 * student, teacher, 0.7, 0.3), prompt_embed(student, teacher, 0.7, 0.3))


def test_a_vector_without_direction_gives_no_gradient() -> None:
    student = torch.zeros(1, 1, 4, 2, 2, requires_grad=True)
    value = prompt_embed(student, draw(1, 1, 4, 2, 2), 0.0, 1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(1) and torch.equal(student.grad, torch.zeros_like(student))


def test_mask_token_is_scipys_divergence() -> None:
    student, teacher, temperature = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1), 0.5
    p, q = softmax(teacher.numpy() / temperature, -1), softmax(student.numpy() / temperature, -1)
    wanted = 1.5 * rel_entr(p, q).sum(-1).mean(-1)
    np.testing.assert_allclose(mask_token(student, teacher, 1.5, temperature).numpy(), wanted, rtol=1e-4)
    shifted = mask_token(student + 3, teacher - 5, 1.5, temperature)
    np.testing.assert_allclose(shifted.numpy(), wanted, rtol=1e-4)  # softmax knows no offset


def test_dense_divergence_has_both_halves_and_is_a_mean() -> None:
    student, teacher = draw(2, 3, 2, 4, 6, scale=2), draw(2, 3, 2, 4, 6, seed=1, scale=2)
    p, q = expit(teacher.double().numpy()), expit(student.double().numpy())
    wanted = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean((-1, -2, -3))
    np.testing.assert_allclose(dense_masks(student, teacher, 1.0, 0.0, GAMMA).numpy(), wanted, rtol=1e-4)
    bigger = [x.repeat_interleave(8, -1).repeat_interleave(8, -2) for x in (student, teacher)]
    np.testing.assert_allclose(dense_masks(*bigger, 1.0, 0.0, GAMMA).numpy(), wanted, rtol=1e-4)
    # a teacher that is sure of nothing being there: the half of 1 - p is all there is
    nothing = dense_masks(torch.zeros(1, 1, 1, 2, 2), torch.full((1, 1, 1, 2, 2), -50.0), 1.0, 0.0, GAMMA)
    assert nothing.item() == pytest.approx(math.log(2))


def test_dense_focal_part_is_soft_focal_without_balance() -> None:
    student, teacher = draw(2, 3, 2, 4, 6), draw(2, 3, 2, 4, 6, seed=1, scale=3)
    wanted = soft_focal(student, teacher.sigmoid(), 1.5).mean((-1, -2, -3))
    torch.testing.assert_close(dense_masks(student, teacher, 0.0, 1.0, 1.5), wanted)


def test_dense_masks_count_the_pixels_on_the_image() -> None:
    student, teacher, inside = draw(2, 3, 1, 4, 4).requires_grad_(), draw(2, 3, 1, 4, 4, seed=1), half(2, 4, 4)
    value = dense_masks(student, torch.where(inside[:, None, None], teacher, math.nan), 0.6, 0.4, GAMMA, inside)
    torch.testing.assert_close(value, dense_masks(student[..., :2], teacher[..., :2], 0.6, 0.4, GAMMA))
    value.sum().backward()
    assert student.grad[..., :2].all() and not student.grad[..., 2:].any()


def test_what_the_teacher_has_on_another_grid_is_resized_to_the_students() -> None:
    ramp = torch.arange(8.0).expand(2, 3, 1, 8, 8)
    coarse = (torch.arange(4.0) * 2 + 0.5).expand(2, 3, 1, 4, 4)  # the same ramp where the coarse cells have centres
    assert dense_masks(coarse, ramp, 1.0, 1.0, GAMMA).abs().max() < 1e-6
    assert prompt_embed(coarse, ramp, 1.0, 1.0).abs().max() < 1e-6
    assert encoder_patch(coarse[:, 0], ramp[:, 0], 1.0, 1.0).abs().max() < 1e-6
    assert dense_masks(ramp, coarse, 1.0, 1.0, GAMMA).shape == (2, 3)


@pytest.mark.parametrize("name", pairs())
def test_other_shapes_are_refused(name: str) -> None:
    loss, student, teacher = pairs()[name]
    with pytest.raises(ValueError, match="teacher"):
        loss(student, teacher[:, :1])
    with pytest.raises(ValueError, match="teacher"):
        loss(student[:1], teacher)


def test_a_wrong_mask_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="inside"):
        encoder_patch(draw(2, 3, 4, 4), draw(2, 3, 4, 4), 1.0, 1.0, half(1, 4, 4))
    with pytest.raises(ValueError, match="inside"):
        task_terms(draw(2, 1, 1, 4, 4), draw(2, 1, 1), half(2, 1, 4, 4).float(), GAMMA, ALPHA, half(2, 4, 2))
    with pytest.raises(ValueError, match="do not match"):
        task_terms(draw(2, 1, 3, 4, 4), draw(2, 1, 3), half(2, 3, 4, 4).float(), GAMMA, ALPHA)


def test_focal_is_torchvisions_where_targets_are_hard() -> None:
    logits, target = draw(3, 5, 7, scale=4), (draw(3, 5, 7, seed=1) > 0).float()
    for gamma, alpha in ((2.0, 0.25), (0.0, 0.5), (1.0, 0.9), (3.5, 0.0)):
        wanted = sigmoid_focal_loss(logits, target, alpha, gamma)
        torch.testing.assert_close(soft_focal(logits, target, gamma, alpha), wanted, atol=1e-7, rtol=1e-4)
        wanted = sigmoid_focal_loss(logits, target, -1, gamma)
        torch.testing.assert_close(soft_focal(logits, target, gamma), wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_of_a_soft_target_is_least_at_the_target(gamma: float) -> None:
    target = torch.tensor([0.1, 0.5, 0.8])
    exact = torch.logit(target)
    grid = exact + torch.linspace(-4, 4, 81)[:, None]
    values = soft_focal(grid, target.expand_as(grid), gamma, ALPHA)
    assert (values.argmin(0) == 40).all() and values[40].max() < 1e-3
    equal = torch.zeros(4, requires_grad=True)
    soft_focal(equal, torch.full((4,), 0.5), gamma).sum().backward()
    assert torch.equal(equal.grad, torch.zeros(4))  # and no NaN from the power's slope


def test_soft_dice_is_zero_for_the_target_alone() -> None:
    target = torch.tensor([[0.0, 0.25, 1.0, 0.5]])
    assert soft_dice(target, target).item() == 0
    p = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert soft_dice(p, target).item() == pytest.approx((1 + 0.5625 + 1 + 0.25) / (2 + 0.0625 + 1 + 0.25 + 1))
    logits = draw(2, 3, 4)
    hard = (draw(2, 3, 4, seed=1) > 0).float()
    error = F.binary_cross_entropy_with_logits(logits, hard)
    wanted = soft_dice(logits.sigmoid().flatten(1), hard.flatten(1)).mean() + error
    torch.testing.assert_close(soft_mask_loss(logits, hard).mean(), wanted)


def test_task_terms_by_hand() -> None:
    logits = torch.tensor([[[[[0.0, math.log(4)], [-math.log(4), 0.0]]]]])  # p = 1/2 4/5 / 1/5 1/2
    target = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    found = task_terms(logits, torch.tensor([[[0.75]]]), target, GAMMA, ALPHA)
    half_, good = math.log(2), -math.log(0.8)
    assert found["bce"].item() == pytest.approx((2 * half_ + 2 * good) / 4)
    focal = (0.25 * (0.25 * half_ + 0.04 * good) + 0.75 * (0.04 * good + 0.25 * half_)) / 4
    assert found["focal"].item() == pytest.approx(focal)
    assert found["dice"].item() == pytest.approx((0.25 + 0.04 + 0.04 + 0.25) / (0.25 + 0.64 + 0.04 + 0.25 + 2 + 1))
    assert found["iou"].item() == pytest.approx((0.75 - 1 / 2) ** 2)  # logits of 0 are outside
    assert {value.shape for value in found.values()} == {(1, 1)}


def test_the_best_of_three_masks_is_trained_and_all_three_predicted_ious() -> None:
    target = half(2, 2, 4, 4).float()
    good = 8 * target - 4
    logits = torch.stack([-good, good, torch.zeros_like(good)], 2)
    logits[1, 1] = torch.stack([good[1, 1], -good[1, 1], -good[1, 1]])  # here the first is best
    logits.requires_grad_()
    iou = torch.full((2, 2, 3), 0.5, requires_grad=True)
    found = task_terms(logits, iou, target, GAMMA, ALPHA)
    alone = task_terms(good[:, :, None], iou[:, :, :1], target, GAMMA, ALPHA)
    for name in ("bce", "focal", "dice"):
        torch.testing.assert_close(found[name], alone[name])
    assert torch.equal(found["iou"], torch.full((2, 2), 0.25))  # true IoUs 0 or 1, all guessed at one half
    sum(value.sum() for value in found.values()).backward()
    trained = logits.grad.flatten(-2).any(-1)
    assert trained.sum() == 4 and trained[0, :, 1].all() and trained[1, 0, 1] and trained[1, 1, 0]
    assert iou.grad.all()


def test_task_terms_count_the_pixels_on_the_image() -> None:
    logits, inside = draw(2, 3, 3, 4, 6, scale=2).requires_grad_(), half(2, 4, 6)
    target, iou = draw(2, 3, 4, 6, seed=1).sigmoid(), draw(2, 3, 3, seed=2)
    spoiled = torch.where(inside[:, None], target, 1.0)
    found = task_terms(logits, iou, spoiled, GAMMA, ALPHA, inside)
    cut = task_terms(logits[..., :3], iou, target[..., :3], GAMMA, ALPHA)
    for name, value in found.items():
        torch.testing.assert_close(value, cut[name])
    (found["bce"] + found["focal"] + found["dice"]).sum().backward()
    assert logits.grad[..., :3].any() and not logits.grad[..., 3:].any()


def test_an_object_that_vanished_in_its_grid_is_no_hit() -> None:
    found = task_terms(torch.full((1, 1, 1, 4, 4), -9.0), torch.zeros(1, 1, 1), torch.zeros(1, 1, 4, 4), GAMMA, ALPHA)
    assert found["iou"].item() == 0 and found["dice"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [100.0, 6e4, 1e30])
def test_huge_logits_stay_finite(size: float) -> None:
    signs = torch.tensor([-1.0, 0.0, 1.0])
    student = (signs[:, None].expand(3, 3) * size).reshape(1, 1, 1, 3, 3).clone().requires_grad_()
    teacher = (signs.expand(3, 3) * size).reshape(1, 1, 1, 3, 3)
    target = teacher[:, :, 0].sigmoid()
    found = task_terms(student, torch.ones(1, 1, 1), target, GAMMA, ALPHA)
    token = mask_token(student[:, :, 0], teacher[:, :, 0], 1.0, 0.5)
    values = [*found.values(), dense_masks(student, teacher, 0.6, 0.4, 0.5), token]
    sum(value.sum() for value in values).backward()
    assert all(value.isfinite().all() for value in values) and student.grad.isfinite().all()


def test_gradients_of_the_task_are_those_of_torch() -> None:
    logits, target = draw(1, 1, 1, 5, 5), (draw(1, 1, 5, 5, seed=1) > 0).float()
    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = task_terms(first, torch.zeros(1, 1, 1), target, GAMMA, ALPHA)
    (found["focal"] + found["bce"]).sum().backward()
    wanted = sigmoid_focal_loss(second[0, 0], target[0], ALPHA, GAMMA, reduction="mean")
    (wanted + F.binary_cross_entropy_with_logits(second[0, 0], target[0])).backward()
    torch.testing.assert_close(first.grad, second.grad, atol=1e-7, rtol=1e-4)
