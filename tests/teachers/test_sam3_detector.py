"""The detector as a teacher against transformers' own models, asked one question at a time."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from original_names import to_original
from safetensors.torch import load_file, save_file
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from samdistill.checkpoints import files
from samdistill.checkpoints.merge import merge
from samdistill.config import TeacherConfig
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer
from samdistill.students import StudentTrunk, StudentTrunkConfig
from samdistill.teachers import Sam3Detector, describe_detector
from samdistill.teachers.sam3 import set_image_size
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch, UserError

OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
TEXTS = ("red circle", "square", "small blue square", "visual")
IMAGE = torch.tensor([0, 0, 0, 1])
WORDS = ConceptPrompts(TEXTS, IMAGE, torch.zeros(4, 0, 4), torch.zeros(4, 0, dtype=torch.int64))
BOXES = ConceptPrompts(
    TEXTS, IMAGE,
    torch.tensor([[[0.0] * 4] * 2, [[0.3, 0.4, 0.2, 0.3], [0.0] * 4], [[0.0] * 4] * 2,
                  [[0.5, 0.5, 0.4, 0.2], [0.8, 0.2, 0.1, 0.1]]]),
    torch.tensor([[-10, -10], [1, -10], [-10, -10], [1, 0]]),
)  # fmt: skip


def batch(size: int = 126, count: int = 2) -> ImageBatch:
    generator = torch.Generator().manual_seed(3)
    return ImageBatch.full(torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator))


def config(path, **settings) -> TeacherConfig:
    return TeacherConfig(path=str(path), **settings)


def asked(prompts: ConceptPrompts) -> dict[str, torch.Tensor]:
    tokens = build_tokenizer()(list(prompts.texts), padding="max_length", return_tensors="pt")
    found = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    if prompts is BOXES:
        found |= {"input_boxes": prompts.boxes, "input_boxes_labels": prompts.labels}
    return found


@torch.no_grad()
def direct(model, images: ImageBatch, prompts: ConceptPrompts, rows=slice(None)):
    """transformers' model with an image for every question; those in words with the CLS token appended by hand."""
    pixels = ((images.images / 255 - 0.5) / 0.5)[prompts.image[rows]]
    given = {name: tensor[rows] for name, tensor in asked(prompts).items()}
    shown = (given.get("input_boxes_labels", torch.full((len(pixels), 1), -10)) != -10).any(1)
    text = model.get_text_features(given["input_ids"], given["attention_mask"], return_dict=True).pooler_output
    found, order = [], []
    for some, boxes in ((~shown, {}), (shown, {k: v[shown] for k, v in given.items() if "boxes" in k})):
        if some.any():
            words, mask = text[some], given["attention_mask"][some]
            if not boxes:
                words = torch.cat([words, cls_token(model, pixels[some])], 1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            found.append(model(pixel_values=pixels[some], text_embeds=BaseModelOutputWithPooling(pooler_output=words),
                               output_hidden_states=True, attention_mask=mask, **boxes))  # fmt: skip
            order.append(some.nonzero()[:, 0])
    back = torch.cat(order).argsort()
    joined = {name: torch.cat([getattr(f, name) for f in found])[back] for name in OUTPUTS}
    return SimpleNamespace(**joined, encoder_hidden_states=found[0].encoder_hidden_states)


def cls_token(model, pixels):
    """What the geometry encoder makes of its CLS token where there is no box, layer by layer."""
    vision, geometry = model.get_vision_features(pixels), model.geometry_encoder
    image, place = vision.fpn_hidden_states[2], vision.fpn_position_encoding[2]
    token = geometry.prompt_layer_norm(geometry.final_proj(geometry.cls_embed.weight))[None].expand(len(pixels), -1, -1)
    for layer in geometry.layers:
        token = layer(token, image.flatten(2).mT, place.flatten(2).mT, None)
    return geometry.output_layer_norm(token)


def assert_answers_as(answer: DetectorOutput, expected, exactly: bool = True) -> None:
    """``exactly``: up to the last bit, which the alignment of a tensor in memory can turn."""
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if exactly else {"atol": 1e-5, "rtol": 1e-4}
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(answer, name), getattr(expected, name), **tolerance)


@pytest.fixture(scope="module")
def teacher(detector):
    return Sam3Detector(config(detector[1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(student, folder): a trunk that fits the tiny detector, with statistics that a merge must carry over."""
    torch.manual_seed(1)
    student = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", head="fused", hidden_size=64, image_size=126)).eval()
    for name, buffer in student.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    return student, folder


@pytest.fixture(scope="module")
def places(detector, run, tmp_path_factory):
    """The same heads in every layout a user may have; all but the merged ones with the same trunk."""
    model, folder = detector
    root = tmp_path_factory.mktemp("layouts")
    video, original = root / "video", root / "original" / "sam3.pt"
    shutil.copytree(folder, video)
    whole = {"model_type": "sam3_video", "detector_config": json.loads((folder / "config.json").read_text())}
    (video / "config.json").write_text(json.dumps(whole))
    weights = {f"detector_model.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
    weights |= {"tracker_model.no_memory_embedding": torch.ones(3), "tracker_neck.fpn_layers.0.bias": torch.ones(3)}
    save_file(weights, video / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder, original.parent, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {name: tensor.clone() for name, tensor in to_original(model.state_dict())[0].items()}
    torch.save({"model": state | {"tracker.no_mem_embed": torch.ones(1, 1, 32)}}, original)
    merged, merged_original = root / "merged", root / "merged_original" / "sam3.pt"
    merge(run[1], folder, merged)
    shutil.copytree(original.parent, merged_original.parent, ignore=shutil.ignore_patterns("*.pt"))
    merge(run[1], original, merged_original)
    return {
        "folder": folder,
        "video": video,
        "original": original,
        "merged": merged,
        "merged_original": merged_original,
    }


@pytest.mark.parametrize("prompts", [WORDS, BOXES], ids=["words", "boxes"])
def test_it_answers_as_transformers_does(teacher, detector, prompts):
    answer = teacher.answer(batch(), prompts)
    assert_answers_as(answer, direct(detector[0], batch(), prompts))
    bare = detector[0](
        pixel_values=(batch().images / 255 - 0.5) / 0.5, **{k: v[[0, 3]] for k, v in asked(WORDS).items()}
    )
    if prompts is WORDS:  # the test can fail: without the token the answer is another
        assert (answer.pred_logits[[0, 3]] - bare.pred_logits).abs().max() > 1e-3


@pytest.mark.parametrize("prompts", [WORDS, BOXES], ids=["words", "boxes"])
def test_a_question_is_answered_as_if_it_were_asked_alone(teacher, detector, prompts):
    """Up to rounding: matrix products of other sizes sum in another order."""
    answer = teacher.answer(batch(), prompts)
    for row in range(len(prompts)):
        one = DetectorOutput(*(getattr(answer, n)[row : row + 1] for n in OUTPUTS), fpn=(), encoder=answer.encoder)
        assert_answers_as(one, direct(detector[0], batch(), prompts, slice(row, row + 1)), exactly=False)
    assert (answer.pred_masks[0] - answer.pred_masks[1]).abs().max() > 1e-3  # the words matter here
    assert (answer.pred_masks[2] - answer.pred_masks[3]).abs().max() > 1e-3


def test_each_image_is_encoded_once_and_all_questions_are_asked_at_once(teacher):
    seen = {"vision_encoder": [], "detr_encoder": [], "detr_decoder": []}

    def count(name):
        return lambda _, args, kwargs, out: seen[name].append(
            out.fpn_hidden_states[0].shape[0] if name == "vision_encoder" else out.last_hidden_state.shape[0]
            if name == "detr_encoder" else out.presence_logits.shape[1]
        )  # fmt: skip

    hooks = [teacher.model.get_submodule(n).register_forward_hook(count(n), with_kwargs=True) for n in seen]
    teacher.answer(batch(), BOXES)
    for hook in hooks:
        hook.remove()
    assert seen == {"vision_encoder": [2], "detr_encoder": [4], "detr_decoder": [4]}
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_the_features_are_those_the_heads_read(teacher, detector, near):
    model, _ = detector
    answer, expected = teacher.answer(batch(), WORDS), direct(model, batch(), WORDS)
    with torch.no_grad():
        vision = model.get_vision_features((batch().images / 255 - 0.5) / 0.5)
    assert [tuple(level.shape) for level in answer.fpn] == [(2, 32, side, side) for side in (36, 18, 9)]
    for level, theirs in zip(answer.fpn, vision.fpn_hidden_states[:3], strict=True):
        near(level, theirs)
    tokens = expected.encoder_hidden_states[-1]
    assert answer.encoder.shape == (4, 32, 9, 9)
    for row, column in ((0, 0), (2, 5), (8, 1)):
        near(answer.encoder[:, :, row, column], tokens[:, 9 * row + column])


def test_the_pyramid_is_the_whole_of_the_models(teacher, detector, near):
    with torch.no_grad():
        vision = detector[0].get_vision_features((batch().images / 255 - 0.5) / 0.5)
    levels = teacher.pyramid(batch())
    assert [tuple(level.shape) for level in levels] == [(2, 32, side, side) for side in (36, 18, 9, 4)]
    for level, theirs in zip(levels, vision.fpn_hidden_states, strict=True):
        near(level, theirs)
    features = teacher.features(batch())
    assert len(features) == 3 and all(torch.equal(*pair) for pair in zip(features, levels[:3], strict=True))
    with pytest.raises(UserError, match="reads 126 x 126 pixels, but the images are 28 x 28"):
        teacher.pyramid(batch(28))


def test_answers_can_be_the_target_of_a_loss(teacher):
    answer = teacher.answer(batch(), WORDS)
    targets = [*(getattr(answer, name) for name in OUTPUTS), *answer.fpn, answer.encoder, *teacher.pyramid(batch())]
    for target in targets:
        assert target.dtype == torch.float32 and target.is_contiguous()
        assert not target.requires_grad and not target.is_inference()
        student = torch.zeros_like(target, requires_grad=True)
        (student * target).sum().backward()
        assert torch.equal(student.grad, target)


def test_the_model_is_frozen_and_autocast_around_it_changes_nothing(teacher):
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    plain = teacher.answer(batch(), BOXES)
    with torch.autocast("cpu", torch.bfloat16):
        assert_answers_as(teacher.answer(batch(), BOXES), plain)


def test_another_size_is_the_model_with_its_positions_recomputed(detector):
    """Against the loaded model, changed in place."""
    model = copy.deepcopy(detector[0])
    set_image_size(model.vision_encoder.backbone, 168)
    teacher = Sam3Detector(config(detector[1], image_size=168))
    assert (teacher.info.image_size, teacher.info.grid, teacher.info.levels) == (168, 12, (48, 24, 12))
    answer = teacher.answer(batch(168), BOXES)
    assert_answers_as(answer, direct(model, batch(168), BOXES))
    assert [level.shape[-1] for level in answer.fpn] == [48, 24, 12] and answer.encoder.shape[-2:] == (12, 12)


@pytest.mark.parametrize(("place", "precision"), [("folder", "bf16"), ("folder", "fp16"), ("merged", "bf16")])
def test_half_precision_is_close_and_comes_in_float32(places, place, precision):
    full, half = Sam3Detector(config(places[place])), Sam3Detector(config(places[place], precision=precision))
    assert full.fingerprint != half.fingerprint
    assert {b.dtype for b in half.model.buffers() if b.is_floating_point()} == {torch.float32}
    for prompts in (WORDS, BOXES):
        first, second = full.answer(batch(), prompts), half.answer(batch(), prompts)
        for name in OUTPUTS:
            one, other = getattr(first, name), getattr(second, name)
            assert other.dtype == torch.float32 and other.isfinite().all() and not torch.equal(one, other)
            assert (one - other).norm() / one.norm() < (0.1 if precision == "bf16" else 0.02), name
        levels = (*second.fpn, second.encoder, *half.pyramid(batch()))
        assert all(level.dtype == torch.float32 and level.isfinite().all() for level in levels)


@pytest.mark.parametrize("place", ["folder", "video", "original"])
def test_every_layout_of_a_checkpoint_is_the_same_teacher(detector, places, place, tmp_path):
    """An original file as the folder with the layer norms of the original code, which has 1e-5 where this has 1e-6."""
    folder = shutil.copytree(detector[1], tmp_path / "folder")
    if place == "original":
        raw = json.loads((folder / "config.json").read_text())
        raw["vision_config"]["backbone_config"]["layer_norm_eps"] = 1e-5
        (folder / "config.json").write_text(json.dumps(raw))
    found, same = Sam3Detector(config(places[place])), Sam3Detector(config(folder))
    assert_answers_as(found.answer(batch(), BOXES), same.answer(batch(), BOXES))
    assert found.fingerprint == same.fingerprint
    assert all(torch.equal(t, same.model.state_dict()[n]) for n, t in found.model.state_dict().items())


@pytest.mark.parametrize("place", ["merged", "merged_original"])
def test_a_merged_student_sees_for_it(places, place, run):
    student, _ = run
    teacher = Sam3Detector(config(places[place]))
    trunk = teacher.model.vision_encoder.backbone
    assert isinstance(trunk, StudentTrunk)
    assert all(torch.equal(t, student.state_dict()[n]) for n, t in trunk.state_dict().items())
    host = Sam3Model.from_pretrained(places["merged"], dtype=torch.float32).eval()
    assert_answers_as(teacher.answer(batch(), BOXES), direct(host, batch(), BOXES))
    assert describe_detector(config(places[place])) == teacher.info


def test_a_merged_student_reads_another_size(places):
    host = Sam3Model.from_pretrained(places["merged"], dtype=torch.float32).eval()
    answer = Sam3Detector(config(places["merged_original"], image_size=168)).answer(batch(168), WORDS)
    assert_answers_as(answer, direct(host, batch(168), WORDS))


def test_a_description_needs_no_weights_and_agrees_with_the_teacher(teacher, detector, tmp_path):
    model, folder = detector
    shutil.copy(folder / "config.json", tmp_path)
    info = describe_detector(config(tmp_path, image_size=168))
    answer = Sam3Detector(config(folder, image_size=168)).answer(batch(168), WORDS)
    assert info.levels == tuple(level.shape[-1] for level in answer.fpn) and info.grid == answer.encoder.shape[-1]
    assert info.queries == answer.pred_logits.shape[1] and info.hidden_size == answer.encoder.shape[1]
    assert info.params == sum(p.numel() for p in model.parameters())
    assert (info.vocab_size, info.context) == (len(VOCABULARY), CONTEXT) == (32, teacher.words.context)
    assert info.mean == info.std == (0.5, 0.5, 0.5)


def test_the_published_file_is_described_without_a_configuration(tmp_path):
    torch.save({"model": {"any": torch.ones(1)}}, tmp_path / "sam3.pt")
    info = describe_detector(config(tmp_path / "sam3.pt", image_size=504))
    assert (info.params, info.queries, info.hidden_size) == (840_376_374, 200, 256)
    assert (info.grid, info.levels, info.vocab_size, info.context) == (36, (144, 72, 36), 49408, 32)


def test_the_fingerprint_is_of_everything_that_decides_the_answer(teacher, detector, tmp_path):
    model, folder = detector
    assert Sam3Detector(config(folder)).fingerprint == teacher.fingerprint
    found = {teacher.fingerprint, Sam3Detector(config(folder, image_size=168)).fingerprint}
    words = build_tokenizer()
    words.model_max_length = 5
    words.save_pretrained(tmp_path / "words")
    found.add(Sam3Detector(config(folder, tokenizer=tmp_path / "words")).fingerprint)
    changed = copy.deepcopy(model)
    changed.dot_product_scoring.query_proj.bias.data[0] += 1
    changed.save_pretrained(tmp_path / "weights")
    found.add(Sam3Detector(config(tmp_path / "weights", tokenizer=folder)).fingerprint)
    setting = copy.deepcopy(model)
    setting.config.detr_encoder_config.num_attention_heads = 2
    setting.save_pretrained(tmp_path / "setting")
    found.add(Sam3Detector(config(tmp_path / "setting", tokenizer=folder)).fingerprint)
    assert len(found) == 5


def test_images_of_another_size_and_strange_phrases_are_refused(teacher):
    with pytest.raises(UserError, match=r"reads 126 x 126 pixels, but the images are 28 x 28; set teacher.image_size"):
        teacher.answer(batch(28), WORDS)
    with pytest.raises(UserError, match="at most 6 are allowed"):
        teacher.answer(batch(), ConceptPrompts.words(["a small red circle on a box"], [0]))


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_a_teacher_without_words_is_refused(detector, kind):
    with pytest.raises(UserError, match=f"teacher.kind={kind}: only SAM 3 answers questions in words; set"):
        describe_detector(config(detector[1], kind=kind))


@pytest.mark.parametrize("size", [130, 13])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(detector, size):
    with pytest.raises(UserError, match=f"image_size={size} is not a multiple of 14; the nearest that work"):
        Sam3Detector(config(detector[1], image_size=size))


def test_models_that_answer_nothing_are_refused(tracker, run, tmp_path):
    for folder, kind in ((tracker[1], "sam3_tracker"), (run[1], "samdistill_student_trunk")):
        with pytest.raises(UserError, match=f"a '{kind}' model answers no questions in words; give a Hugging Face"):
            describe_detector(config(folder))
    with pytest.raises(UserError, match=r"no config\.json"):
        describe_detector(config(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        describe_detector(config(tmp_path / "nowhere"))


def test_weights_of_another_architecture_are_refused(detector, tmp_path):
    """As many queries, layers and tensors as the configuration says; nothing is made up for what is missing."""
    folder = shutil.copytree(detector[1], tmp_path / "detector")
    about = json.loads((folder / "config.json").read_text())
    changes = {
        "num_queries": (12, r"2 mismatched keys.*\[10, \d+\].*\[12, \d+\]"),
        "num_layers": (2, r"\d+ missing keys .* detr_decoder.layers.1"),
    }
    for key, (value, message) in changes.items():
        wrong = copy.deepcopy(about)
        wrong["detr_decoder_config"][key] = value
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=f"wrong checkpoint: {message}") as error:
            Sam3Detector(config(folder))
        assert "\n" not in str(error.value)


def test_an_original_file_of_another_model_is_refused(places, tmp_path):
    folder = shutil.copytree(places["original"].parent, tmp_path / "original")
    torch.save({"model": {"image_encoder.weight": torch.ones(1)}}, folder / "sam3.pt")
    with pytest.raises(UserError, match="wrong checkpoint: 258 missing keys"):
        Sam3Detector(config(folder / "sam3.pt"))


def test_a_checkpoint_needs_its_own_words(detector, sam3, tmp_path):
    with pytest.raises(UserError, match="the tokenizer has 32 tokens, but the text encoder has 1000"):
        Sam3Detector(config(sam3[1], tokenizer=detector[1]))
    with pytest.raises(UserError, match="no tokenizer"):
        Sam3Detector(config(sam3[1]))


def test_sandbox_is_the_packaged_detector(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="lacks the sandbox's detector; install it again"):
        describe_detector(config("sandbox"))
    shutil.copytree(detector[1], tmp_path / "sandbox" / "weights" / "detector")
    assert_answers_as(
        Sam3Detector(config("sandbox")).answer(batch(), WORDS), direct(detector[0], batch(), WORDS)
    )  # fmt: skip
