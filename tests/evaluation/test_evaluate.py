"""Evaluation as a verb: which data it recognises and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from samdistill.config import DataConfig
from samdistill.data.layouts import data_kind, held_out_images
from samdistill.data.sources import open_source
from samdistill.evaluation.evaluate import _images, evaluate, prompt_kinds
from samdistill.sandbox.render import render_sandbox
from samdistill.types import UserError


def test_layouts_are_recognised(world: Path, tmp_path: Path) -> None:
    render_sandbox(tmp_path / "coco", train=2, val=1, size=56, format="coco", progress=False)
    (tmp_path / "plain").mkdir()
    assert data_kind(world) == "sa1b" and data_kind(tmp_path / "coco") == "coco"
    assert data_kind(tmp_path / "plain") == "folder"
    (tmp_path / "plain" / "sa_1.json").touch()
    assert data_kind(tmp_path / "plain") == "sa1b"
    for folder in ("images", "masks", "annotations"):
        (tmp_path / "plain" / folder).mkdir()
    assert data_kind(tmp_path / "plain") == "masks"
    with pytest.raises(UserError, match="no such folder"):
        data_kind(tmp_path / "nowhere")


@pytest.mark.parametrize("pair", [("images", "masks"), ("val/images", "val/masks"), ("JPEGImages", "Annotations")])
def test_image_and_mask_folders_are_evaluated_on_their_held_out_images(pair: tuple[str, str], tmp_path: Path) -> None:
    for folder in pair:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (9, 9), 1).save(tmp_path / folder / "a.png")
    source = held_out_images(tmp_path)
    assert data_kind(tmp_path) == "masks" and source.keys == ["a"] and len(source.instances("a")) == 1


def test_a_divided_set_gives_its_held_out_part_and_a_folder_everything(world: Path, tmp_path: Path) -> None:
    assert len(held_out_images(world).keys) == 8
    for number in range(5):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    assert held_out_images(tmp_path).keys == [f"{n}.png" for n in range(5)]


def test_prompts_are_checked_and_asked_in_one_order() -> None:
    assert prompt_kinds(["refine", "box"]) == ("box", "refine")
    with pytest.raises(UserError, match="did you mean 'point'"):
        prompt_kinds(["box", "pont"])


@pytest.mark.parametrize("images", [0, -3])
def test_at_least_one_image_is_measured(images: int) -> None:
    with pytest.raises(UserError, match=f"--images must be at least 1, got {images}"):
        evaluate("no model is opened", "nor data", images=images)


def test_a_teacher_against_itself_agrees_fully(world: Path) -> None:
    result = evaluate(Path("sandbox"), world, teacher="sandbox", prompts=["box", "point"], images=4, progress=False)
    assert result.images == 4 and result.objects > 4 and result.prompts == ("box", "point")
    row = result.row("student")
    assert row.agreement == {"box": 1.0, "point": 1.0} and row.kept == {"box": 1.0, "point": 1.0}
    assert row.cosine == pytest.approx(1, abs=1e-5) and row.miou == result.row("teacher").miou


def test_what_cannot_be_measured_is_refused(world: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="these images have no masks"):
        evaluate(Path("sandbox"), tmp_path, progress=False)
    with pytest.raises(UserError, match="unknown geometry 'round'"):
        evaluate(Path("sandbox"), world, geometry="round", progress=False)


def test_the_data_a_model_was_trained_on_give_their_held_out_part(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder without splits: one image in ten was held out, and the others are no test."""
    run, folder = tmp_path / "run", world / "images" / "train"
    (run / "student").mkdir(parents=True)
    data = DataConfig(kind="folder", root=folder)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data.model_dump(mode="json")}))
    wanted = open_source(data, "held_out").keys
    assert 0 < len(wanted) < len(held_out_images(folder).keys) == 24
    for place in (run, run / "student"):
        assert _images(place, folder).keys == wanted
    assert _images(run, world).keys == held_out_images(world).keys == _images("sandbox", world).keys
    assert not caplog.records
    nothing = data.model_copy(update={"held_out_fraction": 0.0})
    (run / "config.yaml").write_text(yaml.safe_dump({"data": nothing.model_dump(mode="json")}))
    assert len(_images(run, folder).keys) == 24 and "images that the model was trained on" in caplog.text
    (run / "config.yaml").write_text("data: 3")
    with pytest.raises(UserError, match="not the configuration of a run"):
        _images(run, folder)
