from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tensors import assert_same_tensors, scramble
from tiny_detector import ANSWERS, tiny, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, Sam3Config, Sam3Model

from samdistill.checkpoints.student import trunk_backbone
from samdistill.students import (
    EfficientSam3Config,
    EfficientSam3Model,
    StudentTrunkConfig,
    build_detector,
    build_trunk,
    efficient_sam3_config,
    inherit,
)
from samdistill.types import UserError

PADDED = -10


def teacher(layers: int = 6, queries: int = 20, ffn: int = 64) -> Sam3Model:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": ffn}
    config = Sam3Config(
        vision_config={
            "backbone_config": StudentTrunkConfig(backbone="es_ev_s", hidden_size=32, image_size=126).to_dict(),
            "fpn_hidden_size": 32,
        },
        text_config={**small, "vocab_size": 1000, "num_hidden_layers": 1, "projection_dim": 32},
        geometry_encoder_config={**small, "num_layers": 3},
        detr_encoder_config={**small, "num_layers": layers},
        detr_decoder_config={**small, "num_layers": layers, "num_queries": queries},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    torch.manual_seed(1)
    return Sam3Model(config).eval()


def questions() -> dict[str, torch.Tensor]:
    """Three about the first image and one about the second, each with a box and some with a second."""
    generator = torch.Generator().manual_seed(5)
    return {
        "pixel_values": torch.randn(2, 3, 126, 126, generator=generator),
        "input_ids": torch.randint(3, 900, (4, 8), generator=generator),
        "attention_mask": (torch.arange(8) < torch.tensor([[8], [3], [5], [1]])).long(),
        "input_boxes": 0.25 + 0.25 * torch.rand(4, 2, 4, generator=generator),
        "input_boxes_labels": torch.tensor([[1, 0], [1, PADDED], [0, 1], [1, PADDED]]),
        "prompt_images": torch.tensor([0, 0, 0, 1]),
    }


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_student_has_the_described_size() -> None:
    with torch.device("meta"):
        model = EfficientSam3Model(efficient_sam3_config())
    total = sum(p.numel() for p in model.parameters())
    assert total == 100_934_446
    assert abs(total - 100.3e6) < 2e6
    assert not {m.p for m in model.modules() if isinstance(m, nn.Dropout)} - {0.0}


def test_answers_have_the_names_and_shapes_of_sam3() -> None:
    asked = questions()
    with torch.no_grad():
        out = tiny()(**asked)
        wanted = teacher(layers=1, queries=10)(
            pixel_values=asked["pixel_values"][:1].expand(4, -1, -1, -1), input_ids=asked["input_ids"]
        )
    for name in ANSWERS:  # the teacher's finest level is 36, the student's 32
        shape = [32 if size == 36 else size for size in getattr(wanted, name).shape]
        assert list(getattr(out, name).shape) == shape, name
    assert [tuple(level.shape) for level in out.fpn_hidden_states] == [(2, 32, s, s) for s in (32, 16, 8)]
    assert out.encoder_grid.shape == (4, 32, 8, 8)


def test_the_grid_is_the_encoders_output_row_by_row() -> None:
    model, seen = tiny(), []
    model.detr_encoder.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        grid = model(**questions()).encoder_grid
    assert torch.equal(grid[2, :, 1, 5], seen[0][2, 8 + 5])
    assert not model.detr_encoder._forward_hooks


def test_several_questions_are_answered_as_one_by_one_with_each_image_seen_once() -> None:
    model, asked, calls = tiny(), questions(), []
    handle = model.vision_encoder.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    with torch.no_grad():
        together = model(**asked)
        assert calls == [2]
        handle.remove()
        for i, image in enumerate(asked["prompt_images"].tolist()):
            single = {k: v[i : i + 1] for k, v in asked.items() if k not in ("pixel_values", "prompt_images")}
            alone = model(pixel_values=asked["pixel_values"][image : image + 1], **single)
            for name in (*ANSWERS, "encoder_grid"):
                assert close(getattr(together, name)[i], getattr(alone, name)[0]), (name, i)
            for level, own in zip(together.fpn_hidden_states, alone.fpn_hidden_states, strict=True):
                assert close(level[image], own[0])
        assert not close(together.pred_masks[0], together.pred_masks[1])


def test_features_computed_before_give_the_same_answers() -> None:
    model, asked = tiny(), questions()
    with torch.no_grad():
        wanted = model(**asked)
        vision = model.get_vision_features(asked.pop("pixel_values"))
        text = model.get_text_features(asked.pop("input_ids"), asked["attention_mask"])
        found = model(vision_embeds=vision, text_embeds=text, **asked)
    for name in ANSWERS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    with pytest.raises(ValueError, match="exactly one of pixel_values and vision_embeds"):
        model(input_ids=torch.tensor([[5]]))


def test_a_box_matters_and_a_padded_box_does_not() -> None:
    model, asked = tiny(), questions()
    asked["input_boxes_labels"][:, 1] = PADDED
    with torch.no_grad():
        one_box = model(**asked).pred_masks
        padding = asked["input_boxes"].clone()
        padding[:, 1] = 0.9
        assert close(model(**asked | {"input_boxes": padding}).pred_masks, one_box)
        shorter = {k: asked[k][:, :1] for k in ("input_boxes", "input_boxes_labels")}
        assert close(model(**asked | shorter).pred_masks, one_box)
        moved = asked["input_boxes"].clone()
        moved[:, 0] += 0.3
        assert not close(model(**asked | {"input_boxes": moved}).pred_masks, one_box)
        other_label = asked["input_boxes_labels"].clone()
        other_label[:, 0] = 0
        change = model(**asked | {"input_boxes_labels": other_label}).pred_masks - one_box
        assert change.abs().max() > 1e-4 * one_box.abs().max()  # little, but a thousand times what rounding makes


def test_no_boxes_and_none_are_the_same() -> None:
    model, asked = tiny(), questions()
    empty = {"input_boxes": torch.zeros(4, 0, 4), "input_boxes_labels": torch.zeros(4, 0, dtype=torch.int64)}
    none = {"input_boxes": None, "input_boxes_labels": None}
    with torch.no_grad():
        assert torch.equal(model(**asked | empty).pred_masks, model(**asked | none).pred_masks)


def test_words_are_answered_alike_beside_boxes_and_alone() -> None:
    """transformers adds the box encoder's token to every prompt of a call that shows any box."""
    model, asked = tiny(), questions()
    asked["input_boxes_labels"][[0, 2]] = PADDED
    words = {k: asked[k][[0, 2]] for k in ("input_ids", "attention_mask", "prompt_images")}
    boxed = {k: v if k == "pixel_values" else v[[1, 3]] for k, v in asked.items()}
    with torch.no_grad():
        mixed = model(**asked)
        alone, shown = model(pixel_values=asked["pixel_values"], **words), model(**boxed)
    for name in (*ANSWERS, "encoder_grid"):
        assert close(getattr(mixed, name)[[0, 2]], getattr(alone, name))
        assert close(getattr(mixed, name)[[1, 3]], getattr(shown, name))


def test_without_words_there_are_features_alone() -> None:
    model, asked = tiny(), questions()
    with torch.no_grad():
        silent, whole = model(pixel_values=asked["pixel_values"]), model(**asked)
    assert silent.pred_masks is None
    assert all(torch.equal(a, b) for a, b in zip(silent.fpn_hidden_states, whole.fpn_hidden_states, strict=True))
    with pytest.raises(ValueError, match="no prompts were given"):
        silent.answer()


@pytest.mark.parametrize("repmixer", [False, True])
def test_what_stands_under_the_mask_matters_to_convolutions_alone(repmixer: bool) -> None:
    """So prompts must always be padded with the same token, to the same length."""
    model, asked = tiny(repmixer=repmixer), questions()
    for name, scale in model.text_encoder.named_parameters():
        if name.endswith("layer_scale"):  # starts at 1e-5, too small to see
            scale.data.fill_(1.0)
    other = torch.where(asked["attention_mask"] == 1, asked["input_ids"], 7)
    longer = {k: nn.functional.pad(asked[k], (0, 4)) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        words = [
            model.get_text_features(ids, asked["attention_mask"]).pooler_output for ids in (asked["input_ids"], other)
        ]
        valid = asked["attention_mask"].bool()
        assert close(words[0][valid], words[1][valid]) is not repmixer
        wanted = model(**asked).pred_masks
        assert torch.equal(model(**asked | {"input_ids": other}).pred_masks, wanted) is not repmixer
        assert not close(model(**asked | longer).pred_masks, wanted)  # the position table is stretched
        every = torch.ones_like(asked["attention_mask"])
        assert not close(model(**asked | {"attention_mask": every}).pred_masks, wanted)


def test_gradients_reach_every_parameter_the_detector_uses() -> None:
    model = tiny().train()
    out = model(**questions())
    signals = [*(getattr(out, name) for name in ANSWERS), *out.fpn_hidden_states, out.encoder_grid]
    sum((signal * torch.randn(signal.shape)).mean() for signal in signals).backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    unused = ("vision_encoder.adapters.3.smooth.", "text_encoder.projection.")
    assert dead == {n for n, _ in model.named_parameters() if n.startswith(unused)}


@pytest.mark.parametrize("feature", ["fpn_hidden_states", "encoder_grid"])
def test_a_loss_on_a_feature_reaches_the_backbone(feature: str) -> None:
    model = tiny().train()
    signal = getattr(model(**questions()), feature)
    (signal[-1] if isinstance(signal, tuple) else signal).square().mean().backward()
    assert next(model.vision_encoder.backbone.parameters()).grad.abs().max() > 0


def test_runs_in_half_precision() -> None:
    exact, half = tiny(), tiny().to(torch.bfloat16)
    with torch.no_grad():
        wanted, out = exact(**questions()), half(**questions())
    for name in ANSWERS:
        assert getattr(out, name).isfinite().all() and getattr(out, name).dtype == torch.bfloat16, name
    cosine = nn.functional.cosine_similarity(out.encoder_grid.float().flatten(), wanted.encoder_grid.flatten(), 0)
    assert cosine > 0.97


@pytest.mark.parametrize("backbone", ["es_ev_s", "es_rv_s", "es_tv_s"])
def test_saved_and_loaded_again_it_answers_the_same(backbone: str, tmp_path) -> None:
    model = tiny(backbone)
    model.save_pretrained(tmp_path)
    asked = questions()
    with torch.no_grad():
        wanted = model(**asked)
    for loader in (EfficientSam3Model, AutoModel):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, EfficientSam3Model) and not loaded.training
        assert not any(info.values()), info
        assert_same_tensors(loaded, model)
        with torch.no_grad():
            found = loaded(**asked)
        for name in ANSWERS:  # memory-mapped weights are aligned otherwise: the last bit may differ
            assert close(getattr(found, name), getattr(wanted, name)), name


def test_the_configuration_survives_the_file(tmp_path) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EfficientSam3Config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.vision_config.backbone == "efficientvit_b0" and loaded.image_size == 126
    assert loaded.detr_decoder_config.num_queries == 10 and loaded.mask_decoder_config.num_upsampling_stages == 2


def test_transformers_opens_it_whatever_was_imported_first(tmp_path) -> None:
    """In this order SAM 3's own module and the layers below it are half imported when the students are registered."""
    tiny_config().save_pretrained(tmp_path)
    code = """
import sys, samdistill
from transformers import Sam3LiteTextModel
from transformers import AutoConfig, AutoModel
import torch
config = AutoConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    print(type(AutoModel.from_config(config)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "EfficientSam3Model", done.stderr


# --- weights from elsewhere ------------------------------------------------------------------------------------------


def test_a_trained_trunk_is_taken_from_its_run(tmp_path) -> None:
    trunk = build_trunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=126))
    scramble(trunk)
    trunk.save_pretrained(tmp_path / "student")
    for folder in (tmp_path, tmp_path / "student"):
        model = build_detector(tiny_config())
        model.vision_encoder.backbone.load_state_dict(trunk_backbone(folder, "efficientvit_b0"))
        assert_same_tensors(model.vision_encoder.backbone, trunk.backbone)


def test_a_folder_without_the_right_trunk_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="not a run with a student"):
        trunk_backbone(tmp_path, "efficientvit_b0")
    build_trunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=126)).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="a trunk with the backbone 'efficientvit_b0', but this student has 'repvit_m0_9'"
    ):
        trunk_backbone(tmp_path, "repvit_m0_9")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "sam3"}))
    with pytest.raises(UserError, match="not a student but a 'sam3' model"):
        trunk_backbone(tmp_path, "efficientvit_b0")


def test_heads_are_inherited_with_layers_and_rows_taken_evenly() -> None:
    source = teacher()
    scramble(source)
    state = source.state_dict()
    student = EfficientSam3Model(tiny_config(layers=3))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taken = inherit(student, state)
    after = student.state_dict()
    assert [n for n in after if n not in taken and not torch.equal(after[n], before[n])] == []
    assert not [n for n in taken if n.startswith(("vision_encoder.", "text_encoder."))]
    heads = ("text_projection", "geometry_encoder", "detr_", "mask_decoder", "dot_product_scoring")
    assert set(taken) == {n for n in after if n.startswith(heads)}
    for own, theirs in ((0, 0), (1, 2), (2, 5)):
        for stack in ("detr_encoder", "detr_decoder"):
            wanted = state[f"{stack}.layers.{theirs}.mlp.fc1.weight"]
            assert torch.equal(after[f"{stack}.layers.{own}.mlp.fc1.weight"], wanted), (stack, own)
    assert torch.equal(
        after["geometry_encoder.layers.0.mlp.fc2.weight"], state["geometry_encoder.layers.0.mlp.fc2.weight"]
    )
    rows = [0, 2, 4, 6, 8, 10, 12, 14, 16, 19]  # of 20
    for table in ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight"):
        assert torch.equal(after[table], state[table][rows]), table
    for name in ("mask_decoder.pixel_decoder.conv_layers.1.weight", "dot_product_scoring.query_proj.bias"):
        assert torch.equal(after[name], state[name]), name


def test_what_does_not_fit_is_left_alone() -> None:
    student = EfficientSam3Model(tiny_config(layers=3))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taken = inherit(student, teacher(ffn=96, queries=5).state_dict())
    left = {n for n in before if n.startswith("detr_decoder.") and n not in taken}
    assert left == {
        "detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight",
        *(f"detr_decoder.layers.{i}.mlp.{p}" for i in range(3) for p in ("fc1.weight", "fc1.bias", "fc2.weight")),
    }  # fmt: skip
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in left)
