"""``predict`` with points and boxes, against transformers' own model asked directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F

import samdistill
from samdistill.checkpoints.promptable import load_promptable
from samdistill.cli import main
from samdistill.inference.geometry import own_geometry
from samdistill.inference.points import segment_image
from samdistill.inference.predict import parse_point
from samdistill.inference.result import Result
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.types import UserError


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 x 96 pixels: twice the models' canvas, and not square."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def asked_directly(sams, photo, **prompts):
    """Masks (3, 96, 128) and scores of transformers' ``SamModel``: prompts and answers are scaled by hand."""
    model = load_promptable(sams["large"])
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy()).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, (48, 64), mode="bilinear", antialias=True).round() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    canvas = F.pad((small - mean) / std, (0, 0, 0, 16))
    with torch.no_grad():
        out = model(pixel_values=canvas, **prompts)
    masks = F.interpolate(out.pred_masks[0], (64, 64), mode="bilinear")[..., :48, :]
    return F.interpolate(masks, (96, 128), mode="bilinear") > 0, out.iou_scores[0]


def test_points_and_boxes_are_those_of_the_file(sams, photo) -> None:
    """Pixel 41 of the file is the 20.25th of a canvas half as large, counted from the centre of the first."""
    found = samdistill.predict(photo, sams["large"], points=[(41, 20, 1)])
    assert isinstance(found, Result) and found.masks.shape == (1, 96, 128)
    xy = torch.tensor([[[[41.5 / 2 - 0.5, 20.5 / 2 - 0.5]]]])
    masks, scores = asked_directly(sams, photo, input_points=xy, input_labels=torch.tensor([[[1]]]))
    best = scores[0].argmax()
    assert found.scores[0].item() == pytest.approx(scores[0, best].item(), abs=1e-4)
    assert (found.masks[0] != masks[0, best]).float().mean() < 0.01
    boxes = [(10.0, 20.0, 90.0, 80.0), (0.0, 0.0, 128.0, 96.0)]
    found = samdistill.predict(photo, sams["large"], boxes=boxes)
    masks, scores = asked_directly(
        sams, photo, input_boxes=torch.tensor([boxes]) / 2, multimask_output=False
    )  # fmt: skip
    torch.testing.assert_close(found.scores, scores[:, 0], atol=1e-4, rtol=1e-4)
    assert (found.masks != masks[:, 0]).float().mean() < 0.01
    two = samdistill.predict(photo, sams["large"], points=[(41, 20, 1), (100, 70, 0)], boxes=boxes[:1])
    xy = torch.tensor([[[[20.25, 9.75], [49.75, 34.75]]]])
    masks, scores = asked_directly(
        sams, photo, input_points=xy, input_labels=torch.tensor([[[1, 0]]]), input_boxes=torch.tensor([boxes[:1]]) / 2,
        multimask_output=False,
    )  # fmt: skip
    assert two.scores[0].item() == pytest.approx(scores[0, 0].item(), abs=1e-4)
    assert (two.masks[0] != masks[0, 0]).float().mean() < 0.01


def test_it_is_printed_drawn_and_written(sams, photo, tmp_path, capsys) -> None:
    words = ["predict", str(photo), str(sams["mobile"]), "--point", "41,20", "--point", "100,70,0"]
    assert main([*words, "--json", "--out", str(tmp_path / "seen.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == [[41, 20, 1], [100, 70, 0]] and found["boxes"] == [] and "text" not in found
    (one,) = found["instances"]
    mask = coco_mask.decode(one["segmentation"])
    assert mask.shape == (96, 128) and mask.sum() == one["area"]
    rows, columns = np.nonzero(mask)
    if one["area"]:
        assert one["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    with Image.open(tmp_path / "seen.png") as drawn:
        assert drawn.size == (128, 96)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("photo.png: 1 mask for 2 points, scores are predicted IoU")
    assert main([*words[:3], "--box", "10,20,90,80", "--box", "5,5,50,50"]) == 0
    assert "2 masks for 2 boxes" in capsys.readouterr().out


def test_geometry_is_the_models_own_unless_another_is_asked_for(sams, photo) -> None:
    model = load_promptable(sams["large"])
    assert own_geometry(model) == "longest_side" and own_geometry(load_promptable("sandbox")) == "square"
    own = segment_image(model, photo, boxes=[(10, 20, 90, 80)])
    same, other = (segment_image(model, photo, (), [(10, 20, 90, 80)], g) for g in ("longest_side", "square"))
    assert torch.equal(own.scores, same.scores) and not torch.equal(own.scores, other.scores)


def test_an_opened_model_is_taken_too_and_a_tracker_is_asked_with_points(sams, photo, near) -> None:
    model = load_promptable(sams["large"])
    by_path = samdistill.predict(photo, sams["large"], boxes=[(10, 20, 90, 80)])
    opened = samdistill.predict(Image.open(photo), model, boxes=[(10, 20, 90, 80)])
    near(by_path.scores, opened.scores)
    one, other = by_path.masks, opened.masks
    assert one.shape == other.shape and opened.name == ""
    assert 0 < one.sum() < one.numel() and (one & other).sum() / (one | other).sum() > 0.99
    tracker = samdistill.predict(photo, "sandbox", points=[(41, 20, 1)])
    assert isinstance(tracker, Result) and tracker.masks.shape == (1, 96, 128)
    with pytest.raises(UserError, match="a promptable model takes no text"):
        samdistill.predict(photo, model, text="star")


ERRORS = {
    "outside": (["--point", "128,20"], "point (128, 20) is outside the image of 128 x 96 pixels"),
    "negative": (["--point", "-1,20"], "point (-1, 20) is outside the image of 128 x 96 pixels"),
    "negative fraction": (["--point", "-.5,20"], "point (-0.5, 20) is outside the image"),
    "negative box": (["--box", "-1,20,90,80"], "box (-1, 20, 90, 80) reaches outside the image"),
    "negative threshold": (["--text", "star", "--threshold", "-1e-3"], "--threshold: -0.001 is not between 0 and 1"),
    "second point": (["--point", "1,2", "--point", "5,96,0"], "point (5, 96) is outside"),
    "box": (["--box", "10,20,90,97"], "reaches outside the image of 128 x 96 pixels"),
    "no area": (["--box", "10,20,10,90"], "has no area"),
    "one number": (["--point", "7"], "--point: '7' is not x,y in pixels, or x,y,label"),
    "label": (["--point", "7,8,2"], "--point: '7,8,2' is not"),
    "four numbers": (["--point", "7,8,1,1"], "--point: '7,8,1,1' is not"),
    "no number": (["--point", "x,y"], "--point: 'x,y' is not"),
    "whose points": (["--point", "7,8", "--box", "1,1,9,9", "--box", "2,2,9,9"], "give one box at most"),
    "nothing": ([], "no prompt given: give --point or --box"),
    "words and points": (["--text", "star", "--point", "7,8"], "--text and --point cannot be combined"),
    "words": (["--text", "star"], "no detector of concepts"),
    "threshold": (["--point", "7,8", "--threshold", "0.4"], "--threshold is for detectors only"),
    "geometry": (["--point", "7,8", "--geometry", "round"], "unknown geometry 'round'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_named_in_one_line(case, sams, photo, capsys) -> None:
    words, complaint = ERRORS[case]
    assert main(["predict", str(photo), str(sams["large"]), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and complaint in said


def test_a_detector_reads_no_points(photo, detector, capsys) -> None:
    assert main(["predict", str(photo), str(detector[1]), "--point", "7,8"]) == 2
    assert "has no prompt decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "point"), [("1,2", (1.0, 2.0, 1)), ("1.5,2,0", (1.5, 2.0, 0)), ("3,4,1", (3.0, 4.0, 1))]
)
def test_points_are_read(text, point) -> None:
    assert parse_point(text) == point
