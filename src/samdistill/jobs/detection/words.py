"""The small text encoder of a hosted student: which run of the text job makes it, and what is known before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...checkpoints.files import STUDENT_FOLDER
from ...config import Run
from ...config.loading import read_config
from ...data.questions import PhraseBook
from ...data.sources import survey
from ...io import make_folder, write_text
from ...students import TextStudentConfig, text_student_config
from ...teachers import DetectorInfo
from ...types import UserError
from .. import JOBS
from ..fitting import fitted
from ..images import Images
from ..loading import load_config
from .config import DetectionRunConfig

PHRASES = "phrases.txt"
"""File of the run folder with the phrases that the text encoder learns."""
TEXT_JOB = "text"
"""Job whose recipes make the encoder."""
STEPS = 20
"""Smallest number of steps in an epoch of the text run, for a small vocabulary."""


def text_run(config: DetectionRunConfig) -> Run | None:
    """Return the text run that has to be finished before this one, or None if there is none.

    Its phrases are ``student.text_phrases``, or those of the questions about the training images, which are written to
    the run folder. Of the names of a data set none is held out. Teacher and precision are those of ``config``. A small
    vocabulary is passed over several times in an epoch, so that an epoch has at least as many items of it as of
    composed phrases. Everything else is the recipe's.

    Raises:
        UserError: The recipe is not one of the text job, or there are too few phrases.
    """
    if not config.trains_text:
        return None
    phrases, source = list(config.student.text_phrases or ()), config.questions.source
    settings = []
    if not phrases and source != "generic":
        images = survey(Images(config).train_source)
        vocabulary = PhraseBook(config.questions.model_copy(update={"boxes": 0.0}), images).vocabulary
        make_folder(config.output)
        write_text(config.output / PHRASES, "".join(f"{phrase}\n" for phrase in vocabulary))
        phrases = [str(config.output / PHRASES)]
        if source == "names":  # every name will be asked, so none may be unlearned
            settings.append("data.held_out_fraction=0")
    run = _recipe(config, *([f"data.phrases={json.dumps(phrases)}"] if phrases else ()), *settings)
    job, data = JOBS[run.job], run.data
    count = job.train_items(_with_data(run, passes=1, composed=0))
    passes = max(data.passes, -(-data.composed // count))
    items = job.train_items(_with_data(run, passes=passes))
    run = fitted(_with_data(run, passes=passes), items, ())
    if items // run.train.batch_size >= STEPS:
        return run
    return _with_data(run, passes=passes * -(-STEPS * run.train.batch_size // items))


def _with_data(run: Any, **changed: int) -> Any:
    """Return a text run with other values in its block ``data``."""
    return run.model_copy(update={"data": run.data.model_copy(update=changed)})


def _recipe(config: DetectionRunConfig, *settings: str) -> Run:
    """Load ``student.text_recipe`` for the teacher of ``config``."""
    teacher, name = config.teacher, config.student.text_recipe
    assert name is not None and config.text_encoder is not None
    given = [f"teacher.path={json.dumps(teacher.path)}", f"output={json.dumps(str(config.text_encoder))}",
             f"train.precision={config.train.precision}", *settings]  # fmt: skip
    if teacher.tokenizer is not None:
        given.append(f"teacher.tokenizer={json.dumps(str(teacher.tokenizer))}")
    try:
        job = read_config(name).get("job")
        if job != TEXT_JOB:  # before the settings, which are unknown keys of another job
            job = job or next(iter(JOBS))
            raise UserError(f"a recipe of the {job} job; give one of the text job, such as text/s0")
        return load_config(name, given)
    except UserError as error:
        raise UserError(f"student.text_recipe={name}: {error}") from None


def planned_text(config: DetectionRunConfig, teacher: DetectorInfo) -> TextStudentConfig:
    """Return the configuration of the text encoder that ``text_run`` will make, without reading phrases."""
    student: Any = _recipe(config).student  # type: ignore[attr-defined]
    size = student.size if isinstance(student.size, str) else student.size.fields()
    return text_student_config(
        size, context=min(student.context, teacher.context), vocab_size=teacher.vocab_size, width=teacher.hidden_size,
        attend_padding=student.attend_padding,
    )  # fmt: skip


def text_line(config: DetectionRunConfig) -> str:
    """Return a line about the text run that comes before this one, for a plan. Empty if there is none."""
    if not config.trains_text:
        return ""
    made = config.text_encoder is not None and (config.text_encoder / STUDENT_FOLDER).is_dir()
    state = "finished" if made else "not made yet; `samdistill run` makes it first, or give student.text_encoder"
    return f"{config.student.text_recipe} in {config.text_encoder}: {state}"


def missing_text(place: Path, recipe: str | None) -> UserError:
    """Return the error about a text encoder that no run has made yet."""
    if recipe is None:
        return UserError(f"student.text_encoder={place}: no such file or folder; train it first (the text job)")
    return UserError(
        f"{place}: no text encoder there yet: `samdistill run` trains it before the student; or train one with "
        f"`samdistill train {recipe}` and give its folder as student.text_encoder"
    )
