"""EfficientSAM3's code on a CPU, for ``names_equality.py``: a patched copy, random models, and its files.

It needs ``pip install einops ftfy regex omegaconf``. The copy needs no reader of videos.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sam3_original import CPU, INTERACTIVE, REDUCED, SIZE, TABLES, copy_code, imported, save, scramble
from torch import Tensor, nn

WITHOUT_VIDEO = {name: text for name, text in CPU.items() if "pkg_resources" not in name} | {
    "if _VIDEO_FRAME_BACKEND is None:\n    raise ImportError\n": ""
}
"""What keeps the code from a CPU, and what asks for a reader of videos."""
TRUNKS = {
    "efficientvit_b0": ("efficientvit", "b0"), "efficientvit_b1": ("efficientvit", "b1"),
    "efficientvit_b2": ("efficientvit", "b2"), "repvit_m0_9": ("repvit", "m0.9"), "repvit_m1_1": ("repvit", "m1.1"),
    "repvit_m2_3": ("repvit", "m2.3"), "tiny_vit_5m_224": ("tinyvit", "5m"), "tiny_vit_11m_224": ("tinyvit", "11m"),
    "tiny_vit_21m_224": ("tinyvit", "21m"),
}  # fmt: skip
"""timm names to the names that EfficientSAM3's builder takes."""
TEXTS = {"s0": "MobileCLIP-S0", "s1": "MobileCLIP-S1", "l": "MobileCLIP2-L", "b": "MobileCLIP-B"}
"""Our sizes to the names that EfficientSAM3's builder takes."""
VIT = ("sam3", "")
"""The builder's name for SAM 3's own trunk."""


@dataclass(frozen=True)
class Code:
    """EfficientSAM3's code: a check-out, its builder (imported from a copy), and the vocabulary in it."""

    checkout: Path
    builder: Any
    words: Path

    def build(self, trunk: tuple[str, str], text: str | None, context: int, file: Path | None = None) -> Any:
        """The image model with its interactive tracker, in eval mode, with the weights of ``file`` if there is one."""
        with silent():
            return self.builder.build_efficientsam3_image_model(
                bpe_path=str(self.words), device="cpu", checkpoint_path=None if file is None else str(file),
                enable_inst_interactivity=True, backbone_type=trunk[0], model_name=trunk[1], text_encoder_type=text,
                text_encoder_context_length=context,
            )  # fmt: skip

    def trunk(self, name: tuple[str, str]) -> Any:
        """A student of the first stage, in eval mode."""
        with silent():
            return self.builder._create_student_vision_backbone(*name, enable_inst_interactivity=False).trunk.model

    def convert(self, script: str, **files: Path) -> None:
        """Run a script of its first stage. Keywords are its options, with underscores."""
        options = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
        command = [sys.executable, str(self.checkout / "stage1" / script), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}: {done.stderr[-800:]}")


@contextmanager
def opened_code(checkout: Path, folder: Path) -> Iterator[Code]:
    """Copy the code into ``folder`` and import it."""
    copy_code(checkout / "sam3", folder, WITHOUT_VIDEO, REDUCED.replaced())
    with imported(folder) as builder:
        yield Code(checkout, builder, checkout / "sam3" / "assets" / "bpe_simple_vocab_16e6.txt.gz")


@contextmanager
def silent() -> Iterator[None]:
    """The builder prints, and warns of the missing GPU."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def randomise(model: nn.Module, seed: int, *run: Tensor) -> nn.Module:
    """Every tensor random; batch norms get the statistics of ``run``, so that activations stay of order one."""
    scramble(model, seed, TABLES)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms if run else ():
        norm.momentum = 1.0
        norm.train()
    if run:
        model(*run)
    model.train()  # TinyViT keeps its biases when it turns to eval
    return model.eval()


def save_teacher(code: Code, path: Path, seed: int) -> None:
    """A ``sam3.pt`` of reduced depth with random weights."""
    with silent():
        model = code.builder.build_sam3_image_model(
            bpe_path=str(code.words), device="cpu", load_from_HF=False, enable_inst_interactivity=True
        )
    save(randomise(model, seed), path)


def names_left(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names that the model has and the file has not, and the other way round, as the reader translates them."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {}
    for name, value in state.items():
        own = name.removeprefix("detector.")
        own = f"{INTERACTIVE}{own.removeprefix('tracker.')}" if own.startswith("tracker.") else own
        found[own] = tuple(value.shape)
    shared = wanted.keys() & found.keys()
    return {
        "missing": sorted(wanted.keys() - found.keys()), "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(name for name in shared if wanted[name] != found[name]),
    }  # fmt: skip


def pixels() -> Tensor:
    """One picture of smooth colours with noise on them, from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 14, 18, generator=generator)
    image = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1) * 0.92
    return image + 0.08 * torch.rand(image.shape, generator=generator)


class Student(nn.Module):
    """EfficientSAM3's text student, asked with token ids."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.student.encoder(
            self.student.encoder.forward_embedding(ids), return_all_tokens=True, input_is_embeddings=True
        )
        return self.student.projector(tokens)
