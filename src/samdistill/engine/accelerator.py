"""The Accelerate object of a run: device, precision and ranks."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs

from ..config import TrainConfig
from ..dist import default_device
from ..types import UserError

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(config: TrainConfig, leaves_unused: bool) -> Accelerator:
    """Return the Accelerate object of this process.

    Args:
        config: Settings of the training.
        leaves_unused: A batch may leave parameters without gradient.

    Raises:
        UserError: fp16 without CUDA.
    """
    if config.precision == "fp16" and default_device().type == "cpu":
        raise UserError("train.precision=fp16 needs a GPU (its loss scaling does); use bf16 or fp32 here")
    AcceleratorState._reset_state()  # Accelerate would keep the precision of the first run in this process
    GradientState._reset_state()
    world = int(os.environ.get("WORLD_SIZE", 1))
    kind = default_device().type
    accelerator = Accelerator(
        mixed_precision=_PRECISION[config.precision],
        gradient_accumulation_steps=config.accumulate,
        cpu=kind == "cpu" or (kind == "mps" and world > 1),  # without it, Accelerate does not connect CPU ranks
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=leaves_unused)],
    )
    if accelerator.num_processes != world:
        raise RuntimeError(f"WORLD_SIZE={world}, but this process is one of {accelerator.num_processes}")
    return accelerator
