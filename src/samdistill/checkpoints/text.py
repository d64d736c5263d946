"""Text encoders in SAM 3 checkpoints: their tensors, and the ``Sam3LiteTextModel`` that hosts a small one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Sam3LiteTextConfig,
    Sam3LiteTextModel,
    Sam3LiteTextTextConfig,
)

from ..io import copy_file
from ..students import TEXT_STUDENT, TextStudent, TextStudentConfig
from ..types import UserError
from .efficientsam3 import read_text as read_published
from .files import TORCH_SUFFIXES, TensorInfo, check_archive, load_torch, named_tensors, open_weights
from .layout import DETECTOR, ORIGINAL_STUDENT
from .loading import CONFIG, build_config, compare, model_kinds, open_config, pretrained, skeleton
from .student import as_json
from .words import WORD_FILES

TEXT_PREFIXES = ("text_encoder.", "text_projection.")
"""Begin of the names of the text encoder and its projection in transformers' detectors."""
DETECTOR_MODEL = "detector_model."
"""Begin of the names of the detector in a ``Sam3VideoModel``."""
_NOT_HOSTED = ("width", "architectures", "_name_or_path", "transformers_version", "dtype")
"""Fields of a student's configuration that do not describe its encoder."""
_CAUSAL = "MobileCLIP-B"
"""EfficientSAM3's name of the text encoder with the tensors of MobileCLIP-S1 and a causal mask."""
HOSTS = ("sam3", "sam3_lite_text", "sam3_video")
"""Model types whose detector can host a small text encoder."""


def text_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors of the text encoder: their names in a detector to their names in the file."""
    found = {name.removeprefix(DETECTOR_MODEL): name for name in names}
    return {own: name for own, name in found.items() if own.startswith(TEXT_PREFIXES)}


@dataclass(frozen=True)
class OpenedText:
    """Configuration and tensors of a text student, by its own names, which are also those in a detector."""

    source: Path
    config: TextStudentConfig
    weights: Mapping[str, Tensor]
    info: dict[str, TensorInfo]


def read_text(source: Path) -> OpenedText | None:
    """Read a text student and check that it is complete and has the shapes of its configuration.

    Args:
        source: The folder of a text student, a run with one in ``student/``, or a file of EfficientSAM3 with a text
            encoder: of its first stage, or merged without an image trunk.

    Returns:
        The student, or None if ``source`` holds none.

    Raises:
        UserError: It is damaged, incomplete or of other shapes.
    """
    if source.is_file() and source.suffix in TORCH_SUFFIXES:
        content = load_torch(source)
        tensors = named_tensors(content)[1]
        _refuse_causal(content, source)
        found = None if any(map(_of_student_trunk, tensors)) else read_published(tensors, source)
        if found is None:
            return None
        check_archive(source)
        place, (config, weights) = source, found
        info = {name: TensorInfo.of(tensor) for name, tensor in weights.items()}
    elif (folder := _folder(source)) is not None:
        place, config, opened = folder, open_config(folder, TextStudentConfig), open_weights(folder)
        weights, info = opened, opened.info
    else:
        return None
    wanted = skeleton(lambda: TextStudent(config), place).state_dict()
    compare(info, {name: TensorInfo.of(t) for name, t in wanted.items()}, str(place), "the text student")
    return OpenedText(place, config, weights, info)


def find_text(source: Path) -> OpenedText:
    """Read a text student as ``read_text`` does.

    Raises:
        UserError: As ``read_text``, or there is no text student in ``source``.
    """
    opened = read_text(source)
    if opened is None:
        raise UserError(
            f"{source}: no student of kind {TEXT_STUDENT} here; give the run that trained one, its student/, or a file "
            "of EfficientSAM3"
        )
    return opened


def start_text(student: TextStudent, source: Path) -> None:
    """Load all weights of a text encoder from a trained one.

    Args:
        student: The text encoder to fill.
        source: As in ``read_text``.

    Raises:
        UserError: There is no text encoder in ``source``, or it has other shapes, heads or another use of padding.
    """
    opened = find_text(source)
    state = student.state_dict()
    compare(opened.info, {n: TensorInfo.of(t) for n, t in state.items()}, str(opened.source), "this student")
    for name in ("attend_padding", "num_attention_heads"):
        own, wanted = getattr(opened.config, name), getattr(student.config, name)
        if own != wanted:
            raise UserError(f"{opened.source}: a text encoder with {name} {own}, but this student has {wanted}")
    student.load_state_dict({name: opened.weights[name] for name in state})


def _folder(source: Path) -> Path | None:
    """Return the folder of a text student: ``source``, or ``student/`` in the run folder ``source``. None without."""
    if not source.is_dir():
        return None
    return next((place for place, kind in model_kinds(source).items() if kind == TEXT_STUDENT), None)


def _refuse_causal(content: Mapping[Any, Any], source: Path) -> None:
    """Raise ``UserError`` if EfficientSAM3's training names MobileCLIP-B, which has a causal mask."""
    settings = content.get("config")
    model = settings.get("MODEL") if isinstance(settings, dict) else None
    if isinstance(model, dict) and model.get("BACKBONE") == _CAUSAL:
        raise UserError(f"{source}: a {_CAUSAL}, whose attention is causal; a Sam3LiteTextModel cannot host it")


def _of_student_trunk(name: str) -> bool:
    return ORIGINAL_STUDENT.removeprefix(DETECTOR) in name


def lite_config(settings: dict[str, Any], student: TextStudentConfig, where: Path) -> dict[str, Any]:
    """Return the configuration of the ``Sam3LiteTextModel`` with the vision encoder and the heads of a SAM 3.

    Args:
        settings: The ``config.json`` of the SAM 3. It is not changed. Of a video model, the detector is used.
        student: Configuration of the text encoder.
        where: The SAM 3, for error messages.

    Raises:
        UserError: The SAM 3 takes no words, or its width or its vocabulary is not the student's.
    """
    if settings.get("model_type") not in HOSTS:
        raise UserError(
            f"{where}: a {settings.get('model_type')!r} model takes no words, so it cannot host a text encoder; "
            f"supported: {', '.join(HOSTS)}"
        )
    host = copy.deepcopy(settings.get("detector_config") or settings)
    width = (host.get("detr_encoder_config") or {}).get("hidden_size", 256)
    vocabulary = (host.get("text_config") or {}).get("vocab_size", 49408)
    if student.width != width:
        raise UserError(
            f"the text encoder gives {student.width} channels, but the heads of {where} read {width}; train it with "
            "this teacher"
        )
    if student.vocab_size != vocabulary:
        raise UserError(
            f"the text encoder has a vocabulary of {student.vocab_size} tokens, but the tokenizer of {where} has "
            f"{vocabulary}; train it with this teacher"
        )
    for name, part in host.items():
        if isinstance(part, dict) and name.endswith("_config") and name not in ("vision_config", "text_config"):
            part["model_type"] = f"sam3_lite_text_{name.removesuffix('_config')}"
    text = {key: value for key, value in as_json(student).items() if key not in _NOT_HOSTED}
    host["text_config"] = text | {"model_type": Sam3LiteTextTextConfig.model_type}
    return host | {"model_type": "sam3_lite_text", "architectures": ["Sam3LiteTextModel"]}


def lite_host(host: PreTrainedConfig, text: TextStudentConfig, where: Path) -> Sam3LiteTextConfig:
    """Return the configuration of a detector with another text encoder, see ``lite_config``."""
    return build_config(Sam3LiteTextConfig, lite_config(as_json(host), text, where), where)


def with_text(model: PreTrainedModel, text: OpenedText, config: Sam3LiteTextConfig) -> Sam3LiteTextModel:
    """Return a detector with another text encoder, in float32 and eval mode on the CPU. ``merge`` writes the same one.

    Args:
        model: A ``Sam3Model`` or ``Sam3LiteTextModel``. Its other tensors are used, not copied where possible.
        text: The text encoder.
        config: From ``lite_host``.
    """
    state = model.state_dict()
    kept, _ = split_text(state)
    tensors = {own: state[there] for own, there in kept.items()} | {name: text.weights[name] for name in text.info}
    return pretrained(Sam3LiteTextModel, config, tensors, text.source)


def copy_words(source: Path, to: Path) -> None:
    """Copy the tokenizer of a text student, whose context may be shorter than the teacher's. A file has none."""
    for pattern in WORD_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name != CONFIG:
                copy_file(path, to / path.name)


def split_text(weights: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Divide the tensors of a SAM 3 into those that a merge of a text encoder keeps and removes.

    Args:
        weights: Tensors by their names in transformers.

    Returns:
        The kept tensors of the detector, by name in the result to name in the file, and the names of the others: the
        text encoder, and everything of a video model beside its detector.
    """
    video = any(name.startswith(DETECTOR_MODEL) for name in weights)
    text = set(text_tensors(weights).values())
    kept = {
        name.removeprefix(DETECTOR_MODEL): name
        for name in weights
        if name not in text and (not video or name.startswith(DETECTOR_MODEL))
    }
    there = set(kept.values())
    return kept, [name for name in weights if name not in there]
