"""Maps of frames asked of the detector itself: which frames, on which canvas, in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from samdistill.config import TeacherConfig
from samdistill.data import Geometry
from samdistill.data.sav import SavSource
from samdistill.data.videos import BadVideo
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.teachers import RunningFrames, Sam3Detector
from samdistill.types import ImageBatch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SavSource:
    """A video of 12 frames, 42 x 63 pixels."""
    root = tmp_path_factory.mktemp("live")
    write_sav(root, 1, (42, 63), seed=3, style=VideoStyle(frames=12))
    return SavSource(root / "train")


@pytest.mark.parametrize("geometry", ["square", "longest_side"])
def test_each_frame_has_its_own_map_whatever_is_asked_with_it(
    geometry: str, source: SavSource, detector: tuple[object, Path]
) -> None:
    teacher = Sam3Detector(TeacherConfig(kind="sam3", path=str(detector[1]), image_size=None))
    place, key, wanted = Geometry(teacher.image_size, geometry), source.keys[0], [8, 0, 4, 0, 11]
    for level in (2, 3):
        found = RunningFrames(teacher, source, place, level, batch_size=2)
        asked = [(key, number) for number in wanted]
        (found,) = found.answer(asked, found.read(asked))
        assert len(found) == 5 and found.dtype == torch.float32 and torch.equal(found[1], found[3])
        for number, own in zip(wanted, found, strict=True):
            canvas, _ = place.canvas(Image.fromarray(source.frames(key, [number])[0]))
            alone = teacher.pyramid(ImageBatch.full(canvas[None]))[level][0]
            torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)


def test_a_video_that_has_broken_is_named(source: SavSource, detector: tuple[object, Path], tmp_path: Path) -> None:
    teacher = Sam3Detector(TeacherConfig(kind="sam3", path=str(detector[1]), image_size=None))
    for file in source.path(source.keys[0]).parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = SavSource(tmp_path)
    video = broken.path(broken.keys[0])
    video.write_bytes(video.read_bytes()[:400])
    with pytest.raises(BadVideo, match=broken.keys[0]):
        RunningFrames(teacher, broken, Geometry(teacher.image_size), 2).read([(broken.keys[0], 0), (broken.keys[0], 4)])
