"""The pipeline of any job: plan, cache, check, train, merge, evaluate, export, report.

``plan``, ``cache``, ``check`` and ``train`` are single stages. ``distill``, ``run`` and ``demo`` run all of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoints.files import SANDBOX, STUDENT_FOLDER
from .checkpoints.processors import write_processor
from .config import Run
from .data import reporting
from .delivery import Delivery
from .dist import default_device, process_rank
from .engine import CheckReport, FitResult, check_terms, fit, newest
from .engine.frozen_norm import small_batch
from .io import as_path, write_json, write_text
from .jobs import JOBS
from .jobs.base import Given, Plan
from .jobs.caching import CacheCall, CacheReport
from .jobs.fitting import fitted
from .jobs.loading import load_config
from .locks import locked
from .registry import did_you_mean
from .report import human_bytes, write_report
from .run_result import REPORT, SUMMARY, Earlier, RunResult, report_of
from .types import UserError

logger = logging.getLogger("samdistill")
console = Console(soft_wrap=True, highlight=False)


def plan(config: Run, *, world: int = 1) -> Plan:
    """Compute the sizes and steps of a run. Only configurations and file lists are read.

    A warning is logged if batch norms would train on the statistics of too few images.

    Args:
        config: Configuration from ``load_config``.
        world: Number of training processes.

    Returns:
        The job's plan, with sizes in bytes, parameters and steps. ``facts`` and ``to_dict`` list them.

    Raises:
        UserError: The data set, the teacher or the student cannot be used.

    Example:
        >>> import tempfile
        >>> import samdistill as sd
        >>> root = tempfile.mkdtemp()
        >>> counts = sd.render_sandbox(root, train=64, val=2, progress=False)
        >>> config = sd.load_config("encoder/sandbox", [f"data.root={root}", "train.epochs=3"])
        >>> sd.plan(config).steps
        6
    """
    job = JOBS[config.job]
    with reporting("plan") as left_out:
        found = job.plan(config, world)
        found = replace(found, skipped=tuple(left_out.found))
    warning = small_batch(found.batch_norms, config.train, job.frames(config))
    if warning is not None:
        logger.warning(warning)
    return found


def cache(
    config: Run, *, rank: int = 0, world: int = 1, verify: bool = False, device: str | None = None,
    progress: bool = True, layout: str = "store",
) -> CacheReport:  # fmt: skip
    """Run the teacher and write its features to the cache. Records that exist are not computed again.

    Args:
        config: Configuration from ``load_config``.
        rank: Number of this process. Each process writes its own files.
        world: Number of processes. The images or videos are divided among them.
        verify: Check all checksums, and compare a sample of the records with the teacher's output.
        device: Device of the teacher. None uses CUDA or MPS if available, and the CPU otherwise.
        progress: Show a progress bar.
        layout: ``store``, or ``npy`` (prompt job only) to write one file per image and feature in addition.

    Returns:
        Numbers of records and bytes, and the inputs that were left out.

    Raises:
        UserError: The existing cache has another teacher, transform, size, codec or other prompts, or the job has no
            cache.

    Example:
        See ``train``.
    """
    job = JOBS[config.job]
    known = {name for one in JOBS.values() for name in one.layouts}
    if layout not in known:
        raise UserError(f"no layout is called {layout!r}{did_you_mean(layout, sorted(known, reverse=True))}")
    if layout not in job.layouts:
        owners = " and ".join(name for name, one in JOBS.items() if layout in one.layouts)
        raise UserError(
            f"--layout {layout} is for the {owners} job; the {job.name} job has only {' and '.join(job.layouts)}"
        )
    call = CacheCall(rank, world, verify, device or str(default_device()), progress, layout)
    with reporting("cache", config.output, rank):
        return job.cache(config, call)


def check(config: Run, *, device: str | None = None) -> CheckReport:
    """Compute the value, weight and gradient norm of each loss term on one training batch of every phase.

    A job that trains from a cache uses it if it exists. Otherwise the teacher runs, if the job can train without a
    cache.

    Args:
        config: Configuration from ``load_config``.
        device: Device of student and teacher. None uses CUDA or MPS if available, and the CPU otherwise.

    Returns:
        One row per term and phase. ``ok`` is False if a term has no gradient at the exported parameters.

    Raises:
        UserError: The data, the teacher, the student or the cache cannot be used.

    Example:
        See ``train``.
    """
    job, where = JOBS[config.job], device or str(default_device())
    with reporting("check"):
        task, size = job.probe(config, where)
        return check_terms(task, where, size, config.train.seed, config.train)


def train(config: Run, *, resume: str | Path | None = None) -> FitResult:
    """Train the student. Checkpoints and the student are written to the run folder ``config.output``.

    An interrupted run is resumed by the same call. A finished run is not changed.

    Args:
        config: Configuration from ``load_config``.
        resume: Another run folder or a checkpoint to start from.

    Returns:
        Steps, time, the last value of each term, and the paths of the student and the last checkpoint.

    Raises:
        UserError: The cache is missing, incomplete or does not fit the configuration; another process trains in the
            folder; the folder has a run with other settings or data; or a loss is not finite.

    Example:
        >>> import tempfile
        >>> import samdistill as sd
        >>> root = tempfile.mkdtemp()
        >>> counts = sd.render_sandbox(root, train=16, val=2, progress=False)
        >>> settings = [f"data.root={root}", f"output={root}/run", "train.batch_size=8", "train.epochs=1"]
        >>> config = sd.load_config("encoder/sandbox", settings)
        >>> sd.cache(config, progress=False).records
        16
        >>> sd.check(config).ok
        True
        >>> sd.train(config).steps
        2
    """
    start, started = None if resume is None else as_path(resume), newest(config.output) is not None
    with ExitStack() as stack:
        if process_rank() == 0:
            stack.enter_context(locked(config.output, "train"))
        stack.enter_context(reporting("train", config.output, process_rank(), resume=started))
        return _train(config, start)


def _train(config: Run, resume: Path | None) -> FitResult:
    job = JOBS[config.job]
    config = job.resolve(config)
    ready = job.prepare(config, str(default_device()))
    result = fit(
        ready.task, config.train, config.output, resume=resume, workers=config.data.workers, resolved=config.to_yaml()
    )
    folder = config.output / STUDENT_FOLDER
    if process_rank() == 0 and folder.is_dir():
        if ready.words is not None:
            ready.words.save(folder)  # a student that takes phrases is loaded with its tokenizer
        write_processor(folder)
    return result


def distill(
    job: str, data: str | Path, *, teacher: str | Path | None = None,
    teachers: Mapping[str, float] | None = None, student: str | Path | None = None, out: str | Path,
    train: Mapping[str, Any] | None = None, overrides: Sequence[str] = (), export: Sequence[str] = (),
    web: bool = False, vocabulary: str | Path | Sequence[str] = (),
) -> RunResult:  # fmt: skip
    """Run all stages of a job on a data set: plan, cache, check, train, merge, evaluate, export, report.

    An interrupted run is resumed by the same call.

    Args:
        job: ``encoder``, ``detection``, ``prompt``, ``video`` or ``text``.
        data: A folder of images, an SA-1B tree, a COCO folder, or images with masks. For ``video``: SA-V or DAVIS. For
            ``text``: a file of phrases, or a folder of them.
        teacher: Path or hub id of the teacher, or ``sandbox``.
        teachers: Weights of several teachers by path, for a job that supports it. Give either this or ``teacher``.
        student: Name of a student (``es_rv_m``), a timm model, or a model to start from. None uses the recipe's.
        out: Run folder.
        train: Settings of the block ``train``, such as ``{"epochs": 5}``.
        overrides: Further settings as ``key=value``.
        export: Targets for which the result is exported to ``export/`` in the run folder, such as ``onnx``.
        web: Export to ``onnx`` too, with the page that runs the files in a browser (``serve_page`` serves it). A
            detector's page needs ``vocabulary``.
        vocabulary: Phrases that become constants of the exported files, as for ``export``. Only for a detector.

    Returns:
        The results of all stages. ``summary()`` returns the most important lines.

    Raises:
        UserError: A stage fails. The results of finished stages are kept.

    Example:
        >>> distill("encoder", "photos", teacher="facebook/sam3", student="es_rv_m", out="runs/mine",
        ...         train={"epochs": 5})  # doctest: +SKIP
    """
    if (teacher is None) == (teachers is None):
        raise UserError("give either teacher, or teachers with their weights")
    chosen = JOBS[job]
    delivery = Delivery.of(chosen, export, web, vocabulary)
    place = as_path(data)
    given = Given(
        place, teachers if teachers is not None else {str(teacher): 1.0}, None if student is None else str(student)
    )
    recipe, settings = chosen.begin(given)
    settings.append(f"output={json.dumps(str(as_path(out)))}")
    if default_device().type != "cuda":
        settings.append("train.precision=fp32")  # bf16 is slower than fp32 on most CPUs
    further = [*(f"train.{key}={json.dumps(value)}" for key, value in (train or {}).items()), *overrides]
    if any(text.startswith("job=") for text in further):
        raise UserError("job: it is the first argument of distill; leave it out of the settings")
    if SANDBOX in given.teachers and not any(place.glob("sandbox*-train.json")):
        logger.warning(
            "the teacher %r was trained on rendered scenes only: its student is of no use on photographs; take it to "
            "try the command only", SANDBOX,
        )  # fmt: skip
    config = load_config(recipe, [*settings, *further])
    with locked(config.output, "run"):
        return run_pipeline(fitted(config, chosen.train_items(config), further), delivery)


def run(
    images: str | Path, teacher: str | Path, student: str, out: str | Path, *, overrides: Sequence[str] = (),
    export: Sequence[str] = (), web: bool = False,
) -> RunResult:  # fmt: skip
    """Distil the image encoder of a SAM 3, SAM 2 or SAM into a small one. Same as ``distill`` with the encoder job.

    Args:
        images: A folder of images, an SA-1B tree or a COCO folder.
        teacher: A folder or hub id of a SAM 3, SAM 2 or SAM, an original file, or ``sandbox``.
        student: Name of a student such as ``es_rv_m``, or any timm backbone.
        out: Run folder.
        overrides: Settings as ``key=value``.
        export: As for ``distill``.
        web: As for ``distill``.

    Returns:
        The results of all stages.

    Raises:
        UserError: A stage fails. The results of finished stages are kept, and the same call resumes the run.

    Example:
        >>> run("photos", "facebook/sam3", "es_rv_m", "runs/mine").summary()  # doctest: +SKIP
    """
    return distill(
        next(iter(JOBS)), images, teacher=teacher, student=student, out=out, overrides=overrides, export=export, web=web
    )


def demo(
    out: str | Path, job: str | None = None, *, overrides: Sequence[str] = (), export: Sequence[str] = (),
    web: bool = False,
) -> RunResult:  # fmt: skip
    """Run all stages of a job on rendered data with a bundled teacher. It takes minutes on two CPU cores.

    Args:
        out: Output folder. The data are written to ``data/`` and the run to ``run/``.
        job: Name of the job. None for ``encoder``.
        overrides: Settings as ``key=value``.
        export: As for ``distill``.
        web: As for ``distill``. The page of a detector has the phrases of the rendered data.

    Returns:
        The results of all stages.

    Raises:
        UserError: There is no job of that name, or a stage fails.

    Example:
        >>> demo("runs/demo", "prompt").summary()  # doctest: +SKIP
    """
    chosen, out = JOBS[next(iter(JOBS)) if job is None else job], as_path(out)
    delivery = Delivery.of(chosen, export, web, chosen.phrases if web else ())
    with locked(out, "demo"):
        console.print("[bold]render[/]   the data of the demo")
        recipe, settings = chosen.demo(out / "data")
        run_folder = f"output={json.dumps(str(out / 'run'))}"
        return run_pipeline(load_config(recipe, [run_folder, *settings, *overrides]), delivery)


def run_pipeline(config: Run, delivery: Delivery | None = None, *, label: str = "") -> RunResult:
    """Run all stages of a configuration. Each stage keeps the results that exist and adds what is missing.

    Args:
        config: The configuration.
        delivery: What is exported at the end.
        label: Name of a run that another run needs. It is shown before its lines, and its student is not merged.
    """
    job = JOBS[config.job]
    config = job.resolve(config)
    planned = plan(config)
    say = partial(_say, label)
    say("plan", planned.headline)
    if delivery is not None:
        delivery.check(job, config)
    if planned.steps == 0:
        raise UserError(f"{planned.trained_on} are less than one batch: lower train.batch_size")
    earlier = tuple(map(_run_before, job.before(config)))
    cached = cache(config) if job.reads_cache(config) else None
    if cached is not None:
        say("cache", f"{cached.records} records, {human_bytes(cached.bytes)}, {len(cached.skipped)} skipped")
    checked = check(config)
    for phase in dict.fromkeys(term.phase for term in checked.terms):
        terms = ", ".join(f"{term.name} {term.grad_norm:.3g}" for term in checked.terms if term.phase == phase)
        say("check", f"gradient norm at the student{f', {phase}' if phase else ''}: {terms}")
    if not checked.ok:
        raise UserError("; ".join(checked.problems))
    say("train", f"{planned.steps} steps on {planned.trained_on}")
    trained = train(config)
    merged = job.merge(config) if not label else None
    if merged is not None:
        groups = (f"{name} {t['tensors']} tensors ({t['elements'] / 1e6:.2f}M)" for name, t in merged.totals.items())
        say("merge", ", ".join(groups))
    say("evaluate", "on held-out data")
    with reporting("evaluate", config.output):
        evaluated = job.evaluate(config, merged)
    if evaluated is None:
        console.print(f"         left out: {job.unmeasured}")
    else:
        write_json(config.output / "evaluation.json", evaluated.result.to_dict(), indent=1)
        console.print(evaluated.result.table())
    exported = delivery.export(config, merged) if delivery is not None else None
    report = config.output / REPORT
    result = RunResult(config, planned, cached, checked, trained, merged, evaluated, exported, report, earlier)
    write_report(result.report, report_of(result))
    write_text(config.output / SUMMARY, "".join(f"{line}\n" for line in result.figures()))
    return result


def _say(label: str, stage: str, text: str) -> None:
    console.print(f"[bold]{f'{label}: ' if label else ''}{stage}[/]{' ' * (9 - len(stage))}{text}")


def _run_before(config: Run) -> Earlier:
    """Make a run that another one needs. Of a finished one, settings and data are compared, and nothing is repeated."""
    summary = config.output / SUMMARY
    if summary.is_file():
        train(config)
        _say(config.job, "train", f"finished before, see {config.output}")
    else:
        run_pipeline(config, label=config.job)
    return Earlier(config.job, config.output, tuple(summary.read_text(encoding="utf-8").splitlines()))
