"""The prompt job in tiny: random promptable models of 64 px, and a recipe that runs on the shared world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import SamConfig, SamModel

from samdistill.jobs.loading import load_config
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.students import MobileSamConfig, MobileSamModel

SIZES = {"image_size": 64, "patch_size": 16}
PromptRecipe = Callable[..., PromptRunConfig]


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """A fresh model answers nothing in particular: every parameter is moved."""
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.1
    return model.eval()


def tiny_sam(seed: int = 0) -> SamModel:
    vision = {"hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
              "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 8}  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision | SIZES, prompt_encoder_config={"hidden_size": 16, **SIZES}, mask_decoder_config=decoder
    )
    torch.manual_seed(seed)
    return scrambled(SamModel(config))


def tiny_mobile(seed: int = 0) -> MobileSamModel:
    torch.manual_seed(seed)
    return scrambled(
        MobileSamModel(MobileSamConfig(backbone="efficientvit_b0", neck="fused", width=16, heads=2, **SIZES))
    )


@pytest.fixture(scope="session")
def sams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: four SAMs, which open much faster than a timm trunk, and a MobileSAM."""
    made: dict[str, SamModel] = {
        name: tiny_sam(seed) for seed, name in enumerate(("large", "small", "student", "other"))
    }
    made["mobile"] = tiny_mobile()
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def prompted(world: Path, sams: dict[str, Path]) -> PromptRecipe:
    """prompted(output, *overrides): ``prompt/sandbox`` with two tiny teachers, on half of the world: 14 images."""

    def make(output: Path, *overrides: str) -> PromptRunConfig:
        teachers = [{"name": "large", "checkpoint": str(sams["large"]), "weight": 3.0},
                    {"name": "small", "checkpoint": str(sams["small"]), "weight": 1.0}]  # fmt: skip
        small = [
            f"output={output}", f"data.root={world}", "data.kind=sa1b", "data.workers=0", "data.fraction=0.5",
            f"student.start={sams['student']}", f"teachers={json.dumps(teachers)}", "prompts.objects=2",
            "distillation.sample=4", "train.batch_size=4", "train.epochs=2", "evaluate.images=4", "train.log_every=1",
        ]  # fmt: skip
        config = load_config("prompt/sandbox", [*small, *overrides])
        assert isinstance(config, PromptRunConfig)
        return config

    return make
