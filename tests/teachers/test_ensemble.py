"""Several teachers: their shares, and that each is asked and none of weight 0 is even opened."""

from __future__ import annotations

import pytest
import torch
from transformers import SamConfig, SamModel

from samdistill.config import TeacherEntry
from samdistill.data import ObjectBatch
from samdistill.ops.pca import Projection
from samdistill.teachers import Ensemble, PromptTeacher, fit_projection, shares
from samdistill.teachers.base import Prompted
from samdistill.types import ImageBatch, PromptGroup, Prompts, UserError


def entry(name: str, path="nowhere", weight: float = 1.0) -> TeacherEntry:
    return TeacherEntry(name=name, checkpoint=str(path), weight=weight)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """As conftest's, with positions of the decoder's width: it can be asked."""
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
              "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8}  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision | sizes, prompt_encoder_config={"hidden_size": 16, **sizes}, mask_decoder_config=decoder
    )
    torch.manual_seed(0)
    model, folder = SamModel(config), tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def both(sam, tracker) -> Ensemble:
    found = Ensemble.load([entry("sam", sam[1], 1), entry("none", weight=0), entry("sam3", tracker[1], 3)])
    for number, teacher in enumerate(found.teachers.values()):
        d = teacher.patch_channels
        teacher.projection = Projection(torch.zeros(d), torch.eye(d)[: 8 + number])
    return found


def scene(side: int = 64) -> tuple[ObjectBatch, tuple[PromptGroup, ...]]:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[8.0, 8.0, 40.0, 50.0]]]).expand(2, 1, 4)
    prompts = Prompts(torch.ones(2, 1, dtype=torch.bool), boxes=boxes)
    groups = (PromptGroup(torch.tensor([0, 1]), prompts, multimask=False),)
    masks, said = torch.ones(2, 1, side, side, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    return ObjectBatch(ImageBatch.full(images), masks, said, said, (groups,)), groups


def test_shares_sum_to_one_in_the_given_order() -> None:
    found = shares([entry("b", weight=3), entry("a", weight=1), entry("c", weight=0)])
    assert list(found.items()) == [("b", 0.75), ("a", 0.25)]
    assert shares([entry("only", weight=1e-3)]) == {"only": 1.0}


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([entry("a", weight=0), entry("b", weight=0)], "sum to zero"),
        ([], "sum to zero"),
        ([entry("a"), entry("b"), entry("a")], "same name: a, b, a"),
    ],
)
def test_teachers_that_cannot_be_weighed_are_refused(entries, complaint) -> None:
    with pytest.raises(UserError, match=complaint):
        Ensemble.load(entries)


def test_each_teacher_with_a_weight_answers_for_itself(both) -> None:
    assert both.weights == {"sam": 0.25, "sam3": 0.75} and list(both.teachers) == ["sam", "sam3"]
    assert both.patch_channels == {"sam": 8, "sam3": 9}
    batch, groups = scene()
    found = both.answer(Prompted(batch, groups), both.read(Prompted(batch, groups)))
    assert list(found) == ["sam", "sam3"]
    for name, teacher in both.teachers.items():
        alone = teacher.answer(batch.images, groups)
        assert torch.equal(found[name].encoder_patch, alone.encoder_patch)
        assert torch.equal(found[name].groups[0].low_res_masks, alone.groups[0].low_res_masks)
    assert found["sam"].groups[0].mask_tokens.shape[-1] == 16 and found["sam3"].groups[0].mask_tokens.shape[-1] == 32


def test_a_teacher_without_a_projection_is_noticed(sam) -> None:
    found = Ensemble.load([entry("sam", sam[1])])
    with pytest.raises(ValueError, match="'sam' has no projection"):
        _ = found.patch_channels
    teacher = found.teachers["sam"]
    teacher.projection = fit_projection(teacher, [scene()[0].images], 5, standardise=True)
    assert found.patch_channels == {"sam": 5}


def test_a_student_has_to_meet_every_teacher(both) -> None:
    both.meets((6, 6), 32, ("encoder_patch",))
    with pytest.raises(UserError, match="'sam' has a decoder of width 16"):
        both.meets((6, 6), 32, ("prompt_embed",))
    with pytest.raises(UserError, match="'sam3' has a decoder of width 32"):
        both.meets((6, 6), 16, ("prompt_embed",))
    with pytest.raises(UserError, match="'sam3' has an image embedding of 9 x 9 cells"):
        both.meets((4, 4), 16, ("encoder_patch",))


def test_the_fingerprint_knows_names_and_weights_of_networks_not_shares(sam, tracker) -> None:
    def digest(*entries: TeacherEntry) -> str:
        return Ensemble.load(entries).fingerprint

    first = digest(entry("a", sam[1]), entry("b", tracker[1]))
    assert digest(entry("b", tracker[1], 5), entry("a", sam[1])) == first
    assert digest(entry("b", sam[1]), entry("a", tracker[1])) != first
    assert digest(entry("a", sam[1])) != first


def test_moving_the_ensemble_moves_models_and_projections(sam) -> None:
    teacher = PromptTeacher(entry("sam", sam[1]))
    teacher.projection = Projection(torch.zeros(32), torch.eye(32))
    teacher.to("cpu")
    before = teacher.model
    Ensemble([teacher]).to("meta")
    assert teacher.device.type == "meta" and before is teacher.model
    assert {p.device.type for p in teacher.model.parameters()} == {"meta"}
    assert teacher.projection.basis.device.type == "meta"
