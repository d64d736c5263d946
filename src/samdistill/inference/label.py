"""Labelling of images with a detector: COCO or YOLO annotations, and pictures with the masks drawn on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal, get_args

from ..data.folder import FolderSource
from ..data.skipped import BadInput, leave_out, reporting
from ..io import as_path, check_output, make_folder, write_json, write_text
from ..progress import Progress
from ..registry import did_you_mean
from ..types import UserError
from .concepts import ConceptModel
from .predict import BATCH, Asked, predict_images
from .result import Result

Format = Literal["coco", "yolo"]


@dataclass(frozen=True)
class Labelled:
    """Summary of a labelled data set.

    Attributes:
        out: The folder that was written.
        images: Number of labelled images.
        instances: Number of instances.
        skipped: Images that could not be read, with the reason.
    """

    out: Path
    images: int
    instances: int
    skipped: tuple[BadInput, ...] = field(default=())


def find_images(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """List image files, each once.

    Args:
        images: A file, a folder (including its sub-folders), a glob pattern, or a list of these.

    Raises:
        UserError: A path does not exist, or no images are found.
    """
    places = [images] if isinstance(images, str | Path) else list(images)
    found = list[Path]()
    for place in places:
        path = as_path(place)
        if path.is_dir():
            source = FolderSource(path, None)
            found += [source.path(key) for key in source.keys]
        elif has_magic(str(place)) and not path.exists():
            found += sorted(Path(name) for name in glob(str(path), recursive=True))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such image, folder or pattern")
    if not found:
        packed = any(place.is_dir() and any(place.glob("*.tar")) for place in map(as_path, places))
        extract = "; tar shards are not read here, extract them with: samdistill prepare sa1b" if packed else ""
        raise UserError(f"{', '.join(map(str, places))}: no images here{extract}")
    return list(dict.fromkeys(found))


@reporting("predict")
def label_images(
    images: str | Path | Sequence[str | Path], model: str | Path | ConceptModel, texts: str | Sequence[str],
    out: str | Path, *, format: Format = "coco", threshold: float | None = None, geometry: str | None = None,
    batch_size: int = BATCH, pictures: bool = True, progress: bool = True,
) -> Labelled:  # fmt: skip
    """Label images with a detector, and write the instances as a data set.

    Args:
        images: A folder (including its sub-folders), a glob pattern, a file, or a list of these.
        model: A detector: a model folder, a run folder, an original checkpoint file, a hub id or a sandbox name; or an
            opened detector.
        texts: One phrase or several different ones. Each is a category.
        out: Output folder. It gets ``annotations.json`` (COCO), or ``labels/`` and ``classes.txt`` (YOLO).
        format: ``coco`` or ``yolo``. YOLO has boxes only: class, centre, width and height as fractions of the image.
        threshold: Minimum score of an instance, in 0..1. None means 0.5.
        geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.
        batch_size: Images in one forward pass. The results do not depend on it.
        pictures: Write the images with the instances drawn on them to ``pictures/``.
        progress: Show a progress bar.

    Returns:
        The numbers of images and instances, and the images that could not be read. Those are left out.

    Raises:
        UserError: The phrases do not fit the model, the model or a path cannot be read, or ``out`` cannot be written.

    Example:
        >>> samdistill.label_images("photos", "sandbox-student", ["circle"], "labelled", progress=False).images
        2
    """
    phrases = [texts] if isinstance(texts, str) else list(texts)
    if format not in get_args(Format):
        raise UserError(f"--format: {format!r} is unknown{did_you_mean(format, list(get_args(Format)))}")
    if not phrases or len(set(phrases)) < len(phrases):
        raise UserError("--text: give at least one phrase, and no phrase twice")
    asked, files, target = Asked.of(phrases, threshold=threshold), find_images(images), as_path(out)
    detector = asked.open(model)
    make_folder(target)
    check_output(target / "annotations.json", *files)
    labels, skipped = _Labels(target, phrases, format, pictures), list[BadInput]()
    with Progress("predicting", len(files), "images", progress) as bar:
        for found, unreadable in predict_images(
            files, detector, asked, geometry=geometry, batch_size=batch_size, bar=bar
        ):
            for own in found:
                labels.add(own)
            skipped += unreadable
    leave_out(skipped)
    labels.finish()
    return Labelled(target, len(labels.images), len(labels.annotations), tuple(skipped))


class _Labels:
    """Collects the annotations of a data set and writes its files."""

    def __init__(self, out: Path, phrases: Sequence[str], format: Format, pictures: bool) -> None:
        self.out, self.phrases, self.format, self.pictures = out, phrases, format, pictures
        self.images, self.annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        self._stems = set[str]()
        if pictures:
            make_folder(out / "pictures")

    def add(self, results: Sequence[Result]) -> None:
        """Add one image with one result per phrase."""
        (width, height), file = results[0].image.size, Path(results[0].name)
        number, stem = len(self.images) + 1, self._stem(file)
        self.images.append({"id": number, "file_name": str(file), "width": width, "height": height})
        lines = list[str]()
        for category, result in enumerate(results):
            own = result.to_coco(number, category + 1, len(self.annotations) + 1)
            self.annotations += own
            lines += [_yolo(category, one["bbox"], width, height) for one in own]
            if self.pictures and (len(result) or category == 0):
                end = "" if len(results) == 1 else f"-{category}"
                result.save(self.out / "pictures" / f"{stem}{end}.png")
        if self.format == "yolo":
            make_folder(self.out / "labels")
            write_text(self.out / "labels" / f"{stem}.txt", "".join(lines))

    def _stem(self, file: Path) -> str:
        """Return an unused file name stem. Further images of the same name get a number."""
        found = next(name for name in _numbered(file.stem) if name not in self._stems)
        self._stems.add(found)
        return found

    def finish(self) -> None:
        if self.format == "yolo":
            write_text(self.out / "classes.txt", "".join(f"{phrase}\n" for phrase in self.phrases))
            return
        categories = [{"id": n, "name": phrase} for n, phrase in enumerate(self.phrases, 1)]
        content = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_json(self.out / "annotations.json", content)


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _yolo(category: int, box: Sequence[float], width: int, height: int) -> str:
    left, top, wide, high = box
    return (
        f"{category} {(left + wide / 2) / width:.6f} {(top + high / 2) / height:.6f} {wide / width:.6f} "
        f"{high / height:.6f}\n"
    )
