"""Loading of model folders and weights. A load either succeeds completely or raises.

Model folders from outside are opened only in this module: ``read_settings`` and ``open_config`` read ``config.json``,
``pretrained`` loads the model. Errors of libraries become one ``UserError`` that names the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from accelerate import init_empty_weights
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..ops.phrases import follow_padding
from ..reading import Number, Table, fits, foreign, read_json
from ..types import UserError
from .files import STUDENT_FOLDER, TensorInfo, locate, open_weights

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)
CONFIG = "config.json"
MOST_LAYERS, MOST_PIXELS, MOST_SPARE, MOST_BUFFERS = 1000, 16384, 2**26, 2**29
"""Limits of a configuration: layers of one kind, pixels of a side, parameters in excess of twice those that the file
holds, and elements of all computed buffers.
"""
_LAYERS = re.compile(r"layers|blocks|stages|depth|levels|memory_latents")
_STATISTICS = re.compile(r"^(image|host|input)_(mean|std)$")
_Means = tuple[Number, Number, Number]
_Deviation = Annotated[Number, Field(gt=0)]
_Deviations = tuple[_Deviation, _Deviation, _Deviation]
_SIDES = re.compile(r"(^|_)(image|patch)_size$|^hidden_size$|^num_attention_heads$")


def model_kinds(place: Path) -> dict[Path, str | None]:
    """Return the model folders in ``place`` and the model type of each.

    The folders are ``place`` itself and a run's ``student/`` and ``merged/``.
    """
    folders = [folder for folder in (place, place / STUDENT_FOLDER, place / "merged") if (folder / CONFIG).is_file()]
    return {folder: read_settings(folder).get("model_type") for folder in folders}


def read_settings(folder: Path) -> Table:
    """Read the ``config.json`` of a model folder and check that no value in it can do harm.

    Raises:
        UserError: The file is missing or not a JSON object; the model type is not a string; a number is not finite or
            exceeds a limit such as ``MOST_LAYERS``; a key would replace a method of the configuration class; or the
            weights are quantised.
    """
    path = folder / CONFIG
    return check_settings(read_json(path, Table, "not a readable configuration"), path)


def check_settings(settings: Table, where: Path) -> Table:
    """Return ``settings`` unchanged, checked as in ``read_settings``. ``where`` names their file in errors."""
    try:
        fits(settings.get("model_type"), str | None)
        _check(settings, "")
        if settings.get("quantization_config") is not None:
            raise ValueError("quantization_config: quantised weights are not supported; give the original weights")
    except ValueError as error:
        raise UserError(f"{where}: not a readable configuration: {error}") from None
    return settings


def _check(node: Any, where: str) -> None:
    """Raise ``ValueError`` with the path of the first value that no model configuration can have."""
    if isinstance(node, dict):
        for key, value in node.items():
            place = f"{where}.{key}" if where else key
            if (key.startswith("__") and key != "__float__") or callable(getattr(PreTrainedConfig, key, None)):
                raise ValueError(f"{place} is not a valid setting")
            if isinstance(value, int | float):
                _check_number(value, key, place)
            if _STATISTICS.search(key) and value is not None:
                fits(value, _Deviations if key.endswith("std") else _Means)
            _check(value, place)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            if isinstance(value, int | float):
                _check_number(value, where.rpartition(".")[2], f"{where}[{number}]")
            _check(value, f"{where}[{number}]")


def _check_number(value: float, name: str, place: str) -> None:
    if not -(2**31) <= value < 2**31:  # the comparison is also False for NaN
        raise ValueError(f"{place} is out of range: {value!r:.40}")
    if isinstance(value, bool):
        return
    if _SIDES.search(name) and not 1 <= value <= MOST_PIXELS:
        raise ValueError(f"{place} must be between 1 and {MOST_PIXELS}, got {value!r}")
    if _LAYERS.search(name) and not 0 <= abs(value) <= MOST_LAYERS:
        raise ValueError(f"{place} must be at most {MOST_LAYERS}, got {value!r}")


def open_config(folder: Path, kind: type[PreTrainedConfig] | None = None) -> Any:
    """Load the configuration of a model folder.

    Args:
        folder: The model folder.
        kind: Configuration class. None selects the class by the model type in the file.

    Raises:
        UserError: ``read_settings`` or the class refuses the file.
    """
    named = read_settings(folder).get("model_type")
    with foreign(folder / CONFIG, f"model type {named!r} cannot be read"), quiet_transformers():
        if kind is None:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            config = kind.from_pretrained(folder, local_files_only=True)
        # The file must not select the attention implementation, since its name can refer to code on the hub.
        config._attn_implementation = None
        return config


def locate_config(path: str, kind: str) -> tuple[Path, Any]:
    """Return the folder and the configuration of a Hugging Face checkpoint.

    Args:
        path: A folder or a hub id. For a hub id only ``config.json`` is downloaded.
        kind: Kind of model, for the error message.

    Raises:
        UserError: There is no ``config.json``, or ``open_config`` refuses it.
    """
    folder = locate(path, (CONFIG,))
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}, so this is not a Hugging Face folder of a {kind} model")
    return folder, open_config(folder)


def build_config(kind: type[Config], settings: Table, where: Path) -> Config:
    """Build a configuration from ``settings``, checked as those of a folder. ``where`` names their file in errors."""
    with foreign(where, "not a readable configuration"):
        config = kind.from_dict(dict(check_settings(settings, where)))
        config._attn_implementation = None
        return config


def skeleton(build: Callable[[], nn.Module], where: object) -> nn.Module:
    """Build a module whose parameters take no memory. Its buffers, which are computed and not loaded, hold values.

    Raises:
        UserError: No model can be built from the configuration, or its buffers are too large. The message names
            ``where``.
    """
    with foreign(where, "no model can be built from its configuration"):
        with torch.device("meta"):
            _check_buffers(build())
        with init_empty_weights(include_buffers=False):
            return build()


def _check_buffers(model: nn.Module) -> None:
    if sum(buffer.numel() for buffer in model.buffers()) > MOST_BUFFERS:
        raise ValueError("the sizes in its configuration are too large for any memory")


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of ``module``."""
    return sum(p.numel() for p in module.parameters())


def compare(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], source: str, what: str) -> None:
    """Raise ``UserError`` unless ``found`` and ``wanted`` have the same names and shapes."""
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


def fill(
    module: nn.Module, info: Mapping[str, TensorInfo], read: Callable[[str], Tensor], source: str,
    what: str = "the image encoder",
) -> None:  # fmt: skip
    """Load every tensor of ``module``.

    Each tensor is copied, so the file can be deleted afterwards.

    Args:
        module: Module to fill.
        info: Shape and dtype of the available tensors, by the module's own names.
        read: Returns a tensor by the module's own name.
        source: Name of the checkpoint in error messages.
        what: Name of the module in error messages.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    wanted = {name: TensorInfo.of(tensor) for name, tensor in module.state_dict().items()}
    compare(info, wanted, source, what)
    module.load_state_dict({name: read(name).clone() for name in wanted}, assign=True)


def pretrained(
    kind: type[Model], config: PreTrainedConfig, source: Path | Mapping[str, Tensor], where: Path | str,
    dtype: torch.dtype = torch.float32, spare: bool = False, new: Sequence[str] = (),
) -> Model:  # fmt: skip
    """Load a model with ``kind.from_pretrained`` on the CPU and set it to eval mode.

    Args:
        kind: Model class.
        config: Configuration of the model.
        source: A folder, or tensors by the model's own names.
        where: Start of the error messages.
        dtype: Type of the parameters.
        spare: Allow tensors that the model does not have. A video checkpoint, for example, holds more than its tracker.
        new: Prefixes of the parameters that the source may lack.

    Raises:
        UserError: transformers cannot read the source, the configuration describes a much larger model than the source
            holds, or tensors are missing, of another shape or left over.
    """
    folder, state = (source, None) if isinstance(source, Path) else (None, dict(source))
    info = open_weights(source).info if isinstance(source, Path) else {k: TensorInfo.of(t) for k, t in source.items()}
    with foreign(where, f"cannot be loaded as a {kind.__name__}"), quiet_transformers():
        _check_size(kind, config, sum(about.count for about in info.values()), new)
        model, found = kind.from_pretrained(
            folder, config=config, state_dict=state, dtype=dtype, use_safetensors=True, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    for problem, names in found.items():
        names = sorted(str(name) for name in names if problem != "missing_keys" or not str(name).startswith(tuple(new)))
        if names and not (spare and problem == "unexpected_keys"):
            raise UserError(
                f"{where}: wrong checkpoint: {len(names)} {problem.replace('_', ' ')} for a {kind.__name__} of its "
                f"configuration, such as {names[0]}"
            )
    follow_padding(model)
    return model.eval()


def _check_size(kind: type[PreTrainedModel], config: PreTrainedConfig, held: int, new: Sequence[str]) -> None:
    """Raise ``ValueError`` for a configuration of a much larger model than the file holds, before allocating memory."""
    with torch.device("meta"):
        model = kind(config)
    wanted = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tuple(new)))
    if wanted > 2 * held + MOST_SPARE:  # smaller differences are reported by name after the model is built
        raise ValueError(f"its configuration describes {wanted} parameters, but the file has {held}")
    _check_buffers(model)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and its warnings about things that this package checks itself."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
