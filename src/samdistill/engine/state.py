"""State of a run for exact resume: checkpoints and the weight average."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ..checkpoints.files import STUDENT_FOLDER, check_archive
from ..io import remove, sweep, writing
from ..reading import fits
from ..types import UserError
from .rng import Streams

T = TypeVar("T")
INTERRUPT = "ckpt_interrupt.pt"
_EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pt")
_MOST_CHANGES = 8

HARMLESS = (
    "output", "cache", "evaluate", "data.root", "data.ids", "data.shards", "data.index", "data.phrases",
    "data.exclude", "data.workers", "distillation.precomputed_root", "questions.file", "train.keep", "train.log_every",
)  # fmt: skip
"""Config keys (with all keys below them) that may change on resume, because they do not affect the weights.

``cache`` and ``distillation.precomputed_root``, the cache of the prompt job, are in the list because a store is
verified by its fingerprints. Paths of data are in the list because a checkpoint has a digest of the keys, in their
order, and of the phrases (``data_digest``). ``train.epochs`` is not: the cosine spans the whole run, so the rate would
jump.
"""
HARMFUL = ("cache.mode",)
"""Keys below ``HARMLESS`` keys that may not change, because a running teacher sees other views than a cache has.
Earlier versions did not write this key; it is compared only if the old config has it.
"""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run. It can be loaded with ``weights_only=True``.

    Attributes:
        step: Completed optimiser steps.
        epoch: Completed epochs.
        model: State dict of the student.
        ema: State dict of the weight average, or None.
        optimizer: State dict of the optimiser.
        scaler: State dict of the fp16 gradient scaler, or None.
        rng: States of the random number generators, one per rank.
        config: Resolved YAML of the run.
        items: Length of the data set.
        terms: Last values of the loss terms.
        seconds: Training time.
        data: Digest of the data set's keys (``data_digest``), or empty.
        teacher: Fingerprint of the teacher, ``Task.taught_by``.
        ranges: Ranges of the inputs of quantised layers (``train.qat``), or None.
        task: ``Task.state`` of each rank. Empty in checkpoints of earlier versions.
        frozen: Digest of the parameters that ``model`` leaves out (``Constants``). Empty if it is complete.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    rng: Annotated[list[Streams], Field(min_length=1)]
    config: str
    items: Annotated[int, Field(ge=0)]
    terms: dict[str, float]
    seconds: float
    data: str = ""
    teacher: str = ""
    ranges: Tensor | None = None
    task: list[dict[str, Tensor]] = field(default_factory=list)
    frozen: str = ""

    def save(self, path: Path) -> None:
        """Write the file atomically: to a temporary name, flushed to disk, then renamed.

        The archive has a CRC-32 of each tensor, which ``load`` compares. After an error nothing is left behind.

        Raises:
            UserError: The disk is full, or the file cannot be written.
        """
        with writing(path, sync=True, hint=kept(path.parent)) as file:
            torch.save({f.name: getattr(self, f.name) for f in fields(self)}, file)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint to the CPU.

        Raises:
            UserError: The file is missing, damaged or not a checkpoint.
        """
        check_archive(path)
        return cls._read(path, mmap=False)

    @classmethod
    def peek(cls, path: Path) -> Checkpoint:
        """Read a checkpoint without comparing checksums. Tensors are memory-mapped. Use it for the small fields."""
        return cls._read(path, mmap=True)

    @classmethod
    def _read(cls, path: Path, mmap: bool) -> Checkpoint:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except Exception as error:  # torch raises five types of errors for a bad file
            raise UserError(f"{path}: damaged, or no checkpoint ({str(error).splitlines()[0]})") from error
        try:
            fits(content, cls)
        except ValueError as error:
            raise UserError(f"{path}: not a checkpoint of this program: {error}") from None
        return cls(**content)

    def require_data(self, source: Path, items: int, digest: str) -> None:
        """Raise ``UserError`` if the data set is not the one that was trained on, wherever it is stored."""
        where = "restore the data or start again with another output"
        if self.items != items:
            raise UserError(f"{source}: trained on a data set of {self.items} image(s), it now has {items}; {where}")
        if self.data and digest and self.data != digest:
            raise UserError(f"{source}: trained on other images (or phrases) of the same number; {where}")

    def require_teacher(self, source: Path, teacher: str) -> None:
        """Raise ``UserError`` unless the teacher is the one that was trained with. Fingerprints are compared."""
        if self.teacher and teacher and self.teacher != teacher:
            raise UserError(
                f"{source}: trained with the teacher {self.teacher[:12]}, but this is {teacher[:12]} (other weights, "
                "image size or precision); restore the teacher or start again with another output"
            )


def kept(run_dir: Path) -> str:
    """Return the end of an error message: which checkpoint is kept, and what to do."""
    good = newest(run_dir)
    there = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return f"{there}; make room and run the same command again"


def epoch_checkpoints(run_dir: Path) -> list[Path]:
    """Return the ``ckpt_epoch_{n}.pt`` files, oldest first. n is the number of completed epochs."""
    found = [(int(m[1]), p) for p in run_dir.glob("ckpt_epoch_*.pt") if (m := _EPOCH.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest(run_dir: Path) -> Path | None:
    """Return the checkpoint with the most steps, or None."""
    epochs, interrupt = epoch_checkpoints(run_dir)[-1:], run_dir / INTERRUPT
    if not interrupt.exists():
        return epochs[0] if epochs else None
    try:
        return max([*epochs, interrupt], key=lambda path: Checkpoint.peek(path).step)
    except UserError:  # damaged; ``require_whole`` reports it
        return interrupt


def require_whole(path: Path) -> None:
    """Check that a checkpoint is not damaged.

    The message suggests to remove checkpoints only. The folder may also contain a cache, and a file of another name may
    be a model.

    Raises:
        UserError: It is damaged. The message names the newest earlier checkpoint that is not.
    """
    if (problem := _damage(path)) is None:
        return
    number, useless = _EPOCH.fullmatch(path.name), [path]
    if number is None and path.name != INTERRUPT:
        raise UserError(f"{problem}; give a run folder or one of its checkpoints")
    for earlier in reversed(epoch_checkpoints(path.parent)):
        if number is not None and int(_EPOCH.fullmatch(earlier.name)[1]) >= int(number[1]):  # type: ignore[index]
            continue
        if _damage(earlier) is None:
            remove_these = " and ".join(map(str, useless))
            raise UserError(
                f"{problem}; {earlier.name} before it is whole: to go on from there, remove {remove_these} and run the "
                "same command again"
            )
        useless.append(earlier)
    raise UserError(f"{problem}; no checkpoint before it is whole: start again with another output")


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        check_archive(path)
        Checkpoint.peek(path)
    except UserError as error:
        return str(error)
    return None


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the last ``keep`` epoch checkpoints, and the interrupt checkpoint, once an epoch is saved."""
    for path in [*epoch_checkpoints(run_dir)[:-keep], run_dir / INTERRUPT]:
        remove(path)


def changed_keys(before: str, after: str) -> list[str]:
    """Return the differences between two resolved configs, as ``key (was 1, now 2)``, without keys that may change."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    keys = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    harmful = [k for k in HARMFUL if k in old]
    keys = [k for k in keys if k in harmful or not any(k == free or k.startswith(f"{free}.") for free in HARMLESS)]
    return [f"{k} (was {old.get(k, 'absent')}, now {new.get(k, 'absent')})" for k in keys]


def open_run(run_dir: Path, resume: Path | None, resolved: str) -> Path | None:
    """Return the checkpoint to start from, or None. Rank 0 calls it with the folder locked.

    Args:
        run_dir: Run folder.
        resume: Run folder or checkpoint to start from; None for ``run_dir``.
        resolved: YAML of the run.

    Raises:
        UserError: ``run_dir`` contains another run, the checkpoint is damaged, or settings have changed.
    """
    sweep(run_dir)
    here = newest(run_dir)
    source = here if resume is None else _named(resume)
    if resume is not None and here is not None and (source is None or source.resolve() != here.resolve()):
        raise UserError(
            f"{run_dir}: contains another run ({here.name}); resume that one without --resume, or use another output"
        )
    if source is None and (run_dir / STUDENT_FOLDER).exists():
        raise UserError(f"{run_dir}: holds a student but no checkpoint; move it away or use another output")
    if source is not None:
        require_whole(source)
        if changed := changed_keys(Checkpoint.peek(source).config, resolved):
            other_job = [change for change in changed if change.startswith("job (")]  # then almost all keys differ
            some = other_job or changed[:_MOST_CHANGES]
            more = f" and {len(changed) - len(some)} more" if len(changed) > len(some) else ""
            raise UserError(
                f"{source}: was trained with other settings: {', '.join(some)}{more}; "
                "restore them, or start again with another output"
            )
    return source


def _named(resume: Path) -> Path | None:
    """Return the checkpoint at a path to a run folder or file; None for a run without checkpoint."""
    if resume.is_dir():
        found = newest(resume)
        if found is None and not (resume / "config.yaml").exists():
            raise UserError(f"{resume}: holds no run to resume (no checkpoint, no config.yaml)")
        return found
    if not resume.is_file():
        raise UserError(f"{resume}: no such run folder or checkpoint to resume from")
    return resume


def data_digest(dataset: object) -> str:
    """Return a SHA-256 digest of ``dataset.identity``, the strings that distinguish the items; empty without it."""
    identity: Sequence[str] = getattr(dataset, "identity", ())
    digest = hashlib.sha256()
    for text in identity:
        raw = text.encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(raw) + raw)
    return digest.hexdigest() if identity else ""


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


class Ema:
    """Exponential moving average of trained weights and floating-point buffers. Other entries are copied.

    Weights are averaged if they require a gradient when this object is made. A weight that is frozen for some epochs is
    its own average in them.

    The decay at update t (from 0) is ``min(decay, (1 + t) / (10 + t))``, as in TensorFlow's ExponentialMovingAverage,
    so that the random initialisation does not dominate the average of a short run.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
        self.shadow = {name: value.detach().clone() for name, value in self._tracked(student)}

    def _tracked(self, student: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, value in student.state_dict().items():
            if name not in self.frozen and isinstance(value, Tensor):
                yield name, value

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Update the average with the weights after step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self._tracked(student):
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Copy saved averages."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])

    @contextmanager
    def applied(self, student: nn.Module) -> Iterator[None]:
        """Give the student the averaged weights inside the context."""
        raw = {name: value.detach().clone() for name, value in self._tracked(student)}
        self._copy(student, self.shadow)
        try:
            yield
        finally:
            self._copy(student, raw)

    @torch.no_grad()
    def _copy(self, student: nn.Module, source: Mapping[str, Tensor]) -> None:
        for name, value in self._tracked(student):
            value.copy_(source[name])


def gather(item: T) -> list[T]:
    """Return ``item`` of every rank, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, or raise its ``UserError``, on all ranks."""
    result: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result[0] = work()
        except UserError as error:
            result[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]
