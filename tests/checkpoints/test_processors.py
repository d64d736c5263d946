"""The processor that stands in every folder prepares images, points, boxes and phrases as this package does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    Sam2ImageProcessor,
    Sam2Processor,
    Sam3ImageProcessor,
    Sam3Processor,
    Sam3TrackerModel,
    Sam3TrackerProcessor,
    SamImageProcessor,
    SamProcessor,
    pipeline,
)

from samdistill.checkpoints.files import locate
from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.processors import processor_file, processor_of, write_processor
from samdistill.checkpoints.promptable import load_promptable
from samdistill.checkpoints.words import Words
from samdistill.inference.concepts import detections, load_concept_model
from samdistill.inference.geometry import canvas_of
from samdistill.inference.pictures import image_batch, lay
from samdistill.ops.images import normalise
from samdistill.ops.promptable import embed, predict, sam_pixels
from samdistill.sandbox.concepts import sandbox_words
from samdistill.students import (
    ConceptProcessor,
    MobileSamConfig,
    StudentTrunk,
    StudentTrunkConfig,
    efficient_sam3_config,
)
from samdistill.types import DetectorOutput, Prompts

PROMPTED = {"sandbox": Sam3TrackerProcessor, "sandbox-sam": SamProcessor, "sandbox-mobile": SamProcessor}
STEPS = 2.5 / 255 / 0.22
"""Resizing differs by 2 grey levels between libraries, at most; smallest deviation of a normalisation: 0.224."""


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    grid = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(grid[None], (230, 170), mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray(np.uint8(smooth.permute(1, 2, 0).numpy() * 255))


@pytest.mark.parametrize("name", PROMPTED)
def test_a_packaged_model_opens_with_its_own_images_points_and_masks(name: str, picture: Image.Image) -> None:
    processor, model = AutoProcessor.from_pretrained(locate(name)), load_promptable(name)
    assert type(processor) is PROMPTED[name]
    found = processor(picture, input_points=[[[[100.0, 200.0]]]], input_labels=[[[1]]],
                      input_boxes=[[[10.0, 20.0, 150.0, 220.0]]], return_tensors="pt")  # fmt: skip
    place, laid = canvas_of(model), lay(picture, canvas_of(model))
    batch = image_batch([laid])
    ours = normalise(batch.images) if name == "sandbox" else sam_pixels(model, batch)
    assert found["pixel_values"].shape == ours.shape and (found["pixel_values"] - ours).abs().max() < STEPS
    points = place.points(torch.tensor([[100.0, 200.0]]), laid.original)
    boxes = place.points(torch.tensor([[10.0, 20.0], [150.0, 220.0]]), laid.original)
    torch.testing.assert_close(found["input_points"].float().view(1, 2), points)
    torch.testing.assert_close(found["input_boxes"].float().view(2, 2), boxes)

    logits = F.interpolate(
        torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1)), (36, 36), mode="bicubic"
    )
    sizes = {"reshaped_input_sizes": found["reshaped_input_sizes"]} if name != "sandbox" else {}
    theirs = processor.post_process_masks(logits[None].clone(), found["original_sizes"], **sizes)[0]
    on_canvas = F.interpolate(logits, (place.image_size,) * 2, mode="bilinear")
    assert (theirs[0] == (place.masks_back(on_canvas[0], laid.original) > 0)).float().mean() > 0.995


@pytest.mark.parametrize("name", PROMPTED)
def test_the_pipeline_of_transformers_answers_as_this_package_does(name: str, picture: Image.Image) -> None:
    model, folder = load_promptable(name), locate(name)
    if name == "sandbox":  # for a stretched image, the pipeline places its points as if the aspect were kept
        picture = picture.resize((200, 200))
    width, height = picture.size
    answers = pipeline("mask-generation", model=str(folder), device="cpu", dtype=torch.float32)(
        picture, points_per_crop=1, pred_iou_thresh=-9.0, stability_score_thresh=-9.0, crops_nms_thresh=1.0,
    )  # fmt: skip
    place, laid = canvas_of(model), lay(picture, canvas_of(model))
    middle = place.points(torch.tensor([[[[width / 2, height / 2]]]]), laid.original)
    prompts = Prompts(torch.ones(1, 1, dtype=torch.bool), middle, torch.ones(1, 1, 1, dtype=torch.int64), None)
    with torch.no_grad():
        ours = predict(model, embed(model, image_batch([laid])), prompts, True)
        canvas = F.interpolate(ours.low_res_masks[0], (place.image_size,) * 2, mode="bilinear", align_corners=False)
        masks = place.masks_back(canvas[0], laid.original) > 0
    assert len(answers["masks"]) > 0 and answers["masks"][0].shape == (height, width)
    apart = (answers["scores"][:, None] - ours.iou_scores.flatten()[None]).abs()
    for mask, near in zip(answers["masks"], apart < 0.02, strict=True):  # scores may be close to each other
        equal = (torch.as_tensor(mask).bool() == masks[near]).flatten(1).float().mean(1)
        assert len(equal) and equal.max() > 0.99, (answers["scores"], ours.iou_scores, equal)


@pytest.mark.parametrize("name", ["detector", "student"])
def test_a_detector_opens_with_its_own_phrases_boxes_and_instances(name: str, picture: Image.Image) -> None:
    folder = locate("sandbox", packaged="detector") if name == "detector" else locate("sandbox-student")
    model = load_concept_model("sandbox" if name == "detector" else "sandbox-student")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is ConceptProcessor and isinstance(processor, Sam3Processor)
    found = processor(picture, text="red circle", input_boxes=[[[17.0, 23.0, 85.0, 115.0]]], return_tensors="pt")
    ids, mask = model.words.encode(["red circle"])
    assert torch.equal(found["input_ids"], ids) and torch.equal(found["attention_mask"], mask)
    assert processor(text=["red circle"])["input_ids"] == ids.tolist()
    torch.testing.assert_close(found["input_boxes"], torch.tensor([[[0.3, 0.3, 0.4, 0.4]]]))
    laid = lay(picture, canvas_of(model))
    mean, std = (model.mean, model.std) if name == "detector" else (
        model.model.config.vision_config.image_mean, model.model.config.vision_config.image_std)  # fmt: skip
    ours = normalise(image_batch([laid]).images, tuple(mean), tuple(std))
    assert (found["pixel_values"] - ours).abs().max() < STEPS
    with pytest.raises(ValueError, match=r"a phrase has \d+ tokens with start and end, but at most 6 fit"):
        processor(text="red circle " * 6)

    made = torch.Generator().manual_seed(2)
    corners = torch.rand(1, 5, 2, generator=made) * 0.5
    masks = F.interpolate(torch.randn(1, 5, 4, 4, generator=made), (36, 36), mode="bicubic")
    answer = DetectorOutput(
        pred_logits=torch.randn(1, 5, generator=made), presence_logits=torch.ones(1, 1), pred_masks=masks,
        semantic_seg=masks[:, :1], fpn=(), encoder=None, pred_boxes=torch.cat([corners, corners + 0.4], -1),
    )  # fmt: skip
    theirs = processor.post_process_instance_segmentation(answer, threshold=0.3, target_sizes=[laid.original])[0]
    side = (model.image_size, model.image_size)
    own = detections(answer, 0, 0.3, laid.size, side, laid.original)
    order = theirs["scores"].argsort(descending=True)
    torch.testing.assert_close(theirs["scores"][order], own.scores)
    torch.testing.assert_close(theirs["boxes"][order], own.boxes)
    assert (theirs["masks"][order].bool() == own.masks).float().mean() > 0.98


@pytest.mark.parametrize("name", ["tracker", "sam", "mobile", "detector", "student"])
def test_the_packaged_files_are_those_that_are_written_today(name: str, tmp_path: Path) -> None:
    folder = locate("sandbox").parent / name
    for path in folder.glob("*.json"):
        if path.name != "processor_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    write_processor(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written == json.loads((folder / "processor_config.json").read_text())


def test_a_merged_folder_has_the_geometry_of_its_trunk(hosts, tmp_path: Path, picture) -> None:
    for geometry, kind in (("square", Sam3TrackerProcessor), ("longest_side", SamProcessor)):
        run = tmp_path / geometry
        trunk = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=64, image_size=126, geometry=geometry))
        trunk.save_pretrained(run / "student")
        merge(run, hosts["tracker"][1], run / "merged")
        processor = AutoProcessor.from_pretrained(run / "merged")
        assert type(processor) is kind
        model = load_promptable(run / "merged")
        ours = normalise(image_batch([lay(picture, canvas_of(model))]).images)
        assert (processor(picture, return_tensors="pt")["pixel_values"] - ours).abs().max() < STEPS
        generate = pipeline("mask-generation", model=str(run / "merged"), device="cpu")
        answers = generate(picture, points_per_crop=1, pred_iou_thresh=-9.0, stability_score_thresh=-9.0)
        assert type(generate.model) is Sam3TrackerModel and answers["scores"].shape == (len(answers["masks"]),)


def test_a_trunk_alone_and_a_video_model_without_words_have_image_processors(hosts, student, tmp_path: Path) -> None:
    folder = student[1] / "student"
    write_processor(folder)
    trunk = AutoProcessor.from_pretrained(folder)
    merge(folder, hosts["video"][1], tmp_path / "video")
    video = AutoProcessor.from_pretrained(tmp_path / "video")
    assert type(trunk) is Sam2ImageProcessor and list(trunk.image_mean) == [0.5, 0.5, 0.5]
    assert type(video) is Sam3ImageProcessor and video.size.height == trunk.size.height == 126
    assert type(pipeline("mask-generation", model=str(tmp_path / "video"), device="cpu").model) is Sam3TrackerModel


def test_a_video_model_with_words_has_all_three_processors(hosts, student, tmp_path: Path) -> None:
    folder = shutil.copytree(hosts["video"][1], tmp_path / "video")
    sandbox_words().save(folder)
    merge(student[1], folder, tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert type(processor).__name__ == "Sam3VideoProcessor" and processor.target_size == 126
    assert processor.video_processor.size.height == 126 and processor.tokenizer.pad_token == "<pad>"


def test_the_class_follows_the_geometry_the_words_and_the_context() -> None:
    words = sandbox_words()
    square, padded = MobileSamConfig(image_size=64), MobileSamConfig(image_size=64)
    square.geometry = "square"
    assert type(processor_of(square)) is Sam2Processor and type(processor_of(padded)) is SamProcessor
    detector = efficient_sam3_config(text={"max_position_embeddings": 32})
    long = Words(words.tokenizer, 32)
    long.tokenizer.model_max_length = 32
    assert type(processor_of(detector, long.tokenizer)) is Sam3Processor
    assert type(processor_of(detector)) is Sam3ImageProcessor
    detector.geometry = "longest_side"
    assert type(processor_of(detector, long.tokenizer)) is SamImageProcessor
    name, settings = processor_file(processor_of(StudentTrunkConfig(image_size=126)))
    assert name == "preprocessor_config.json" and settings["processor_class"] == settings["image_processor_type"]
