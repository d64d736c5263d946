"""``export``: write a folder with files for a device, each compared with the eager model before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoints.files import SANDBOX
from ..checkpoints.loading import MOST_PIXELS
from ..checkpoints.promptable import load_promptable
from ..inference.concepts import ConceptModel, load_concept_model
from ..inference.predict import answers_prompts
from ..io import as_path, make_folder, replacing, write_text
from ..ops.promptable import Promptable
from ..progress import Progress
from ..reading import foreign
from ..students import HostedVideoLiteModel, HostedVideoModel
from ..types import UserError
from .companions import about_model, kind_of, write_companions
from .gate import refusal, sha256
from .page import find_runtime, write_page
from .part_files import OPENED, SUFFIXES, Order, write_part
from .parts import Part
from .parts_detector import Baked, bake, detector_parts
from .parts_promptable import promptable_parts
from .precision import needs_images
from .quality import calibration, shortfall
from .record import RECORD, Exported, write_card, write_record
from .standalone import standalone
from .targets import target
from .vocabulary import NO_WORDS, phrases_of


def export(
    model: str | Path, out: str | Path, *, to: str | Sequence[str] = "onnx", precision: str | Sequence[str] = "fp32",
    calibrate: str | Path | None = None, vocabulary: str | Path | Sequence[str] = (), image_size: int | None = None,
    static: bool = False, web: bool = False, keep_failed: bool = False, progress: bool = True,
) -> Exported:  # fmt: skip
    """Export a model to a folder for devices.

    Every file is compared with the eager model before it gets its name. If one does not pass, nothing is delivered.

    Args:
        model: Anything that ``load`` opens. A run or a folder is read, not changed.
        out: The folder. It must not exist, be empty, or hold an earlier export, which is replaced.
        to: Export targets: ``onnx`` and others that are listed in docs/export.md.
        precision: ``fp32``, ``fp16`` or ``int8``, or several.
        calibrate: Images for ``int8``: a folder, a pattern or a file. Every second one gives the ranges of values; on
            the others the files are compared, with labels also by mIoU or cgF1.
        vocabulary: Phrases that become constants of the files, as a list, as text with commas, or as a file with a
            phrase per line. The files then need no text encoder and no tokenizer. Only for a detector.
        image_size: Side of the input in pixels. None keeps the model's.
        static: Fix all axes: one image, one prompt, one point or one box, and a full memory.
        web: Add a page that runs them in a browser. It needs ``onnxruntime-web`` of npm, a detector ``vocabulary`` too.
        keep_failed: Deliver files that fail the gate, as ``NAME.failed.EXT``.
        progress: Show a progress bar.

    Returns:
        The files and what the gate found. ``table()`` formats them for a terminal.

    Raises:
        UserError: The model cannot be loaded or have this ``image_size``, the target needs a missing library or cannot
            express the model, a phrase does not fit, ``out`` holds something else, or a file fails the gate.

    Example:
        >>> export("sandbox-mobile", "exported").passed  # doctest: +SKIP
        True
    """
    names, kinds = ([one] if isinstance(one, str) else list(one) for one in (to, precision))
    needs_images(kinds, calibrate)
    order = Order({name: target(name) for name in names}, _precisions(kinds, names), static, keep_failed)
    folder = _free_folder(as_path(out))
    if web:
        _check_page(names)  # before the conversions, which take minutes
    network = _load(model, image_size)
    baked = _baked(network, vocabulary, web)
    if calibrate is not None:
        order = replace(order, calibration=calibration(network, calibrate))
    with foreign(model, "cannot be exported"):
        parts = parts_of(network, baked, static)
    about = about_model(network, baked, str(model)) | {"static": static}
    exported = Exported(folder, kind_of(network), as_path(model).name, str(model), about)
    with replacing(folder) as new:
        make_folder(new)
        with Progress("exporting", len(parts) * len(order.targets), "files", progress) as bar:
            for name in order.targets:
                for part in parts:
                    exported.files += write_part(part, name, order, new)
                    bar.advance(1)
        _finish(new, exported, network, baked, web)
        _measure(new, exported, order)
    return exported


def parts_of(model: ConceptModel | Promptable, baked: Baked | None = None, static: bool = False) -> list[Part]:
    """Return the files of a model.

    Args:
        model: The model, in float32 on the CPU.
        baked: Text features of a vocabulary, from ``bake``. None for a text encoder that reads any phrase.
        static: Whether all axes are fixed.

    Raises:
        UserError: No files can be made of the model.
    """
    if isinstance(getattr(model, "model", None), HostedVideoModel | HostedVideoLiteModel):
        raise UserError("a hosted student with a memory cannot be exported; export the image student that it began as")
    if isinstance(model, Promptable):
        return promptable_parts(model, static)
    return detector_parts(model, baked, static)


def _finish(
    folder: Path, exported: Exported, network: ConceptModel | Promptable, baked: Baked | None, web: bool
) -> None:
    """Write what stands beside the files. The record is last, because it has the checksums of all others."""
    write_companions(folder, network, baked)
    write_text(folder / "predict.py", standalone())
    if web:
        write_page(folder)
    write_card(folder, exported)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    exported.others = {name: sha256(folder / name) for name in sorted(there - {file.path for file in exported.files})}
    write_record(folder, exported)


def _measure(folder: Path, exported: Exported, order: Order) -> None:
    """Measure what the int8 files for onnxruntime lose on held-out data, and write the record again with it."""
    if order.calibration is None:
        return
    reduced = [file for file in exported.files if file.precision == "int8" and file.target == OPENED]
    if not reduced:
        found = {"measured": False, "reason": f"it is measured with the files of the target {OPENED}"}
    elif all(file.verdict.passed for file in reduced):
        found = order.calibration.quality(folder)
    else:
        found = {"measured": False, "reason": "a file failed the gate"}
    exported.about |= {"quality": {"int8": found}}
    if (problem := shortfall(found)) is not None:
        if not order.keep_failed:
            raise refusal("int8", replace(reduced[0].verdict, problems=[problem]))
        for file in reduced:
            file.refuse(folder, problem)
        write_card(folder, exported)
        exported.others["README.md"] = sha256(folder / "README.md")
    write_record(folder, exported)


def _precisions(kinds: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    if unknown := [kind for kind in kinds if kind not in SUFFIXES]:
        raise UserError(f"--precision: {unknown[0]!r} is unknown; give {', '.join(SUFFIXES)}")
    for name in targets:
        if lacking := [kind for kind in kinds if kind not in target(name).precisions]:
            raise UserError(f"--precision {lacking[0]}: not available for {name}; leave it out for this target")
    return tuple(dict.fromkeys(kinds))


def _free_folder(folder: Path) -> Path:
    """Return ``folder`` if an export may be written there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UserError(f"{folder}: holds something else than an export; give a new folder")
    make_folder(folder.parent)
    return folder


def _load(model: str | Path, image_size: int | None) -> ConceptModel | Promptable:
    """Load a model on the CPU. An exported folder cannot be exported again."""
    if image_size is not None and not 0 < image_size <= MOST_PIXELS:
        raise UserError(
            f"--image-size {image_size}: give a side of 1 to {MOST_PIXELS} px, for a SAM 3 a multiple of its patches "
            "such as 1008; or leave it out for the model's own"
        )
    if (as_path(model) / RECORD).is_file():
        raise UserError(f"{model}: is an exported folder; give the model from which it was exported")
    if str(model) != SANDBOX and answers_prompts(model):
        return load_promptable(model, image_size)
    return load_concept_model(model, image_size, "cpu")


def _check_page(targets: Sequence[str]) -> None:
    if "onnx" not in targets:
        raise UserError("--web: the page runs ONNX files; add onnx to --to")
    find_runtime()


def _baked(network: ConceptModel | Promptable, vocabulary: str | Path | Sequence[str], web: bool) -> Baked | None:
    if not isinstance(vocabulary, str | Path) and not vocabulary:
        if web and not isinstance(network, Promptable):
            raise UserError(NO_WORDS)
        return None
    if isinstance(network, Promptable):
        raise UserError("--vocabulary: is for a detector; a promptable model takes points and boxes, no phrases")
    return bake(network, phrases_of(vocabulary, network.words))
