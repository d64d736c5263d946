"""The factor of each part of a global batch, by hand."""

import torch

from samdistill.engine.shares import shares
from samdistill.types import Term, Terms

CPU = torch.device("cpu")


def alone(tensor):
    return tensor


def numbers(found):
    return [{name: value.item() for name, value in part.items()} for part in found]


def test_a_part_counts_by_its_units():
    found = numbers(shares([{"iou": 3, "align": 2}, {"iou": 1, "align": 2}], 1, alone, CPU))
    assert found == [{"iou": 1.5, "align": 1.0}, {"iou": 0.5, "align": 1.0}]
    values = torch.tensor([4.0, 8.0])  # means over 3 and over 1 units
    assert sum(v * part["iou"] for v, part in zip(values, found, strict=True)) / 2 == (3 * 4 + 1 * 8) / 4


def test_the_other_rank_counts_too():
    """Two ranks of two parts: this one has 1 and 2 units, the other 5."""
    found = numbers(shares([{"a": 1}, {"a": 2}], 2, lambda own: own + 5, CPU))
    assert found == [{"a": 4 * 1 / 8}, {"a": 4 * 2 / 8}]


def test_equal_parts_are_weighted_by_exactly_one_whatever_their_number():
    for parts, count in ((3, 7), (2, 1), (7, 13), (5, 101)):
        assert numbers(shares([{"a": count}] * parts, 1, alone, CPU)) == [{"a": 1.0}] * parts


def test_parts_without_units_weigh_nothing_unless_there_are_none_at_all():
    assert numbers(shares([{"a": 0}, {"a": 4}], 1, alone, CPU)) == [{"a": 0.0}, {"a": 2.0}]
    assert numbers(shares([{"a": 0}, {"a": 0}], 1, alone, CPU)) == [{"a": 1.0}, {"a": 1.0}]
    assert shares([{"a": 0}], 1, alone, CPU) == [{}] and shares([{}, {}], 2, alone, CPU) == [{}, {}]


def test_terms_are_scaled_by_name_and_a_teachers_share_goes_with_its_term():
    terms = Terms({"a": Term(torch.tensor(3.0), 2.0), "b/t0": Term(torch.tensor(5.0), 1.0)})
    scaled = terms.scaled({"b": torch.tensor(0.5)})
    assert {n: (t.value.item(), t.weight) for n, t in scaled.items()} == {"a": (3.0, 2.0), "b/t0": (2.5, 1.0)}
    assert scaled.total.item() == 3 * 2 + 2.5
