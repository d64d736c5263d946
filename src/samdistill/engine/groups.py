"""Frozen parameters by epoch, and parameter groups of the optimiser."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import FreezeConfig, RateConfig
from ..types import UserError

_SHOWN = 8
"""Largest number of names that an error lists."""


class Freezing:
    """Apply the rules of ``train.freeze`` to a student.

    A parameter is frozen while at least one rule that matches it applies. Rules end and do not begin later, so a
    parameter that trains in one epoch trains in all later ones. Parameters that the task built without
    ``requires_grad`` never train.

    The constructor sets ``requires_grad`` for all parameters that train in some epoch, and for no others. An optimiser,
    DDP and a weight average that are made then include all of them. ``start`` freezes those that do not train in an
    epoch.

    Args:
        student: The student.
        rules: The rules.
        epochs: Epochs of the run. A rule that lasts as long freezes for the whole run.
        frozen_statistics: Keep all batch norms in eval mode (``train.batch_norm: frozen``).

    Raises:
        UserError: A pattern matches no parameter, or no parameter trains in some epoch.
    """

    def __init__(
        self, student: nn.Module, rules: Sequence[FreezeConfig], epochs: int, frozen_statistics: bool = False
    ) -> None:
        self.student, self.frozen_statistics = student, frozen_statistics
        names = _names(student)
        self._begins = {p: 0 for p in names if p.requires_grad}
        """First epoch in which each parameter trains, without those that never train."""
        if not self._begins:
            raise UserError("the student has no trainable parameter: every one is frozen")
        held = dict.fromkeys(names, 0)
        for rule in rules:
            until = epochs if rule.until is None else rule.until
            for parameter in _matching("train.freeze", rule.match, names):
                held[parameter] = max(held[parameter], until)
        self._begins = {p: held[p] for p in self._begins if held[p] < epochs}
        if 0 not in self._begins.values():
            last = min(self._begins.values(), default=epochs) - 1
            through = f" to {last}" if last else ""
            raise UserError(
                f"train.freeze leaves nothing to train in epoch 0{through} (of 0 to {epochs - 1}): "
                "leave a part of the student out of the rules, or let one end earlier"
            )
        for parameter in names:
            parameter.requires_grad_(parameter in self._begins)

    def start(self, epoch: int) -> int:
        """Set ``requires_grad`` for ``epoch`` (from 0), and the modes of a student in train mode.

        A batch norm whose own parameters are all frozen is set to eval mode, because its statistics are weights too.
        With ``frozen_statistics`` every batch norm is. Dropout in frozen parts stays on.

        Returns:
            Number of parameters (tensors) that train.
        """
        for parameter, first in self._begins.items():
            parameter.requires_grad_(first <= epoch)
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                own = list(module.parameters(recurse=False))
                if self.frozen_statistics or (own and not any(p.requires_grad for p in own)):
                    module.eval()
        return sum(first <= epoch for first in self._begins.values())


def frozen_until(name: str, rules: Sequence[FreezeConfig]) -> float:
    """Return the first epoch in which no rule freezes the parameter ``name``; infinity if one lasts."""
    ends = [rule.until for rule in rules if any(fnmatchcase(name, glob) for glob in rule.match)]
    return max((math.inf if end is None else end for end in ends), default=0)


def parameter_groups(student: nn.Module, weight_decay: float, rates: Sequence[RateConfig] = ()) -> list[dict[str, Any]]:
    """Return the parameters that require a gradient, in one group per ``scale`` and weight decay.

    Biases and 1-D parameters (norms) have no weight decay. The engine sets the learning rate of a group from its
    ``scale``.

    Args:
        student: The student.
        weight_decay: Weight decay of matrices and kernels.
        rates: Scales of the learning rate. The first one that matches a name of the parameter applies; otherwise 1.

    Raises:
        UserError: A pattern matches no parameter, a rate matches only parameters that never train, or no parameter
            requires a gradient.
    """
    names = _names(student)
    scales: dict[nn.Parameter, float] = {}
    for rate in rates:
        found = _matching("train.rates", rate.match, names)
        if not any(parameter.requires_grad for parameter in found):
            globs = ", ".join(map(repr, rate.match))
            raise UserError(
                f"train.rates: {globs}: every parameter that matches is frozen for the whole run; leave the rate out, "
                "or change train.freeze"
            )
        for parameter in found:
            scales.setdefault(parameter, rate.scale)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, called in names.items():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or called[0].endswith("bias")
            groups.setdefault((scales.get(parameter, 1.0), plain), []).append(parameter)
    if not groups:
        raise UserError("the student has no trainable parameter: every one is frozen")
    return [
        {"params": groups[scale, plain], "weight_decay": 0.0 if plain else weight_decay, "scale": scale}
        for scale, plain in sorted(groups, key=lambda key: (key[0] != 1, key))
    ]


def _names(student: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return all names of each parameter. A tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _matching(key: str, globs: Iterable[str], names: dict[nn.Parameter, list[str]]) -> list[nn.Parameter]:
    """Return the parameters that match one of ``globs``. Each pattern must match at least one."""
    found: dict[nn.Parameter, None] = {}
    for glob in globs:
        hits = [p for p, called in names.items() if any(fnmatchcase(name, glob) for name in called)]
        if not hits:
            raise UserError(f"{key}: {glob!r} matches no parameter of the student{_suggestion(glob, names)}")
        found |= dict.fromkeys(hits)
    return list(found)


def _suggestion(glob: str, names: dict[nn.Parameter, list[str]]) -> str:
    """Return the end of the error message: a similar name, or a pattern for a similar module."""
    known: dict[str, None] = {}
    for called in names.values():
        for name in called:
            parts = name.split(".")
            known |= dict.fromkeys(".".join((*parts[:depth], "*")) for depth in range(1, len(parts)))
            known[name] = None
    close = difflib.get_close_matches(glob, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    tops = [name for name in known if name.count(".") <= 1 and (name.endswith(".*") or "." not in name)]
    more = f" and {len(tops) - _SHOWN} more" if len(tops) > _SHOWN else ""
    return f"; there is: {', '.join(tops[:_SHOWN])}{more}"
