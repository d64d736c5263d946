"""Pixel values of decoded images as 8-bit RGB.

This module imports NumPy and Pillow alone, because it is also part of the ``predict.py`` of an export; see
``deployment/standalone.py``.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS, _WHITE_IS_ZERO, _LARGEST = 258, 262, (281, 341)  # TIFF: BitsPerSample, Photometric.., (S)MaxSampleValue
_FAINT = 1 / 16


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to 8-bit RGB. Transparency is composed over white.

    Args:
        image: An image of any of Pillow's modes. Values of more than 8 bits are scaled as ``eight_bits`` does.

    Raises:
        ValueError: As for ``eight_bits``.
    """
    if image.mode == "RGB":
        return image.copy() if getattr(image, "fp", None) is not None else image
    if image.mode.startswith("I") or image.mode == "F":
        tags = getattr(image, "tag_v2", {})
        values = eight_bits(np.asarray(image), _said(tags))
        return Image.fromarray(255 - values if tags.get(_WHITE_IS_ZERO) == 0 else values).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _said(tags: dict[int, object]) -> float | None:
    """Return the largest pixel value that a TIFF declares, or None if its values fill their bytes."""
    for tag in _LARGEST:
        largest = tags.get(tag)
        if isinstance(largest, tuple) and largest and float(largest[0]) > 0:
            return float(largest[0])
    bits = tags.get(_BITS)
    return 2.0 ** bits[0] - 1 if isinstance(bits, tuple) and bits and 8 < bits[0] < 16 else None


def eight_bits(values: np.ndarray, said: float | None = None) -> np.ndarray:
    """Scale integers or floats to 0..255.

    White is the largest value that the file declares. Without one, integers are taken as the smallest bit depth, at
    least 8, that holds the largest value, and floats as 0..1 if the largest value is below 2.

    Args:
        values: Pixel values of any shape; NaN and infinity become 0.
        said: Largest value that the file declares, or None.

    Returns:
        uint8 values of the same shape.

    Raises:
        ValueError: There are negative values, or no finite value.
    """
    whole = values.dtype.kind in "iu"
    numbers = values.astype(np.float64)
    if not whole:
        numbers = np.where(np.isfinite(numbers), numbers, 0.0)
    low, high = float(numbers.min(initial=0)), float(numbers.max(initial=0))
    if not whole and values.size and not np.isfinite(values).any():
        raise ValueError("it has no finite value")
    if low < 0:
        raise ValueError(f"it has negative values, down to {low:g}: scale it to 8 bits")
    if said is not None and high <= said:
        white = said
    elif not whole and high < 2:  # 0..1; resampling may exceed 1 by a little
        white = 1.0 if high >= _FAINT or high == 0 else high
    else:
        white = 2.0 ** max(8 if whole else 1, int(np.ceil(np.log2(high + 1)))) - 1
    return (numbers * (255 / white)).round().clip(0, 255).astype(np.uint8)
