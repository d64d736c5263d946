"""What rooms hand each other: which cells show image, moving between devices, sums of terms."""

from __future__ import annotations

import pytest
import torch

from samdistill.types import ImageBatch, Prompts, Term, Terms


def batch_of(sizes: list[tuple[int, int]], side: int) -> ImageBatch:
    count = len(sizes)
    return ImageBatch(
        torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.tensor(sizes), torch.tensor(sizes),
        tuple(map(str, range(count))), torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip


def test_a_full_batch_has_no_padding() -> None:
    images = torch.arange(2 * 3 * 28 * 28).view(2, 3, 28, 28).to(torch.uint8)
    batch = ImageBatch.full(images)
    assert len(batch) == 2 and batch.keys == ("0", "1") and batch.seeds.tolist() == [0, 0]
    assert batch.sizes.tolist() == batch.original_sizes.tolist() == [[28, 28]] * 2
    assert bool(batch.valid((2, 2)).all())
    assert ImageBatch.full(images, ("a", "b")).keys == ("a", "b")


@pytest.mark.parametrize("grid", [(9, 9), (4, 7), (18, 9), (126, 126)])
def test_valid_marks_the_cells_whose_centre_is_on_the_image(grid: tuple[int, int]) -> None:
    sizes = [(126, 126), (63, 126), (126, 62), (1, 1), (70, 8), (64, 77)]
    found = batch_of(sizes, 126).valid(grid)
    for image, (height, width) in enumerate(sizes):
        for row in range(grid[0]):
            for column in range(grid[1]):
                inside = (row + 0.5) * 126 / grid[0] < height and (column + 0.5) * 126 / grid[1] < width
                assert bool(found[image, row, column]) is inside, (image, row, column)


def test_moving_carries_every_field_and_changes_nothing_else() -> None:
    batch = batch_of([(14, 14)], 14)
    moved = batch.to("meta")
    assert isinstance(moved, ImageBatch) and moved.keys == batch.keys
    assert {t.device.type for t in (moved.images, moved.sizes, moved.original_sizes, moved.seeds)} == {"meta"}
    assert batch.images.device.type == "cpu"
    prompts = Prompts(torch.ones(1, 2, dtype=torch.bool), boxes=torch.zeros(1, 2, 4)).to("meta")
    assert prompts.points is None and prompts.boxes is not None and prompts.boxes.device.type == "meta"


def test_total_is_the_weighted_sum_and_carries_the_gradient() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    terms = Terms({"square": Term(x * x, 0.5), "line": Term(4 * x, 2.0), "off": Term(x**3, 0.0)})
    assert terms.total.item() == 0.5 * 9 + 2 * 12
    terms.total.backward()
    assert x.grad is not None and x.grad.item() == 0.5 * 6 + 2 * 4
    assert list(terms) == ["square", "line", "off"] and len(terms) == 3 and terms["line"].weight == 2.0
    assert str(terms) == "square 9 x 0.5  line 12 x 2  off 27 x 0"


def test_only_keeps_the_named_terms_as_they_are() -> None:
    terms = Terms({name: Term(torch.tensor(float(i)), i + 0.5) for i, name in enumerate("abcd")})
    kept = terms.only(("d", "b", "z"))
    assert list(kept) == ["b", "d"] and kept.total.item() == 1 * 1.5 + 3 * 3.5  # their order, and no name made up
    assert kept["b"] is terms["b"] and len(terms) == 4 and len(terms.only(())) == 0


def test_only_takes_a_term_of_several_teachers_by_its_name() -> None:
    names = ("dice", "mask/big", "mask/small", "mask_token/big", "mask")
    terms = Terms({name: Term(torch.tensor(1.0), 1.0) for name in names})
    assert list(terms.only(("mask",))) == ["mask/big", "mask/small", "mask"]
    assert list(terms.only(("big", "mask_token", "dice"))) == ["dice", "mask_token/big"]


def test_terms_that_are_not_finite_are_named() -> None:
    values = {"fine": 1.0, "nan": float("nan"), "inf": float("inf")}
    terms = Terms({name: Term(torch.tensor(value), 1.0) for name, value in values.items()})
    assert terms.nonfinite() == ["nan", "inf"]
    assert Terms({"fine": terms["fine"]}).nonfinite() == []
