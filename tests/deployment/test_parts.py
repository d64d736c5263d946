"""The eager modules of the files give what the models' own forward passes give, at every size."""

from __future__ import annotations

import pytest
import torch
from tiny_students import hosted_sam, tiny_detector, tiny_sam2, tiny_tracker

from samdistill.checkpoints.promptable import load_promptable
from samdistill.deployment.folder import parts_of
from samdistill.deployment.parts import Part
from samdistill.deployment.parts_detector import bake


def compared(part: Part) -> None:
    for sizes in part.cases:
        given = part.example(sizes, 3)
        with torch.no_grad():
            found, wanted = part.module(*given), part.reference(*given)
        assert len(found) == len(wanted) == len(part.outputs)
        for port, one, other in zip(part.outputs, found, wanted, strict=True):
            assert one.shape == other.shape and len(one.shape) == len(port.shape), port.name
            assert all(isinstance(a, str) or a == b for a, b in zip(port.shape, one.shape, strict=True)), port.name
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.fixture(scope="module", params=["sandbox-mobile", "tracker", "sam2", "hosted"])
def promptable(request: pytest.FixtureRequest):
    built = {"tracker": tiny_tracker, "sam2": tiny_sam2, "hosted": hosted_sam}
    return built[request.param]() if request.param in built else load_promptable(request.param)


@pytest.mark.parametrize("static", [False, True])
def test_a_promptable_model(promptable, static: bool) -> None:
    parts = parts_of(promptable, None, static)
    ends = ["", "_boxes", "_masks"] if static else ["", "_masks"]
    assert [p.name for p in parts] == ["vision_encoder", *(f"prompt_encoder_mask_decoder{e}" for e in ends)]
    for part in parts:
        compared(part)
        assert not static or part.cases == (part.traced,)


WHOLE = ["vision_encoder", "text_encoder", "decoder", "decoder_boxes"]


@pytest.mark.parametrize("words", [(), ("red circle", "star")])
@pytest.mark.parametrize("memory", [False, True])
def test_a_detector(memory: bool, words: tuple[str, ...]) -> None:
    student = tiny_detector(12 if memory else 0)
    parts = parts_of(student, bake(student, words) if words else None)
    names = [*WHOLE, "memory", "decoder_memory"] if memory else WHOLE if not words else ["detector"]
    assert [part.name for part in parts] == [name for name in names if not words or name != "text_encoder"]
    for part in parts:
        compared(part)
    inputs = {port.name for port in parts[-1].inputs}
    assert ("concepts" in inputs) == bool(words) and ("memory_tokens" in inputs) == memory
