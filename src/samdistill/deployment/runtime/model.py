"""An exported model: masks from points, boxes or words on one image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...ops.sights import Size, Tracked, tight_box
from .files import PRECISIONS, Array, ModelError, Network, check_folder, load_onnxruntime
from .images import Box, Canvas, check_prompts, draw, list_frames, open_image, sigmoid
from .phrases import Tokenizer, Vocabulary
from .video import VISUAL, Video

SINGLE = ("single_iou_scores", "single_masks")  # outputs of the prompt decoder for a prompt that is not ambiguous
_AT_ONCE = 4  # prompts in one run, because the masks of each take about 25 MB at 1008 px


class Encoded(NamedTuple):
    """An image and its features. It can be given in place of the image, so that several prompts encode it once."""

    image: Array
    features: dict[str, Array]

    @property
    def size(self) -> Size:
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class Result:
    """The masks of one image: by descending score for a detector, in the order of the prompts otherwise."""

    image: Array  # RGB (h, w, 3)
    masks: Array  # bool (n, h, w)
    boxes: Array  # left, top, right, bottom in pixels, (n, 4)
    scores: Array  # (n,)
    logits: Array | None = None  # (n, a, b), of a promptable model; can be given as `mask` with further clicks
    presence: float | None = None  # probability that a detector's concept is in the image

    def draw(self) -> Image.Image:
        """Return the image with the masks and scores drawn on it."""
        return draw(self.image, dict(enumerate(self.masks)), [f"{score:.2f}" for score in self.scores])


class Model:
    """An exported model, whose ``kind`` is ``promptable``, ``detector`` or ``detector with memory``.

    Args:
        folder: The exported folder. The SHA-256 of its files is compared with ``export.json``.
        precision: ``fp32``, ``fp16`` or ``int8``; None takes the first that the folder has.
        providers: Names of onnxruntime's execution providers.
        threads: Number of threads; 0 lets onnxruntime choose.
    """

    def __init__(
        self, folder: str | Path, precision: str | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0,
    ) -> None:  # fmt: skip
        load_onnxruntime()
        self.folder = Path(folder)
        self.record = check_folder(self.folder)
        files = files_of(self.record, precision, self.folder)
        self.networks = {name: Network(self.folder / path, providers, threads) for name, path in files.items()}
        self.config: dict[str, Any] = self.record["config"]
        self.kind: str = self.record["kind"]
        self.canvas = canvas_of(self.record)
        self.vocabulary = Vocabulary(self.folder) if (self.folder / "vocabulary.json").is_file() else None
        self._tokenizer: Tokenizer | None = None
        self._concepts: dict[str, dict[str, Array]] = {}

    @property
    def phrases(self) -> list[str] | None:
        """The concepts of a model with a fixed vocabulary. None for other models."""
        return None if self.vocabulary is None else self.vocabulary.phrases

    def network(self, name: str) -> Network:
        """Return the network of a part. Raises ``ModelError`` if the folder does not have it."""
        if name not in self.networks:
            raise ModelError(f"{self.folder}: {_LACKS.get(name, 'this prompt')} needs {name}, which was not exported")
        return self.networks[name]

    def encode(self, image: Any) -> Encoded:
        """Encode an image: a file, a PIL image, or an RGB array (h, w, 3) of dtype uint8."""
        if isinstance(image, Encoded):
            return image
        opened = open_image(image)
        pixels = {"pixel_values": self.canvas.pixels(opened)}
        whole = "vision_encoder" not in self.networks  # a detector of a fixed vocabulary is one file
        return Encoded(opened, pixels if whole else self.network("vision_encoder")(pixels))

    def __call__(
        self, image: Any, text: str | None = None, *, points: Sequence[Sequence[float]] = (), boxes: Sequence[Box] = (),
        mask: Array | None = None, threshold: float = 0.5,
    ) -> Result:  # fmt: skip
        """Predict masks on one image.

        Args:
            image: A file, a PIL image, an RGB array (h, w, 3) of dtype uint8, or an ``Encoded``.
            text: A noun phrase, for a detector.
            points: Points (x, y) or (x, y, label) in pixels on one object, for a promptable model. Label 1 (the
                default) is inside the object, 0 outside.
            boxes: Boxes (left, top, right, bottom) in pixels. For a promptable model, one object per box; for a
                detector, examples of the concept.
            mask: ``logits`` of an earlier result, for a promptable model, together with points or boxes.
            threshold: Minimum score of an instance, for a detector.

        Raises:
            ModelError: The image cannot be read, or the prompts do not fit the model or the image.
        """
        points, boxes = [(*map(float, p), 1.0)[:3] for p in points], [tuple(map(float, box)) for box in boxes]
        seen = self.encode(image)
        check_prompts(seen.size, points, boxes)
        if self.kind == "promptable":
            if text is not None:
                raise ModelError("a promptable model takes no text; give points or boxes")
            return self._segment(seen, points, boxes, mask)
        if points or mask is not None:
            raise ModelError("a detector takes text and boxes only")
        if text is None and not boxes:
            raise ModelError("no prompt given: give text, boxes or both")
        given = self.exemplars(boxes, seen.size)[None] if boxes else None
        answer = self.ask(seen.features, [VISUAL if text is None else text], given)
        masks, found, scores = self.instances(answer, 0, threshold, seen.size)
        return Result(seen.image, masks, found, scores, presence=float(sigmoid(answer["presence_logits"])[0, 0]))

    def video(self, *, threshold: float = 0.5, context: int | None = None, stride: int | None = None) -> Video:
        """Start to follow objects in a video, see ``Video``."""
        if self.kind == "promptable":
            raise ModelError("a promptable model cannot follow objects; export a detector")
        return Video(self, threshold, context, stride)

    def track(
        self, frames: str | Path | Iterable[Any], text: str | None = None, *, boxes: Sequence[Box] = (),
        threshold: float = 0.5,
    ) -> Iterator[tuple[Tracked, ...]]:  # fmt: skip
        """Track objects through a video. Yields those of each frame, including those that are not visible.

        Args:
            frames: A folder of frames in the natural order of their names, or images of one size.
            text: A noun phrase. Without ``boxes``, every instance is tracked, including those that appear later.
            boxes: Boxes (left, top, right, bottom) in pixels around objects of the first frame, which ``text`` names.
            threshold: Minimum score of a visible object.
        """
        video = self.video(threshold=threshold)
        if text is None and not boxes:
            raise ModelError("no prompt given: give text, boxes or both")
        for box in boxes:
            video.add_box(box, text)
        if text is not None and not boxes:
            video.add_text(text)
        for frame in list_frames(Path(frames)) if isinstance(frames, str | Path) else frames:
            yield video.push(frame)

    def concept(self, phrase: str) -> dict[str, Array]:
        """Return the decoder's inputs for a phrase: its row of the vocabulary, or its text features."""
        if phrase not in self._concepts:
            if self.vocabulary is not None:
                found = {"concepts": np.array([self.vocabulary.row(phrase)])}
            else:
                self._tokenizer = self._tokenizer or Tokenizer(self.folder)
                ids, mask = self._tokenizer.encode(phrase)
                encoder = self.network("text_encoder")
                found = {**encoder({"input_ids": ids, "attention_mask": mask}), "attention_mask": mask}
            self._concepts = {**dict(list(self._concepts.items())[-255:]), phrase: found}
        return self._concepts[phrase]

    def ask(
        self, features: Mapping[str, Array], phrases: Sequence[str], boxes: Array | None = None,
        memory: Array | None = None,
    ) -> dict[str, Array]:  # fmt: skip
        """Return the decoder's outputs for p phrases on one image.

        ``boxes`` are examples (p, k, 4), cxcywh in 0..1 of the canvas; ``memory`` has tokens (p, l, c).
        """
        whole = "pixel_values" in features
        name = "detector" if whole else "decoder_memory" if memory is not None else "decoder"
        concepts = [self.concept(phrase) for phrase in phrases]
        given = {n: np.concatenate([concept[n] for concept in concepts]) for n in concepts[0]}
        given["prompt_images"] = np.zeros(len(concepts), np.int64)
        if boxes is not None:
            name = "decoder_boxes"
            given |= {"input_boxes": boxes, "input_boxes_labels": np.ones(boxes.shape[:2], np.int64)}
        if memory is not None:
            given["memory_tokens"] = memory
        return self.network(name).rows(given, features, 0 if whole else _AT_ONCE)

    def remember(self, given: Mapping[str, Array]) -> Array:
        """Return the memory tokens of each row of the memory's inputs. A file of fixed axes reads a full memory."""
        network = self.network("memory")
        length = network.inputs["memory_features"].shape[1]
        if isinstance(length, int):  # frames that are not valid come first, as they are the oldest
            more = {n: [(0, 0), (length - v.shape[1], 0)] + [(0, 0)] * (v.ndim - 2) for n, v in given.items()}
            given = {n: np.pad(v, more[n]) for n, v in given.items()}
        return network.rows(given, {}, 1)["memory_tokens"]

    def instances(
        self, answer: Mapping[str, Array], row: int, threshold: float, size: Size, most: int | None = None
    ) -> tuple[Array, Array, Array]:
        """Return masks, boxes and scores of prompt ``row`` in an image of ``size``, by descending score."""
        scores = sigmoid(answer["pred_logits"][row]) * sigmoid(answer["presence_logits"][row])
        order = np.argsort(-scores, kind="stable")[:most]
        order = order[scores[order] >= threshold]
        masks = np.zeros((len(order), *size), bool)
        for number, query in enumerate(order):
            masks[number] = self.canvas.back(answer["pred_masks"][row, query], size) > 0
        (height, width), side = self.canvas.placed(size), self.canvas.side
        scale = np.array([side * size[1] / width, side * size[0] / height] * 2, np.float32)
        boxes = np.clip(answer["pred_boxes"][row][order] * scale, 0, np.array([size[1], size[0]] * 2, np.float32))
        return masks, boxes, scores[order]

    def exemplars(self, boxes: Sequence[Box], size: Size) -> Array:
        """Convert boxes (xyxy, pixels of the image) to cxcywh in 0..1 of the canvas, (k, 4)."""
        corners = self.canvas.points(np.array(boxes, np.float32).reshape(-1, 2, 2), size) / np.float32(self.canvas.side)
        low, high = corners[:, 0], corners[:, 1]
        return np.concatenate([(low + high) / 2, high - low], 1)

    def _segment(self, seen: Encoded, points: list[Any], boxes: list[Any], mask: Array | None) -> Result:
        """Segment the object of ``points``, or the one in each box."""
        if not points and not boxes:
            raise ModelError("no prompt given: give points or boxes")
        if points and len(boxes) > 1:
            raise ModelError(f"with {len(boxes)} boxes it is unclear whose the points are; give one box at most")
        count = max(1, len(boxes))
        xy = np.array([point[:2] for point in points], np.float32).reshape(1, -1, 2)
        corners = np.array(boxes, np.float32).reshape(-1, 2, 2)
        given = {
            "input_points": self.canvas.points(xy + 0.5, seen.size)[None] - np.float32(0.5),
            "input_labels": np.array([point[2] for point in points], np.int64).reshape(1, 1, -1).repeat(count, 1),
            "input_boxes": self.canvas.points(corners, seen.size).reshape(1, -1, 4),
        }  # fmt: skip
        if mask is not None:
            given["input_masks"] = np.asarray(mask, np.float32).reshape(1, count, *np.shape(mask)[-2:])
        found = self.decode(seen.features, given)
        ambiguous = len(points) == 1 and not boxes and points[0][2] == 1
        scores, logits = (found[n][0] for n in (("iou_scores", "pred_masks") if ambiguous else SINGLE))
        best = scores.argmax(1)
        scores, logits = scores[np.arange(count), best], logits[np.arange(count), best]
        masks = np.stack([self.canvas.back(one, seen.size) > 0 for one in logits])
        return Result(seen.image, masks, np.array([tight_box(m) for m in masks], np.float32), scores, logits)

    def decode(self, features: Mapping[str, Array], given: Mapping[str, Array]) -> dict[str, Array]:
        """Run the prompt decoder on b images: on all prompts at once, or one by one where its file has fixed axes.

        ``given`` has ``input_points`` (b, n, p, 2), ``input_labels`` (b, n, p), ``input_boxes`` (b, n, 4) and perhaps
        ``input_masks`` (b, n, h, w), in pixels of the canvas. p, and the number of boxes, may be 0.
        """
        name = "prompt_encoder_mask_decoder"
        if "input_masks" in given:
            name += "_masks"
        elif f"{name}_boxes" in self.networks and given["input_boxes"].shape[1]:  # files of fixed axes
            name += "_boxes"
        network = self.network(name)
        if given["input_labels"].shape[2] and "input_labels" not in network.inputs:
            raise ModelError(f"{network.path}: reads boxes alone; give no point, or export without --static")
        count = max(given[n].shape[1] for n in ("input_labels", "input_boxes"))
        fixed = any(one.shape[1] == 1 for n, one in network.inputs.items() if n in ("input_labels", "input_boxes"))
        step = 1 if fixed else count
        parts = ({n: v[:, i : i + step] for n, v in given.items()} for i in range(0, count, step))
        found = [network({**features, **part}) for part in parts]
        return {n: np.concatenate([one[n] for one in found], 1) for n in found[0]}


def files_of(record: Mapping[str, Any], precision: str | None, folder: Path) -> dict[str, str]:
    """Return the path of each part's ONNX file in one precision. A precision in which a part failed is left out."""
    rows = [row for row in record["files"] if row["target"] == "onnx"]
    found = {
        name: {r["part"]: r["path"] for r in rows if r["precision"] == name and r["passed"]} for name in PRECISIONS
    }
    there = [name for name in PRECISIONS if found[name] and len(found[name]) == len({row["part"] for row in rows})]
    if not there or precision not in (None, *there):
        wanted = precision or "any precision"
        raise ModelError(f"{folder}: no ONNX files in {wanted}; there is: {', '.join(there) or '-'}")
    return found[precision or there[0]]


def canvas_of(record: Mapping[str, Any]) -> Canvas:
    """Return how a model's images are placed and normalised."""
    given = record["canvas"]
    mean, std = (np.array(given[name], np.float32) for name in ("mean", "std"))
    return Canvas(int(given["image_size"]), given["geometry"] == "square", mean, std, bool(given["zero_padding"]))


_LACKS = {
    "text_encoder": "a phrase", "decoder": "a phrase", "decoder_boxes": "an example box", "memory": "the memory",
    "decoder_memory": "the memory", "prompt_encoder_mask_decoder_masks": "a mask prompt",
}  # fmt: skip
