"""Cost of models: parameters, floating-point operations, and latency of the vision encoder."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ops.flops import count_flops
from ..ops.promptable import image_size
from .result import Conditions


def parameters(module: nn.Module) -> int:
    """Count the parameters of a module. Shared parameters count once."""
    return sum(p.numel() for p in module.parameters())


def trunk_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of the trunk, without the neck. A trunk that a SAM hosts includes what was its neck."""
    neck = getattr(model.vision_encoder, "neck", None)
    return parameters(model.vision_encoder) - (0 if neck is None else parameters(neck))


def trunk_gflops(model: PreTrainedModel) -> float:
    """Count the operations of the trunk for one image. The trunk includes its head but not the neck.

    A copy of the architecture runs on meta tensors without arithmetic, so a full SAM 3 takes seconds too.

    Returns:
        GFLOP. A multiply-add counts as two operations.
    """
    size = image_size(model)
    with torch.device("meta"):
        encoder = type(model)(copy.deepcopy(model.config)).eval().vision_encoder
        pixels = torch.empty(1, 3, size, size)
    counted = list[int]()
    with count_flops() as counter:
        if (neck := getattr(encoder, "neck", None)) is not None:
            neck.register_forward_pre_hook(lambda *_: counted.append(counter.get_total_flops()))
        encoder(pixels)
        counted.append(counter.get_total_flops())
    return counted[0] / 1e9


def encoder_latency(
    models: Mapping[str, PreTrainedModel], image_size: int, repeats: int = 9, seconds: float = 120.0
) -> tuple[dict[str, float], Conditions]:
    """Measure the latency of each model's vision encoder (trunk and neck) for one image.

    Each model runs once without timing. Then every round runs each model once, so that a change in the machine's speed
    affects all models.

    Args:
        models: Models by name, all on the same device.
        image_size: Side of the image in pixels.
        repeats: Largest number of rounds.
        seconds: No new round starts after this time. The first round always runs.

    Returns:
        Median latency in milliseconds by name, and the conditions with the number of rounds.
    """
    device = next(next(iter(models.values())).parameters()).device
    pixels = torch.zeros(1, 3, image_size, image_size, device=device)
    times: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    with torch.no_grad():
        for model in models.values():
            _timed(model, pixels)
        for done in range(repeats):
            if done and time.perf_counter() - begun > seconds:
                break
            for name, model in models.items():
                times[name].append(_timed(model, pixels))
    rounds = len(next(iter(times.values())))
    conditions = Conditions(device_name(device), torch.get_num_threads(), rounds, image_size)
    return {name: 1e3 * statistics.median(took) for name, took in times.items()}, conditions


def device_name(device: torch.device) -> str:
    """Return the name of the GPU for CUDA, and the type of the device otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _timed(model: PreTrainedModel, pixels: torch.Tensor) -> float:
    _wait(pixels.device)
    begun = time.perf_counter()
    model.vision_encoder(pixels)
    _wait(pixels.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    """Wait until the device has finished, because calls on accelerators return earlier."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
