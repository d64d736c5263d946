"""What a model costs: parameters, floating-point operations, and the time its vision encoder takes."""

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
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def trunk_gflops(model: PreTrainedModel) -> float:
    """GFLOP of the trunk (with its head, without the neck) for one image; a multiply-add counts as two.

    A copy of the architecture is run on meta tensors: no arithmetic is done, so the full SAM 3 takes seconds too.
    """
    size = image_size(model)
    with torch.device("meta"):
        encoder = type(model)(copy.deepcopy(model.config)).eval().vision_encoder
        pixels = torch.empty(1, 3, size, size)
    counted = list[int]()
    with count_flops() as counter:
        encoder.neck.register_forward_pre_hook(lambda *_: counted.append(counter.get_total_flops()))
        encoder(pixels)
    return counted[0] / 1e9


def encoder_latency(
    models: Mapping[str, PreTrainedModel], image_size: int, repeats: int = 9, seconds: float = 120.0
) -> tuple[dict[str, float], Conditions]:
    """Median milliseconds of each model's vision encoder (trunk and neck) for one image, on the device it is on.

    After one untimed run of each, every round runs each model once, so that a drift of the machine is shared. At most
    ``repeats`` rounds, and no new one after ``seconds``; the conditions say how many it were.
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
    """``cpu``, or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _timed(model: PreTrainedModel, pixels: torch.Tensor) -> float:
    _wait(pixels.device)
    begun = time.perf_counter()
    model.vision_encoder(pixels)
    _wait(pixels.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    """Accelerators return before they have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
