"""Rendered videos as SA-V files, read back by other code and held against the real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samdistill.sandbox.concepts import PHRASES
from samdistill.sandbox.videos import VideoStyle, render_video
from samdistill.sandbox.write import WORLD
from samdistill.sandbox.write_videos import write_sav
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "sav"
EXTRA = {"masklet_concepts", "masklet_visible_share", "masklet_extent"}
SIZE, STYLE = (40, 57), VideoStyle(frames=30)

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real SA-V sample at {REAL}")


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def decoded(masklet: list[list[dict[str, Any]]]) -> np.ndarray:
    return np.stack([np.stack([coco_mask.decode(rle).astype(bool) for rle in frame]) for frame in masklet])


def statistics(masklet: list[list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """What SA-V says of each masklet, worked out from its areas by following every object through the frames."""
    found: dict[str, list[Any]] = {name: [] for name in ("abs", "bucket", "changes", "first")}
    for own in zip(*masklet, strict=True):
        areas = [int(coco_mask.area(rle)) for rle in own]
        visible = [area for area in areas if area]
        mean = sum(visible) / len(visible)
        first = next(t for t, area in enumerate(areas) if area)
        changes = sum((areas[t] > 0) != (areas[t - 1] > 0) for t in range(first + 1, len(areas)))
        found["abs"].append(mean)
        found["bucket"].append("small" if mean < 1024 else "medium" if mean < 9216 else "large")
        found["changes"].append(changes)
        found["first"].append(first)
    return found


def check_statistics(record: dict[str, Any]) -> None:
    found, resolution = statistics(record["masklet"]), record["video_resolution"]
    assert record["masklet_size_abs"] == pytest.approx(found["abs"])
    assert record["masklet_size_rel"] == pytest.approx([area / resolution for area in found["abs"]])
    assert record["masklet_size_bucket"] == found["bucket"]
    assert record["masklet_visibility_changes"] == found["changes"]
    assert record["masklet_first_appeared_frame"] == found["first"]
    assert record["masklet_frame_count"] == [len(record["masklet"])] * record["masklet_num"]
    assert record["masklet_id"] == list(range(record["masklet_num"]))


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@needs_real
@pytest.mark.parametrize("name", ["sav_000001_manual", "sav_000001_auto"])
def test_definitions_are_those_of_real_annotations(name: str) -> None:
    check_statistics(json.loads((REAL / f"{name}.json").read_text()))


def test_annotations_are_the_rendered_masks_of_every_fourth_frame(tmp_path: Path) -> None:
    names, changes = write_sav(tmp_path, 5, SIZE, seed=3, split="val", style=STYLE), 0
    assert names == [f"sav_{3 * WORLD + i}" for i in range(5)]
    for i, name in enumerate(names):
        record = json.loads((tmp_path / "val" / f"{name}_manual.json").read_text())
        video = render_video(i, SIZE, seed=3, style=STYLE)
        masks = video.masks[::4].numpy()
        assert masks.shape[0] == 8 and np.array_equal(decoded(record["masklet"]), masks)
        assert record["masklet_visible_share"] == video.visible_share[::4].tolist()
        assert record["masklet_extent"] == video.extents[::4].tolist()
        for phrases, words in zip(record["masklet_concepts"], video.concepts, strict=True):
            assert phrases == [words[0], words[1], f"{words[1]} {words[0]}"] and set(phrases) <= set(PHRASES)
        assert {key: record[key] for key in record if key.startswith("video_") and key != "video_environment"} == {
            "video_id": name, "video_duration": 30 / 24, "video_frame_count": 30, "video_height": 40,
            "video_width": 57, "video_resolution": 40 * 57, "video_split": "val",
        }  # fmt: skip
        check_statistics(record)
        changes += sum(record["masklet_visibility_changes"])
    assert changes > 0


@needs_real
def test_annotations_have_the_keys_and_types_of_real_ones(tmp_path: Path) -> None:
    def skeleton(value: object) -> object:
        if isinstance(value, dict):
            return {key: skeleton(v) for key, v in value.items()}
        if isinstance(value, list):
            parts = [skeleton(part) for part in value]
            assert all(part == parts[0] for part in parts if not isinstance(part, list))
            return [parts[0]]
        return type(value)

    name = write_sav(tmp_path, 1, 32, seed=0, style=STYLE)[0]
    assert name == "sav_000000"
    ours = json.loads((tmp_path / "train" / f"{name}_manual.json").read_text())
    real = json.loads((REAL / "sav_000001_manual.json").read_text())
    assert set(ours) - set(real) == EXTRA
    assert skeleton({key: ours[key] for key in real}) == skeleton(real)
    empty = coco_mask.encode(np.zeros((848, 480), np.uint8, "F"))["counts"].decode()
    assert sum(rle["counts"] == empty for frame in real["masklet"] for rle in frame) == 125  # an object out of sight


@pytest.mark.parametrize("size", [(126, 126), (41, 63)])
def test_mp4_has_the_frames_the_rate_and_nearly_the_colours(tmp_path: Path, size: tuple[int, int]) -> None:
    name = write_sav(tmp_path, 1, size, seed=2, style=STYLE)[0]
    path, drawn = tmp_path / "train" / f"{name}.mp4", render_video(0, size, seed=2, style=STYLE).images
    drawn = drawn.permute(0, 2, 3, 1).numpy().astype(int)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24 and stream.frames == 30 and (stream.height, stream.width) == size
        keys = [index for index, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert keys == [0, 12, 24]
    frames = frames_of(path)
    assert frames.shape == drawn.shape
    errors = np.abs(frames - drawn)
    assert errors.mean() < 2 and errors.mean((1, 2, 3)).max() < 2.5
    assert np.abs((frames - drawn).mean((0, 1, 2))).max() < 0.5  # no shift of colours


def test_seeking_finds_the_frame_asked_for(tmp_path: Path) -> None:
    name = write_sav(tmp_path, 1, 48, seed=2, style=STYLE)[0]
    path = tmp_path / "train" / f"{name}.mp4"
    whole = frames_of(path)
    for wanted in (20, 4, 29):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(round(wanted / 24 / stream.time_base), stream=stream)
            passed = [frame for frame in container.decode(stream) if round(frame.time * 24) <= wanted]
            assert len(passed) == wanted % 12 + 1  # from the key frame before it on
            assert np.array_equal(passed[-1].to_ndarray(format="rgb24"), whole[wanted])


def test_objects_that_never_show_are_left_out(tmp_path: Path) -> None:
    style = VideoStyle(frames=8, min_radius=0.02, max_radius=0.03, hides=0)  # most of them between pixel centres
    kept, drawn = 0, 0
    for i, name in enumerate(write_sav(tmp_path, 12, 12, seed=1, style=style)):
        record = json.loads((tmp_path / "train" / f"{name}_manual.json").read_text())
        video = render_video(i, 12, seed=1, style=style)
        shows = video.masks[::4].flatten(2).any(-1).any(0)
        kept, drawn = kept + record["masklet_num"], drawn + len(shows)
        assert record["masklet_num"] == int(shows.sum()) == len(record["masklet_concepts"])
        if shows.any():
            assert np.array_equal(decoded(record["masklet"]), video.masks[::4, shows].numpy())
            check_statistics(record)
    assert 0 < kept < drawn


def test_rerun_grows_and_restores_the_same_bytes(tmp_path: Path) -> None:
    write_sav(tmp_path / "a", 5, SIZE, seed=1, style=STYLE)
    names = write_sav(tmp_path / "b", 3, SIZE, seed=1, style=STYLE)
    (tmp_path / "b/train" / f"{names[0]}.mp4").unlink()
    (tmp_path / "b/train" / f"{names[1]}_manual.json").unlink()
    calls: list[tuple[int, int]] = []
    write_sav(tmp_path / "b", 5, SIZE, seed=1, style=STYLE, progress=lambda a, b: calls.append((a, b)))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert calls == [(2, 5), (3, 5), (4, 5), (5, 5)]


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    write_sav(tmp_path, 1, 32, seed=1, style=STYLE)
    for size, seed, style in ((40, 1, STYLE), (32, 2, STYLE), (32, 1, replace(STYLE, leaves=0.1))):
        with pytest.raises(UserError, match="rendered with other settings"):
            write_sav(tmp_path, 1, size, seed=seed, style=style)
    for count, size in ((0, 32), (1, 1)):
        with pytest.raises(UserError, match="out of range"):
            write_sav(tmp_path, count, size, seed=1, style=STYLE)
    assert len(write_sav(tmp_path, 1, 32, seed=2, split="val", style=STYLE)) == 1  # another split may differ
