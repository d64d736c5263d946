"""Tokens, canvas and masks of the standalone file, against transformers and PyTorch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from samdistill.checkpoints.words import Words
from samdistill.data.images import read_image
from samdistill.data.transforms import Geometry
from samdistill.deployment import runtime
from samdistill.sandbox.concepts import sandbox_words

WORDS = (
    'red', 'car', "dog's", 'the', "'twas", "don't", '12', '3.5', 'naïve', 'café', 'ÉCOLE', '中文', '東京タワー',
    'ελληνικά', 'ΣΊΣΥΦΟΣ', 'İstanbul', 'ß', 'ﬁ', 'é', '🚗', '👩\u200d👧', '<bos>', '<|endoftext|>',
    'a<|startoftext|>b', '!!!', "''s", "'re²", 'Ⅷ', '①', 'Ⓐb', '_x_', '\xa0', '\u3000', '\x85', '\x1c', 'हिन्दी',
    'ไทย', 'العربية', '\u200d', 'ǅ', 'circle',
)  # fmt: skip
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-pair tokenizer with CLIP's rules, trained on a few words."""
    backend = Backend(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(CLIP), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(WORDS * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), False, False)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
        pad_token="<|endoftext|>", model_max_length=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    wrapped.save_pretrained(folder)
    return folder


def phrases(count: int = 500) -> list[str]:
    rng = random.Random(0)
    letters = [*map(chr, [*range(9, 14), *range(28, 600), *range(0x300, 0x340), *range(0x900, 0x960)])]
    letters += [*map(chr, [*range(0x2000, 0x2070), *range(0x2150, 0x2190), *range(0x2460, 0x24F0), 0x1F600, 0xFEFF])]
    found = ["".join(rng.choice(("", " ", "  ")) + rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
             for _ in range(count)]  # fmt: skip
    return found + ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(count)]


def test_tokens_are_those_of_a_clip_tokenizer(clip: Path) -> None:
    own, theirs = runtime.Tokenizer(clip), AutoTokenizer.from_pretrained(clip)
    for phrase in phrases():
        assert own.tokens(phrase) == theirs(phrase, verbose=False)["input_ids"], repr(phrase)


def test_tokens_and_padding_are_those_of_the_sandbox(tmp_path: Path) -> None:
    words = sandbox_words()
    words.save(tmp_path)
    own = runtime.Tokenizer(tmp_path)
    for phrase in phrases():
        assert own.tokens(phrase) == words.tokenizer(phrase, verbose=False)["input_ids"], repr(phrase)
    for phrase in ("red circle", "a zebra", "star"):
        for part, wanted in zip(own.encode(phrase), words.encode([phrase]), strict=True):
            assert part.dtype == np.int64 and np.array_equal(part, wanted.numpy())


def test_phrases_that_are_empty_or_too_long_are_refused(clip: Path) -> None:
    own = runtime.Tokenizer(clip)
    with pytest.raises(runtime.ModelError, match="a phrase is empty"):
        own.encode("  ")
    words = Words.load(clip, len(AutoTokenizer.from_pretrained(clip)))
    assert words.fits("12 " * 15) and not words.fits("12 " * 16) and own.encode("12 " * 15)[1].sum() == 32
    with pytest.raises(runtime.ModelError, match="longer than the 32 tokens this model reads"):
        own.encode("12 " * 16)


@pytest.mark.parametrize("kind", ["square", "longest_side"])
@pytest.mark.parametrize("size", [(126, 126), (150, 200), (333, 217), (7, 5), (900, 40), (60, 61)])
def test_the_canvas_is_that_of_the_package_bit_for_bit(kind: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    place, ones = Geometry(126, kind), np.ones(3, np.float32)  # type: ignore[arg-type]
    own = runtime.Canvas(126, kind == "square", 0 * ones, ones / 255)
    canvas, placed = place.canvas(Image.fromarray(image))
    assert own.placed(size) == placed
    assert np.array_equal(np.rint(own.pixels(image)[0]).astype(np.uint8), canvas.numpy())
    points = np.array([[0.5, 0.5], [size[1] - 1, size[0] / 3]], np.float32)
    assert np.array_equal(own.points(points, size), place.points(torch.from_numpy(points), size).numpy())
    mask = np.random.default_rng(1).random(size) < 0.5
    cells = F.adaptive_avg_pool2d(place.mask(mask)[None].float(), (9, 10))[0]
    assert np.allclose(own.cells(mask, (9, 10)), cells.numpy(), atol=1e-6)
    logits = torch.from_numpy(np.random.default_rng(2).standard_normal((31, 31)).astype(np.float32))
    wide = F.interpolate(logits[None, None], (126, 126), mode="bilinear", align_corners=False)[0, 0]
    assert np.allclose(own.back(logits.numpy(), size), place.masks_back(wide, size).numpy(), atol=1e-5)


def test_masks_are_written_as_runs_of_columns() -> None:
    from pycocotools import mask as coco

    mask = np.random.default_rng(0).random((9, 7)) < 0.5
    for one in (mask, ~mask, np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        rle = coco.frPyObjects(runtime.runs(one), *one.shape)
        assert np.array_equal(coco.decode(rle).astype(bool), one)


@pytest.mark.parametrize("name", ["deep.png", "bits.tif", "float.tif", "grey.png", "palette.png", "print.jpg"])
def test_pixels_are_those_that_the_package_reads(name: str, tmp_path: Path) -> None:
    values, file = np.random.default_rng(3).random((6, 5)), tmp_path / name
    tags = {"tiffinfo": {281: 4095}} if name == "bits.tif" else {}
    picture = {
        "deep.png": Image.fromarray((40000 * values).astype(np.uint16)),
        "bits.tif": Image.fromarray((900 * values).astype(np.uint16)),
        "float.tif": Image.fromarray(values.astype(np.float32)),
        "grey.png": Image.fromarray((255 * values).astype(np.uint8)).convert("LA"),
        "palette.png": Image.fromarray((255 * values).astype(np.uint8)).convert("P"),
        "print.jpg": Image.fromarray((255 * values).astype(np.uint8)).convert("CMYK"),
    }[name]
    picture.save(file, **tags)
    assert np.array_equal(runtime.open_image(file), np.asarray(read_image(file)))


def test_images_are_read_upright_over_white(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert runtime.open_image(tmp_path / "turned.png").shape == (3, 2, 3)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (runtime.open_image(tmp_path / "clear.png") == 255).all()
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(runtime.ModelError, match=r"no.png: not a readable image"):
        runtime.open_image(tmp_path / "no.png")
