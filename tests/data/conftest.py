"""Videos that the tests write themselves, whose every frame says which it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 64, 96
BITS = 6
GROUPS = {"g": "12", "bf": "2", "sc_threshold": "0"}

WriteVideo = Callable[..., Path]
WriteSav = Callable[..., dict[int, np.ndarray]]


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A square that moves under six black or white fields, which are the number in binary."""
    frame = np.full((height, width, 3), 60 + number % 7 * 20, np.uint8)
    left = number * 5 % (width - 16)
    frame[24:56, left : left + 16] = (230, number * 4 % 256, 30)
    for bit in range(BITS):
        frame[:16, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    return frame


def number_in(frame: np.ndarray) -> int:
    """What ``numbered`` wrote, after any compression."""
    return sum(int(frame[4:12, 16 * bit + 4 : 16 * bit + 12].mean() > 128) << bit for bit in range(BITS))


@pytest.fixture(scope="session")
def number_of() -> Callable[[np.ndarray], int]:
    return number_in


@pytest.fixture(scope="session", name="numbered")
def give_numbered() -> Callable[..., np.ndarray]:
    return numbered


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    """write_video(path, count, ...): ``count`` numbered frames as H.264; 12 frames to a group, two of three B."""

    def write(
        path: Path, count: int = 60, size: tuple[int, int] = (HEIGHT, WIDTH), options: dict[str, str] = GROUPS,
        movflags: str = "faststart", millis: Sequence[int] | None = None,
    ) -> Path:  # fmt: skip
        """movflags: ``faststart`` puts the index before the frames. millis: when each frame is shown."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options={"movflags": movflags} if path.suffix == ".mp4" else {}) as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "12", **options})
            (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
            if millis is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
                if millis is not None:
                    frame.pts, frame.time_base = millis[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def write_sav(write_video: WriteVideo) -> WriteSav:
    """write_sav(folder, key, ...): a video and its ``_manual.json``; gives the masks of each annotated frame."""

    def write(
        folder: Path, key: str, count: int = 60, stride: int = 4, objects: int = 2, hidden: Sequence[int] = (),
        never: Sequence[int] = (), concepts: list[list[str]] | None = None, size: tuple[int, int] = (HEIGHT, WIDTH),
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """Object k is a box in column 20 * k that sinks with time. hidden: rows without masks; never: objects."""
        write_video(folder / f"{key}.mp4", count, size)
        found = {}
        for row, index in enumerate(range(0, count, stride)):
            masks = np.zeros((objects, *size), bool)
            for k in set(range(objects)) - set(never):
                if row not in hidden:
                    masks[k, 8 + row : 24 + row, (20 * k + 2) % size[1] : (20 * k + 2) % size[1] + 14] = True
            found[index] = masks
        rles = [[coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks] for masks in found.values()]
        record = {
            "video_id": key, "video_duration": count / 24, "video_frame_count": float(count),
            "video_height": float(size[0]), "video_width": float(size[1]), "masklet_id": list(range(objects)),
            "masklet": [[{"size": r["size"], "counts": r["counts"].decode()} for r in row] for row in rles],
            "masklet_stability_score": [[None] * objects], "masklet_num": objects,
        }  # fmt: skip
        if concepts is not None:
            record["masklet_concepts"] = concepts
        (folder / f"{key}_manual.json").write_text(json.dumps(record))
        return found

    return write
