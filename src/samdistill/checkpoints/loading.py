"""Building models and filling them from files or named tensors, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..types import UserError
from .files import TensorInfo

Model = TypeVar("Model", bound=PreTrainedModel)


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with parameters that hold no memory; buffers, which are computed and not loaded, are real."""
    with init_empty_weights(include_buffers=False):
        return build()


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compare(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], source: str, what: str) -> None:
    """``UserError`` unless names and shapes of ``found`` are those of ``wanted``."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        verb, names = ("lacks", missing) if missing else ("has unknown", extra)
        raise UserError(
            f"{source}: wrong checkpoint: {what} {verb} {len(names)} tensors ({len(wanted)} expected), "
            f"such as {names[0]}"
        )
    for name, about in wanted.items():
        if found[name].shape != about.shape:
            raise UserError(
                f"{source}: wrong checkpoint: {name} of {what} has the shape {found[name].shape}, "
                f"but its configuration asks for {about.shape}"
            )


def fill(module: nn.Module, info: Mapping[str, TensorInfo], read: Callable[[str], Tensor], source: str) -> None:
    """Load every tensor of the image encoder ``module`` by name; complete and of the right shape, or ``UserError``.

    ``info`` and ``read`` speak the module's own names. Each tensor is copied, so the file may go away.
    """
    wanted = {name: TensorInfo.of(tensor) for name, tensor in module.state_dict().items()}
    compare(info, wanted, source, "the image encoder")
    module.load_state_dict({name: read(name).clone() for name in wanted}, assign=True)


def pretrained(
    kind: type[Model], config: PreTrainedConfig, source: Path | Mapping[str, Tensor], where: Path | str,
    dtype: torch.dtype = torch.float32, spare: bool = False,
) -> Model:  # fmt: skip
    """``kind.from_pretrained`` in eval mode on the CPU, all or nothing.

    source: a folder, or tensors by the model's names. spare: tensors that the model has no use for are no fault, as
    where a video checkpoint holds its tracker among others. Raises ``UserError``, beginning with ``where``, for what
    transformers cannot read, and for tensors that are missing, of another shape or left over.
    """
    folder, state = (source, None) if isinstance(source, Path) else (None, dict(source))
    try:
        with quiet_transformers():
            model, found = kind.from_pretrained(
                folder, config=config, state_dict=state, dtype=dtype, use_safetensors=True, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: cannot be loaded as a {kind.__name__}: {why}") from None
    for problem, names in found.items():
        if names and not (spare and problem == "unexpected_keys"):
            raise UserError(
                f"{where}: wrong checkpoint: {len(names)} {problem.replace('_', ' ')} for a {kind.__name__} of its "
                f"configuration, such as {min(map(str, names))}"
            )
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers about what is checked here anyway."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
