"""Files of one part: converted, compared with the eager model, and only then given their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..io import copy_file, make_folder, remove
from .gate import LIMITS, check, limits_of, refusal, sha256
from .parts import Part, seeing
from .quality import Calibration
from .record import File
from .targets import Target

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
"""Endings of file names by precision, as transformers.js has them."""
OPENED = "onnx"
"""The target whose files ``load`` opens, and of which the quality on held-out data is measured."""


@dataclass(frozen=True)
class Order:
    """What is exported, and how.

    Attributes:
        targets: Export targets by name.
        precisions: Some of ``SUFFIXES``.
        static: Whether all axes are fixed.
        keep_failed: Whether files that fail the gate are delivered under a name that says so.
        calibration: Images for ``int8``.
    """

    targets: dict[str, type[Target]]
    precisions: tuple[str, ...]
    static: bool
    keep_failed: bool
    calibration: Calibration | None = None


def write_part(part: Part, name: str, order: Order, folder: Path) -> Iterator[File]:
    """Write the files of one part, one per precision, and rename those that passed.

    Args:
        part: The part.
        name: The target, one of ``order.targets``.
        order: What is exported.
        folder: The new folder. Files are written to ``folder / name``.

    Yields:
        Each file, once it has its name.

    Raises:
        UserError: The target cannot express the part, or a file fails the gate and ``order`` does not keep it.
    """
    kind, place = order.targets[name], folder / name
    make_folder(place)
    whole, reduced = (place / f".{part.name}{ending}{kind.extension}" for ending in ("", "_reduced"))
    kind.convert(part, whole, order.static)
    size, images = _bytes(whole), order.calibration
    for precision in order.precisions:
        made = whole if precision == "fp32" else reduced
        if made is reduced:
            kind.reduce(part, whole, made, precision, None if images is None else images.pixels)
        limits = LIMITS[precision]
        if name == OPENED:  # int8 is judged by its quality too
            limits = limits_of(part, precision)
            if precision == "int8" and images is not None and images.agrees:
                limits = replace(limits, agreement=None)  # measured on annotated objects, at the end
        with nullcontext() if images is None else seeing(images.held_out):
            verdict, contents = check(part, made, kind, order.static, limits)
        own = _bytes(made)
        if limits.size is not None and own > limits.size * size:
            verdict.problems.append(f"its size is {own / size:.3f} of fp32, over {limits.size:g}")
        stem = f"{part.name}{SUFFIXES[precision]}"
        if not verdict.passed and not order.keep_failed:
            raise refusal(f"{name}/{stem}{kind.extension}", verdict)
        path = place / f"{stem}{'' if verdict.passed else '.failed'}{kind.extension}"
        for one in _written(made):
            copy_file(one, path.with_suffix(one.suffix))
        yield File(f"{name}/{path.name}", part, name, precision, own, sha256(path), verdict, contents)
    for one in (*_written(whole), *_written(reduced)):
        remove(one)


def _written(path: Path) -> list[Path]:
    """Return a file and those beside it that belong to it: OpenVINO's weights are a second file."""
    return sorted(path.parent.glob(f"{path.stem}.*"))


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in _written(path))
