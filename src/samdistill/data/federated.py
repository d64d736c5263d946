"""Which phrases of a COCO or LVIS image are annotated completely, and the names of their categories as phrases."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

ABSENT, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"
"""Fields of LVIS's images: categories that are known to be absent, and categories of which not all are annotated."""
LVIS = "lvis_*.json"
"""Files of LVIS in ``annotations/``."""


def spoken(name: str) -> str:
    """Return the name of a category as a phrase. LVIS writes ``puffer_(fish)``.

    Example:
        >>> spoken("puffer_(fish)")
        'puffer fish'
    """
    return " ".join(re.sub(r"[_()]", " ", name).split())


def file_name(image: Mapping[str, Any]) -> Any:
    """Return the ``file_name`` of an image. LVIS has only ``coco_url``, which ends with folder and name."""
    if "file_name" in image or "coco_url" not in image:
        return image["file_name"]
    return "/".join(PurePosixPath(urlsplit(str(image["coco_url"])).path).parts[-2:])


def lvis_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Find the annotation files of LVIS, by their names without suffix, with the folder of the images of COCO."""
    images = root / "images"
    return {path.stem: (path, images if images.is_dir() else root) for path in (root / "annotations").glob(LVIS)}


class Verified:
    """What an annotation file says about absent and partly annotated categories.

    COCO's images say nothing: all categories are annotated in all of them. In LVIS a category is annotated in some
    images, and known to be absent from others. In the rest it may be there without an annotation.

    Source: Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation, 2019.

    Args:
        images: The file's entries of images.
        names: Phrase of each category by its id.
    """

    def __init__(self, images: Iterable[Mapping[str, Any]], names: Mapping[Any, str]) -> None:
        self.names = names
        self.federated = any(ABSENT in image or PARTIAL in image for image in images)
        self._ids: Mapping[str, list[Any]] = defaultdict(list)
        for identity, name in names.items():
            self._ids[name].append(identity)

    def absent(self, image: Mapping[str, Any], present: Sequence[str]) -> list[str] | None:
        """Return the phrases that are known to be absent; None for all that are not ``present``."""
        if not self.federated:
            return None
        listed = dict.fromkeys(self.names[identity] for identity in image.get(ABSENT, ()) if identity in self.names)
        return [name for name in listed if name not in present and self.complete(image, name, False)]

    def complete(self, image: Mapping[str, Any], phrase: str, present: bool) -> bool:
        """Return whether all objects of a phrase are annotated, or it is known to be absent.

        Args:
            image: The entry of the image.
            phrase: The phrase.
            present: Whether the image has an object of it.
        """
        if not self.federated:
            return True
        own = self._ids.get(phrase, [])
        if any(identity in image.get(PARTIAL, ()) for identity in own):
            return False
        return present or (bool(own) and all(identity in image.get(ABSENT, ()) for identity in own))
