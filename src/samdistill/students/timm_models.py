"""timm's models by name, as timm ships them.

timm's registry can be overwritten: importing MobileSAM's or EfficientSAM3's code registers functions of theirs under
timm's names, without the settings that timm keeps of them. Hence a name that timm ships is looked up in timm's modules,
and the registry is asked for other names alone.
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
    """build: timm's function for the architecture, as ``timm.create_model`` calls it. settings: of the weights that the
    name stands for, with their normalisation and where they are downloaded from."""

    name: str
    build: Callable[..., nn.Module]
    settings: PretrainedCfg


def current_name(name: str) -> str:
    """What timm calls a model today that it once had under ``name``."""
    return get_deprecated_models().get(name) or name


def find_timm(name: str) -> TimmArchitecture | None:
    """The model behind a timm name (``resnet18``, or ``resnet18.a1_in1k`` for certain weights), or None.

    Raises ``UserError`` for weights that timm does not have of a model it has, and for a registered model without
    settings.
    """
    architecture, _, tag = name.partition(".")
    build = getattr(timm.models, architecture, None)  # the package imports the functions of all of its modules
    own = getattr(sys.modules.get(getattr(build, "__module__", "")), "default_cfgs", {}).get(architecture)
    if build is None or own is None:
        return _registered(name) if timm.is_model(architecture) and ":" not in name else None
    tag = tag or own.tags[0]
    if tag not in own.cfgs:
        close = difflib.get_close_matches(tag, own.cfgs, n=3) or list(own.cfgs)[:3]
        raise UserError(f"timm has no weights {tag!r} of {architecture!r}; there is {' and '.join(map(repr, close))}")
    found = own.cfgs[tag]
    hub = f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"
    settings = replace(
        found, architecture=architecture, tag=tag or None,
        hf_hub_id=hub if found.hf_hub_id == "timm/" else found.hf_hub_id,
    )  # fmt: skip
    return TimmArchitecture(name, build, settings)


def _registered(name: str) -> TimmArchitecture:
    """A model that is not timm's, registered by its user."""
    try:
        return TimmArchitecture(
            name, timm.model_entrypoint(name), timm.get_pretrained_cfg(name, allow_unregistered=False)
        )
    except RuntimeError as error:
        raise UserError(
            f"backbone {name!r} is registered with timm without settings ({error}); put them into default_cfgs of the "
            "module that registers it"
        ) from None
