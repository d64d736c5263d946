"""The terms against values written by hand: padding does not count, and a long phrase counts as a short one."""

from __future__ import annotations

import math

import pytest
import torch

from samdistill.jobs.text.losses import TEXT_TERMS

# two phrases of two tokens with three channels; the second one has one token and padding that must not count
STUDENT = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [[3.0, 4.0, 0.0], [9.0, 9.0, 9.0]]])
TEACHER = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 2.0, 2.0]], [[4.0, 3.0, 0.0], [-5.0, 0.0, 1.0]]])
MASK = torch.tensor([[1, 1], [1, 0]])
COSINES = (1.0, 2 / 3, 24 / 25)
"""Of the three tokens: 0 + 4 of 2 * 3, and 12 + 12 of 5 * 5."""
ERRORS = (0.0, 5 / 3, 2 / 3)
WANTED = {
    "mse": ((ERRORS[0] + ERRORS[1]) / 2 + ERRORS[2]) / 2,
    "cosine": ((1 - COSINES[0] + 1 - COSINES[1]) / 2 + 1 - COSINES[2]) / 2,
    "pooled_mse": (ERRORS[1] + ERRORS[2]) / 2,
    "pooled_cosine": (1 - COSINES[1] + 1 - COSINES[2]) / 2,
}


@pytest.mark.parametrize("name", TEXT_TERMS.names())
def test_terms_are_those_computed_by_hand(name: str) -> None:
    assert TEXT_TERMS.get(name)(STUDENT, TEACHER, MASK).item() == pytest.approx(WANTED[name], abs=1e-6)


@pytest.mark.parametrize("name", TEXT_TERMS.names())
def test_padding_has_no_value_and_no_gradient(name: str) -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    value = TEXT_TERMS.get(name)(student, teacher, MASK)
    value.backward()
    assert not student.grad[1, 1].any() and student.grad[0, 1].any()
    other = STUDENT.clone()
    other[1, 1] = math.pi
    teacher[1, 1] = -1
    assert TEXT_TERMS.get(name)(other, teacher, MASK).item() == value.item()


@pytest.mark.parametrize("name", TEXT_TERMS.names())
def test_equal_tokens_cost_nothing_and_zeros_give_no_infinite_gradient(name: str) -> None:
    assert TEXT_TERMS.get(name)(TEACHER, TEACHER, MASK).item() == pytest.approx(0, abs=1e-6)
    zeros = torch.zeros_like(STUDENT).requires_grad_()
    TEXT_TERMS.get(name)(zeros, TEACHER, MASK).backward()
    assert zeros.grad.isfinite().all()


def test_tokens_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        TEXT_TERMS.get("mse")(STUDENT[..., :1], TEACHER, MASK)
