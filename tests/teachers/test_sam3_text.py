"""The text teacher against transformers' whole model, in every layout, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_names import to_original
from transformers import Sam3Model

from samdistill.config import TeacherConfig
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, sandbox_words
from samdistill.teachers import Sam3Text, describe_text
from samdistill.types import UserError

TEXTS = ["red circle", "star", "large blue ring"]


def config(path: Path | str, **settings: object) -> TeacherConfig:
    return TeacherConfig(path=str(path), **settings)


def test_tokens_are_those_of_the_whole_model_and_zeros_at_padding(detector, near) -> None:
    model, folder = detector
    teacher = Sam3Text(config(folder))
    ids, mask = sandbox_words().encode(TEXTS)
    with torch.no_grad():
        wanted = model.get_text_features(ids, mask, return_dict=True).pooler_output
    tokens, found_mask = teacher.tokens(TEXTS)
    assert torch.equal(found_mask, mask) and tokens.shape == (3, CONTEXT, 32)
    near(tokens[mask.bool()], wanted[mask.bool()])
    assert not tokens[~mask.bool()].any() and not tokens.is_inference() and not tokens.requires_grad
    (maps,) = teacher.features(TEXTS)
    assert torch.equal(maps[:, :, 0].transpose(1, 2), tokens)


def test_only_the_text_encoder_is_built_and_counted(detector) -> None:
    model, folder = detector
    info = describe_text(config(folder))
    parts = (model.text_encoder, model.text_projection)
    assert info.params == sum(p.numel() for part in parts for p in part.parameters())
    assert (info.width, info.vocab_size, info.context) == (32, len(VOCABULARY), CONTEXT)
    assert sum(p.numel() for p in Sam3Text(config(folder)).model.parameters()) == info.params


def test_an_original_file_gives_the_same_tokens(detector, tmp_path: Path) -> None:
    model, folder = detector
    state, _ = to_original(model.state_dict())
    torch.save({"model": {name: tensor.clone() for name, tensor in state.items()}}, tmp_path / "sam3.pt")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    sandbox_words().save(tmp_path)
    one, other = Sam3Text(config(folder)), Sam3Text(config(tmp_path / "sam3.pt"))
    assert torch.equal(one.tokens(TEXTS)[0], other.tokens(TEXTS)[0])
    assert one.fingerprint == other.fingerprint


def test_the_fingerprint_follows_weights_precision_and_vocabulary(detector, tmp_path: Path) -> None:
    model, folder = detector
    first = Sam3Text(config(folder)).fingerprint
    assert first == Sam3Text(config(folder)).fingerprint != Sam3Text(config(folder, precision="bf16")).fingerprint
    changed = Sam3Model(model.config)
    changed.load_state_dict(model.state_dict())
    changed.vision_encoder.neck.fpn_layers[0].proj1.bias.data += 1  # not part of the text encoder
    changed.save_pretrained(tmp_path)
    sandbox_words().save(tmp_path)
    assert Sam3Text(config(tmp_path)).fingerprint == first
    changed.text_projection.bias.data += 1
    changed.save_pretrained(tmp_path)
    assert Sam3Text(config(tmp_path)).fingerprint != first


def test_a_model_without_words_and_a_phrase_that_is_too_long_are_one_line(detector, tracker) -> None:
    with pytest.raises(UserError, match="answers no questions in words"):
        Sam3Text(config(tracker[1]))
    with pytest.raises(UserError, match="only SAM 3 answers questions in words"):
        describe_text(config(detector[1], kind="sam"))
    with pytest.raises(UserError, match=f"at most {CONTEXT} are allowed"):
        Sam3Text(config(detector[1])).tokens(["red red red red red red"])
