"""What ``samdistill plan`` prints, line by line, for each job."""

from __future__ import annotations

from ..report import human_bytes
from .detection import DetectionPlan
from .plan import AnyPlan, Plan
from .prompt import PromptPlan
from .video_task import VideoPlan


def plan_facts(found: AnyPlan) -> dict[str, str]:
    """Name and text of each line."""
    if isinstance(found, DetectionPlan):
        return _detection_facts(found)
    if isinstance(found, VideoPlan):
        return _video_facts(found)
    return _prompt_facts(found) if isinstance(found, PromptPlan) else _encoder_facts(found)


def _video_facts(found: VideoPlan) -> dict[str, str]:
    shape = " x ".join(map(str, found.record_shape))
    parts = ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in found.parts.items())
    phases = "; ".join(f"{name} {steps}" for name, steps in found.phases)
    about = "" if found.counted == found.videos else f", counted in {found.counted} videos"
    return {
        "teacher": f"{found.teacher} ({found.teacher_params / 1e6:.2f}M), {found.image_size} px, {shape} a frame",
        "student": f"{found.student} ({found.student_params / 1e6:.2f}M); what trains: {parts}",
        "videos": f"{found.videos} to train on, {found.held_out_videos} held out; {found.frames} annotated "
        f"frames{about}",
        "clips": f"{found.clips_per_epoch} an epoch, {found.context} frames before the query and {found.objects} "
        "objects at most",
        "cache": f"{human_bytes(found.cache_bytes)}: {human_bytes(found.bytes_per_frame)} a frame",
        "memory": f"{human_bytes(found.weights_and_optimiser_bytes)} trained weights and optimiser, "
        f"{human_bytes(found.frozen_bytes)} frozen; activations are not counted",
        "steps": f"{found.steps} ({found.steps_per_epoch} an epoch)" + (f": {phases}" if phases else ""),
    }


def _prompt_facts(found: PromptPlan) -> dict[str, str]:
    parts = ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in found.parts.items() if size >= 5e3)
    grid = " x ".join(map(str, found.grid))
    rounds = f" and {found.rounds} corrective click(s) each" if found.rounds else ""
    teachers = {
        f"teacher {t.name}": f"{t.checkpoint}, {t.share:.0%}: {t.params / 1e6:.2f}M, {t.image_size} px, "
        f"{' x '.join(map(str, t.grid))} cells"
        for t in found.teachers
    }
    used = f"{found.views} view(s) each" if found.cached else "not used: teachers run along"
    return {
        "student": f"{found.student} ({found.student_params / 1e6:.2f}M): {parts}; {found.image_size} px, {grid} cells",
        **teachers,
        "distilled": ", ".join(found.terms) or "nothing: the task alone",
        "images": f"{found.images} to train on, {found.held_out_images} held out; {found.objects} object(s) a step, "
        f"prompts: {found.mode}{rounds}",
        "cache": f"{human_bytes(found.cache_bytes)}: {found.codec}, {human_bytes(found.bytes_per_image)} a view, "
        f"{used}",
        "memory": f"{human_bytes(found.weights_and_optimiser_bytes)} weights and optimiser, "
        f"{human_bytes(found.teacher_bytes)} teachers; activations are not counted",
        "student's file": f"{human_bytes(found.student_fp16_bytes)} in fp16",
        "steps": f"{found.steps} ({found.steps_per_epoch} an epoch)",
    }


def _encoder_facts(found: Plan) -> dict[str, str]:
    shape = " x ".join(map(str, found.embedding_shape))
    return {
        "teacher": f"{found.teacher} ({found.teacher_trunk_params / 1e6:.2f}M in its image encoder)",
        "student": f"{found.student} ({found.trunk_params / 1e6:.3f}M trunk + {found.head_params / 1e6:.3f}M head)",
        "embedding": f"{shape} from {found.image_size} px",
        "images": f"{found.images} to train on, {found.held_out_images} held out, {found.views} view(s) each",
        "cache": f"{human_bytes(found.cache_bytes)}: {found.codec}, {human_bytes(found.bytes_per_record)} a record",
        "memory": f"{human_bytes(found.weights_and_optimiser_bytes)} weights and optimiser, "
        f"{human_bytes(found.activation_bytes)} activations of {found.micro_batch} images",
        "steps": f"{found.steps} ({found.steps_per_epoch} an epoch)",
    }


def _detection_facts(found: DetectionPlan) -> dict[str, str]:
    levels = ", ".join(map(str, found.teacher_levels))
    parts = ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in found.parts.items())
    phases = "; ".join(f"{name} {steps}" for name, steps in found.phases)
    return {
        "teacher": f"{found.teacher} ({found.teacher_params / 1e6:.2f}M, {found.teacher_queries} queries), "
        f"{found.image_size} px, maps of {levels}",
        "student": f"{found.student} ({found.student_params / 1e6:.2f}M, {found.queries} queries): {parts}",
        "images": f"{found.images} to train on, {found.held_out_images} held out, "
        f"{found.questions_per_image} question(s) each",
        "memory": f"{human_bytes(found.weights_and_optimiser_bytes)} weights and optimiser, "
        f"{human_bytes(found.teacher_bytes)} teacher; activations are not counted",
        "student's file": f"{human_bytes(found.student_fp16_bytes)} in fp16",
        "steps": f"{found.steps} ({found.steps_per_epoch} an epoch)" + (f": {phases}" if phases else ""),
    }
