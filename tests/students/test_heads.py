from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from samdistill.students import HEADS, STUDENTS, compare_heads
from samdistill.students.backbones import build_backbone, levels
from samdistill.students.heads import to_grid

CHANNELS = [8, 12, 16, 24]


def maps(size: int = 126) -> list[torch.Tensor]:
    return [torch.randn(2, c, -(-size // s), -(-size // s)) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


@pytest.mark.parametrize("name", HEADS)
def test_output_fills_the_grid(name: str) -> None:
    head = HEADS.get(name)(CHANNELS, 20)
    for grid in ((9, 9), (7, 11), (40, 40)):
        out = head(maps(), grid)
        assert out.shape == (2, 20, *grid)
        assert out.isfinite().all()


def test_published_head_is_the_published_formula_and_names() -> None:
    head = HEADS.get("published")(CHANNELS, 20).eval()
    state = head.state_dict()
    running = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert set(state) == {"0.weight", "1.weight", "1.bias", *running, "3.weight", "3.bias"}
    state["1.running_mean"].normal_()
    state["1.running_var"].uniform_(0.5, 2)
    inputs = maps()
    x = torch.einsum("bchw,dc->bdhw", inputs[-1], state["0.weight"][:, :, 0, 0])
    column = (1, -1, 1, 1)
    x = (x - state["1.running_mean"].view(column)) / (state["1.running_var"].view(column) + 1e-5).sqrt()
    x = x * state["1.weight"].view(column) + state["1.bias"].view(column)
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = F.conv2d(x, state["3.weight"], state["3.bias"], padding=1)
    wanted = F.interpolate(x, (9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(inputs, (9, 9)), wanted, atol=1e-5, rtol=1e-4)


def test_published_head_reads_the_coarsest_map_alone_and_fused_reads_all() -> None:
    inputs = maps()
    for name in HEADS:
        head = HEADS.get(name)(CHANNELS, 20).eval()
        before = head(inputs, (9, 9))
        read = [not torch.equal(head([*inputs[:i], inputs[i] + 1, *inputs[i + 1 :]], (9, 9)), before) for i in range(4)]
        assert read == ([False, False, False, True] if name == "published" else [True] * 4)


def test_fused_head_keeps_detail_that_the_coarsest_map_has_lost() -> None:
    """One bright cell of the stride-8 map moves the output most at the cell of the grid that lies over it."""
    torch.manual_seed(0)
    head = HEADS.get("fused")(CHANNELS, 64).eval()
    inputs = [torch.zeros_like(m[:1]) for m in maps(1008)]
    quiet = head(inputs, (72, 72))
    inputs[1][:, :, 63 + 30, 40] = 20.0  # of 126: centre (93.5, 40.5) / 126 * 72 = row 53.4, column 23.1
    moved = (head(inputs, (72, 72)) - quiet).abs().sum(1)[0]
    row, column = divmod(int(moved.argmax()), 72)
    assert (row, column) == (53, 23)


def test_strided_head_knows_where_in_a_cell_something_is_and_fused_does_not() -> None:
    """Two pixels of a cell change places. Maps of stride 4 and 8 have 4 x 4 and 2 x 2 in a cell."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, c, side, side) for c, side in zip(CHANNELS, (36, 18, 9, 5), strict=True)]
    for level, step in ((0, 4), (1, 2)):
        swapped = [each.clone() for each in inputs]
        corner, other = (3 * step, 5 * step), (4 * step - 1, 5 * step + 1)
        swapped[level][:, :, *corner], swapped[level][:, :, *other] = (
            inputs[level][:, :, *other], inputs[level][:, :, *corner]
        )  # fmt: skip
        for name, knows in (("fused", False), ("strided", True)):
            head = HEADS.get(name)(CHANNELS, 64).eval()
            moved = (head(inputs, (9, 9)) - head(swapped, (9, 9))).abs().amax(1)[0]
            assert (moved.max() > 1e-3) == knows, (name, level)
            if knows:
                assert divmod(int(moved.argmax()), 9) == (3, 5)


def test_strided_head_projects_every_position_of_a_cell_with_weights_of_its_own() -> None:
    head = HEADS.get("strided")(CHANNELS, 20).eval()
    assert [lateral[0].weight.shape for lateral in head.laterals] == [
        (20, 8, 4, 4), (20, 12, 2, 2), (20, 16, 1, 1), (20, 24, 1, 1)
    ]  # fmt: skip
    fine = torch.randn(1, 8, 36, 36)
    cells = fine.unflatten(2, (9, 4)).unflatten(4, (9, 4))  # b c row y column x
    wanted = torch.einsum("bcryqx,dcyx->bdrq", cells, head.laterals[0][0].weight)
    torch.testing.assert_close(head.laterals[0][0](fine), wanted, atol=1e-5, rtol=1e-4)
    assert HEADS.get("strided")(CHANNELS, 1024).laterals[0][0].out_channels == 256


@pytest.mark.parametrize("hidden_size", [192, 256, 1024])
@pytest.mark.parametrize("name", STUDENTS)
def test_fused_head_is_smaller_than_published(name: str, hidden_size: int) -> None:
    with torch.device("meta"):
        channels = [level.channels for level in levels(build_backbone(name, 1008))]
        size = {h: sum(p.numel() for p in HEADS.get(h)(channels, hidden_size).parameters()) for h in HEADS}
    assert size["fused"] < size["published"]


@pytest.mark.parametrize("side", [4, 9, 16, 18, 31, 32, 63, 126, 252])
def test_resizing_keeps_positions(side: int) -> None:
    """A map that holds the position of its cell centres gives the centres of the grid's cells, up to the border."""
    grid = 9 if side < 60 else 18
    centres = (torch.arange(side) + 0.5) / side
    ramp = torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])[None]
    out = to_grid(ramp, (grid, grid))
    wanted = (torch.arange(grid) + 0.5) / grid
    inner = (wanted > 0.5 / side) & (wanted < 1 - 0.5 / side)
    torch.testing.assert_close(out[0, 0, 0][inner], wanted[inner], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[0, 1, :, 0][inner], wanted[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [20, 31, 35, 63])
def test_resizing_skips_no_pixel(side: int) -> None:
    x = torch.zeros(1, 1, side, side, requires_grad=True)
    to_grid(x, (9, 9)).sum().backward()
    assert (x.grad > 0).float().mean() > 0.95


def test_compare_heads_counts_what_a_person_would() -> None:
    costs = {cost.head: cost for cost in compare_heads("es_ev_s", hidden_size=32, image_size=126, repeats=1)}
    assert set(costs) == set(HEADS)
    published = costs["published"]
    assert published.params == 128 * 32 + 2 * 32 + 9 * 32 * 32 + 32
    assert published.gflops == pytest.approx(2 * 16 * (128 * 32 + 9 * 32 * 32) / 1e9)  # the coarsest map is 4 x 4
    assert all(cost.milliseconds > 0 for cost in costs.values())
