"""Asking a detector: exact post-processing, prompts laid on the canvas, and which folders hold a detector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Sam3ImageProcessor, Sam3Model

from detector_model import detector_config
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.words import Words
from samdistill.inference.concepts import StudentDetector, ask_image, detections, load_concept_model
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer, sandbox_words
from samdistill.students import EfficientSam3Model, efficient_sam3_config
from samdistill.types import ConceptPrompts, DetectorOutput, ImageBatch, UserError

TEXT = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip


@pytest.fixture(scope="module")
def student() -> EfficientSam3Model:
    """Every tensor random: heads that start at zero would answer every question alike."""
    config = efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, TEXT)
    model = EfficientSam3Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def folder(student: EfficientSam3Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run") / "student"
    student.save_pretrained(place)
    sandbox_words().save(place)
    return place


def output(masks: torch.Tensor, boxes: torch.Tensor, logits: torch.Tensor, presence: float) -> DetectorOutput:
    """The answer to one question."""
    empty = torch.zeros(1, 1, 1, 1)
    return DetectorOutput(
        masks[None], boxes[None], logits[None], torch.tensor([[presence]]), empty, (empty,), torch.zeros(1, 1, 1, 1)
    )


def words() -> Words:
    return Words(build_tokenizer(), CONTEXT)


def test_on_a_square_canvas_it_is_transformers_post_processing() -> None:
    """Logits of one size but for their sign: then interpolating them and their probabilities cannot differ."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.where(torch.rand(12, 30, 30, generator=generator) > 0.5, 4.0, -4.0)
    corners = torch.rand(12, 2, 2, generator=generator).sort(1).values.reshape(12, 4)
    answer = output(masks, corners, torch.randn(12, generator=generator), 1.5)
    raw = SimpleNamespace(pred_logits=answer.pred_logits, pred_boxes=answer.pred_boxes, pred_masks=answer.pred_masks,
                          presence_logits=answer.presence_logits)  # fmt: skip
    (theirs,) = Sam3ImageProcessor().post_process_instance_segmentation(raw, 0.4, target_sizes=[(126, 126)])
    ours = detections(answer, 0, 0.4, (126, 126), (126, 126), (126, 126))
    order = theirs["scores"].argsort(descending=True)
    assert 3 < len(ours) < 12
    assert torch.equal(ours.scores, theirs["scores"][order])
    assert torch.allclose(ours.boxes, theirs["boxes"][order], atol=1e-4)
    assert torch.equal(ours.masks, theirs["masks"][order].bool())
    assert ours.presence == pytest.approx(1 / (1 + 2.718281828**-1.5))


def test_padding_is_cut_off_and_boxes_are_clamped() -> None:
    """An image of 25 x 50 on the upper half of a canvas of 100: a factor of 2, by hand."""
    masks = torch.full((3, 100, 100), -1.0)
    masks[:, :, :60] = 1  # down into the padding
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.4], [-0.1, 0.2, 1.2, 0.9], [0.0, 0.6, 0.1, 0.8]])
    answer = output(masks, boxes, torch.tensor([0.0, 3.0, -9.0]), 20.0)
    found = detections(answer, 0, 0.5, (50, 100), (100, 100), (25, 50))  # a score of exactly 0.5 counts
    assert found.boxes.tolist() == [pytest.approx([0, 10, 50, 25]), pytest.approx([5, 5, 25, 20])]
    assert found.masks.shape == (2, 25, 50)
    assert bool(found.masks[..., :30].all()) and not bool(found.masks[..., 30:].any())
    assert found.scores[0] > found.scores[1]
    outside = detections(answer, 0, 0.0, (50, 100), (100, 100), (25, 50))
    assert len(outside) == 3 and outside.boxes[2].tolist() == [0, 25, 5, 25]  # all of it lies on the padding
    assert detections(answer, 0, 0.0, (50, 100), (100, 100), (25, 50), most=1).scores == found.scores[:1]
    assert len(detections(answer, 0, 1.0, (50, 100), (100, 100), (25, 50))) == 0


def test_a_student_normalises_for_itself_and_encodes_an_image_once(student: EfficientSam3Model) -> None:
    images = torch.randint(0, 256, (2, 3, 126, 126), dtype=torch.uint8)
    prompts = ConceptPrompts.words(["red circle", "star", "blue"], [0, 0, 1])
    encoded: list[torch.Tensor] = []
    hook = student.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(args[0]))
    detector = StudentDetector(student, words())
    answer = detector.answer(ImageBatch.full(images), prompts)
    hook.remove()
    assert detector.image_size == 126 and not answer.pred_masks.requires_grad
    assert answer.pred_masks.shape[:2] == (3, 5) and len(answer.fpn) == 3 and len(answer.fpn[0]) == 2
    # the statistics of ImageNet, which efficientvit_b0 was trained with, and each question alone
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert len(encoded) == 1 and torch.allclose(encoded[0], (images.float() / 255 - mean) / std, atol=1e-5)
    tokens = build_tokenizer()(["blue"], padding="max_length", max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        alone = student((images[1:].float() / 255 - mean) / std, tokens["input_ids"], tokens["attention_mask"])
    assert torch.allclose(answer.pred_masks[2], alone.pred_masks[0], atol=1e-4)
    assert torch.allclose(answer.pred_boxes[2], alone.pred_boxes[0], atol=1e-4)
    assert not torch.allclose(answer.pred_logits[0], answer.pred_logits[1], atol=1e-4)


def test_what_was_saved_answers_alike(student: EfficientSam3Model, folder: Path) -> None:
    images = ImageBatch.full(torch.randint(0, 256, (1, 3, 126, 126), dtype=torch.uint8))
    prompts = ConceptPrompts(
        ("star",), torch.tensor([0]), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.ones(1, 1).long()
    )
    wanted = StudentDetector(student, words()).answer(images, prompts)
    for place in (folder, folder.parent):  # the student itself, and the run it is in
        loaded = load_concept_model(place)
        assert torch.allclose(loaded.answer(images, prompts).pred_masks, wanted.pred_masks, atol=1e-5)
        assert not loaded.model.training and loaded.words.context == CONTEXT
    larger = load_concept_model(folder, image_size=189)
    assert larger.image_size == 189
    pixels = ImageBatch.full(torch.zeros(1, 3, 189, 189, dtype=torch.uint8))
    assert larger.answer(pixels, prompts).fpn[0].shape[-1] == 48  # ceil(189 / 4)


def test_sam3_is_a_detector_too_and_other_models_are_none(folder: Path, tmp_path: Path) -> None:
    Sam3Model(detector_config()).save_pretrained(tmp_path / "sam3")
    sandbox_words().save(tmp_path / "sam3")
    found = ask_image(load_concept_model(tmp_path / "sam3"), Image.new("RGB", (60, 40)), "red circle", threshold=0)
    assert found.masks.shape == (25, 40, 60)
    with pytest.raises(UserError, match="'sam3_tracker', no detector of concepts"):
        load_concept_model(locate("sandbox"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_concept_model(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_concept_model(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="give a model's folder"):
        load_concept_model(tmp_path / "notes.txt")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_concept_model(half)


class Listener:
    """Keeps what it was asked."""

    image_size = 100
    words = words()
    model = torch.nn.Identity()

    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        self.images, self.prompts = images, prompts
        return output(torch.ones(1, 10, 10), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([9.0]), 9.0)


def test_boxes_are_laid_on_the_canvas() -> None:
    model, image = Listener(), Image.new("RGB", (50, 25))
    found = ask_image(model, image, boxes=[(10, 5, 20, 25)])
    assert model.prompts.texts == ("visual",) and model.prompts.labels.tolist() == [[1]]
    assert model.prompts.boxes[0].tolist() == [pytest.approx([0.3, 0.6, 0.2, 0.8])]
    assert found.masks.shape == (1, 25, 50) and found.boxes.tolist() == [[0, 0, 50, 25]]
    found = ask_image(model, image, "red star", [(10, 5, 20, 25), (0, 0, 50, 25)], geometry="longest_side")
    assert model.prompts.texts == ("red star",) and model.images.sizes.tolist() == [[50, 100]]
    assert model.prompts.boxes[0].tolist() == [pytest.approx([0.3, 0.3, 0.2, 0.4]), pytest.approx([0.5, 0.25, 1, 0.5])]
    assert found.boxes.tolist() == [[0, 0, 50, 25]]  # the lower half of the canvas is padding
    ask_image(model, image, "star")
    assert model.prompts.boxes.shape == (1, 0, 4)


@pytest.mark.parametrize(
    ("text", "boxes", "complaint"),
    [
        (None, [], "no prompt given"),
        ("  ", [], "--text: empty"),
        ("red red red red red star", [], "longer than the 6 tokens"),
        (None, [(20, 5, 10, 25)], "--box: 20,5,10,25 is empty"),
        (None, [(10, 5, 10, 25)], "is empty; give left"),
        (None, [(10, float("nan"), 20, 25)], "is empty; give left"),
        (None, [(10, 5, 51, 25)], "--box: 10,5,51,25 reaches beyond the image, which is 50 x 25"),
        ("star", [(-1, 5, 20, 25)], "reaches beyond"),
    ],
)
def test_what_cannot_be_asked_is_refused(text: str | None, boxes: list, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ask_image(Listener(), Image.new("RGB", (50, 25)), text, boxes)


def test_images_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        ask_image(Listener(), tmp_path / "a.png", "star")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        ask_image(Listener(), tmp_path / "a.png", "star")
