"""What each part of the detection job is worth: every term left out, another matching, other targets, one phase.

    python benchmarks/detection_terms.py --jobs 2 --out benchmarks/results/detection_terms.txt
    python benchmarks/detection_terms.py --only all,"no mask",greedy --seeds 1    # a part now, the rest later

The sandbox recipe on rendered scenes, each variant with the same seeds, evaluated on held-out questions in words:

    all          the recipe: eight terms, three phases (align: fpn alone; features: all terms; outputs: six)
    no X         weight 0, and left out of the terms of every phase. Without fpn the phase align has nothing to train;
                 it is dropped and its epochs are given to nobody
    no align     all eight terms, the phase align dropped: what "no fpn" has to be compared with for the term alone
    greedy       match.method=greedy
    no negatives loss.unmatched=false: queries without a partner are not taught "no object"
    floor F      match.floor=F: teacher queries that score less are nobody's target
    no phases    one phase as long as all, with all terms, at the rates of the phase features

Every training and every evaluation is a process of its own. What is finished in --work is not done again, and a
training that was cut off goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Sheet, arguments, run_cli, setting, spread, use_device

import samdistill
from samdistill.config import DetectionRunConfig, load_config
from samdistill.engine import default_device, newest, read_lines

RECIPE = "detection/sandbox"
BASELINE, FPN = "all", "fpn"
MEASURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc", "mask AP": "mask_ap"}
TEACHER = "teacher"
Phases = list[dict[str, Any]]


def recipe_phases(epochs: Sequence[int] | None, scenes: int, overrides: Sequence[str]) -> Phases:
    """The recipe's phases, with other numbers of epochs where they are given; at most a quarter is warm-up."""
    train = load_config(RECIPE, overrides).train
    phases = [phase.model_dump() for phase in train.phases or ()]
    epochs = [phase["epochs"] for phase in phases] if epochs is None else epochs
    if len(epochs) != len(phases):
        raise SystemExit(f"--epochs: one number for each of the phases {', '.join(p['name'] for p in phases)}")
    found = []
    for phase, count in zip(phases, epochs, strict=True):
        steps = count * (scenes // train.batch_size)
        found.append({**phase, "epochs": count, "warmup_steps": min(phase["warmup_steps"], steps // 4)})
    return found


def without(phases: Phases, removed: str) -> Phases:
    """Phases that train every term they had but ``removed``; those that have none left are dropped."""
    left = []
    for phase in phases:
        terms = [t for t in phase["terms"] or DetectionRunConfig.TERMS if t != removed]
        left += [{**phase, "terms": terms}] if terms else []
    return left


def variants(phases: Phases) -> dict[str, list[str]]:
    """Overrides of the recipe by name."""

    def schedule(chosen: Phases) -> str:
        return f"train.phases={json.dumps(chosen)}"

    align = [phase for phase in phases if phase["terms"] is not None and tuple(phase["terms"]) == (FPN,)]
    every = max(phases, key=lambda phase: len(phase["terms"] or DetectionRunConfig.TERMS))
    one = {**every, "name": "one", "epochs": sum(phase["epochs"] for phase in phases), "terms": None}
    whole = schedule(phases)
    found = {BASELINE: [whole]}
    found |= {f"no {t}": [schedule(without(phases, t)), f"loss.{t}=0.0"] for t in DetectionRunConfig.TERMS}
    if align:
        found["no align"] = [schedule([phase for phase in phases if phase not in align])]
    return found | {
        "greedy": [whole, "match.method=greedy"],
        "no negatives": [whole, "loss.unmatched=false"],
        "floor 0": [whole, "match.floor=0.0"],
        "floor 0.6": [whole, "match.floor=0.6"],
        "no phases": [schedule([one])],
    }


@dataclass(frozen=True)
class ConceptStudy:
    """Variants of the detection recipe x seeds, in ``work``; jobs: processes at a time, one thread each."""

    work: Path
    variants: dict[str, list[str]]
    seeds: Sequence[int]
    scenes: int
    val: int
    base: Sequence[str]
    jobs: int

    @property
    def data(self) -> Path:
        return self.work / f"scenes-{self.scenes}-{self.val}"

    def folder(self, variant: str, seed: int) -> Path:
        return self.work / "trained" / f"{variant.replace(' ', '_')}-seed{seed}"

    def settings(self, variant: str, seed: int) -> list[str]:
        places = [setting("output", self.folder(variant, seed)), setting("data.root", self.data)]
        return [*self.base, *self.variants[variant], *places, f"train.seed={seed}", f"data.seed={seed}"]

    def run(self) -> None:
        """Render, train, evaluate, seed after seed, so that a cut-off study has whole seeds."""
        samdistill.render_sandbox(self.data, train=self.scenes, val=self.val, format="coco", progress=False)
        pairs = [(name, seed) for seed in self.seeds for name in self.variants]
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(lambda pair: self._one(*pair), pairs):
                pass
        path = load_config(RECIPE, self.settings(BASELINE, self.seeds[0])).teacher.path
        self._evaluate(path, self.work / "evaluated" / f"{TEACHER}.json")

    def _one(self, variant: str, seed: int) -> None:
        run, settings = self.folder(variant, seed), self.settings(variant, seed)
        resolved = load_config(RECIPE, settings).to_yaml()
        if (run / "config.yaml").is_file() and (run / "config.yaml").read_text() != resolved:
            raise SystemExit(f"{run}: trained with other settings; remove it, or give another --work")
        # the tokenizer is written last: a student without it cannot be asked
        if not (run / "student" / "tokenizer.json").is_file():
            self._note(f"training {run.name}")
            resume = ["--resume", str(run)] if newest(run) is not None else []
            run_cli(["train", RECIPE, *settings, *resume], self.work / "logs" / f"{run.name}.txt", 1)
        self._evaluate(str(run), self.work / "evaluated" / f"{run.name}.json")

    def _evaluate(self, model: str, kept: Path) -> None:
        if kept.is_file():
            return
        kept.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--child", model, str(self.data), str(kept), *self.base]
        log = self.work / "logs" / f"evaluated-{kept.stem}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            threads = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=threads, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"evaluating {model} ended with {done.returncode}; see {log}")

    def _note(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}\n", end="", file=sys.stderr, flush=True)  # one write: threads

    def result(self, variant: str, seed: int) -> dict[str, Any]:
        return json.loads((self.work / "evaluated" / f"{self.folder(variant, seed).name}.json").read_text())

    def teacher(self) -> dict[str, Any]:
        return json.loads((self.work / "evaluated" / f"{TEACHER}.json").read_text())

    def values(self, variant: str, measure: str) -> list[float]:
        """One figure of a variant, per seed."""
        return [self.result(variant, seed)["models"][0][measure] for seed in self.seeds]

    def differences(self, variant: str, baseline: str, measure: str) -> list[float]:
        """Variant minus baseline, seed by seed."""
        pairs = zip(self.values(variant, measure), self.values(baseline, measure), strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def trained(self, variant: str) -> tuple[int, list[float]]:
        """Steps, and seconds in them by seed."""
        lines = [read_lines(self.folder(variant, seed) / "metrics.jsonl") for seed in self.seeds]
        last = [[line for line in run if "seconds" in line][-1] for run in lines]  # not the validation after it
        return last[0]["step"], [line["seconds"] for line in last]


def evaluate_child(model: str, data: Path, kept: Path, overrides: Sequence[str]) -> None:
    """A run or a detector's folder on all held-out questions; leaves the figures in ``kept``."""
    from samdistill.data.saco import ConceptSet, find_concepts
    from samdistill.evaluation.concepts import evaluate_concepts
    from samdistill.inference.concepts import load_concept_model

    config, place = load_config(RECIPE, [*overrides, setting("data.root", data)]), find_concepts(data)
    assert isinstance(config, DetectionRunConfig) and place is not None
    settings = config.evaluate
    found = evaluate_concepts(
        {Path(model).name: load_concept_model(model, device=default_device())}, ConceptSet.load(place),
        geometry=config.data.geometry, threshold=settings.threshold, batch_size=settings.batch_size, pictures=0,
        repeats=0,
    )  # fmt: skip
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(found.to_dict()))
    partial.replace(kept)


def say(sheet: Sheet, study: ConceptStudy) -> None:
    """Conditions, all figures, and each variant against the baseline."""
    config, one = load_config(RECIPE, study.settings(BASELINE, study.seeds[0])), study.teacher()
    phases = ", ".join(f"{phase.name} {phase.epochs}" for phase in config.train.phases or ())
    seeds = ", ".join(map(str, study.seeds))
    sheet.say()
    sheet.say(
        f"teacher {config.teacher.path!r}, student {config.student.backbone} with {config.student.queries} queries, "
        f"{study.scenes} scenes, batches of {config.train.batch_size}, epochs: {phases}; seeds {seeds}; 1 thread per "
        f"training, {study.jobs} at a time"
    )
    if config.student.start is not None:
        sheet.say(
            "all variants and seeds go on from one student whose vision encoder was aligned with the teacher's before, "
            "by the recipe's phase align alone: a term is missed in what follows, not in that phase"
        )
    sheet.say(
        f"held out: {one['questions']} questions about {one['images']} scenes, {one['positives']} of them for "
        f"something that is there; scores from {one['threshold']:g}"
    )
    rows = []
    for name in study.variants:
        steps, seconds = study.trained(name)
        figures = [spread(study.values(name, measure)) for measure in MEASURES.values()]
        rows.append([name, *figures, str(steps), spread(seconds, ".0f")])
    rows.append([TEACHER, *(f"{one['models'][0][measure]:.4f}" for measure in MEASURES.values()), "", ""])
    sheet.table("mean +- standard deviation over seeds", ["", *MEASURES, "steps", "seconds in steps"], rows)
    for title, measure in MEASURES.items():
        compared = [(name, BASELINE) for name in study.variants if name != BASELINE]
        if {f"no {FPN}", "no align"} <= study.variants.keys():
            compared.append((f"no {FPN}", "no align"))
        rows = []
        for name, baseline in compared:
            gaps = study.differences(name, baseline, measure)
            told = name if baseline == BASELINE else f"{name} minus {baseline}"
            rows.append([told, f"{statistics.fmean(gaps):+.4f}", *(f"{gap:+.4f}" for gap in gaps)])
        if rows:
            sheet.table(
                f"{title}: variant minus {BASELINE}, same seed", ["", "mean", *(f"seed {s}" for s in study.seeds)], rows
            )


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "detection_terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trainings")
    parser.add_argument("--only", help="variants, separated by commas; 'all' is always among them")
    parser.add_argument("--scenes", type=int, default=2000, help="rendered scenes to train on (2000)")
    parser.add_argument("--val", type=int, default=128, help="held-out scenes, four questions each (128)")
    parser.add_argument("--epochs", help="of each phase, such as 3,1,1 (the recipe's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to do some seeds now and others later (0)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (1)")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, data, kept, *overrides = sys.argv[2:]
        evaluate_child(model, Path(data), Path(kept), overrides)
        return
    args = parse()
    epochs = None if args.epochs is None else [int(text) for text in args.epochs.split(",")]
    chosen = variants(recipe_phases(epochs, args.scenes, args.overrides))
    if args.only is not None:
        names = [BASELINE, *(name.strip() for name in args.only.split(","))]
        if unknown := [name for name in names if name not in chosen]:
            raise SystemExit(f"--only: no variant is called {unknown[0]!r}; there is: {', '.join(chosen)}")
        chosen = {name: overrides for name, overrides in chosen.items() if name in names}
    device = use_device(args.device)
    sheet = Sheet(device)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    base = ["data.workers=0", *args.overrides]
    study = ConceptStudy(args.work.resolve(), chosen, list(seeds), args.scenes, args.val, base, args.jobs)
    study.run()
    say(sheet, study)
    sheet.say()
    if "no align" in chosen:
        sheet.say(
            '"no fpn" loses the phase align too, and its epochs are given to nobody; "no align" has the same steps '
            'with the term. A step of align asks nobody anything and is the cheapest, so "no phases" takes as many '
            "steps but more time."
        )
    sheet.say('"no X": weight 0 and out of every phase. Weights of the other terms are not tuned again.')
    sheet.say(
        "Not measured: exemplar boxes, photographs and the real SAM 3, longer trainings, other weights. The spread "
        "covers initialisation, order, augmentation and questions; teacher and scenes stay the same."
    )
    sheet.save(
        args.out,
        {
            "recipe": RECIPE, "scenes": args.scenes, "held_out": args.val, "seeds": list(seeds), "base": base,
            "variants": chosen, "teacher": study.teacher(),
            "evaluations": {name: [study.result(name, seed) for seed in seeds] for name in chosen},
            "training": {name: dict(zip(("steps", "seconds"), study.trained(name), strict=True)) for name in chosen},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
