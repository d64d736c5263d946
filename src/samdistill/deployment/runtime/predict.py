#!/usr/bin/env python3
"""Run a model that samdistill exported to ONNX: masks from points, boxes or words, and objects tracked in a video.

This file needs NumPy, Pillow and onnxruntime, and no other file than those of its own folder. Results are those of the
PyTorch model: images are resized with the same fixed-point arithmetic, and a video gives the same object ids.

Example:
    python predict.py photo.jpg --point 320,240 --out seen.png
    python predict.py photo.jpg --text "red car" --out seen.png
    python predict.py --frames video/ --text "red car" --out seen/

    >>> from predict import Model
    >>> model = Model("exported")
    >>> model("photo.jpg", boxes=[(10, 20, 110, 90)]).masks.shape
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

FORMAT = 1  # newest version of export.json that this file reads
PRECISIONS = ("fp32", "fp16", "int8")
MOST_OBJECTS = 20  # of a video
VISUAL = "visual"  # text of a prompt that has only example boxes
PAD = 128  # value of padded pixels
SAME, LEAST_SCORE = 0.5, 0.05  # IoU of two instances of one object, score of an instance that can be a tracked object
SINGLE = ("single_iou_scores", "single_masks")  # outputs of the prompt decoder for a prompt that is not ambiguous
_AT_ONCE = 4  # prompts in one run, because the masks of each take about 25 MB at 1008 px
_TYPES = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")

Array = np.ndarray
Size = tuple[int, int]
Box = Sequence[float]


class ModelError(ValueError):
    """A model folder, an image or a prompt cannot be used. The message is one line."""


# ---------------------------------------------------------------------------------------------------- files


class Network:
    """An ONNX file, opened on its first use with some of onnxruntime's execution providers."""

    def __init__(self, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0) -> None:
        self.path, self._providers, self._threads = path, list(providers), threads

    @cached_property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``."""
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self._threads, 3
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=self._providers)
        except Exception as error:  # onnxruntime raises many types
            raise ModelError(f"{self.path}: not a readable ONNX file: {_line(error)}") from None

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs by name, with ``type`` and ``shape``."""
        return {one.name: one for one in self.session.get_inputs()}

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run the network. ``values`` may hold more than its inputs. Floats are returned as float32."""
        if missing := [name for name in self.inputs if name not in values]:
            raise ModelError(f"{self.path}: needs the input {missing[0]}, which this prompt does not have")
        feeds = {n: np.ascontiguousarray(values[n], _TYPES[one.type[7:-1]]) for n, one in self.inputs.items()}
        try:
            found = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime raises many types
            raise ModelError(f"{self.path}: cannot run: {_line(error)}") from None
        names = [one.name for one in self.session.get_outputs()]
        return {n: v.astype(np.float32) if v.dtype == np.float16 else v for n, v in zip(names, found, strict=True)}

    def rows(self, given: Mapping[str, Array], shared: Mapping[str, Array], most: int = 0) -> dict[str, Array]:
        """Run the network on at most ``most`` rows of ``given`` at a time (0: all) and join the results.

        A row is a prompt, a phrase or an image. ``shared`` are the inputs that are the same for all rows. A file of
        fixed axes reads one row.
        """
        count = len(next(iter(given.values())))
        fixed = any(isinstance(self.inputs[name].shape[0], int) for name in given if name in self.inputs)
        step = 1 if fixed else most or count
        found = [self({**shared, **{n: v[i : i + step] for n, v in given.items()}}) for i in range(0, count, step)]
        return found[0] if len(found) == 1 else {n: np.concatenate([one[n] for one in found]) for n in found[0]}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        how = "pip install onnxruntime, or pip install 'samdistill[onnx]'"
        raise ModelError(f"onnxruntime is not installed; {how}") from None
    return onnxruntime


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {_line(error)}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object")
    return found


def check_folder(folder: Path) -> dict[str, Any]:
    """Return ``export.json`` of a folder after a check of its version and of the SHA-256 of every file it lists."""
    record = _read(folder / "export.json")
    version = record.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ModelError(
            f"{folder}: export.json has format {version!r}, this reader knows 1 to {FORMAT}; use the predict.py that "
            "lies in the folder, or a newer samdistill"
        )
    for name, digest in {**{row["path"]: row["sha256"] for row in record["files"]}, **record["others"]}.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{folder}: export.json lists {name!r}, which is outside the folder")
        if not path.is_file():
            raise ModelError(f"{path}: missing; export.json lists it")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ModelError(f"{path}: damaged: its SHA-256 is not the one in export.json; export or copy it again")
    return record


# ----------------------------------------------------------------------------------------------- phrases

_SHORT = re.compile("'(?:s|t|re|ve|m|ll|d)")
_OTHER_LETTERS = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)
_SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000").union(map(chr, range(0x2000, 0x200B)))
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-pair encoding writes as they are
_BYTES = {v: chr(v) for v in _PLAIN} | {v: chr(256 + n) for n, v in enumerate(sorted({*range(256)} - {*_PLAIN}))}


class Tokenizer:
    """Tokenizer of the ``tokenizer.json`` of a folder: CLIP's byte-pair encoding, or a list of whole words."""

    def __init__(self, folder: Path) -> None:
        rules, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
        model = rules["model"]
        if model["type"] not in ("BPE", "WordLevel"):
            raise ModelError(f"{folder / 'tokenizer.json'}: a {model['type']} tokenizer is not supported")
        self._vocabulary, self._suffix = model["vocab"], model.get("end_of_word_suffix") or ""
        self._unknown = self._vocabulary.get(model.get("unk_token") or "")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())]
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = model["type"] == "BPE"
        self._added = {one["content"]: one for one in rules.get("added_tokens", ())}
        self._steps = _steps(rules.get("normalizer"))
        self._before, self._after = _frame(rules.get("post_processor"))
        self.context, padding = int(settings["model_max_length"]), settings["pad_token"]
        self._padding = self._id(padding["content"] if isinstance(padding, dict) else padding)

    def encode(self, phrase: str) -> tuple[Array, Array]:
        """Return token ids and attention mask of a phrase, int64 of shape (1, ``context``)."""
        if not phrase.strip():
            raise ModelError("a phrase is empty; give a noun phrase such as 'red car'")
        tokens = self.tokens(phrase)
        if len(tokens) > self.context:
            raise ModelError(f"{phrase[:80]!r} is longer than the {self.context} tokens this model reads; shorten it")
        ids, mask = np.full((1, self.context), self._padding), np.zeros((1, self.context), np.int64)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        return ids, mask

    def tokens(self, phrase: str) -> list[int]:
        """Return the token ids of a phrase with start and end, without padding."""
        found = list(self._before)
        for text, added in self._split(phrase, False):
            if added:
                found.append(self._id(text))
                continue
            for step in self._steps:
                text = step(text)
            for part, special in self._split(text, True):
                found += [self._id(part)] if special else [i for word in self._words(part) for i in self._pieces(word)]
        return found + self._after

    def _id(self, token: str) -> int:
        return int(self._added[token]["id"] if token in self._added else self._vocabulary[token])

    def _split(self, text: str, normalised: bool) -> Iterator[tuple[str, bool]]:
        """Cut added tokens out of a text, those that are looked for before or after normalisation."""
        wanted = [name for name, one in self._added.items() if bool(one.get("normalized")) == normalised]
        rule = "|".join(map(re.escape, sorted(wanted, key=len, reverse=True))) or "(?!)"
        for place, part in enumerate(re.split(f"({rule})", text)):
            if part:
                yield part, bool(place % 2)

    def _words(self, text: str) -> Iterator[str]:
        """Cut a text into words: CLIP's rule, or words and punctuation."""
        start = 0
        while start < len(text):
            kind, end = _kind(text[start], self._bytes), start + 1
            if self._bytes and (short := _SHORT.match(text, start)):
                end = short.end()
            else:
                while end < len(text) and kind != "number" and _kind(text[end], self._bytes) == kind:
                    end += 1
            if kind != "space":
                yield text[start:end]
            start = end

    def _pieces(self, word: str) -> list[int]:
        """Return the ids of one word."""
        parts = [word]
        if self._bytes:
            parts = [_BYTES[value] for value in word.encode("utf-8")]
            parts[-1] += self._suffix
            while len(parts) > 1:
                ranks = [self._ranks.get(pair, math.inf) for pair in pairwise(parts)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == math.inf:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids = [self._vocabulary.get(part, self._unknown) for part in parts]
        return [number for number in ids if number is not None]


def _kind(character: str, clip: bool) -> str:
    """Return the class of a character that a word is made of."""
    if character in _SPACES:
        return "space"
    category = unicodedata.category(character)
    if clip:
        return {"L": "letter", "N": "number"}.get(category[0], "other")
    letter = category[0] in "LM" or category in ("Nd", "Nl", "Pc") or _OTHER_LETTERS.match(character)
    return "letter" if letter else "other"


def _steps(rule: Mapping[str, Any] | None) -> list[Any]:
    """Return the functions of a normaliser."""
    if rule is None:
        return []
    kind = rule["type"]
    if kind == "Sequence":
        return [step for one in rule["normalizers"] for step in _steps(one)]
    if kind == "Lowercase":  # per character, without Python's rule for a final sigma
        return [lambda text: "".join(map(str.lower, text))]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [lambda text: unicodedata.normalize(kind, text)]
    if kind == "Replace" and rule["pattern"].get("Regex") == r"\s+":
        spaces = re.compile(f"[{''.join(sorted(_SPACES))}]+")
        return [lambda text: spaces.sub(rule["content"], text)]
    raise ModelError(f"tokenizer.json: the normaliser {kind} is not supported")


def _frame(rule: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a phrase."""
    if rule is None:
        return [], []
    if rule["type"] == "RobertaProcessing":
        return [int(rule["cls"][1])], [int(rule["sep"][1])]
    if rule["type"] != "TemplateProcessing":
        raise ModelError(f"tokenizer.json: the post-processor {rule['type']} is not supported")
    names = [one.get("SpecialToken", {}).get("id") for one in rule["single"]]  # None is the phrase
    ids = [[] if name is None else rule["special_tokens"][name]["ids"] for name in names]
    place = names.index(None)
    return [n for one in ids[:place] for n in one], [n for one in ids[place:] for n in one]


class Vocabulary:
    """The fixed list of concepts of a model without a text encoder: ``vocabulary.json``."""

    def __init__(self, folder: Path) -> None:
        found = _read(folder / "vocabulary.json")
        self.phrases: list[str] = list(found["phrases"])
        self._rows = {phrase: row for row, phrase in enumerate([*self.phrases, *found.get("hidden", ())])}

    def row(self, phrase: str) -> int:
        """Return the index of a phrase. Raises ``ModelError`` if it is not in the list."""
        if phrase not in self._rows:
            raise ModelError(f"{phrase[:80]!r} is not a concept of this model; it knows: {', '.join(self.phrases)}")
        return self._rows[phrase]


# ------------------------------------------------------------------------------------------------ images


@lru_cache(64)
def _shrinking(size: int, target: int) -> tuple[Array, Array, int]:
    """Return first pixel, integer weights and their bits for resizing with antialiasing, as PyTorch does for uint8."""
    scale = size / target
    reach = max(scale, 1.0)
    most, centres = math.ceil(reach) * 2 + 1, scale * (np.arange(target) + 0.5)
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    count = np.clip(np.minimum((centres + reach + 0.5).astype(np.int64), size) - first, 0, most)
    place = np.arange(most)
    away = np.abs((place + first[:, None] - centres[:, None] + 0.5) * (1 / reach))
    weights = np.where((away < 1) & (place < count[:, None]), 1 - away, 0.0)
    weights /= weights.sum(1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, np.floor(0.5 + weights * (1 << bits)), bits


def shrink(image: Array, size: Size) -> Array:
    """Resize an image (h, w, 3), uint8, with antialiasing, bit for bit as PyTorch's bilinear kernel for uint8."""
    for axis in (1, 0):
        if image.shape[axis] == size[axis]:
            continue
        turned = image.swapaxes(0, axis)
        first, weights, bits = _shrinking(len(turned), size[axis])
        kind = np.float32 if bits < 16 else np.float64  # holds the integer sums exactly
        values, weights = turned.reshape(len(turned), -1).astype(kind), weights.astype(kind)
        found = np.empty((size[axis], values.shape[1]), kind)
        for row, start in enumerate(first):
            part = values[start : start + weights.shape[1]]
            np.matmul(weights[row, : len(part)], part, out=found[row])
        found = np.clip((found + (1 << (bits - 1))) * 2.0**-bits, 0, 255).astype(np.uint8)
        image = found.reshape(size[axis], *turned.shape[1:]).swapaxes(0, axis)
    return image


def _bilinear(size: int, target: int) -> Array:
    """Return the matrix (target, size) of bilinear interpolation without aligned corners."""
    at = np.maximum((np.arange(target) + 0.5) * (size / target) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), size - 1)
    found = np.zeros((target, size))
    found[np.arange(target), low] += 1 - (at - low)
    found[np.arange(target), np.minimum(low + 1, size - 1)] += at - low
    return found


@lru_cache(64)
def _enlarging(size: int, side: int, placed: int, target: int) -> Array:
    """Return the matrix that resizes ``size`` to ``side`` and then the first ``placed`` of these to ``target``."""
    canvas = _bilinear(size, side)[:placed]
    return (canvas if placed == target else _bilinear(placed, target) @ canvas).astype(np.float32)


@lru_cache(16)
def _averaging(size: int, target: int) -> Array:
    """Return the matrix (target, size) of adaptive average pooling."""
    found = np.zeros((target, size), np.float32)
    for row in range(target):
        start, end = row * size // target, -(-(row + 1) * size // target)
        found[row, start:end] = 1 / (end - start)
    return found


@dataclass(frozen=True)
class Canvas:
    """Placement of images on the square input of a model, and their normalisation in the range 0..1."""

    side: int
    square: bool  # stretch the image; otherwise keep its aspect ratio, and pad it at the bottom and the right
    mean: Array
    std: Array
    zeros: bool = False  # set padding to zero after normalisation

    def placed(self, size: Size) -> Size:
        """Return height and width on the canvas of an image of ``size``."""
        if self.square:
            return self.side, self.side
        scale = self.side / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def pixels(self, image: Array) -> Array:
        """Return the normalised input (1, 3, side, side) of an image (h, w, 3), uint8."""
        height, width = self.placed(image.shape[:2])
        canvas = np.full((self.side, self.side, 3), PAD, np.uint8)
        canvas[:height, :width] = shrink(image, (height, width))
        values = (canvas.astype(np.float32) / np.float32(255) - self.mean) / self.std
        if self.zeros:
            values[height:], values[:, width:] = 0, 0
        return np.ascontiguousarray(values.transpose(2, 0, 1))[None]

    def points(self, xy: Array, size: Size) -> Array:
        """Convert x, y in pixels of an image to pixels of the canvas."""
        height, width = self.placed(size)
        return np.asarray(xy, np.float32) * np.array([width / size[1], height / size[0]], np.float32)

    def back(self, logits: Array, size: Size) -> Array:
        """Resize mask logits (a, b) over the canvas to the image."""
        rows, columns = map(_enlarging, logits.shape, (self.side, self.side), self.placed(size), size)
        return rows @ logits.astype(np.float32) @ columns.T

    def cells(self, mask: Array, grid: Size) -> Array:
        """Return the fraction of each cell of a grid over the canvas that a mask of an image covers."""
        height, width = self.placed(mask.shape)
        rows, columns = (
            np.minimum(((np.arange(v, dtype=np.float32) + np.float32(0.5)) * np.float32(s / v)).astype(np.int64), s - 1)
            for v, s in zip((height, width), mask.shape, strict=True)
        )
        placed = np.zeros((self.side, self.side), np.float32)
        placed[:height, :width] = mask.take(rows, 0).take(columns, 1)
        return _averaging(self.side, grid[0]) @ placed @ _averaging(self.side, grid[1]).T


def open_image(image: Any) -> Array:
    """Return an image file (upright by its EXIF orientation), a PIL image or an array as RGB (h, w, 3), uint8."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ModelError(f"an image must be a uint8 array (height, width, 3), got {image.dtype} of {image.shape}")
        return image
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ModelError(f"{image}: not a readable image: {_line(error)}") from None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def tight_box(mask: Array) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of a mask; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values.astype(np.float32)))


# ------------------------------------------------------------------------------------------------- model


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
        _onnxruntime()
        self.folder = Path(folder)
        self.record = check_folder(self.folder)
        files = _files_of(self.record, precision, self.folder)
        self.networks = {name: Network(self.folder / path, providers, threads) for name, path in files.items()}
        self.config: dict[str, Any] = self.record["config"]
        self.kind: str = self.record["kind"]
        self.canvas = _canvas(self.record)
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
        _check(seen.size, points, boxes)
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
        return Result(seen.image, masks, found, scores, presence=float(_sigmoid(answer["presence_logits"])[0, 0]))

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
        scores = _sigmoid(answer["pred_logits"][row]) * _sigmoid(answer["presence_logits"][row])
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
        network, count = self.network(name), max(given[n].shape[1] for n in ("input_labels", "input_boxes"))
        fixed = any(one.shape[1] == 1 for n, one in network.inputs.items() if n in ("input_labels", "input_boxes"))
        step = 1 if fixed else count
        parts = ({n: v[:, i : i + step] for n, v in given.items()} for i in range(0, count, step))
        found = [network({**features, **part}) for part in parts]
        return {n: np.concatenate([one[n] for one in found], 1) for n in found[0]}


def _files_of(record: Mapping[str, Any], precision: str | None, folder: Path) -> dict[str, str]:
    """Return the path of each part's ONNX file in one precision."""
    rows = [row for row in record["files"] if row["target"] == "onnx" and row["passed"]]
    there = [name for name in PRECISIONS if name in {row["precision"] for row in rows}]
    if not there or precision not in (None, *there):
        wanted = precision or "any precision"
        raise ModelError(f"{folder}: no ONNX files in {wanted}; there is: {', '.join(there) or '-'}")
    return {row["part"]: row["path"] for row in rows if row["precision"] == (precision or there[0])}


def _canvas(record: Mapping[str, Any]) -> Canvas:
    """Return how a model's images are placed and normalised."""
    given = record["canvas"]
    mean, std = (np.array(given[name], np.float32) for name in ("mean", "std"))
    return Canvas(int(given["image_size"]), given["geometry"] == "square", mean, std, bool(given["zero_padding"]))


_LACKS = {
    "text_encoder": "a phrase", "decoder": "a phrase", "decoder_boxes": "an example box", "memory": "the memory",
    "decoder_memory": "the memory", "prompt_encoder_mask_decoder_masks": "a mask prompt",
}  # fmt: skip


def _check(size: Size, points: Sequence[Sequence[float]], boxes: Sequence[Box]) -> None:
    """Raise ``ModelError`` for points and boxes that are not in an image of ``size``."""
    (height, width), where = size, f"the image, which is {size[1]} x {size[0]} pixels"
    for x, y, label in points:
        if label not in (0, 1):
            raise ModelError(f"point {x:g},{y:g}: the label {label:g} is neither 1 (inside the object) nor 0 (outside)")
        if not (0 <= x < width and 0 <= y < height):
            raise ModelError(f"point {x:g},{y:g} is outside {where}")
    for box in boxes:
        shown = ",".join(f"{value:g}" for value in box)
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ModelError(f"box {shown} is empty; give left,top,right,bottom in pixels")
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
            raise ModelError(f"box {shown} reaches beyond {where}")


# ------------------------------------------------------------------------------------------------- video


@dataclass(frozen=True, eq=False)
class Tracked:
    """One object in one frame."""

    object_id: int
    phrase: str | None  # that it was found or named with
    score: float  # in 0..1; 0 if the model did not look for it
    visible: bool
    mask: Array  # bool (h, w); empty if it is not visible
    box: tuple[float, float, float, float]  # left, top, right, bottom of the mask in pixels; zeros if it is not visible


class _Sight(NamedTuple):  # an instance in one frame
    score: float
    mask: Array
    box: tuple[int, int, int, int]
    area: int


def _sight(score: float, mask: Array) -> _Sight | None:
    area = int(np.count_nonzero(mask))
    return _Sight(score, mask, tight_box(mask), area) if area else None


@dataclass(eq=False)
class _Track:
    object_id: int
    phrase: str | None
    asked: str
    last: _Sight


class _Shown(NamedTuple):  # an object to be added at the next frame, given by a box or a mask
    object_id: int
    phrase: str | None
    box: tuple[float, ...] | None
    mask: Array | None


class _Past(NamedTuple):
    number: int
    features: Array
    marks: dict[int, Array]  # of each object, see `Canvas.cells`


class _Frame(NamedTuple):
    features: dict[str, Array]
    sights: dict[int, _Sight]
    scores: dict[int, float]
    plain: dict[str, list[_Sight]]  # instances of a phrase, detected without memory


def _overlap(first: _Sight, second: _Sight) -> float:
    """Return the IoU of two masks."""
    left, top = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    right, bottom = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    if left >= right or top >= bottom:
        return 0.0
    common = np.count_nonzero(first.mask[top:bottom, left:right] & second.mask[top:bottom, left:right])
    return common / (first.area + second.area - common)


def _apart(first: _Sight, second: _Sight) -> float:
    """Return the distance of the centres of two boxes."""
    across, down = (first.box[i] + first.box[i + 2] - second.box[i] - second.box[i + 2] for i in (0, 1))
    return math.hypot(across, down) / 2


def _box_iou(box: Array, others: Array) -> Array:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    return common / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common)


def assign(gains: Array) -> list[tuple[int, int]]:
    """Assign rows to columns so that the sum of gains is greatest.

    The algorithm, also in its choice between equal sums, is that of scipy's ``linear_sum_assignment`` (Crouse, On
    implementing 2D rectangular assignment algorithms, 2016).
    """
    turned = gains.shape[0] > gains.shape[1]
    costs = (-(gains.T if turned else gains).astype(float)).tolist()
    u, v = [0.0] * len(costs), [0.0] * len(costs[0])
    path, owner, chosen = [-1] * len(v), [-1] * len(v), [-1] * len(u)
    for current in range(len(u)):
        row, least, sink = current, 0.0, -1
        remaining, costs_to = list(range(len(v)))[::-1], [math.inf] * len(v)
        rows, columns = list[int](), list[int]()
        while sink < 0:
            index, lowest = -1, math.inf
            for place, column in enumerate(remaining):
                cost = least + costs[row][column] - u[row] - v[column]
                if cost < costs_to[column]:
                    path[column], costs_to[column] = row, cost
                if costs_to[column] < lowest or (costs_to[column] == lowest and owner[column] < 0):
                    index, lowest = place, costs_to[column]
            least, column = lowest, remaining[index]
            columns.append(column)
            remaining[index] = remaining[-1]
            remaining.pop()
            if owner[column] < 0:
                sink = column
            else:
                row = owner[column]
                rows.append(row)
        u[current] += least
        for row in rows:
            u[row] += least - costs_to[chosen[row]]
        for column in columns:
            v[column] -= least - costs_to[column]
        column, row = sink, -1
        while row != current:
            row = owner[column] = path[column]
            chosen[row], column = column, chosen[row]
    return [(column, row) if turned else (row, column) for row, column in enumerate(chosen)]


class Video:
    """Follows objects through one video, whose frames are given in order. Memory use does not grow with its length.

    The rules and ids are those of ``samdistill.VideoSession``: with marks, a query per object; otherwise a query per
    phrase, whose instances are assigned to objects by the IoU with their last mask. ``crowded`` says whether instances
    were left out because there are ``MOST_OBJECTS`` objects.

    Example:
        >>> video = Model("exported").video()
        >>> video.add_box((20, 20, 60, 60))
        1
        >>> video.push(frame)[0].mask.shape
    """

    def __init__(self, model: Model, threshold: float, context: int | None, stride: int | None) -> None:
        config, remembers = model.config, model.kind == "detector with memory"
        self.context = 0 if not remembers else config["memory_context"] if context is None else context
        self.stride = int(config.get("memory_stride", 4)) if stride is None else stride
        if self.context < 0 or self.stride < 1 or not 0 <= threshold <= 1:
            raise ModelError("`context` must be at least 0, `stride` at least 1 and `threshold` in 0..1")
        self.threshold, self.crowded = threshold, False
        self._model, self._unnamed = model, config.get("memory_phrase", "object")
        self._level = f"vision_features.{config.get('memory_level', 3)}"
        self._marks = bool(self.context and config.get("memory_marks", True))
        self._past, self._number, self._size = list[_Past](), 0, (0, 0)
        self._tracks: dict[int, _Track] = {}
        self._shown: dict[int, _Shown] = {}
        self._phrases: dict[str, bool] = {}

    def add_text(self, phrase: str) -> None:
        """Track every instance of ``phrase``, including those that appear later."""
        self._model.concept(phrase)
        self._phrases.setdefault(phrase, False)

    def add_box(self, box: Box, text: str | None = None) -> int:
        """Track the object in ``box`` (xyxy, pixels) of the next frame, and return its id."""
        self._model.network("decoder_boxes")
        return self._show(_Shown(self._new_id(None), text, tuple(map(float, box)), None))

    def add_mask(self, mask: Array, text: str | None = None, object_id: int | None = None) -> int:
        """Track the object with ``mask`` (bool, the size of the frame) in the next frame, and return its id."""
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or not mask.any():
            raise ModelError("a mask must be a bool array (height, width) that is not empty")
        return self._show(_Shown(self._new_id(object_id), text, None, mask.copy()))

    def push(self, frame: Any) -> tuple[Tracked, ...]:
        """Return all objects in the next frame, in the order in which they were added, also those not visible.

        ``frame`` is an image file, a PIL image, or an RGB array (h, w, 3), of the first frame's size.
        """
        image = open_image(frame)
        size = (image.shape[0], image.shape[1])
        if self._number and size != self._size:
            (height, width), (h, w) = size, self._size
            raise ModelError(f"frame {self._number} is {width} x {height} pixels, the first one {w} x {h}")
        shown, self._shown = list(self._shown.values()), {}
        for one in shown:
            self._check_fits(one, size)
        self._size = size
        now, before = _Frame(self._model.encode(image).features, {}, {}, {}), len(self._tracks)
        (self._recall if self._marks else self._follow)(now)
        self._start(now, shown)
        self._discover(now)
        for object_id, sight in now.sights.items():
            self._tracks[object_id].last = sight
        if self.context and (self._number % self.stride == 0 or len(self._tracks) > before):
            self._remember(now)
        self._number += 1
        return tuple(self._tracked(now, track) for track in self._tracks.values())

    def _remember(self, now: _Frame) -> None:
        """Add a frame to the memory. The last frame that shows an object is kept while later frames are dropped."""
        features, seen = now.features[self._level][0], now.sights if self._marks else {}
        marks = {i: self._model.canvas.cells(sight.mask, features.shape[-2:]) for i, sight in seen.items()}
        self._past.append(_Past(self._number, features, marks))
        if len(self._past) > self.context:
            oldest = enumerate(self._past[: self.context // 2 + 1])
            spare = (n for n, one in oldest if one.marks.keys() <= set().union(*(p.marks for p in self._past[n + 1 :])))
            del self._past[next(spare, 0)]

    def _tracked(self, now: _Frame, track: _Track) -> Tracked:
        sight = now.sights.get(track.object_id)
        if sight is None:
            sight = _Sight(now.scores.get(track.object_id, 0.0), np.zeros(self._size, bool), (0,) * 4, 0)
        left, top, right, bottom = map(float, sight.box)
        return Tracked(
            track.object_id, track.phrase, sight.score, sight.area > 0, sight.mask, (left, top, right, bottom)
        )

    def _new_id(self, wanted: int | None) -> int:
        taken = self._tracks.keys() | self._shown.keys()
        if len(taken) >= MOST_OBJECTS:
            raise ModelError(f"a video has at most {MOST_OBJECTS} objects")
        if wanted in taken:
            raise ModelError(f"object id {wanted} is in use")
        return next(n for n in range(1, len(taken) + 2) if n not in taken) if wanted is None else wanted

    def _show(self, shown: _Shown) -> int:
        if shown.phrase is not None:
            self._model.concept(shown.phrase)
        if self._number:
            self._check_fits(shown, self._size)
        self._shown[shown.object_id] = shown
        return shown.object_id

    def _check_fits(self, shown: _Shown, size: Size) -> None:
        _check(size, (), () if shown.box is None else (shown.box,))
        if shown.mask is not None and shown.mask.shape != size:
            (height, width), (h, w) = shown.mask.shape, size
            raise ModelError(f"the mask of object {shown.object_id} is {width} x {height} pixels, the frame {w} x {h}")

    def _tokens(self, count: int, objects: Sequence[int] = ()) -> Array:
        """Return the memory tokens of ``count`` prompts, or of the objects whose marks are read."""
        features = np.stack([one.features for one in self._past])[None]
        ages = [min((self._number - one.number) / self.stride, self.context) for one in self._past]
        given = {
            "memory_features": features, "memory_ages": np.array([ages], np.float32),
            "memory_valid": np.ones((1, len(ages)), bool),
        }  # fmt: skip
        if not objects:
            return np.repeat(self._model.remember(given), count, 0)
        nowhere = np.zeros(features.shape[-2:], np.float32)
        marks = [np.stack([one.marks.get(number, nowhere) for one in self._past])[None] for number in objects]
        return np.concatenate([self._model.remember({**given, "memory_masks": one}) for one in marks])

    def _sights(self, answer: Mapping[str, Array], row: int) -> list[_Sight]:
        masks, _, scores = self._model.instances(answer, row, LEAST_SCORE, self._size, MOST_OBJECTS)
        return [sight for sight in map(_sight, scores.tolist(), masks) if sight is not None]

    def _plain(self, now: _Frame, phrases: Sequence[str]) -> dict[str, list[_Sight]]:
        """Return the instances of each phrase in this frame, detected without memory."""
        if missing := [phrase for phrase in phrases if phrase not in now.plain]:
            answer = self._model.ask(now.features, missing)
            now.plain.update({phrase: self._sights(answer, row) for row, phrase in enumerate(missing)})
        return {phrase: now.plain[phrase] for phrase in phrases}

    def _recall(self, now: _Frame) -> None:
        """Find every object that the memory shows. A pixel belongs to the object with the largest logit."""
        marked = set().union(*(one.marks for one in self._past))
        tracks = [track for track in self._tracks.values() if track.object_id in marked]
        if not tracks:
            return
        memory = self._tokens(len(tracks), [track.object_id for track in tracks])
        answer = self._model.ask(now.features, [track.asked for track in tracks], memory=memory)
        scores = _sigmoid(answer["presence_logits"][:, 0]).tolist()
        best, owner = np.zeros(self._size, np.float32), np.full(self._size, -1)
        for row, query in enumerate(answer["pred_logits"].argmax(1)):
            if scores[row] >= self.threshold:
                logits = self._model.canvas.back(answer["pred_masks"][row, query], self._size)
                owner[logits > best] = row
                np.maximum(logits, best, out=best)
        for row, track in enumerate(tracks):
            now.scores[track.object_id] = scores[row]
            if (sight := _sight(scores[row], owner == row)) is not None:
                now.sights[track.object_id] = sight

    def _follow(self, now: _Frame) -> None:
        """Run the detector once per phrase, and assign the instances to objects."""
        phrases = list(dict.fromkeys(track.asked for track in self._tracks.values()))
        if phrases and self._past:
            answer = self._model.ask(now.features, phrases, memory=self._tokens(len(phrases)))
            found = {phrase: self._sights(answer, row) for row, phrase in enumerate(phrases)}
        else:
            found = self._plain(now, phrases)
        for phrase, sights in found.items():
            tracks = [track for track in self._tracks.values() if track.asked == phrase]
            shares = np.array([[_overlap(track.last, sight) for sight in sights] for track in tracks])
            for row, column in assign(shares) if shares.size else ():
                if shares[row, column] > 0:
                    now.sights[tracks[row].object_id] = sights[column]

    def _start(self, now: _Frame, shown: Sequence[_Shown]) -> None:
        """Add the objects of ``shown`` at this frame."""
        boxed = [one for one in shown if one.box is not None]
        found = self._boxed(now, boxed) if boxed else {}
        for one in shown:
            sight = found[one.object_id] if one.mask is None else _sight(1.0, one.mask)
            self._begin(now, one.object_id, one.phrase, sight)

    def _begin(self, now: _Frame, object_id: int, phrase: str | None, sight: Any) -> None:
        asked = self._unnamed if phrase is None else phrase
        self._tracks[object_id] = _Track(object_id, phrase, asked, sight)
        now.sights[object_id] = sight

    def _boxed(self, now: _Frame, shown: Sequence[_Shown]) -> dict[int, _Sight | None]:
        """Return the instance in each box, or the box itself if no instance fits."""
        exemplars = self._model.exemplars([one.box for one in shown], self._size)[:, None]
        phrases = [VISUAL if one.phrase is None else one.phrase for one in shown]
        answer = self._model.ask(now.features, phrases, exemplars)
        sights = {}
        for row, one in enumerate(shown):
            masks, boxes, scores = self._model.instances(answer, row, LEAST_SCORE, self._size)
            shares = _box_iou(np.array(one.box, np.float32), boxes)
            left, top, right, bottom = one.box
            filled = np.zeros(self._size, bool)
            filled[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
            best = int(shares.argmax()) if shares.max(initial=0) >= SAME else None
            found = None if best is None else _sight(float(scores[best]), masks[best])
            sights[one.object_id] = found or _sight(1.0, filled)
        return sights

    def _discover(self, now: _Frame) -> None:
        """Detect new instances of the phrases. Each is matched to an object that is not visible, or is a new object."""
        due = [phrase for phrase, asked in self._phrases.items() if not asked or self._number % self.stride == 0]
        for phrase, sights in self._plain(now, due).items():
            self._phrases[phrase] = True
            for sight in (sight for sight in sights if sight.score >= self.threshold):
                own = [track for track in self._tracks.values() if track.asked == phrase]
                seen = (now.sights[t.object_id] for t in own if t.object_id in now.sights)
                if any(_overlap(sight, other) >= SAME for other in seen):
                    continue
                hidden = [track for track in own if track.object_id not in now.sights]
                if hidden:
                    now.sights[min(hidden, key=lambda track: _apart(track.last, sight)).object_id] = sight
                elif len(self._tracks) < MOST_OBJECTS:
                    self._begin(now, self._new_id(None), phrase, sight)
                else:
                    self.crowded = True


def list_frames(folder: Path) -> list[Path]:
    """Return the images of a folder in the natural order of their names (``2.jpg`` before ``10.jpg``)."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder of frames")
    found = [path for path in folder.iterdir() if path.suffix.lower() in _IMAGES and path.name[0] != "."]
    if not found:
        raise ModelError(f"{folder} holds no frame")
    return sorted(found, key=lambda p: [int(s) if n % 2 else s for n, s in enumerate(re.split(r"(\d+)", p.stem))])


# ----------------------------------------------------------------------------------------------- command

COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (255, 225, 25),
)  # fmt: skip


def draw(image: Array, masks: Mapping[int, Array], labels: Sequence[str]) -> Image.Image:
    """Return an image with masks as tints, and a label at each mask. The key of a mask selects its colour."""
    drawn = image.astype(np.float32) * 0.85
    for number, mask in sorted(masks.items(), key=lambda item: -int(item[1].sum())):
        drawn[mask] = 0.45 * drawn[mask] + 0.55 * np.array(COLOURS[number % len(COLOURS)], np.float32)
    found = Image.fromarray(drawn.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(found)
    for mask, label in zip(masks.values(), labels, strict=True):
        left, top, _, _ = tight_box(mask)
        pen.text((left, max(0, top - 11)), label, fill="white", stroke_width=1, stroke_fill="black")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a fault of the input, which is printed in one line."""
    parser = argparse.ArgumentParser(description="Run an exported model on an image or on the frames of a video.")
    for names, settings in _OPTIONS:
        parser.add_argument(*names.split(), **settings)
    given = parser.parse_args(arguments)
    try:
        if (given.image is None) == (given.frames is None):
            raise ModelError("give an image, or --frames with a folder")
        if given.frames is not None and given.point:
            raise ModelError("--point: objects of a video are given by --text or --box")
        model = Model(given.model, given.precision, threads=given.threads)
        (_image if given.frames is None else _frames)(
            model, given, [_numbers("--box", one, 4, 4) for one in given.box],
            [_numbers("--point", one, 2, 3) for one in given.point],
        )  # fmt: skip
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("image", {"nargs": "?", "help": "an image file"}),
    ("--frames", {"metavar": "DIR", "help": "a folder of video frames, instead of an image"}),
    ("--text", {"metavar": "PHRASE", "help": "a noun phrase, for a detector"}),
    ("--box", {"action": "append", "default": [], "metavar": "X0,Y0,X1,Y1", "help": "a box in pixels"}),
    ("--point", {"action": "append", "default": [], "metavar": "X,Y[,LABEL]",
                 "help": "a point in pixels, label 0 if it is outside the object"}),
    ("--threshold", {"type": float, "default": 0.5, "metavar": "P", "help": "minimum score (default: 0.5)"}),
    ("--out", {"metavar": "PNG", "help": "draw the masks; with --frames, a folder"}),
    ("--json", {"action": "store_true", "help": "print JSON, with the masks run-length encoded"}),
    ("--model", {"default": str(Path(__file__).parent), "metavar": "DIR",
                 "help": "the exported folder (default: the one of this file)"}),
    ("--precision", {"choices": PRECISIONS, "help": "which files (default: the best)"}),
    ("--threads", {"type": int, "default": 0, "metavar": "N"}),
)  # fmt: skip


def _numbers(option: str, text: str, least: int, most: int) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if not least <= len(found) <= most:
        raise ModelError(f"{option}: {text!r} is not {least} numbers with commas between them")
    return found


def _image(model: Model, given: argparse.Namespace, boxes: Sequence[Box], points: Sequence[Box]) -> None:
    found = model(given.image, given.text, points=points, boxes=boxes, threshold=given.threshold)
    rows = list(zip(found.scores.tolist(), found.boxes.tolist(), found.masks, strict=True))
    if given.json:
        instances = [{"score": score, "box": box, "mask": runs(mask)} for score, box, mask in rows]
        print(json.dumps({"presence": found.presence, "instances": instances}))
    else:
        for score, box, _ in rows:
            print(f"score {score:.3f}  box {', '.join(f'{value:.1f}' for value in box)}")
        print(f"{len(rows)} instances")
    if given.out:
        _save(found.draw(), Path(given.out))


def _frames(model: Model, given: argparse.Namespace, boxes: Sequence[Box], points: Sequence[Box]) -> None:
    paths = list_frames(Path(given.frames))
    followed = model.track(paths, given.text, boxes=boxes, threshold=given.threshold)
    for path, objects in zip(paths, followed, strict=True):
        shown = {n: one for n, one in enumerate(objects) if one.visible}
        if given.json:
            rows = [{"id": o.object_id, "score": o.score, "box": o.box, "mask": runs(o.mask)} for o in shown.values()]
            print(json.dumps({"frame": path.name, "objects": rows}))
        else:
            print(f"{path.name}  {', '.join(f'{o.object_id}: {o.score:.2f}' for o in shown.values()) or '-'}")
        if given.out:
            masks, labels = {n: o.mask for n, o in shown.items()}, [str(o.object_id) for o in shown.values()]
            _save(draw(open_image(path), masks, labels), Path(given.out) / f"{path.stem}.png")


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be written: {_line(error)}") from None


def runs(mask: Array) -> dict[str, list[int]]:
    """Return a mask in COCO's uncompressed run-length encoding: lengths of runs in column order, background first."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: len(counts) - (counts[-1] == 0)].tolist()}


if __name__ == "__main__":
    sys.exit(main())
