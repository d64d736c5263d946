"""Image files: decoding to upright 8-bit RGB, deep values, pages, what is not read and what is said of it."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from samdistill.data import FolderSource, UnreadableImage, read_image, upright_size
from samdistill.data.images import DECODE_ERRORS, IMAGE_SUFFIXES, unread

ORIENTATION = 0x0112


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5, y * 9, 255 - x * 5], -1).astype(np.uint8))


def write_png(path: Path, values: np.ndarray, orientation: int | None = None) -> Path:
    """A 16-bit PNG of 1 to 4 channels, by the specification: Pillow writes none in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation or 1
    parts = ((b"IHDR", head), (b"eXIf", exif.tobytes()[6:]), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def write_deep_tiff(path: Path, values: np.ndarray) -> Path:
    coder = av.CodecContext.create("tiff", "w")
    coder.width, coder.height, coder.pix_fmt, coder.time_base = values.shape[1], values.shape[0], "rgb48le", Fraction(1)
    frame = av.VideoFrame.from_ndarray(values.astype(np.uint16), format="rgb48le")
    path.write_bytes(b"".join(bytes(packet) for packet in [*coder.encode(frame), *coder.encode(None)]))
    return path


def ramp(largest: float, channels: int = 1) -> np.ndarray:
    """0 to ``largest`` from left to right."""
    return np.tile(np.linspace(0, largest, 32)[None, :, None], (8, 1, channels))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_image(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    # what a camera stores so that the tag's transposition restores the scene
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(upright))  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_does_not_lose_the_image(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f garbage", quality=95)
    assert read_image(tmp_path / "a.jpg").size == (40, 24)


def test_modes_become_rgb_with_the_same_look(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[..., None], 3, -1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    for name in ("grey.png", "deep.png", "int.tif", "float.tif", "palette.png"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB", name
        assert np.array_equal(np.asarray(image), expected), name


def test_cmyk_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red = np.asarray(read_image(tmp_path / "red.jpg")).reshape(-1, 3).mean(0)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (255, 0, 0, 255)
    pixels[3] = (0, 0, 0, 51)  # black at a fifth
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rows = np.asarray(read_image(tmp_path / "a.png"))[:, 0]
    assert rows.tolist() == [[255, 0, 0], [255, 0, 0], [255, 255, 255], [204, 204, 204]]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_size_is_read_without_decoding(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:800])  # the head, and some pixels
    assert upright_size(path) == (90, 70)
    with pytest.raises(UnreadableImage):
        read_image(path)


def shown(path: Path) -> np.ndarray:
    """The red channel of the first row; all channels have to agree."""
    pixels = np.asarray(read_image(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].astype(int)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_few_bits_in_a_16_bit_png_are_as_bright_as_they_were(
    tmp_path: Path, bits: int, white: int, channels: int
) -> None:
    values = ramp(white, channels).round()
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    found = shown(write_png(tmp_path / f"{bits}.png", values))
    assert np.abs(found - ramp(255)[0, :, 0]).max() <= 1


def test_a_dark_picture_of_many_bits_stays_dark(tmp_path: Path) -> None:
    assert shown(write_png(tmp_path / "a.png", ramp(40000)))[-1] == round(40000 / 257)
    assert shown(write_png(tmp_path / "b.png", ramp(0))).max() == 0


def test_a_deep_colour_picture_keeps_colour_transparency_and_orientation(tmp_path: Path) -> None:
    values = np.zeros((2, 3, 4), int)
    values[0, 0], values[0, 1], values[1, 2] = (4095, 0, 2048, 65535), (0, 0, 0, 0), (0, 4095, 0, 13107)
    upright = np.asarray(read_image(write_png(tmp_path / "a.png", values)))
    assert upright[0, 0].tolist() == [255, 0, 128] and upright[0, 1].tolist() == [255] * 3  # laid over white
    assert upright[1, 2].tolist() == [204, 255, 204]
    turned = write_png(tmp_path / "b.png", values, orientation=6)
    assert upright_size(turned) == (3, 2) and np.array_equal(np.asarray(read_image(turned)), np.rot90(upright, -1))


def test_a_deep_colour_tiff(tmp_path: Path) -> None:
    found = shown(write_deep_tiff(tmp_path / "a.tif", ramp(4095, 3)))
    assert np.abs(found - ramp(255)[0, :, 0]).max() <= 1


@pytest.mark.parametrize(("largest", "expected"), [(1.0, 255), (0.25, 64), (1.02, 255), (255.0, 255), (4095.0, 255),
                                                   (65535.0, 255), (1e-3, 255), (200.0, 200), (0.0, 0)])  # fmt: skip
def test_floats_are_never_nearly_black(tmp_path: Path, largest: float, expected: int) -> None:
    Image.fromarray(ramp(largest)[..., 0].astype(np.float32)).save(tmp_path / "a.tif")
    assert shown(tmp_path / "a.tif")[-1] == expected


def test_what_a_tiff_says_of_its_values_counts(tmp_path: Path) -> None:
    values = ramp(1000)[..., 0].astype(np.uint16)
    for tags, white in (({}, 1023), ({281: 4095}, 4095), ({262: 0}, 1023)):
        Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
        last = round(1000 * 255 / white)
        assert shown(tmp_path / "a.tif")[-1] == (255 - last if 262 in tags else last)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((4, 4), -5, np.int32), "negative values, down to -5"),
        (np.full((4, 4), np.nan, np.float32), "no finite"),
    ],
)
def test_values_that_no_photograph_has_are_refused(tmp_path: Path, values: np.ndarray, reason: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match=reason):
        read_image(tmp_path / "a.tif")


def test_which_of_several_pictures_is_meant_is_not_guessed(tmp_path: Path) -> None:
    first, *others = (Image.new("RGB", (8, 6), (i, 0, 0)) for i in (200, 100, 50))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    first.save(tmp_path / "moving.gif", save_all=True, append_images=others)
    first.save(tmp_path / "moving.webp", save_all=True, append_images=others)
    first.save(tmp_path / "one.gif")
    first.save(tmp_path / "phone.mpo", save_all=True, append_images=others)
    for name, reason in (("pages.tif", "3 pages"), ("moving.gif", "3 frames"), ("moving.webp", "3 frames")):
        with pytest.raises(UnreadableImage, match=rf"{name} is not a readable image: .*{reason}: save the one that is"):
            read_image(tmp_path / name)
    preview = Image.new("RGB", (4, 3))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "preview.tif", save_all=True, append_images=[preview])
    for name in ("one.gif", "phone.mpo", "preview.tif"):
        assert np.abs(np.asarray(read_image(tmp_path / name))[0, 0].astype(int) - (200, 0, 0)).max() < 8, name


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "gif", "ppm", "tga", "jp2", "avif"])
def test_rarer_formats_are_read(tmp_path: Path, suffix: str) -> None:
    if f".{suffix}" not in IMAGE_SUFFIXES:
        assert unread(f"a.{suffix}") is not None
        return
    kind = {"jpe": "JPEG", "jfif": "JPEG", "jp2": "JPEG2000", "ppm": "PPM"}.get(suffix, suffix.upper())
    Image.new("RGB", (32, 16), (200, 100, 50)).save(tmp_path / f"a.{suffix}", kind)
    source = FolderSource(tmp_path)
    assert source.keys == [f"a.{suffix}"] and source.problems == []
    assert np.abs(np.asarray(source.load(source.keys[0]))[8, 16].astype(int) - (200, 100, 50)).max() < 12


def test_files_that_look_like_images_and_are_not_read_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name in ("b.cr2", "c.JXL", "d.txt", ".e.psd"):
        (tmp_path / name).write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert source.keys == ["a.png"]
    assert sorted(source.problems) == [
        ("b.cr2", ".cr2 files are not read: convert them to JPEG or PNG"),
        ("c.JXL", ".jxl files are not read: convert them to JPEG or PNG"),
    ]


def test_photographs_of_a_phone(tmp_path: Path) -> None:
    """HEIC is read with pillow-heif; without it the message says how to get it, in a folder and for one file."""
    path = tmp_path / "a.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UnreadableImage, match=r"a\.HEIC is not a readable image"):
        read_image(path)
    if ".heic" not in IMAGE_SUFFIXES:
        (problem,) = FolderSource(tmp_path).problems
        assert problem.key == "a.HEIC" and "pip install 'samdistill[heic]'" in problem.reason
        return
    import pillow_heif

    pillow_heif.from_pillow(gradient(64, 48)).save(path, quality=95)
    assert upright_size(path) == (48, 64)
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(gradient(64, 48))).mean() < 8


def test_an_image_over_pillows_limit_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for read in (read_image, upright_size):
        with pytest.raises(UnreadableImage, match=r"a\.png has more than 0 million pixels.*: scale it down"):
            read(tmp_path / "a.png")


def test_a_programming_error_is_not_taken_for_a_bad_image() -> None:
    assert not any(issubclass(e, DECODE_ERRORS) for e in (AttributeError, KeyError, NameError, AssertionError))
