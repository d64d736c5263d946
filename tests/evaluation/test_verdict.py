"""The verdict on a run, against cases worked out by hand, a bootstrap and simulated runs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from samdistill.evaluation.verdict import Circumstances, Score, doubt, means_without, verdict

ENOUGH = Circumstances(steps=5000, images=2000)


def score(groups: dict[str, list[float]]) -> Score:
    values = [value for group in groups.values() for value in group]
    return Score("mIoU", float(np.mean(values)), f"{len(values)} objects", means_without(groups))


def one_each(values: np.ndarray) -> Score:
    return score({str(number): [float(value)] for number, value in enumerate(values)})


def test_means_without_each_group() -> None:
    groups = {"a": [1.0, 0.0], "b": [0.5], "c": [], "d": [0.25, 0.75, 0.5]}
    found = means_without(groups)
    assert found.keys() == {"a", "b", "d"}
    assert found == pytest.approx({"a": 2 / 4, "b": 2.5 / 5, "d": 1.5 / 3})
    assert means_without({"a": [1.0]}) == means_without({}) == {}


def test_with_one_object_per_image_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0.2, 0.9, 40)
    after = before + rng.normal(0.02, 0.05, 40)
    interval = ttest_rel(after, before).confidence_interval(0.95)
    found = doubt(one_each(after), one_each(before))
    assert found == pytest.approx((interval.high - interval.low) / 2, rel=1e-6)


def test_objects_of_one_image_are_not_independent() -> None:
    """A bootstrap over images, with objects of an image that all change alike: ten times the objects say no more."""
    rng = np.random.default_rng(1)
    sizes, shifts = rng.integers(1, 20, 60), rng.normal(0.01, 0.1, 60)
    before = {str(n): list(rng.uniform(0.2, 0.8, size)) for n, size in enumerate(sizes)}
    after = {name: [value + shifts[int(name)] for value in group] for name, group in before.items()}
    drawn = []
    for _ in range(2000):
        chosen = rng.integers(0, 60, 60)
        drawn.append((sizes[chosen] * shifts[chosen]).sum() / sizes[chosen].sum())
    found = doubt(score(after), score(before))
    assert found == pytest.approx(2.0 * np.std(drawn), rel=0.15)
    alone = doubt(*(one_each(np.concatenate(list(each.values()))) for each in (after, before)))
    assert alone is not None and found is not None and alone < found / 2


def test_chance_is_taken_for_learning_in_one_run_of_forty() -> None:
    rng = np.random.default_rng(2)
    said = [
        verdict(one_each(after), one_each(before), None, ENOUGH).split(" ")[0]
        for before, after in (rng.uniform(0, 1, (2, 12)) for _ in range(2000))
    ]
    assert 0.015 < said.count("Learned:") / 2000 < 0.035 and 0.015 < said.count("Worse") / 2000 < 0.035


def test_a_small_gain_on_every_object_counts() -> None:
    """0.05 on each of 40 objects, whose values spread over 0..1: unpaired bounds would call it chance."""
    before = np.linspace(0, 0.9, 40)
    gain = 0.05 + 0.01 * np.sin(np.arange(40))
    assert verdict(one_each(before + gain), one_each(before), None, ENOUGH).startswith("Learned: mIoU 0.5")
    assert verdict(one_each(before), one_each(before + gain), None, ENOUGH).startswith("Worse than before training")
    same = verdict(one_each(before), one_each(before), None, ENOUGH)
    assert same.startswith("No better than before training") and "differences below 0.000" in same


def test_one_image_decides_nothing() -> None:
    found = verdict(one_each(np.array([0.9])), one_each(np.array([0.1])), None, ENOUGH)
    assert found.startswith("Measured: mIoU 0.900 on 1 objects, 0.100 before training. This is too little data")


def test_the_likely_reason_is_named() -> None:
    poor, good = one_each(np.full(9, 0.1)), one_each(np.full(9, 0.9))
    few = verdict(good, good, poor, Circumstances(10, 5, 0.01))
    for words in ("The teacher itself reaches 0.100", "only 5 images", "only 10 steps", "train.lr_batch=null"):
        assert words in few
    assert "Raise train.epochs or train.lr" in verdict(poor, poor, good, ENOUGH)
    assert "only" not in verdict(good, poor, None, Circumstances(1, 1))
    assert verdict(good, None, Score("mIoU", 0.95, "x"), ENOUGH) == "Measured: mIoU 0.900 on 9 objects, teacher 0.950."
