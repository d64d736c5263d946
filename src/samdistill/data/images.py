"""Image files: supported formats, decoding to upright 8-bit RGB, and reading the size without decoding."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import PurePath

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from ..ops.pixels import eight_bits, to_rgb
from ..reading import one_line
from ..types import UserError
from .members import InputFile
from .transforms import Size

# Pillow's decoders raise these on damaged files. Any other exception is an error of this package and is not caught.
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
"""Suffixes of supported image files, in lower case. AVIF needs a Pillow built with it, HEIC needs pillow-heif."""
_FIRST_COUNTS = ("MPO", "HEIF")
"""Formats of which only the first picture is read, because the others are its previews, depth maps or gain maps."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Transposition that turns an image upright, by EXIF orientation."""
_SIDEWAYS = (5, 6, 7, 8)
_REDUCED = 0b101


class UnreadableImage(UserError):
    """A file cannot be used as an image. The message names the file and the reason."""


def unread(name: str) -> str | None:
    """Return why an image format is not supported, or None for supported formats and for files that are not images.

    Only the suffix of ``name`` is used.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix not in _OTHER:
        return None
    if suffix in _HEIF:
        return f"{suffix} files need pillow-heif: pip install 'samdistill[heic]', or convert them to JPEG"
    return f"{suffix} files are not read: convert them to JPEG or PNG"


def read_image(path: InputFile) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    Grey is repeated over three channels, transparency is composed over white, and CMYK is converted. The EXIF
    orientation is applied. Values of more than 8 bits are scaled to 0..255:

    - by the largest value that a TIFF declares, if it declares one;
    - integers otherwise as the smallest bit depth, at least 8, that holds the largest value of the image, so a 16-bit
      PNG with values up to 4095 is taken as 12-bit;
    - floats otherwise as 0..1 if the largest value is below 2; if it is below 1/16, it is taken as white. Larger floats
      are scaled as the smallest bit depth that holds the largest value.

    JPEG files are always decoded at full size, because with Pillow's ``draft`` a view would depend on the encoding of
    the file. libjpeg does not report damage in the entropy-coded data of a JPEG; such a file is decoded to wrong
    pixels.

    Args:
        path: The image file, or a member of a shard.

    Returns:
        An RGB image.

    Raises:
        UnreadableImage: The file is missing, damaged, not an image, an animation, a TIFF of several pages, has negative
            values, or has more pixels than Pillow's limit.
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
            image.info.pop("exif", None)  # the pixels are valid, but the orientation is unknown
        return to_rgb(image)


def upright_size(path: InputFile) -> Size:
    """Return the height and width that ``read_image`` would give, without decoding pixels.

    Raises:
        UnreadableImage: The file is not a readable image.
    """
    with _opened(path) as file:
        height, width = file.height, file.width
        turned = _orientation(file) in _SIDEWAYS and file.format != "TIFF"  # Pillow already turns the size of a TIFF
    return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: InputFile) -> Iterator[Image.Image]:
    """Open an image without decoding it. Errors in the body become ``UnreadableImage`` with the file's name."""
    if path.suffix.lower() in _HEIF and path.suffix.lower() in IMAGE_SUFFIXES:
        import pillow_heif  # an optional extra

        pillow_heif.register_heif_opener()
    try:
        with path.open("rb") as stream, Image.open(stream) as file:
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
    """Return the EXIF orientation if it is stored before the pixels."""
    try:
        # the method of Pillow's PNG class decodes the pixels first, to find metadata that is stored after them
        return Image.Image.getexif(file).get(ExifTags.Base.Orientation)
    except (*DECODE_ERRORS, KeyError, AttributeError):
        return None


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _refuse_further_pages(file: Image.Image) -> None:
    """Raise ``ValueError`` for a file of several pictures, unless the others are previews of the first."""
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
    """Return whether a file has 16-bit colour channels, of which Pillow keeps only the upper 8 bits."""
    names = (tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in getattr(file, "tile", []) if tile[3])
    return any(str(name).endswith((";16B", ";16L", ";16N")) and not str(name).startswith("I") for name in names)


def _deep_colour(path: InputFile) -> Image.Image:
    """Decode an image with 16-bit colour channels through FFmpeg, which keeps all bits. EXIF orientation is not
    applied.
    """
    with path.open("rb") as stream, av.open(stream) as container:
        frame = next(container.decode(video=0))
    # with more threads a loader worker that is forked later would wait for threads of the converter and never return
    values = frame.reformat(format="rgba64le", threads=1).to_ndarray()
    scaled, alpha = eight_bits(values[..., :3]), (values[..., 3:] / 257).round().astype(np.uint8)
    return to_rgb(Image.fromarray(np.concatenate([scaled, alpha], -1)))
