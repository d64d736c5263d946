"""Hugging Face folders of a SAM 3 that hosts a student: configuration, companion files, shards and a load check."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from ..io import copy_file, replacing, write_json
from ..reading import foreign
from ..students import StudentTrunk, StudentTrunkConfig
from ..types import UserError
from .files import TORCH_SUFFIXES, TensorInfo
from .layout import neck_inputs, vision_configs
from .loading import compare, quiet_transformers
from .processors import PROCESSOR_FILES
from .student import Host, OpenedStudent, as_json, expected, read_student

SHARD_BYTES = 2**30
"""Largest size of a shard. Shards are written one after the other, so this also bounds the memory that a merge takes.
"""
_CLASSES = {
    "sam3": "Sam3Model", "sam3_lite_text": "Sam3LiteTextModel", "sam3_tracker": "Sam3TrackerModel",
    "sam3_tracker_video": "Sam3TrackerVideoModel", "sam3_video": "Sam3VideoModel",
}  # fmt: skip
_OWN = ("config.json", "merge.json", "README.md", ".gitattributes", *PROCESSOR_FILES)
"""Files of a teacher's folder that do not describe the merged model."""
_TRACKERS = ("sam3_tracker", "sam3_tracker_video")


def host_of(config: dict[str, Any], where: Path) -> Host:
    """Return the trunk's output channels, patch size and input size that a SAM 3 ``config.json`` expects.

    Raises:
        UserError: ``config`` is not that of a SAM 3 model that can host a student.
    """
    if config.get("model_type") not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UserError(f"{where}: a {config.get('model_type')!r} model cannot host a student; supported: {known}")
    trunk = vision_configs(copy.deepcopy(config))[0].get("backbone_config") or {}
    size = trunk.get("image_size", 1008)
    return Host(
        trunk.get("hidden_size", 1024), trunk.get("patch_size", 14), size[0] if isinstance(size, list) else size
    )


def host_config(config: dict[str, Any], host: Host, student: StudentTrunkConfig) -> dict[str, Any]:
    """Return ``config`` with the student as the trunk of every vision encoder.

    ``config`` itself is not changed. If the student's input size differs from the host's, every size that follows from
    the input (feature maps, prompts, memory) is set for the student's.
    """
    merged = copy.deepcopy(config)
    for vision in vision_configs(merged):
        vision["backbone_config"] = as_json(student)
    if student.image_size == host.image_size:
        return merged
    size, grid = student.image_size, student.image_size // student.patch_size
    for vision in vision_configs(merged):
        vision["backbone_feature_sizes"] = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    if "low_res_mask_size" in merged:
        merged["low_res_mask_size"] = 4 * grid
    for part in (merged, merged.get("tracker_config") or {}):
        if part.get("model_type") in _TRACKERS or part is merged.get("tracker_config"):
            part["prompt_encoder_config"] = {**(part.get("prompt_encoder_config") or {}), "image_size": size}
        if "memory_attention_rope_feat_sizes" in part:
            part["memory_attention_rope_feat_sizes"] = [grid, grid]
        if "image_size" in part or part.get("model_type") == _TRACKERS[1]:  # without the key it would be 1008
            part["image_size"] = size
    return merged


def check_shapes(student: OpenedStudent, host: Host, kept: Mapping[str, TensorInfo], teacher: Path | str) -> None:
    """Check that the trunk's output channels and patch size are those that the configuration and each neck read, and
    that it was not trained for a SAM or a SAM 2.

    Raises:
        UserError: They are not, or it was.
    """
    config = student.config
    wanted = {"the configuration": host.hidden_size, **neck_inputs(kept)}
    for where, channels in wanted.items():
        if channels != config.hidden_size:
            raise UserError(
                f"{student.source}: shape conflict: the student gives {config.hidden_size} channels, but {where} of "
                f"{teacher} reads {channels}; train the student against this teacher"
            )
    if config.patch_size != host.patch_size:
        raise UserError(
            f"{student.source}: shape conflict: the student's patch size is {config.patch_size}, "
            f"but that of {teacher} is {host.patch_size}"
        )
    for name, given, reads in (
        ("fine levels of these channels", config.fine_channels, host.fine_channels),
        ("mean of its images", config.host_mean, host.mean),
        ("deviation of its images", config.host_std, host.std),
    ):
        if list(given) != list(reads):
            raise UserError(
                f"{student.source}: a trunk for another host: {name}: {list(given)}, but {teacher} reads "
                f"{list(reads)}; train the student against this teacher"
            )


def trained_trunk(source: Path, trunk: StudentTrunk, kept: Mapping[str, TensorInfo], teacher: str) -> dict[str, Tensor]:
    """Return the tensors of a trained trunk, for ``trunk`` in a model whose other tensors are ``kept``.

    Args:
        source: As in ``read_student``.
        trunk: The trunk to fill. The trained one may have another input size. Its normalisation becomes that of
            ``trunk``.
        kept: Tensors of the host.
        teacher: Name of the host in error messages.

    Raises:
        UserError: As ``read_student``; or the trained trunk has another backbone or head, or is one for another host.
    """
    config = trunk.config
    host = Host(config.hidden_size, config.patch_size, config.image_size)
    found = read_student(source, host)
    check_shapes(found, host, kept, teacher)
    own, wanted = (f"the backbone {c.backbone!r} and the head {c.head!r}" for c in (found.config, config))
    if own != wanted:
        raise UserError(f"{found.source}: a trunk with {own}, but this student has {wanted}")
    compare(found.info, expected(config), str(found.source), f"the student {config.backbone} at {config.image_size} px")
    trunk.read_as(found.config)
    return {name: found.weights[name] for name in found.info}


def copy_companions(folder: Path, to: Path) -> None:
    """Copy tokenizer and licence files. The processor is written anew, see ``write_processor``."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in (*TORCH_SUFFIXES, ".safetensors") or path.name.endswith(".index.json")
        if not weights and path.is_file() and path.name not in _OWN:
            copy_file(path, to / path.name)


def save_shards(folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, TensorInfo]) -> None:
    """Write safetensors as transformers does: one file, or shards with an index above ``SHARD_BYTES``."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, about in info.items():
        if shards[-1] and size + about.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += about.bytes
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with replacing(folder / file) as new:
            save_file({name: tensors[name].contiguous() for name in names}, new, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(about.bytes for about in info.values())}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def check_loads(folder: Path, config: dict[str, Any]) -> None:
    """Load the folder on the meta device with the class that its users will use.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape.
    """
    named = (config.get("architectures") or [None])[0]
    model_class = getattr(transformers, named or _CLASSES.get(config["model_type"], ""), AutoModel)
    with foreign("the merged model", f"would not load as {model_class.__name__}"), quiet_transformers():
        _, found = model_class.from_pretrained(folder, device_map="meta", output_loading_info=True)
    problems = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if problems:
        kind, names = next(iter(problems.items()))
        raise UserError(
            f"the merged model would not load as {model_class.__name__}: {len(names)} {kind.replace('_', ' ')}, "
            f"such as {names[0]}; check --target-prefix and --replace-prefix"
        )
