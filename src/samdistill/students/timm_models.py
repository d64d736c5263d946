"""Lookup of timm's own models by name.

timm's registry can be overwritten: importing MobileSAM's or EfficientSAM3's code registers its functions under timm's
names, without timm's settings. Names that timm ships are therefore looked up in timm's modules. The registry is used
only for other names.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import timm
from timm.models import PretrainedCfg, get_deprecated_models
from torch import nn

from ..types import UserError


@dataclass(frozen=True)
class TimmArchitecture:
    """A timm model by name.

    Attributes:
        name: The timm name.
        build: timm's function for the architecture, as called by ``timm.create_model``.
        settings: Settings of the weights of this name: normalisation and download location.
    """

    name: str
    build: Callable[..., nn.Module]
    settings: PretrainedCfg


def current_name(name: str) -> str:
    """Return timm's current name of a model, also for a deprecated ``name``."""
    return get_deprecated_models().get(name) or name


def find_timm(name: str) -> TimmArchitecture | None:
    """Find a timm model.

    Args:
        name: ``resnet18``, or ``resnet18.a1_in1k`` for certain weights.

    Returns:
        The model, or None if there is none of this name.

    Raises:
        UserError: timm has the model but not these weights, or a registered model has no settings.
    """
    architecture, _, tag = name.partition(".")
    build = getattr(timm.models, architecture, None)  # timm.models exports the functions of all of its modules
    own = getattr(sys.modules.get(getattr(build, "__module__", "")), "default_cfgs", {}).get(architecture)
    if build is None or own is None:
        return _registered(name) if timm.is_model(architecture) and ":" not in name else None
    tag = tag or own.tags[0]
    if tag not in own.cfgs:
        close = difflib.get_close_matches(tag, own.cfgs, n=3) or list(own.cfgs)[:3]
        raise UserError(f"timm has no weights {tag!r} of {architecture!r}; it has {', '.join(map(repr, close))}")
    found = own.cfgs[tag]
    hub = f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"
    settings = replace(
        found, architecture=architecture, tag=tag or None,
        hf_hub_id=hub if found.hf_hub_id == "timm/" else found.hf_hub_id,
    )  # fmt: skip
    return TimmArchitecture(name, build, settings)


def _registered(name: str) -> TimmArchitecture:
    """Return a model that the user registered with timm."""
    try:
        return TimmArchitecture(
            name, timm.model_entrypoint(name), timm.get_pretrained_cfg(name, allow_unregistered=False)
        )
    except RuntimeError as error:
        raise UserError(
            f"backbone {name!r} is registered with timm without settings ({error}); put them into default_cfgs of the "
            "module that registers it"
        ) from None
