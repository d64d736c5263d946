"""EfficientSAM3's files as sources and as results of a merge."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from original_names import to_original
from small_students import HIDDEN, make_student
from test_efficientsam3 import SAM3, TEXT, TRUNK, WORDS, same, scramble
from torch import Tensor
from transformers import Sam3LiteTextModel, Sam3Model, Sam3TrackerModel

from samdistill.checkpoints.files import open_weights
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.original import load_original
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.rename_efficientsam3 import TRUNKS, text_to_theirs
from samdistill.checkpoints.student import trunk_backbone
from samdistill.inference.concepts import load_concept_model
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, sandbox_words
from samdistill.students import StudentTrunk, TextStudent, TextStudentConfig
from samdistill.teachers import Sam3Detector
from samdistill.types import ConceptPrompts, ImageBatch, UserError

THEIRS = {"names": "efficientsam3"}


def save(state: dict[str, Tensor], path: Path, **beside) -> Path:
    torch.save({"model": state, **beside}, path)
    return path


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> tuple[StudentTrunk, Path, Path]:
    """(student, run, file of EfficientSAM3) that read SAM 3's statistics."""
    place = tmp_path_factory.mktemp("trunk")
    model = make_student(**SAM3)
    model.save_pretrained(place / "run" / "student")
    names = TRUNKS["efficientvit_b0"]
    state = {names.their_name(name): value for name, value in model.state_dict().items()}
    return model, place / "run", save(state, place / "student.pth")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[TextStudent, Path, Path]:
    """(student, run, file of EfficientSAM3) of the width and the vocabulary of the host."""
    place = tmp_path_factory.mktemp("text")
    model = scramble(TextStudent(TextStudentConfig(**TEXT | {"vocab_size": 1000})))
    model.save_pretrained(place / "run" / "student")
    return model, place / "run", save(text_to_theirs(model.state_dict()), place / "text.pth")


@pytest.fixture
def teacher(hosts, original_state, tmp_path) -> Path:
    """A ``sam3.pt`` with its ``config.json``."""
    shutil.copy(hosts["sam3"][1] / "config.json", tmp_path / "config.json")
    return save(original_state, tmp_path / "sam3.pt")


def test_a_trunk_is_written_and_read_back(trunk, teacher, original_state, tmp_path) -> None:
    model, run, file = trunk
    report = merge(run, teacher, tmp_path / "out.pt", **THEIRS)
    written, own = open_weights(tmp_path / "out.pt"), torch.load(file)["model"]
    kept = {name: value for name, value in original_state.items() if "vision_backbone.trunk." not in name}
    assert same(dict(written), kept | {TRUNK + name: value for name, value in own.items()})
    assert set(report.added) == {TRUNK + name for name in own}
    assert not any("edge" in note for note in report.notes)
    for _ in range(2):  # with the report beside the file, and without it, as EfficientSAM3's own files are
        opened = load_original(tmp_path / "out.pt", Sam3Model)
        assert isinstance(opened.vision_encoder.backbone, StudentTrunk)
        assert same(opened.vision_encoder.backbone.state_dict(), model.state_dict())
        assert opened.vision_encoder.backbone.config.input_mean == [0.5, 0.5, 0.5]
        (tmp_path / "out.pt.merge.json").unlink(missing_ok=True)


@pytest.mark.parametrize("source", ["student.pth", "merged.pt"])
def test_its_files_are_sources(source, trunk, teacher, hosts, tmp_path) -> None:
    model, run, file = trunk
    shutil.copy(file, tmp_path / "student.pth")
    merge(run, teacher, tmp_path / "merged.pt", **THEIRS)
    merge(tmp_path / source, hosts["tracker"][1], tmp_path / "tracker")
    found = load_promptable(tmp_path / "tracker").vision_encoder.backbone
    assert same(found.state_dict(), model.state_dict())
    # what the training read: ImageNet's statistics in the first stage, SAM 3's in a merged file
    assert (found.config.input_mean == [0.5, 0.5, 0.5]) == (source == "merged.pt")
    merge(tmp_path / source, teacher, tmp_path / "ours.pt")
    assert {name for name in open_weights(tmp_path / "ours.pt") if name.startswith(TRUNK)} == {
        TRUNK + name.replace("backbone.", "backbone.model.", 1) for name in model.state_dict()
    }
    if source == "student.pth":
        assert same(trunk_backbone(tmp_path / source, "efficientvit_b0"), model.backbone.state_dict())
    else:
        with pytest.raises(UserError, match=r"normalised with the mean \[0.5, 0.5, 0.5\], but this student has timm's"):
            trunk_backbone(tmp_path / source, "efficientvit_b0")
    with pytest.raises(UserError, match="the backbone 'efficientvit_b0', but this student has 'repvit_m1_1'"):
        trunk_backbone(tmp_path / source, "repvit_m1_1")


def test_another_normalisation_is_folded_with_a_note(student, teacher, tmp_path) -> None:
    report = merge(student[1], teacher, tmp_path / "out.pt", **THEIRS)
    assert any("outputs differ near the image's edge" in note for note in report.notes)


def test_a_text_encoder_goes_into_a_folder_and_a_file(text, teacher, original_state, tmp_path) -> None:
    model, run, file = text
    for number, (source, settings) in enumerate(((file, THEIRS), (run, THEIRS), (run, {}))):
        out = tmp_path / f"{number}.pt"
        report = merge(source, teacher, out, **settings)
        kept = {name: value for name, value in original_state.items() if "language_backbone" not in name}
        own = {WORDS + name: value for name, value in torch.load(file)["model"].items()}
        assert same(dict(open_weights(out)), kept | own) and set(report.added) == set(own)
        opened = load_original(out, Sam3LiteTextModel)
        names = model.state_dict().keys()
        assert same({name: opened.state_dict()[name] for name in names}, model.state_dict())
        with pytest.raises(UserError, match="a text encoder of EfficientSAM3, which a Sam3Model cannot host; open it"):
            load_original(out, Sam3Model)
    assert any("reads padding" in note for note in merge(file, teacher, tmp_path / "folder").notes)
    opened = Sam3LiteTextModel.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert same({name: opened.state_dict()[name] for name in names}, model.state_dict())
    assert opened.config.text_config.attend_padding is True
    with pytest.raises(UserError, match="SAM 3's text encoder, which a Sam3LiteTextModel cannot host"):
        load_original(teacher, Sam3LiteTextModel)


@pytest.mark.parametrize("out", ["both.pt", "both"])
def test_both_in_one_call_are_both_in_two(out, trunk, text, teacher, tmp_path) -> None:
    names = THEIRS if out == "both.pt" else {}
    report = merge(trunk[1], teacher, tmp_path / out, text=text[1], **names)
    merge(trunk[1], teacher, tmp_path / "middle.pt", **names)
    merge(text[1], tmp_path / "middle.pt", tmp_path / f"two {out}", **names)
    found, wanted = open_weights(tmp_path / out), open_weights(tmp_path / f"two {out}")
    assert same(dict(found), dict(wanted))
    assert len(report.added) == len(trunk[0].state_dict()) + len(text_names(text[0], out))
    assert set(report.kept) | set(report.added) == set(found)
    place = tmp_path / "both" / "merge.json" if out == "both" else tmp_path / "both.pt.merge.json"
    assert json.loads(place.read_text()) == report.to_dict()
    if out == "both.pt":
        both = load_original(tmp_path / out, Sam3LiteTextModel)
        assert same(both.vision_encoder.backbone.state_dict(), trunk[0].state_dict())
        (tmp_path / "both.pt.merge.json").unlink()
        assert same(load_original(tmp_path / out, Sam3LiteTextModel).state_dict(), both.state_dict())


def text_names(model: TextStudent, out: str) -> set[str]:
    return set(text_to_theirs(model.state_dict()) if out == "both.pt" else model.state_dict())


def test_a_merged_file_answers_as_the_students_and_the_teachers_heads_do(hosts, trunk, tmp_path, near) -> None:
    """Vision from the trunk, words from the text encoder with padding, everything from the names of the file alone."""
    config = hosts["sam3"][0].config.__class__.from_dict(hosts["sam3"][0].config.to_dict())
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(VOCABULARY), CONTEXT
    torch.manual_seed(5)
    model = Sam3Model(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    sandbox_words().save(tmp_path)
    save(to_original(model.state_dict())[0], tmp_path / "sam3.pt")
    words = scramble(TextStudent(TextStudentConfig(**TEXT | {"vocab_size": len(VOCABULARY)})))
    words.save_pretrained(tmp_path / "words" / "student")
    merge(trunk[1], tmp_path / "sam3.pt", tmp_path / "both.pt", text=tmp_path / "words", **THEIRS)
    (tmp_path / "both.pt.merge.json").unlink()
    state = {name.removeprefix("detector."): value for name, value in torch.load(tmp_path / "both.pt")["model"].items()}
    save(state, tmp_path / "bare.pt")  # as EfficientSAM3's training writes it
    for name in ("both.pt", "bare.pt"):
        detector = load_concept_model(tmp_path / name)
        assert isinstance(detector, Sam3Detector) and isinstance(detector.model, Sam3LiteTextModel)
        ids, mask = detector.words.encode(["red circle", "star"])
        with torch.no_grad():
            wanted = words(ids, mask).last_hidden_state
            near(detector.model.get_text_features(ids, mask, return_dict=True).pooler_output, wanted)
        images = ImageBatch.full(torch.randint(0, 256, (1, 3, 1008, 1008), dtype=torch.uint8))
        with torch.no_grad():
            levels = detector.pyramid(images)
            pixels = (images.images / 255 - 0.5) / 0.5
            tokens = trunk[0].image_embedding(pixels)
        near(detector.model.vision_encoder.backbone(pixels).last_hidden_state, tokens.flatten(2).transpose(1, 2))
        assert levels[0].shape[-1] == 288
        assert detector.answer(images, ConceptPrompts.words(["star"], [0])).pred_logits.isfinite().all()


def test_settings_of_its_training_are_read_as_dictionaries(trunk, hosts, tmp_path, monkeypatch) -> None:
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, **given) -> None:
            super().__init__(given)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patched.setitem(sys.modules, "yacs.config", module)
        settings = CfgNode(MODEL=CfgNode(BACKBONE="efficientvit_b0"))
        save(torch.load(trunk[2])["model"], tmp_path / "student.pth", config=settings, epoch=3)
    merge(tmp_path / "student.pth", hosts["sam3"][1], tmp_path / "merged")


def test_a_causal_text_encoder_is_refused(text, teacher, tmp_path) -> None:
    state, settings = torch.load(text[2])["model"], {"MODEL": {"BACKBONE": "MobileCLIP-B"}}
    path = save(state, tmp_path / "b.pth", config=settings)
    with pytest.raises(UserError, match=r"b.pth: a MobileCLIP-B, whose attention is causal; .* cannot host it"):
        merge(path, teacher, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 999}, "a vocabulary of 999 tokens, but the tokenizer of .* has 1000"),
        ({"width": 16}, "gives 16 channels, but the heads of .* read 32"),
    ],
)
def test_a_text_encoder_for_another_host_is_refused(settings, said, teacher, hosts, tmp_path) -> None:
    model = scramble(TextStudent(TextStudentConfig(**TEXT | {"vocab_size": 1000} | settings)))
    file = save(text_to_theirs(model.state_dict()), tmp_path / "text.pth")
    for place, out in ((teacher, "out.pt"), (hosts["sam3"][1], "out")):
        with pytest.raises(UserError, match=said):
            merge(file, place, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_what_does_not_go_together_is_refused(trunk, text, student, teacher, hosts, tmp_path) -> None:
    folder, out = hosts["sam3"][1], tmp_path / "out.pt"
    other = make_student(hidden_size=48, **SAM3)
    names = TRUNKS["efficientvit_b0"]
    state = {names.their_name(name): value for name, value in other.state_dict().items()}
    save(state, tmp_path / "other.pth")
    strange = {"backbone.model.blocks.0.weight": torch.zeros(1), "head.0.weight": torch.zeros(8, 8, 1, 1)}
    save(strange, tmp_path / "strange.pth")
    missing = torch.load(trunk[2])["model"]
    del missing["head.3.bias"]
    save(missing, tmp_path / "missing.pth")
    merge(student[1], teacher, tmp_path / "seeing.pt")  # our names
    fused = tmp_path / "fused"
    make_student(head="fused").save_pretrained(fused / "student")
    cases = [
        ((trunk[1], teacher, out), {"names": "theirs"}, "--names must be samdistill or efficientsam3, got 'theirs'"),
        ((trunk[1], folder, out), THEIRS, "--names efficientsam3 is for an original sam3.pt, not for a Hugging Face"),
        ((fused, teacher, out), THEIRS, "no names for the backbone 'efficientvit_b0' with the head 'fused'"),
        ((tmp_path / "other.pth", teacher, out), {}, "the student gives 48 channels, but .* reads 64"),
        ((tmp_path / "strange.pth", teacher, out), {}, r"an unknown trunk, with names such as backbone.model.blocks.0"),
        ((tmp_path / "missing.pth", teacher, out), {}, r"missing.pth: .*head\.3\.bias"),
        (
            (text[1], tmp_path / "seeing.pt", out),
            THEIRS,
            "no such names as its trunk has; merge the trunk",
        ),
        ((text[2], teacher, out), {"target_prefix": "x."}, "are for an image trunk, not for a text encoder"),
        ((text[1], teacher, out), {"text": trunk[1]}, f"{text[1]}: a text encoder; give an image trunk first"),
        ((trunk[1], teacher, out), {"text": tmp_path / "none"}, "none: no such file or folder; give a run"),
        ((tmp_path / "none", teacher, out), {}, "none: no such file or folder; give a run"),
        ((trunk[1], teacher, tmp_path / "x"), {}, "x: the result is a file; choose an --out that ends in .pt"),
        ((trunk[1], teacher, tmp_path / "x.safetensors"), THEIRS, "the result is a file; choose an --out that ends"),
        ((trunk[1], folder, out), {}, "out.pt: the result is a folder; choose an --out without .pt"),
        ((trunk[1], teacher, out), {"text": trunk[1]}, "no text encoder; give an image trunk first"),
        (
            (trunk[1], hosts["tracker"][1], tmp_path / "x"),
            {"text": text[1]},
            f"^{re.escape(str(hosts['tracker'][1]))}: a 'sam3_tracker' model takes no words, so it cannot host",
        ),
        (
            (trunk[1], hosts["video"][1], tmp_path / "x"),
            {"text": text[1]},
            f"but the heads of {re.escape(str(hosts['video'][1]))} read 128",
        ),
    ]
    for given, settings, said in cases:
        with pytest.raises(UserError, match=said) as error:
            merge(*given, **settings)
        assert "\n" not in str(error.value)
        assert not out.exists() and not list(tmp_path.glob("x*"))


def test_a_student_alone_is_not_a_model(trunk, text) -> None:
    for file, what in ((trunk[2], "a student efficientvit_b0"), (text[2], "a text encoder of 3 layers")):
        for load in (load_concept_model, load_promptable):
            with pytest.raises(UserError, match=f"{file.name}: {what} without .*: `samdistill merge .* makes a model"):
                load(file)


def test_an_unknown_trunk_in_a_merged_file_is_refused(trunk, teacher, tmp_path) -> None:
    merge(trunk[1], teacher, tmp_path / "out.pt", **THEIRS)
    (tmp_path / "out.pt.merge.json").unlink()
    state = torch.load(tmp_path / "out.pt")["model"]
    state[f"{TRUNK}head.0.weight"] = torch.zeros(HIDDEN, 99, 1, 1)
    save(state, tmp_path / "strange.pt")
    for kind in (Sam3Model, Sam3TrackerModel):
        with pytest.raises(UserError, match=r"strange.pt: an unknown trunk of EfficientSAM3: an EfficientViT .* 99"):
            load_original(tmp_path / "strange.pt", kind)
