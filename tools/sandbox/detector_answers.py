"""Predictions of a sandbox detector on rendered scenes, computed as in inference."""

from __future__ import annotations

from transformers import Sam3Model

from detector_questions import Questions
from samdistill.ops.images import normalise
from samdistill.ops.outputs import ask
from samdistill.sandbox.concepts import sandbox_words
from samdistill.sandbox.scenes import Scenes
from samdistill.types import DetectorOutput


def ask_scenes(model: Sam3Model, scenes: Scenes, questions: Questions) -> DetectorOutput:
    """Run the detector on all prompts. Each scene is encoded once."""
    vision = model.get_vision_features(normalise(scenes.images))
    asked = sandbox_words().inputs(questions.prompts, model.device)
    text = model.get_text_features(asked["input_ids"], asked["attention_mask"], return_dict=True).pooler_output
    return ask(
        model, vision, questions.prompts.image.to(model.device), text, asked["attention_mask"], asked["input_boxes"],
        asked["input_boxes_labels"],
    )  # fmt: skip
