"""The verdict on a run, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from samdistill.evaluation.verdict import Circumstances, Score, verdict

ENOUGH = Circumstances(steps=5000, images=2000)


def score(value: float, items: int = 100) -> Score:
    return Score("mIoU", value, items)


def test_the_error_bounds_that_of_any_numbers_in_0_to_1() -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0, 1), (0.4, 0.6), (0.9, 1)):
        values = rng.uniform(low, high, 400)
        assert values.std() / 20 <= score(values.mean(), 400).error
    assert score(0.5).error == pytest.approx(0.05) and score(-0.2).error == 0


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (0.7, 0.5, "Learned"),
        (0.55, 0.5, "No better than before"),
        (0.3, 0.5, "Worse than before"),
        (0.5, 0.5, "No bet"),
    ],
)
def test_a_difference_counts_beyond_twice_its_error(now: float, before: float, said: str) -> None:
    assert verdict(score(now), score(before), score(0.9), ENOUGH).startswith(said)
    assert verdict(score(0.55, 10_000), score(0.5, 10_000), None, ENOUGH).startswith("Learned")


def test_the_likely_reason_is_named() -> None:
    few = verdict(score(0.5), score(0.5), score(0.1), Circumstances(10, 5, 0.01))
    for words in ("The teacher itself reaches 0.100", "only 5 images", "only 10 steps", "train.lr_batch=null"):
        assert words in few
    assert "Raise train.epochs or train.lr" in verdict(score(0.5), score(0.5), score(0.9), ENOUGH)
    assert "only" not in verdict(score(0.9), score(0.1), None, Circumstances(1, 1))
    assert verdict(score(0.9), None, score(0.95), ENOUGH) == "Measured: mIoU 0.900 on 100 items, teacher 0.950."
