"""Masks from anywhere, scored from folders: figures by hand, whose rules are taken, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import samdistill
from samdistill.cli import main
from samdistill.types import UserError

SIDE = 20


def write(folder: Path, widths: Sequence[int], number: int = 1) -> None:
    """One frame per width: the left columns of 20, over the whole height; the tolerance of an outline is 1 pixel."""
    folder.mkdir(parents=True)
    for frame, width in enumerate(widths):
        grid = np.zeros((SIDE, SIDE), np.uint8)
        grid[:, :width] = number
        Image.fromarray(grid).save(folder / f"{frame:05}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two videos. J is 1, 1/2, 4/5 in the first (F 1, 0, 1) and 1, 0 in the second (F 1, 0), whose end is empty."""
    write(tmp_path / "truth/Annotations/a", (4, 4, 4, 4, 4))
    write(tmp_path / "found/a", (9, 4, 2, 5, 9))
    write(tmp_path / "truth/Annotations/b", (4, 4, 0, 4))
    write(tmp_path / "found/b", (9, 4, 6, 9))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([str(argument) for argument in ("evaluate", *arguments, "--masks", "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in ("evaluate", *arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_figures_by_hand(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, root / "found", root / "truth")
    (row,) = found["models"]
    first, second = (1 + 0.5 + 0.8) / 3, 0.5
    assert row["j"] == pytest.approx((first + second) / 2) and row["f"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert row["jf"] == pytest.approx((row["j"] + row["f"]) / 2) and (row["objects"], row["frames"]) == (2, 5)
    scores = found["scores"]["predictions"]
    assert scores["statistics"]["j_recall"] == pytest.approx((2 / 3 + 0.5) / 2)
    # quarters share their borders: of three frames the first one is frames 1 and 2, the last one frame 3 alone
    assert scores["statistics"]["j_decay"] == pytest.approx(((0.75 - 0.8) + (1 - 0)) / 2)
    assert found["convention"] == "davis_2017" and found["videos"] == 2 and found["skipped"] == []
    assert found["parameters"] is None and [video["name"] for video in scores["videos"]] == ["a", "b"]
    assert said(capsys, root / "found", root / "truth" / "Annotations", "--workers", 2)["scores"] == found["scores"]
    one = said(capsys, root / "found", root / "truth", "--videos", 1)
    assert one["models"][0]["j"] == pytest.approx(first)


def test_whose_rules_are_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # by SA-V's an object that only the prediction shows at first counts from there on
    write(root / "truth/Annotations/c", (4, 0, 0, 4, 4))
    write(root / "found/c", (4, 0, 0, 4, 4))
    frames = {
        name: said(capsys, root / "found", root / "truth", "--convention", name)["models"][0]["frames"]
        for name in ("davis2017", "sav")
    }
    assert frames == {"davis2017": 8, "sav": 6}
    (root / "truth/Annotations").rename(root / "truth/Annotations_6fps")
    assert said(capsys, root / "found", root / "truth")["convention"] == "sav"
    write(root / "objects/v/000", (4, 4, 4), 255)
    write(root / "masks/v/000", (4, 2, 4))
    result = samdistill.evaluate_masks(str(root / "masks"), root / "objects", progress=False)
    assert (result.convention, result.rows[0].j) == ("sav", 0.5) and "1 video, rules of sav." in result.caption()


def test_what_is_left_out_is_listed(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "truth/Annotations/empty", (0, 4, 4))
    write(root / "found/empty", (0, 0, 0))
    write(root / "truth/Annotations/short", (4, 4))
    write(root / "found/short", (4, 4))
    write(root / "found/extra", (4, 4, 4))
    found = said(capsys, root / "found", root / "truth")
    assert {bad["key"]: bad["reason"] for bad in found["skipped"]} == {
        "extra": "no true masks of that name; ignored",
        "empty": "no object counts, because the first true mask is empty",
        "short, object 1": "not visible on any frame that counts",
    }
    assert found["models"][0]["objects"] == 2
    assert main(["evaluate", str(root / "found"), str(root / "truth"), "--masks"]) == 0
    table = capsys.readouterr().out
    assert "J decay" in table and "no true masks of that name" in caplog.text and "parameters" not in table


def test_a_mistake_in_one_video_scores_none(root: Path) -> None:
    Image.new("L", (3, 3)).save(root / "found/a/00001.png")
    (root / "found/b/00002.png").unlink()
    with pytest.raises(UserError, match=r"a/00001.png is 3 x 3 pixels.*20 x 20.*\(and 1 more videos with errors\)"):
        samdistill.evaluate_masks(root / "found", root / "truth", progress=False)


def test_what_does_not_go_together(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = (root / "found", root / "truth", "--masks")
    assert "no model runs" in refused(capsys, *places, "--teacher", "sandbox")
    assert "no model runs" in refused(capsys, *places, "--every-frame")
    assert "do not go together" in refused(capsys, *places, "--concepts")
    assert "several files of data go with --concepts" in refused(capsys, places[0], root, *places[1:])
    assert "no convention is called 'davis'" in refused(capsys, *places, "--convention", "davis")
    assert "--videos must be at least 1, got 0" in refused(capsys, *places, "--videos", "0")
    assert "--workers must be at least 1, got 0" in refused(capsys, *places, "--workers", "0")
    write(root / "none/v", (0, 4, 4))
    write(root / "silent/v", (0, 0, 0))
    error = refused(capsys, root / "silent", root / "none", "--masks", "--json")
    assert "no object counts by the rules of davis_2017: none is visible in a video's first annotated frame" in error
