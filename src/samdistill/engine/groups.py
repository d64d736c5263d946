"""Which parameters train in which epoch, and at what share of the schedule's rate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import FreezeConfig, RateConfig
from ..types import UserError

_SHOWN = 8
"""Names in the list that stands in for a suggestion."""


class Freezing:
    """The rules of ``train.freeze`` over a student: a parameter is frozen while any rule that matches it holds.

    Rules only end, so what trains in one epoch trains in all later ones. What the task itself built without
    ``requires_grad`` never trains, rules or not. ``epochs``: of the run; a rule that outlasts it holds for ever.
    ``frozen_statistics``: no batch norm trains on the statistics of its batch (``train.batch_norm: frozen``).

    On construction everything that ever trains requires a gradient, and nothing else does: an optimiser, DDP and a
    weight average made then know all of it. ``start`` narrows that down for an epoch.

    Raises ``UserError`` for a glob that matches no parameter, and where nothing is left to train in an epoch.
    """

    def __init__(
        self, student: nn.Module, rules: Sequence[FreezeConfig], epochs: int, frozen_statistics: bool = False
    ) -> None:
        self.student, self.frozen_statistics = student, frozen_statistics
        names = _names(student)
        self._begins = {p: 0 for p in names if p.requires_grad}
        """Parameter to the first epoch it trains in; the frozen ones are not in it."""
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
        """Set ``requires_grad`` for ``epoch`` (from 0), and a student in train mode to what it has to be then.

        A frozen BatchNorm, one whose own parameters are all frozen, goes into eval mode: its statistics are weights
        too. So does every one where statistics are frozen. Dropout of frozen parts stays on. Gives the number of
        parameters (tensors) that train.
        """
        for parameter, first in self._begins.items():
            parameter.requires_grad_(first <= epoch)
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                own = list(module.parameters(recurse=False))
                if self.frozen_statistics or (own and not any(p.requires_grad for p in own)):
                    module.eval()
        return sum(first <= epoch for first in self._begins.values())


def parameter_groups(student: nn.Module, weight_decay: float, rates: Sequence[RateConfig] = ()) -> list[dict[str, Any]]:
    """Everything that requires a gradient, one group per ``scale`` and decay; the engine sets the rates by ``scale``.

    Matrices and kernels decay, biases and 1-D parameters (norms) do not. A parameter's scale is that of the first of
    ``rates`` that matches one of its names, 1 without. Raises ``UserError`` for a glob that matches no parameter, and
    where nothing requires a gradient.
    """
    names = _names(student)
    scales: dict[nn.Parameter, float] = {}
    for rate in rates:
        for parameter in _matching("train.rates", rate.match, names):
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
    """Every parameter and all it is called: a tied one has several names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _matching(key: str, globs: Iterable[str], names: dict[nn.Parameter, list[str]]) -> list[nn.Parameter]:
    """Parameters that one of ``globs`` matches; each glob has to match some."""
    found: dict[nn.Parameter, None] = {}
    for glob in globs:
        hits = [p for p, called in names.items() if any(fnmatchcase(name, glob) for name in called)]
        if not hits:
            raise UserError(f"{key}: {glob!r} matches no parameter of the student{_suggestion(glob, names)}")
        found |= dict.fromkeys(hits)
    return list(found)


def _suggestion(glob: str, names: dict[nn.Parameter, list[str]]) -> str:
    """The tail of the error: a name, or a part of the student as a glob, that is spelt much like this one."""
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
