"""Hosted students of seconds, trunks of encoder runs, and what tests compare of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.detection.parts import DetectionParts
from samdistill.students import HostedStudent, StudentTrunkConfig, build_trunk
from samdistill.types import ConceptPrompts, ImageBatch

TRUNK = "vision_encoder.backbone."
WIDTH = 64
"""Channels of the tiny teacher's ViT."""


def heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(TRUNK)}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


def built(config: DetectionRunConfig) -> HostedStudent:
    torch.manual_seed(config.train.seed)
    student = DetectionParts(config).task().build_student()
    assert isinstance(student, HostedStudent)
    return student


def saved_trunk(folder: Path, hidden: int = WIDTH, patch: int = 14, **settings: object) -> Path:
    """A finished encoder run with a trunk that no default initialises."""
    torch.manual_seed(5)
    config = StudentTrunkConfig(
        **{"backbone": "es_ev_s", "head": "strided", **settings},
        hidden_size=hidden,
        patch_size=patch,
        image_size=9 * patch,
    )
    trunk = build_trunk(config)
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.1)
    trunk.save_pretrained(folder / "student")
    return folder


def questions(seed: int = 0) -> tuple[ImageBatch, ConceptPrompts]:
    """Two images, three questions, the last one with a box."""
    images = torch.randint(256, (2, 3, 126, 126), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4]]).expand(3, 1, 4)
    labels = torch.tensor([[-10], [-10], [1]])
    return ImageBatch.full(images), ConceptPrompts(
        ("red circle", "star", "visual"), torch.tensor([0, 1, 1]), boxes, labels
    )
