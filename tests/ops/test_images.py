"""Normalisation, against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2.functional import normalize, to_dtype

from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD, normalise


@pytest.mark.parametrize(("mean", "std"), [(SAM3_MEAN, SAM3_STD), (IMAGENET_MEAN, IMAGENET_STD)])
def test_it_is_torchvisions(mean, std) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = normalise(images, mean, std)
    expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_sam3s_statistics_are_the_default_and_span_minus_one_to_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert normalise(ends)[0, :, 0].tolist() == [[-1.0, 1.0]] * 3


def test_imagenets_are_the_published_ones() -> None:
    assert (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
