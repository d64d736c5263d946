"""Image files: which ones are read, decoding to upright 8-bit RGB, and sizes without decoding."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePath

import av
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from ..reading import one_line
from ..types import UserError
from .transforms import Size

# What Pillow's decoders raise on broken files; anything else is a fault of this package and must surface.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error,
                 zlib.error, av.FFmpegError)  # fmt: skip

_HEIF = (".heic", ".heif", ".hif")
_PILLOW = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".jp2",
           ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga")  # fmt: skip
_OTHER = (".avif", *_HEIF, ".jxl", ".psd", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
          ".rw2", ".raf", ".pef", ".srw")  # fmt: skip
IMAGE_SUFFIXES = (
    *_PILLOW, *((".avif",) if features.check("avif") else ()), *(_HEIF if find_spec("pillow_heif") else ())
)  # fmt: skip
"""Endings of the images that are read, in lower case: AVIF where Pillow was built with it, HEIC with pillow-heif."""
_FIRST_COUNTS = ("MPO", "HEIF")
"""Formats whose further pictures are previews, depth or gain maps of the first."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What shows an image upright, by its EXIF orientation."""
_SIDEWAYS = (5, 6, 7, 8)
_BITS, _WHITE_IS_ZERO, _LARGEST = 258, 262, (281, 341)  # tags of TIFF: BitsPerSample, Photometric.., (S)MaxSampleValue
_REDUCED, _FAINT = 0b101, 1 / 16


class UnreadableImage(UserError):
    """A file is no image that can be used; the message names it and says why."""


def unread(name: str) -> str | None:
    """Why a file that is called like an image is not read, or None for one that is, and for other files."""
    suffix = PurePath(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix not in _OTHER:
        return None
    if suffix in _HEIF:
        return f"{suffix} files need pillow-heif: pip install 'samdistill[heic]', or convert them to JPEG"
    return f"{suffix} files are not read: convert them to JPEG or PNG"


def read_image(path: Path) -> Image.Image:
    """Decode to upright 8-bit RGB.

    Grey is repeated, transparency is laid over white, CMYK converted. Deeper values are scaled by what the file says of
    them, else by their range: whole numbers as if of the fewest bits, 8 at least, that hold the largest (12-bit data in
    a 16-bit PNG by 1/16), floats as 0..1 where they look so. JPEGs are always decoded at full size: Pillow's ``draft``
    would make a view depend on how the file was encoded. Raises ``UnreadableImage``, also for animations, for several
    pages, negative values and more pixels than Pillow's limit. Corruption inside a JPEG's entropy-coded data is not
    reported by libjpeg and decodes to wrong pixels.
    """
    with _opened(path) as file:
        _refuse_further_pages(file)
        if _is_deep_colour(file):
            return _turned(_deep_colour(path), _orientation(file))
        file.load()
        image: Image.Image = file
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except (*DECODE_ERRORS, KeyError, AttributeError):
            image.info.pop("exif", None)  # broken metadata around good pixels: no orientation is known
        return _to_rgb(image)


def upright_size(path: Path) -> Size:
    """Height and width of an image as ``read_image`` would give it, from the file's head: no pixel is decoded.

    Raises ``UnreadableImage``.
    """
    with _opened(path) as file:
        height, width = file.height, file.width
        turned = _orientation(file) in _SIDEWAYS and file.format != "TIFF"  # Pillow turns the size of a TIFF itself
    return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image that is not decoded yet; what goes wrong inside names the file."""
    if path.suffix.lower() in _HEIF and path.suffix.lower() in IMAGE_SUFFIXES:
        import pillow_heif  # an optional extra

        pillow_heif.register_heif_opener()
    try:
        with Image.open(path) as file:
            yield file
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImage(
            f"{path} has more than {limit / 1e6:.0f} million pixels, Pillow's limit: scale it down, for instance to "
            "8192 pixels a side"
        ) from error
    except DECODE_ERRORS as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        why = "its format is not known" if isinstance(error, UnidentifiedImageError) else said
        if isinstance(error, UnidentifiedImageError) and (reason := unread(path.name)):
            why = reason
        raise UnreadableImage(f"{path} is not a readable image: {why}") from error


def _orientation(file: Image.Image) -> int | None:
    """By EXIF, as far as it stands before the pixels."""
    try:
        # Pillow's own method for PNG decodes the pixels first, to find metadata behind them
        return Image.Image.getexif(file).get(ExifTags.Base.Orientation)
    except (*DECODE_ERRORS, KeyError, AttributeError):
        return None


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _refuse_further_pages(file: Image.Image) -> None:
    """``ValueError`` for more than one picture, previews of the first apart: which one was meant is unknown."""
    count = getattr(file, "n_frames", 1)
    if count == 1 or file.format in _FIRST_COUNTS:
        return
    if file.format != "TIFF":
        raise ValueError(f"it is an animation of {count} frames: save the one that is meant, or a video, on its own")
    others = []
    for page in range(1, count):
        file.seek(page)
        others.append(file.tag_v2.get(254, 0) & _REDUCED)  # type: ignore[attr-defined]
    file.seek(0)
    if not all(others):
        raise ValueError(f"it has {count} pages: save the one that is meant on its own")


def _is_deep_colour(file: Image.Image) -> bool:
    """Colours of 16 bits, of which Pillow keeps the upper 8: of 12-bit data, four."""
    names = (tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in getattr(file, "tile", []) if tile[3])
    return any(str(name).endswith((";16B", ";16L", ";16N")) and not str(name).startswith("I") for name in names)


def _deep_colour(path: Path) -> Image.Image:
    """Such an image through FFmpeg, which keeps all bits; as it lies in the file."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    # one thread: the converter's own outlive it, and a loader worker that is forked then waits for them for ever
    values = frame.reformat(format="rgba64le", threads=1).to_ndarray()
    scaled, alpha = _eight_bits(values[..., :3]), (values[..., 3:] / 257).round().astype(np.uint8)
    return _to_rgb(Image.fromarray(np.concatenate([scaled, alpha], -1)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy() if getattr(image, "fp", None) is not None else image
    if image.mode.startswith("I") or image.mode == "F":
        tags = getattr(image, "tag_v2", {})
        values = _eight_bits(np.asarray(image), _said(tags))
        return Image.fromarray(255 - values if tags.get(_WHITE_IS_ZERO) == 0 else values).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _said(tags: dict[int, object]) -> float | None:
    """The largest value that a TIFF says its pixels can have, where it says more than that they fill their bytes."""
    for tag in _LARGEST:
        largest = tags.get(tag)
        if isinstance(largest, tuple) and largest and float(largest[0]) > 0:
            return float(largest[0])
    bits = tags.get(_BITS)
    return 2.0 ** bits[0] - 1 if isinstance(bits, tuple) and bits and 8 < bits[0] < 16 else None


def _eight_bits(values: Shaped[np.ndarray, "*n"], said: float | None = None) -> UInt8[np.ndarray, "*n"]:
    """Integers or floats as 0..255. said: what is white, where the file says so.

    Raises ``ValueError`` for negative values, which no photograph has.
    """
    whole = values.dtype.kind in "iu"
    numbers: Float[np.ndarray, "*n"] = values.astype(np.float64)
    if not whole:
        numbers = np.where(np.isfinite(numbers), numbers, 0.0)
    low, high = float(numbers.min(initial=0)), float(numbers.max(initial=0))
    if not whole and values.size and not np.isfinite(values).any():
        raise ValueError("it has no finite value")
    if low < 0:
        raise ValueError(f"it has negative values, down to {low:g}: scale it to 8 bits")
    if said is not None and high <= said:
        white = said
    elif not whole and high < 2:  # 0..1, and a little more where it was resampled
        white = 1.0 if high >= _FAINT or high == 0 else high
    else:
        white = 2.0 ** max(8 if whole else 1, int(np.ceil(np.log2(high + 1)))) - 1
    return (numbers * (255 / white)).round().clip(0, 255).astype(np.uint8)
