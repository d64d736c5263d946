"""A detection student of a few thousand weights, and what tells two of them apart."""

from __future__ import annotations

import torch
from torch import nn

from samdistill.students import EfficientSam3Config, EfficientSam3Model, efficient_sam3_config

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000,
    "projection_dim": 32,
}  # fmt: skip
ANSWERS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


def scramble(model: nn.Module) -> None:
    """Give every saved tensor a value of its own, so that a tensor left at its initial value shows."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if name.endswith("running_var") else tensor + 0.05 * (noise - 0.5))
        else:
            tensor.fill_(7)


def assert_same_tensors(first: nn.Module, second: nn.Module) -> None:
    """Everything a forward pass may read, saved or not."""
    one, other = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (first, second))
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def tiny_config(backbone: str = "es_ev_s", repmixer: bool = True, layers: int = 2) -> EfficientSam3Config:
    return efficient_sam3_config(
        backbone=backbone, image_size=126, hidden_size=32, heads=4, ffn=64, encoder_layers=layers,
        decoder_layers=layers, queries=10, text={**TEXT, "use_repmixer_blocks": repmixer},
    )  # fmt: skip


def tiny(backbone: str = "es_ev_s", repmixer: bool = True) -> EfficientSam3Model:
    torch.manual_seed(0)
    model = EfficientSam3Model(tiny_config(backbone, repmixer)).eval()
    scramble(model)
    return model
