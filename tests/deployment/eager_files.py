"""Exported models whose files are run by PyTorch: the parts themselves, which the gate compares with the files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from samdistill.deployment import runtime
from samdistill.deployment.companions import canvas, kind_of, network_of
from samdistill.deployment.folder import parts_of
from samdistill.deployment.parts import Part
from samdistill.deployment.parts_detector import bake
from samdistill.inference.concepts import ConceptModel
from samdistill.ops.promptable import Promptable


class Eager(runtime.Network):
    """A part in place of its file."""

    def __init__(self, part: Part, static: bool) -> None:
        self.part, self.path = part, Path(part.name)
        lengths = part.traced if static else {}
        self._inputs = {
            port.name: SimpleNamespace(shape=[lengths.get(axis, axis) for axis in port.shape]) for port in part.inputs
        }

    @property
    def inputs(self) -> dict[str, SimpleNamespace]:
        return self._inputs

    @torch.no_grad()
    def __call__(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.check(values)
        given = [torch.from_numpy(np.ascontiguousarray(values[port.name])).to(port.dtype) for port in self.part.inputs]
        found = self.part.module(*given)
        return {port.name: value.numpy() for port, value in zip(self.part.outputs, found, strict=True)}


def eager(
    model: ConceptModel | Promptable, folder: Path, static: bool = False, vocabulary: Sequence[str] = ()
) -> runtime.Model:
    """An exported model that runs the parts of ``model``. ``folder`` has the tokenizer."""
    baked = bake(model, vocabulary) if vocabulary else None  # type: ignore[arg-type]
    found = runtime.Model.__new__(runtime.Model)
    found.record = {"canvas": canvas(model), "context": getattr(getattr(model, "words", None), "context", None)}
    found.folder, found.kind, found.canvas = folder, kind_of(model), runtime.canvas_of(found.record)
    found.config, found._tokenizer, found._concepts = (
        json.loads(network_of(model).config.to_json_string(False)),
        None,
        {},
    )
    found.networks = {part.name: Eager(part, static) for part in parts_of(model, baked, static)}  # type: ignore[misc]
    found.vocabulary = None
    if baked is not None:
        found.vocabulary = runtime.Vocabulary.__new__(runtime.Vocabulary)
        found.vocabulary.phrases = list(vocabulary)
        found.vocabulary._rows = {phrase: row for row, phrase in enumerate(baked.phrases)}
    return found
