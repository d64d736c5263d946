"""``samdistill prepare sa1b``: convert downloaded SA-1B shards or extracted folders to a tree with splits."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from ..io import as_path, disk_errors, make_folder, sweep, write_bytes, write_json, write_text
from ..locks import locked
from ..reading import Table, parse_json, read_json
from ..types import UserError
from .division import split_keys
from .images import DECODE_ERRORS, IMAGE_SUFFIXES, unread
from .members import ARCHIVES, COMPRESSED, scan
from .sa1b import JPEG_SUFFIXES
from .skipped import BadInput
from .sources import key_problem

AGAIN = "run it again when that is mended: it goes on where it stopped"
SPLITS = ("train", "val")
_SETTINGS, _SKIPPED = "prepare.json", "skipped.txt"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


class _Claim(TypedDict):
    """Settings with which a tree was prepared."""

    kind: Literal["sa1b"]
    val_fraction: float


class _Found(NamedTuple):
    """A file, or a byte range of a tar shard. Plain files sort first, because they can be hard-linked."""

    in_tar: bool
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class PrepareReport:
    """Counts and problems of ``prepare_sa1b``.

    Attributes:
        train: Images in the training split, including those of earlier runs.
        val: Images in the validation split, including those of earlier runs.
        linked: Files that were hard-linked.
        copied: Files that were copied.
        present: Files that were already in place.
        ignored: Files that are not images, JSON or archives.
        problems: Inputs that were skipped.
    """

    train: int = 0
    val: int = 0
    linked: int = 0
    copied: int = 0
    present: int = 0
    ignored: int = 0
    problems: list[BadInput] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.train} images in train, {self.val} in val ({self.linked} files linked, {self.copied} copied, "
                 f"{self.present} already there; {self.ignored} other files ignored)"]  # fmt: skip
        if self.problems:
            lines.append(f"{len(self.problems)} inputs skipped:")
            lines += [f"  {key}: {reason}" for key, reason in self.problems[:20]]
            if len(self.problems) > 20:
                lines.append(f"  ... and {len(self.problems) - 20} more, all in {_SKIPPED}")
        return "\n".join(lines)


class _Index:
    """Images and annotations below a source by key. Plain files are listed before shards, each sorted by path."""

    def __init__(self, src: Path, dst: Path, report: PrepareReport) -> None:
        self.images: dict[str, _Found] = {}
        self.annotations: dict[str, _Found] = {}
        self.report = report
        for path, size in sorted(_files(src, dst)):
            name = os.path.basename(path)
            if name.endswith(".tar"):
                continue
            if name.endswith(ARCHIVES):
                report.problems.append(BadInput(path, COMPRESSED))
            else:
                self._add(name, _Found(False, path, 0, size))
        for path, size in sorted(_files(src, dst)):
            if path.endswith(".tar"):
                self._add_shard(path, size)

    def _add(self, name: str, found: _Found) -> None:
        key, suffix = os.path.splitext(name)
        if suffix.lower() not in (*JPEG_SUFFIXES, ".json"):
            if suffix.lower() in IMAGE_SUFFIXES or unread(name):
                self.report.problems.append(BadInput(name, "not a JPEG, as the images of SA-1B are"))
            else:
                self.report.ignored += 1
            return
        index = self.annotations if suffix == ".json" else self.images
        if reason := key_problem(key):
            self.report.problems.append(BadInput(repr(key), reason))
        elif key in index:
            where = f"{found.path} repeats {index[key].path}"
            self.report.problems.append(BadInput(name, f"duplicate: {where}"))
        else:
            index[key] = found

    def _add_shard(self, path: str, size: int) -> None:
        try:
            for entry in scan(path, size, self.report.problems):
                self._add(entry.name, _Found(True, path, entry.offset, entry.size))
        except OSError as error:
            self.report.problems.append(BadInput(path, f"cannot be read: {error.strerror or error}"))


def _files(src: Path, dst: Path) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file that is not hidden and not inside ``dst``."""
    if src.is_file():
        yield str(src), src.stat().st_size
        return
    out = os.path.realpath(dst)
    for folder, below, names in os.walk(src):
        below[:] = [b for b in below if b[0] != "." and os.path.realpath(os.path.join(folder, b)) != out]
        for name in names:
            path = os.path.join(folder, name)
            if name[0] != "." and os.path.isfile(path):
                yield path, os.path.getsize(path)


def _check(image: _Found, annotation: _Found) -> str | None:
    """Return why an image and its annotation cannot be used, or None.

    Only the header of the image is read; pixels are decoded when the image is used.
    """
    try:
        record = parse_json(annotation.read(), Table)
        if not {"image", "annotations"} <= record.keys():
            return "its JSON has no 'image' and 'annotations'"
    except (OSError, ValueError) as error:
        return f"its JSON is not readable: {error}"
    try:
        with Image.open(io.BytesIO(image.read()) if image.in_tar else image.path) as opened:
            return None if opened.format in ("JPEG", "MPO") else f"its image is {opened.format}, not JPEG"
    except DECODE_ERRORS as error:
        return f"its image is not readable: {' '.join(str(error).split())}"


def _place(found: _Found, target: Path) -> Literal["linked", "copied"]:
    """Create ``target`` atomically, as a hard link or as a copy."""
    if not found.in_tar:
        try:
            os.link(os.path.realpath(found.path), target)
            return "linked"
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    write_bytes(target, found.read(), hint=AGAIN)
    return "copied"


def _claim(dst: Path, val_fraction: float) -> None:
    """Create the folders, or check that an earlier run had the same settings and remove its incomplete files."""
    settings = _Claim(kind="sa1b", val_fraction=float(val_fraction))
    for split in SPLITS:
        make_folder(dst / "images" / split)
        make_folder(dst / "annotations" / split)
    path = dst / _SETTINGS
    if path.is_file():
        earlier = read_json(
            path, _Claim, "not the settings of a prepared tree; give another folder, or delete this one"
        )
        if earlier != settings:
            raise UserError(f"{dst}: was prepared with val_fraction={earlier['val_fraction']:g}, not {val_fraction:g}; "
                            "give the same or another folder")  # fmt: skip
    else:
        write_json(path, settings)
    for folder in dst.glob("*/*/"):
        sweep(folder)


def prepare_sa1b(
    src: str | Path, dst: str | Path, val_fraction: float = 0.01, progress: Callable[[int, int], None] | None = None
) -> PrepareReport:
    """Build ``dst/{images,annotations}/{train,val}`` from SA-1B shards and files.

    Plain files are hard-linked if the file system allows it, and copied otherwise. Members of shards are copied. A file
    appears under its name only when it is complete, so a run that was killed is resumed by running it again. The split
    depends on a hash of the key. An image that an earlier run placed keeps its split. Skipped inputs are listed in the
    report and in ``dst/skipped.txt``.

    Args:
        src: A tar shard, or a folder with tar shards and extracted files at any depth.
        dst: Folder of the tree.
        val_fraction: Fraction of images in the validation split, 0 to below 1.
        progress: Called with (done, total) after each image.

    Returns:
        Counts and problems.

    Raises:
        UserError: There is nothing to prepare, ``dst`` was prepared with other settings, or the disk is full.

    Example:
        >>> report = samdistill.prepare_sa1b("downloads", "data/sa1b", val_fraction=0.5)
        >>> report.train, report.val
        (1, 1)
    """
    src, dst = as_path(src), as_path(dst)
    if not src.exists() or src.resolve() == dst.resolve():
        raise UserError(f"{src}: {'is also the destination' if src.exists() else 'does not exist'}")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: give a share from 0 to below 1")
    report = PrepareReport()
    index = _Index(src, dst, report)
    pairs = sorted(index.images.keys() & index.annotations.keys(), key=lambda key: (index.images[key], key))
    for key in sorted(index.images.keys() ^ index.annotations.keys()):
        why = "image without its JSON" if key in index.images else "JSON without its image"
        report.problems.append(BadInput(key, why))
    if not pairs:
        left_out = "".join(f"; {key}: {reason}" for key, reason in report.problems[:3])
        raise UserError(f"{src}: no pair of sa_*.jpg and sa_*.json in it{left_out}")
    with locked(dst, "prepare"), disk_errors(dst, AGAIN):
        _claim(dst, val_fraction)
        _build(dst, index, pairs, val_fraction, report, progress)
    return report


def _build(
    dst: Path, index: _Index, pairs: list[str], val_fraction: float, report: PrepareReport,
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    held_out = set(split_keys(pairs, val_fraction)[1])
    there = {s: {kind: set(os.listdir(dst / kind / s)) for kind in ("images", "annotations")} for s in SPLITS}
    for done, key in enumerate(pairs, 1):
        names = {"annotations": f"{key}.json", "images": f"{key}.jpg"}
        split = "val" if key in held_out else "train"
        for other in SPLITS:  # an image stays in its split when shards are added
            if any(names[kind] in there[other][kind] for kind in names):
                split = other
        missing = [kind for kind in names if names[kind] not in there[split][kind]]
        report.present += len(names) - len(missing)
        problem = _check(index.images[key], index.annotations[key]) if missing else None
        if problem is None:
            for kind in missing:
                found = index.images[key] if kind == "images" else index.annotations[key]
                how = _place(found, dst / kind / split / names[kind])
                setattr(report, how, getattr(report, how) + 1)
            setattr(report, split, getattr(report, split) + 1)
        else:
            report.problems.append(BadInput(key, problem))
        if progress is not None:
            progress(done, len(pairs))
    lines = "".join(f"{key}: {reason}\n" for key, reason in report.problems)
    write_text(dst / _SKIPPED, lines)
