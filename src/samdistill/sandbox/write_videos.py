"""Writer of rendered videos in the layout of SA-V: ``sav_<id>.mp4`` and ``sav_<id>_manual.json``.

Every 4th frame is annotated, as in SA-V. Video ``index`` of world ``seed`` has the id ``seed * 1,000,000 + index``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import Bool, UInt8

from ..data.saco import Rle, to_rle
from ..io import make_folder, replacing, sweep, write_json
from ..types import UserError
from .concepts import phrases_of
from .videos import Video, VideoStyle, render_video
from .write import WORLD, Progress, claim

RATE = 24
"""Frames per second, as in SA-V."""
EVERY = 4
"""Frames from one annotated frame to the next. The first frame is annotated."""
ENCODER = {
    "crf": "13", "preset": "medium", "g": "12", "keyint_min": "12", "sc_threshold": "0", "threads": "1",
    "x264-params": "mbtree=0:cpu-independent=1",
}  # fmt: skip
"""Options of libx264. A key frame every 12 frames makes readers seek to frames between key frames. The other options
make the bytes depend on the frames only: the number of threads and the CPU's instruction set change them otherwise, and
macroblock trees are not deterministic for small frames."""
PIXELS = "yuv444p"
"""Pixel format without chroma subsampling, which would blur the edges of objects and needs even sides."""
SMALL, MEDIUM = 32**2, 96**2
"""Mean areas in pixels below which SA-V's size bucket of a masklet is "small" and "medium"."""


def _claim(root: Path, split: str, count: int, size: tuple[int, int], seed: int, style: VideoStyle) -> None:
    """Check the arguments and record the settings of the split (see ``write.claim``)."""
    if not 0 < count <= WORLD or min(size) < 2:
        raise UserError(f"sandbox: count {count} (1 to {WORLD}) or size {size[0]} x {size[1]} is out of range")
    settings = {
        "size": list(size), "seed": seed, "style": asdict(style), "rate": RATE, "pixels": PIXELS, "encoder": ENCODER
    }  # fmt: skip
    claim(root / f"sandbox-videos-{split}.json", settings)


def _write_mp4(path: Path, images: UInt8[torch.Tensor, "t 3 h w"]) -> None:
    """Encode a video. The file gets its name when it is complete."""
    with replacing(path) as new, av.open(str(new), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options=ENCODER)
        stream.height, stream.width = images.shape[-2:]
        stream.pix_fmt = PIXELS
        for image in images.permute(0, 2, 3, 1).contiguous().numpy():
            # one thread: the encoder's own conversion leaves threads behind that a forked loader worker would wait for
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=PIXELS, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _bucket(area: float) -> str:
    return "small" if area < SMALL else "medium" if area < MEDIUM else "large"


def _rles(masks: Bool[np.ndarray, "n h w"]) -> list[Rle]:
    return [to_rle(mask) for mask in masks]


def _record(video: Video, name: str, split: str) -> dict[str, Any]:
    """Return the annotations of a video in the format of SA-V, with concepts, extents and visible shares added."""
    total, _, height, width = video.images.shape
    masks = video.masks[::EVERY].numpy()
    shows = masks.any((2, 3))
    kept = np.flatnonzero(shows.any(0))  # an object that is never visible has no first appearance
    masks, shows = masks[:, kept], shows[:, kept]
    count, annotated = len(kept), len(masks)
    areas = [float(a) for a in masks.sum((0, 2, 3)) / shows.sum(0)]
    first = shows.argmax(0).tolist()
    return {
        "video_id": name,
        "video_duration": total / RATE,
        "video_frame_count": float(total),
        "video_height": float(height),
        "video_width": float(width),
        "video_resolution": float(height * width),
        "video_environment": "Indoor",  # the format has "Indoor" and "Outdoor"
        "video_split": split,
        "masklet": [_rles(frame) for frame in masks],
        "masklet_id": list(range(count)),
        "masklet_size_rel": [area / (height * width) for area in areas],
        "masklet_size_abs": areas,
        "masklet_size_bucket": [_bucket(area) for area in areas],
        "masklet_visibility_changes": [
            int((shows[start + 1 :, k] != shows[start:-1, k]).sum()) for k, start in enumerate(first)
        ],
        "masklet_first_appeared_frame": [float(start) for start in first],
        "masklet_frame_count": [annotated] * count,
        "masklet_edited_frame_count": [0] * count,
        "masklet_type": ["manual"] * count,
        "masklet_stability_score": [None] * count,
        "masklet_num": count,
        "masklet_concepts": [list(phrases_of(video.concepts[k])) for k in kept],
        "masklet_visible_share": video.visible_share[::EVERY, kept].tolist(),
        "masklet_extent": video.extents[::EVERY, kept].tolist(),
    }


def write_sav(
    root: Path,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    split: str = "train",
    style: VideoStyle = VideoStyle(),
    progress: Progress | None = None,
) -> list[str]:
    """Render videos 0 to ``count - 1`` of world ``seed`` into ``root/<split>``.

    The JSON files have the keys and types of SA-V's manual annotations. Frame numbers in them, such as the first
    appearance, count annotated frames. There are three additional keys:

    - ``masklet_concepts``: for each object, the phrases that apply ("circle", "red", "red circle").
    - ``masklet_extent``: [annotated frame][object], pixels inside the image, including occluded ones.
    - ``masklet_visible_share``: [annotated frame][object], visible pixels divided by the extent, in 0..1; 0 outside.

    Objects that are visible in no annotated frame are left out. The mean difference of decoded and rendered colours is
    below 2 of 255. Existing files are kept, so an interrupted call can be repeated and a larger ``count`` adds videos.
    The bytes depend on the arguments and the encoder's version.

    Args:
        root: Output folder.
        count: Number of videos.
        size: Side, or height and width, in pixels; at least 2.
        seed: Number of the world.
        split: Name of the split.
        style: Distribution of objects and events.
        progress: Called with the number of finished videos and ``count`` after each video.

    Returns:
        The names of the videos, ``sav_<id>``.

    Raises:
        UserError: ``count`` or ``size`` is out of range, or the split was rendered with other settings.
    """
    height_width = (size, size) if isinstance(size, int) else size
    _claim(Path(root), split, count, height_width, seed, style)
    folder = Path(root) / split
    make_folder(folder)
    sweep(folder)
    names = [f"sav_{seed * WORLD + index:06d}" for index in range(count)]
    there = {path.name for path in folder.iterdir()}
    missing = [i for i, name in enumerate(names) if not {f"{name}.mp4", f"{name}_manual.json"} <= there]
    for done, index in enumerate(missing, count - len(missing) + 1):
        name, video = names[index], render_video(index, height_width, seed, style)
        _write_mp4(folder / f"{name}.mp4", video.images)
        write_json(folder / f"{name}_manual.json", _record(video, name, split))
        if progress is not None:
            progress(done, count)
    return names
