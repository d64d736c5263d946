"""Everything a run needs to go on as if it had never stopped: checkpoints, random streams, the weight average."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from ..types import UserError

T = TypeVar("T")
INTERRUPT = "ckpt_interrupt.pt"
_EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pt")

HARMLESS = ("output", "cache", "evaluate", "data.workers", "train.keep", "train.log_every")
"""Config keys (with all below them) that may change between a run and its resume: they do not change a weight.

``cache`` is in the list because a store proves itself by its own fingerprints. ``train.epochs`` is not: the cosine
spans the whole run, so other epochs are another schedule, and the rate would jump.
"""


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` optimiser steps, ``epoch`` of its epochs complete. Loads with ``weights_only=True``.

    model: state dict of the raw student; ema: of its average, or None. rng: one entry per rank. config: the resolved
    YAML. items: length of the data set. terms: their last values. seconds: spent training so far.
    """

    step: int
    epoch: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    rng: list[dict[str, Any]]
    config: str
    items: int
    terms: dict[str, float]
    seconds: float

    def save(self, path: Path) -> None:
        """Write aside, flush to the disk, rename: ``path`` is the old file or the whole new one, never a part.

        Raises ``UserError`` when it cannot be written (disk full, no permission); nothing is left behind then.
        """
        with written(path) as aside, open(aside, "wb") as file:
            torch.save({f.name: getattr(self, f.name) for f in fields(self)}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path, mmap: bool = False) -> Checkpoint:
        """Read to the CPU; with ``mmap`` tensors stay in the file. ``UserError`` for what is not a checkpoint."""
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except Exception as error:  # torch raises five kinds for a bad file
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: not a readable checkpoint ({reason}); move it away to fall back") from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; renamed to ``path`` at the end, removed on any failure.

    A failure of the disk becomes a ``UserError`` that names ``path`` and the newest checkpoint that stays.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        remove(aside)
        reason = _disk_reason(error)
        if reason is None:
            raise
        good = newest(path.parent)
        kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise UserError(f"{path}: could not be written ({reason}); {kept}; free some space and resume") from error


def _disk_reason(error: BaseException | None) -> str | None:
    """What the disk said. torch's archive writer and safetensors wrap it in errors of their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, SafetensorError) and "os error" in str(error):
            return str(error)
        error = error.__context__
    return None


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def epoch_checkpoints(run_dir: Path) -> list[Path]:
    """``ckpt_epoch_{n}.pt`` files, the oldest first; n counts completed epochs."""
    found = [(int(m[1]), p) for p in run_dir.glob("ckpt_epoch_*.pt") if (m := _EPOCH.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest(run_dir: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    epochs, interrupt = epoch_checkpoints(run_dir)[-1:], run_dir / INTERRUPT
    if not interrupt.exists():
        return epochs[0] if epochs else None
    return max([*epochs, interrupt], key=lambda path: Checkpoint.load(path, mmap=True).step)


def prune(run_dir: Path, keep: int) -> None:
    """After a new epoch checkpoint: drop all but the last ``keep``, and the interrupt one it supersedes."""
    for path in epoch_checkpoints(run_dir)[:-keep]:
        path.unlink()
    (run_dir / INTERRUPT).unlink(missing_ok=True)


def changed_keys(before: str, after: str) -> list[str]:
    """What differs between two resolved configs, as ``key (was 1, now 2)``, but for what is ``HARMLESS``."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    keys = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    keys = [k for k in keys if not any(k == free or k.startswith(f"{free}.") for free in HARMLESS)]
    return [f"{k} (was {old.get(k, 'absent')}, now {new.get(k, 'absent')})" for k in keys]


def open_run(run_dir: Path, resume: Path | bool, resolved: str) -> Path | None:
    """On rank 0: make the folder, decide which checkpoint to start from, refuse what would lose or mix runs."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for torn in list(run_dir.glob("*.tmp")):  # left by a kill in the middle of a write
        remove(torn)
    here = newest(run_dir)
    if resume is False:
        source = None
    elif resume is True or resume.is_dir():
        source = newest(run_dir if resume is True else resume)
        if source is None and resume is not True and not (resume / "config.yaml").exists():
            raise UserError(f"{resume}: holds no run to resume (no checkpoint, no config.yaml)")
    elif resume.is_file():
        source = resume
    else:
        raise UserError(f"{resume}: no such run folder or checkpoint to resume from")
    if here is not None and (source is None or source.resolve() != here.resolve()):
        raise UserError(f"{run_dir}: holds a run ({here.name}); resume that with --resume, or use another output")
    if here is None and (run_dir / "student").exists():
        raise UserError(f"{run_dir}: holds a student but no checkpoint; move it away or use another output")
    if source is not None:
        changed = changed_keys(Checkpoint.load(source, mmap=True).config, resolved)
        if changed:
            raise UserError(
                f"{source}: cannot resume with other settings: {', '.join(changed)}; "
                "restore them or start again with another output"
            )
    return source


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, in types that ``weights_only`` reads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "device": _device_rng(device).get_rng_state() if device.type != "cpu" else None,
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        _device_rng(device).set_rng_state(state["device"])


def _device_rng(device: torch.device) -> Any:
    return getattr(torch, device.type)


def seed_rng(seed: int) -> None:
    """Start all global generators of this process from one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Ema:
    """An exponential average of the trained weights and floating buffers; other entries follow the student.

    Trained is what requires a gradient when this is made; what is frozen later, for some epochs, averages to itself.

    The decay at update t (from 0) is ``min(decay, (1 + t) / (10 + t))``, so that a short run's average is not dominated
    by the random start (as in TensorFlow's ExponentialMovingAverage).
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
        """Take in the weights after step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self._tracked(student):
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        for name, value in self.shadow.items():
            value.copy_(shadow[name])

    @contextmanager
    def applied(self, student: nn.Module) -> Iterator[None]:
        """Inside, the student has the averaged weights."""
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
    """``item`` of every rank, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and give its result, or raise its ``UserError``, on all ranks."""
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
