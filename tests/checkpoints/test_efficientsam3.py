"""Students in EfficientSAM3's files: what is read from them, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samdistill.checkpoints.efficientsam3 import (
    read_text,
    read_trunk,
    students_in,
    text_config,
    write_text,
    write_trunk,
)
from samdistill.checkpoints.rename_efficientsam3 import TRUNKS, text_to_theirs
from samdistill.ops.images import SAM3_MEAN, SAM3_STD
from samdistill.students import StudentTrunk, StudentTrunkConfig, TextStudent, TextStudentConfig
from samdistill.types import UserError

FILE = Path("student.pth")
SAM3 = {"input_mean": SAM3_MEAN, "input_std": SAM3_STD, "attention_eps": 1e-15}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1, "width": 32,
        "projection_dim": 64, "vocab_size": 40, "max_position_embeddings": 8, "attend_padding": True}  # fmt: skip
TRUNK, WORDS = "detector.backbone.vision_backbone.trunk.model.", "detector.backbone.language_backbone."


def scramble(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def trunk() -> StudentTrunk:
    config = StudentTrunkConfig(backbone="es_ev_s", head="published", hidden_size=64, image_size=126, **SAM3)
    return scramble(StudentTrunk(config))


@pytest.fixture(scope="module")
def published(trunk) -> dict[str, Tensor]:
    """The file of its student."""
    return {TRUNKS["efficientvit_b0"].their_name(name) or "": value for name, value in trunk.state_dict().items()}


@pytest.fixture(scope="module", params=[True, False], ids=["with convolutions", "transformer alone"])
def text(request) -> TextStudent:
    return scramble(TextStudent(TextStudentConfig(**TEXT, use_repmixer_blocks=request.param)))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("prefix", ["", "module.", "student_trunk.", "module.student_trunk."])
def test_a_student_of_the_first_stage_reads_imagenets_statistics(prefix, trunk, published) -> None:
    found = read_trunk({prefix + name: value for name, value in published.items()}, FILE, 14, 126)
    assert found is not None and same(found[1], trunk.state_dict())
    config = found[0]
    assert (config.backbone, config.head, config.hidden_size) == ("efficientvit_b0", "published", 64)
    assert (config.patch_size, config.image_size) == (14, 126)
    assert config.input_mean == pytest.approx([0.485, 0.456, 0.406]) and config.host_mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("prefix", [TRUNK, TRUNK.removeprefix("detector."), f"{TRUNK}student_trunk."])
def test_a_merged_student_reads_sam3s_statistics_and_leaves_other_tensors(prefix, trunk, published) -> None:
    state = {prefix + name: value for name, value in published.items()} | {"detector.transformer.x": torch.zeros(1)}
    found = read_trunk(state, FILE)
    assert found is not None and same(found[1], trunk.state_dict())
    assert found[0].input_mean == list(SAM3_MEAN) and found[0].input_std == list(SAM3_STD)


def test_other_files_have_no_student_and_strange_names_are_refused(published) -> None:
    assert read_trunk({"a": torch.zeros(1)}, FILE) is None and read_text({"a": torch.zeros(1)}, FILE) is None
    assert students_in({"a": torch.zeros(1)}, FILE) == ""
    assert students_in(published, FILE) == "a student efficientvit_b0"
    with pytest.raises(UserError, match=r"student.pth: .* 1 names are not those of .* efficientvit_b0, such as"):
        read_trunk(published | {"neck.0.weight": torch.zeros(1)}, FILE)


def test_what_was_written_is_read_back(trunk) -> None:
    config, tensors = write_trunk(trunk.config, trunk.state_dict(), FILE)
    found = read_trunk({TRUNK + name: value for name, value in tensors.items()}, FILE, 14, 126)
    assert found is not None and same(found[1], trunk.state_dict())
    assert found[0].to_dict() == config.to_dict() == trunk.config.to_dict()


@pytest.mark.parametrize("student", ["es_ev_s", "es_rv_s", "es_tv_s"])
def test_the_first_convolution_takes_over_the_normalisation(student) -> None:
    config = StudentTrunkConfig(backbone=student, head="published", hidden_size=16, image_size=126)
    own = scramble(StudentTrunk(config))
    changed, tensors = write_trunk(config, own.state_dict(), FILE)
    assert changed.input_mean == [0.5] * 3 and config.input_mean != [0.5] * 3
    theirs = StudentTrunk(changed).eval()
    back = {TRUNKS[config.backbone].our_name(name) or "": value for name, value in tensors.items()}
    theirs.load_state_dict(back)
    assert sum(not torch.equal(value, back[name]) for name, value in own.state_dict().items()) == 2
    pixels = torch.randn(1, 3, 32, 32)
    seen = []
    for model in (own, theirs):
        norm = next(module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d))
        hook = norm.register_forward_hook(lambda _, args, output: seen.append(output))
        model.backbone(pixels * model.input_scale + model.input_shift)
        hook.remove()
    # the convolution adds zeros at the edge, which are another colour before the normalisation
    torch.testing.assert_close(seen[0][..., 1:, 1:], seen[1][..., 1:, 1:])
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize(
    ("settings", "said"), [({"head": "fused"}, "with the head 'fused'"), ({"backbone": "resnet18"}, "'resnet18'")]
)
def test_a_trunk_without_published_names_is_refused(settings, said) -> None:
    config = StudentTrunkConfig(**({"backbone": "es_ev_s", "head": "published"} | settings))
    with pytest.raises(UserError, match=f"student.pth: EfficientSAM3 has no names for the backbone .*{said}"):
        write_trunk(config, {}, FILE)


@pytest.mark.parametrize("prefix", ["", "module.", WORDS, WORDS.removeprefix("detector.")])
def test_a_text_encoder_and_its_configuration_are_read_back(prefix, text) -> None:
    written = write_text(text.config, text.state_dict(), FILE)
    found = read_text({prefix + name: value for name, value in written.items()}, FILE)
    assert found is not None and same(found[1], text.state_dict())
    assert found[0].to_dict() == text.config.to_dict()
    assert students_in(written, FILE) == "a text encoder of 3 layers"


def test_a_text_encoder_that_its_reader_would_build_otherwise_is_refused(text) -> None:
    for settings, said in (
        ({"attend_padding": False}, "trained with masked padding.* train it with student.attend_padding=true"),
        (
            {"num_attention_heads": 4},
            "takes num_attention_heads 1 for a text encoder of 64 channels, but this .* 4",
        ),
        ({"hidden_act": "relu"}, "takes hidden_act 'gelu' .* has 'relu'"),
    ):
        config = TextStudentConfig.from_dict(text.config.to_dict() | settings)
        with pytest.raises(UserError, match=f"student.pth: .*{said}"):
            write_text(config, text.state_dict(), FILE)


def test_a_damaged_text_encoder_is_refused(text) -> None:
    published = text_to_theirs(text.state_dict())
    with pytest.raises(UserError, match=r"1 names are not those of .* text encoder, such as encoder.strange"):
        read_text(published | {"encoder.strange": torch.zeros(1)}, FILE)
    with pytest.raises(UserError, match="has a wrong number of axes"):
        read_text(published | {"encoder.embedding_layer.weight": torch.zeros(3)}, FILE)
    state = text.state_dict()
    del state["text_projection.weight"]
    with pytest.raises(UserError, match=r"a text encoder of EfficientSAM3 without text_projection.weight"):
        text_config(state, FILE)
