"""The parity gate: a file is compared with the eager model before it gets its name."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reading import foreign
from ..types import UserError
from .parts import Part, Sizes
from .targets import Contents, Session, Target

SEEDS = (1, 2)
_SMALL = 500
"""Masks of fewer pixels are compared together: in one of 50 pixels, a single pixel is all that fp16 may lose."""
_ROUNDS, _SECONDS = 7, 10.0  # of the latency: most rounds, and the time after which no further one starts

Overlap = tuple[int, int]  # pixels of both masks, and of one or both


@dataclass(frozen=True)
class Limits:
    """What a file has to reach.

    Attributes:
        difference: Largest difference of an output, relative to its largest value. None for reduced precision.
        agreement: Smallest agreement with eager: IoU of the masks, or cosine of outputs that are no masks. None for
            files that are judged by size and by the quality on held-out data alone.
        size: Largest size relative to the fp32 file.
    """

    difference: float | None
    agreement: float | None
    size: float | None = None


LIMITS = {
    "fp32": Limits(1e-4, 0.999),
    "fp16": Limits(None, 0.98, 0.6),
    "int8": Limits(None, 0.93, 0.3),
}
"""Limits of each precision."""
_INT8_HEADS = Limits(None, None, 0.3)  # files that are no image encoders


def limits_of(part: Part, precision: str) -> Limits:
    """Return what a file of ``part`` has to reach in a precision."""
    return _INT8_HEADS if precision == "int8" and part.probe is None else LIMITS[precision]


@dataclass
class Verdict:
    """What the gate found about one file.

    Attributes:
        difference: Largest difference of any output in any comparison, relative to the output's largest value.
        agreement: Smallest agreement of any output in any comparison. Of each output, the comparisons whose masks have
            fewer than 500 pixels are taken together.
        comparisons: Number of comparisons.
        problems: Why the file is refused. Empty if it passed.
        milliseconds: Median time of the file and of the eager module on the smallest case, with the same threads, and
            their ratio: the median over the rounds (``ratio``), the least and the greatest.
        ran: Whether the file ran in every comparison. Formats that cannot run here have their structure checked alone.
    """

    difference: float = 0.0
    agreement: float = 1.0
    comparisons: int = 0
    problems: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    ran: bool = True

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(part: Part, path: Path, target: type[Target], static: bool, limits: Limits) -> tuple[Verdict, Contents]:
    """Compare a file with the eager model.

    The axes are read back from the file. Then every case of the part runs with several inputs, twice each, all on one
    session, because a runtime can be right in the first call alone.

    Args:
        part: What the file was made of.
        path: The file.
        target: Its format.
        static: Whether its axes are meant to be fixed.
        limits: What it has to reach.

    Returns:
        The verdict, and what the file says about itself.
    """
    found, contents = Verdict(), target.read(path)
    found.problems += wrong_axes(part, contents, static)
    if not target.ran_here:
        found.ran = False
        return found, contents
    if found.passed:  # a fixed axis would make every other size fail with a message that says less
        try:
            session = target.open(path)
            _compare_all(part, session, found)
            if found.passed:
                found.milliseconds = latency(part, session)
        except Exception as error:  # of any runtime
            found.ran = False
            found.problems.append(f"it does not run: {str(error).strip().splitlines()[-1][:300]}")
    if limits.difference is not None and not found.difference <= limits.difference:
        apart = f"outputs differ by {found.difference:.2g} of the largest value"
        found.problems.append(f"{apart}, over {limits.difference:g}")
    if limits.agreement is not None and not found.agreement >= limits.agreement:
        found.problems.append(f"agreement with eager is {found.agreement:.4f}, under {limits.agreement:g}")
    return found, contents


def wrong_axes(part: Part, contents: Contents, static: bool) -> list[str]:
    """Compare the axes that a file has with those that the part declares."""
    if list(contents.inputs) != [port.name for port in part.inputs]:
        return [f"its inputs are {', '.join(contents.inputs)}, not {', '.join(port.name for port in part.inputs)}"]
    problems = []
    for port in part.inputs:
        axes = contents.inputs[port.name]
        if len(axes) != len(port.shape):
            problems.append(f"{port.name} has {len(axes)} axes, not {len(port.shape)}")
            continue
        for wanted, there in zip(port.shape, axes, strict=True):
            if isinstance(wanted, str) and isinstance(there, int) and not static:
                problems.append(f"the axis {wanted!r} of {port.name} is fixed at {there}")
            elif isinstance(there, str) and (static or isinstance(wanted, int)):
                problems.append(f"an axis of {port.name} is dynamic ({there}), not {wanted}")
            elif isinstance(there, int) and isinstance(wanted, int) and there != wanted:
                problems.append(f"an axis of {port.name} has {there} elements, not {wanted}")
    return problems


def _compare_all(part: Part, session: Session, found: Verdict) -> None:
    """Run all cases, then all again, and compare each run with the eager result."""
    asked = [(sizes, part.example(sizes, seed)) for sizes in part.cases for seed in SEEDS]
    small: dict[str, list[Overlap]] = {name: [] for name in part.masks}
    with torch.no_grad():
        expected = [part.reference(*given) for _, given in asked]
    for _ in range(2):
        for (sizes, given), wanted in zip(asked, expected, strict=True):
            _compare(part, sizes, session(*(one.numpy() for one in given)), wanted, found, small)
    for overlaps in filter(None, small.values()):
        both, either = (sum(counts) for counts in zip(*overlaps, strict=True))
        found.agreement = min(found.agreement, both / either if either else 1.0)


def _compare(
    part: Part, sizes: Sizes, outputs: Sequence[np.ndarray], wanted: Sequence[Tensor], found: Verdict,
    small: dict[str, list[Overlap]],
) -> None:  # fmt: skip
    found.comparisons += 1
    for port, one, tensor in zip(part.outputs, outputs, wanted, strict=True):
        true = tensor.numpy()
        if one.shape != true.shape:
            found.problems.append(f"{port.name} is {one.shape}, not {true.shape}, at {dict(sizes)}")
            return
        one = one.astype(np.float32)
        found.difference = max(found.difference, difference(one, true))
        if port.name not in part.masks:
            found.agreement = min(found.agreement, cosine(one, true))
        elif (overlap := _overlap(one, true))[1] < _SMALL:
            small[port.name].append(overlap)
        else:
            found.agreement = min(found.agreement, overlap[0] / overlap[1])
    if part.probe is not None:  # masks that the model makes of these features
        with torch.no_grad():
            masks = part.probe(*(torch.from_numpy(one.astype(np.float32)) for one in outputs))
            found.agreement = min(found.agreement, mask_iou(masks.numpy(), part.probe(*wanted).numpy()))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference relative to the largest value. Infinite for values that are not finite."""
    if not np.isfinite(found).all():
        return math.inf
    largest = float(np.abs(wanted).max(initial=0.0))
    apart = float(np.abs(found - wanted).max(initial=0.0))
    return apart / largest if largest else apart


def _overlap(found: np.ndarray, wanted: np.ndarray) -> Overlap:
    """Return the number of pixels where both mask logits are above 0, and where one is."""
    ours, theirs = found > 0, wanted > 0
    return int((ours & theirs).sum()), int((ours | theirs).sum())


def mask_iou(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the IoU of all pixels of mask logits above 0. 1 if both have none."""
    both, either = _overlap(found, wanted)
    return both / either if either else 1.0


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the cosine of two tensors. 1 if both are 0."""
    ours, theirs = (one.astype(np.float64).ravel() for one in (found, wanted))
    lengths = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(ours @ theirs) / lengths if lengths else float(not ours.any() and not theirs.any())


def latency(part: Part, session: Session) -> dict[str, float]:
    """Time the file and the eager module on the smallest case, alternating. Returns ``Verdict.milliseconds``."""
    case = min(part.cases, key=lambda sizes: math.prod(max(1, size) for size in sizes.values()))
    given = part.example(case, 0)
    arrays = [one.numpy() for one in given]
    with torch.no_grad():
        runs: dict[str, Callable[[], Any]] = {"file": lambda: session(*arrays), "eager": lambda: part.module(*given)}
        for run in runs.values():
            run()
        spent: dict[str, list[float]] = {name: [] for name in runs}
        until = time.perf_counter() + _SECONDS
        while len(spent["file"]) < _ROUNDS and (time.perf_counter() < until or not spent["file"]):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                spent[name].append(1000 * (time.perf_counter() - start))
    each = [ours / theirs for ours, theirs in zip(spent["file"], spent["eager"], strict=True)]
    ratios = {"ratio": statistics.median(each), "least": min(each), "greatest": max(each)}
    return {name: statistics.median(times) for name, times in spent.items()} | ratios


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with foreign(path, "cannot be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refusal(name: str, verdict: Verdict) -> UserError:
    """Return the error for a file that did not pass."""
    return UserError(
        f"{name} did not pass the parity gate and was not delivered: {'; '.join(verdict.problems)}; --keep-failed "
        "delivers it under a name that says so"
    )
