"""Pictures, a video, and what the package's own models answer for them, for tests/web/page.test.mjs.

``python tests/web/answers.py FOLDER`` writes ``exports/`` (sandbox models with the page), ``scene.png``, ``scene.webm``
and ``answers.json``. ``--keep`` leaves exports that are there. Nearly all of its time is that of ``torch.onnx.export``,
so there is one export of each kind, and of a detector with one layer in its encoder and one in its decoder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import torch
from arithmetic import packed
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

import samdistill as sd
from samdistill.deployment.folder import export
from samdistill.deployment.gate import sha256
from samdistill.deployment.page import write_page
from samdistill.inference.concepts import Box, StudentDetector, ask_image
from samdistill.inference.geometry import canvas_of
from samdistill.inference.pictures import image_batch, lay
from samdistill.inference.points import Point, segment_image
from samdistill.inference.video import VideoSession
from samdistill.ops.promptable import Promptable, embed, predict
from samdistill.sandbox.scenes import render_scenes
from samdistill.sandbox.videos import render_video
from samdistill.students.memory import warm_start
from samdistill.students.sam3 import EfficientSam3Model
from samdistill.types import Prompts

PICTURE, FRAME = (324, 432), (126, 168)
"""Height and width. At twice its size, the picture fits the page in a window of 1280 x 900, so clicks are exact."""
FRAMES, RATE = 14, 12
INSIDE, OUTSIDE, BOX = (120, 150, 1), (60, 190, 0), (60.0, 100.0, 180.0, 220.0)
WORDS, EXAMPLE = ("circle", "square", "star", "pill", "red", "blue"), (250.0, 20.0, 400.0, 170.0)
REMEMBERED = {"words": WORDS[:1], "boxes": [(20.5, 30.5, 70.5, 80.5)], "threshold": 0.3}
"""What a session with a memory is asked: little, as an untrained memory barely tells objects of one phrase apart. The
box fills all pixels that it touches, and ends within pixels, so that the rounding of a pointer's place touches no
more."""
SEEN = {"words": WORDS[:2], "boxes": [], "threshold": 0.1}
"""What a session without a memory is asked: a detector that is one file takes no boxes."""
LOW = 0.1
"""Lowest score in the tests with words: the bundled student is small."""


def promptable(model: Promptable, picture: Image.Image, static: bool) -> dict[str, Any]:
    """Answers for a click, a corrective click with the first mask as a prompt, and a box.

    A decoder of fixed axes has one point, so that the corrective click and the mask are all that it gets.
    """

    def one(points: Sequence[Point], boxes: Sequence[Box] = ()) -> dict[str, Any]:
        found = segment_image(model, picture, points, boxes)
        return {"mask": packed(found.masks[0].numpy().view(np.uint8)), "score": float(found.scores[0])}

    clicks = slice(1, None) if static else slice(None)
    return {"click": one([INSIDE]), "box": one([], [BOX]), "corrected": corrected(model, picture, clicks)}


@torch.no_grad()
def corrected(model: Promptable, picture: Image.Image, clicks: slice) -> dict[str, Any]:
    """Answer for those of two clicks that are in ``clicks``, and the mask of the first."""
    place = canvas_of(model)
    laid = lay(picture, place)
    xy = torch.tensor([INSIDE[:2], OUTSIDE[:2]], dtype=torch.float32)
    points = (place.points(xy + 0.5, laid.original) - 0.5)[None, None]
    labels, valid = torch.tensor([[[1, 0]]]), torch.ones(1, 1, dtype=torch.bool)
    seen = embed(model, image_batch([laid]))
    first, _ = predict(model, seen, Prompts(valid, points[..., :1, :], labels[..., :1]), multimask=True).best()
    again = Prompts(valid, points[..., clicks, :], labels[..., clicks], masks=first)
    logits, score = predict(model, seen, again).best()
    side = (place.image_size, place.image_size)
    canvas = torch.nn.functional.interpolate(logits, side, mode="bilinear", align_corners=False)[0]
    mask = place.masks_back(canvas, laid.original)[0] > 0
    return {"mask": packed(mask.numpy().view(np.uint8)), "score": float(score)}


def words(model: StudentDetector, picture: Image.Image, boxes: Sequence[Box] = ()) -> list[dict[str, Any]]:
    """Instances of all words, in the order of the words, or of what a box shows."""
    found = []
    for phrase in (None,) if boxes else WORDS:
        answer = ask_image(model, picture, phrase, boxes, LOW)
        for mask, score in zip(answer.masks, answer.scores, strict=True):
            found.append({"phrase": phrase, "score": float(score), "mask": packed(mask.numpy().view(np.uint8))})
    return found


def video(model: StudentDetector, frames: UInt8[np.ndarray, "t h w 3"], asked: dict[str, Any]) -> dict[str, Any]:
    """Objects of each frame of a session with words and boxes."""
    session = VideoSession(model, threshold=asked["threshold"])
    for phrase in asked["words"]:
        session.add_text(phrase)
    for box in asked["boxes"]:
        session.add_box(box)
    found = [
        [
            {"id": one.object_id, "phrase": one.phrase, "visible": one.visible, "score": one.score,
             "mask": packed(one.mask.view(np.uint8))}
            for one in session.push(frame)
        ]
        for frame in frames
    ]  # fmt: skip
    return {**asked, "frames": found}


def small_student(folder: Path, latents: int) -> StudentDetector:
    """Save the first layers of the bundled student, with an untrained memory unless ``latents`` is 0.

    Its answers are poor, but depend on all that it sees and remembers.
    """
    student = sd.load("sandbox-student").network
    config = student.model.config
    config.detr_encoder_config.num_layers = config.detr_decoder_config.num_layers = 1
    config.memory_latents, config.memory_context, config.memory_stride, config.memory_marks = latents, 4, 2, True
    torch.manual_seed(0)
    model = EfficientSam3Model(config)
    model.load_state_dict(student.model.state_dict(), strict=False)
    if model.memory_resampler is not None and model.memory_attention is not None:
        warm_start(model.memory_resampler, model.memory_attention)
    model.save_pretrained(folder)
    student.words.save(folder)
    return sd.load(folder).network


def fix_axes(source: Path, out: Path) -> None:
    """Copy an export and fix the axes of its files to the lengths of ``--static``, without another conversion."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    record = json.loads((out / "export.json").read_text())
    lengths = {"frames": record["config"]["memory_context"]}
    for row in record["files"]:
        model = onnx.load(out / row["path"])
        for port in (*model.graph.input, *model.graph.output):
            for axis in port.type.tensor_type.shape.dim:
                if axis.HasField("dim_param"):
                    axis.dim_value = lengths.get(axis.dim_param, 1)
        del model.graph.value_info[:]
        onnx.save(model, out / row["path"])
        row |= {"bytes": (out / row["path"]).stat().st_size, "sha256": sha256(out / row["path"])}
    (out / "export.json").write_text(json.dumps(record | {"static": True}))


def write_video(path: Path, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
    """Write a video without loss, so that a browser decodes the same pixels."""
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=RATE, options={"lossless": "1", "g": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "gbrp"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="gbrp")))
        container.mux(stream.encode())


def pixels(images: UInt8[Tensor, "t 3 h w"]) -> UInt8[np.ndarray, "t h w 3"]:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def main(folder: Path, keep: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels(render_scenes([3], PICTURE, seed=5).images)[0])
    frames = pixels(render_video(1, FRAME, seed=2).images[:FRAMES])
    picture.save(folder / "scene.png")
    write_video(folder / "scene.webm", frames)
    tracker = Path(sd.__file__).parent / "sandbox" / "weights" / "tracker"
    detector, remembering = (small_student(folder / name, latents) for name, latents in (("words", 0), ("memory", 12)))
    answers = {
        "picture": {"inside": INSIDE, "outside": OUTSIDE, "box": BOX, "words": WORDS, "example": EXAMPLE}, "low": LOW,
        "mobile": promptable(sd.load("sandbox-mobile").network, picture, static=False),
        "tracker": promptable(sd.load(tracker).network, picture, static=True), "words": words(detector, picture),
        "memory": {"words": words(remembering, picture), "box": words(remembering, picture, [EXAMPLE])},
        "remembered": video(remembering, frames, REMEMBERED), "seen": video(detector, frames, SEEN),
    }  # fmt: skip
    (folder / "answers.json").write_text(json.dumps(answers))
    exports = folder / "exports"
    sources: dict[str, tuple[str | Path, dict[str, Any]]] = {
        "mobile": ("sandbox-mobile", {}), "tracker": (tracker, {"static": True}),
        "words": (folder / "words", {"vocabulary": WORDS}), "memory": (folder / "memory", {"vocabulary": WORDS}),
    }  # fmt: skip
    for name, (source, options) in sources.items():
        if not (keep and (exports / name / "export.json").is_file()):
            export(source, exports / name, progress=False, **options)
        write_page(exports / name, folder)
    fix_axes(exports / "memory", exports / "fixed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    main(given.folder, given.keep)
