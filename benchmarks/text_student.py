"""How much of the teacher's cgF1 does a small text encoder keep, on phrases that it was not trained on?

    python benchmarks/text_student.py --out benchmarks/results/text_student.txt

The recipe text/sandbox, as it is and with variants, each with every seed, which also selects the held-out phrases. Each
student is merged into the bundled detector and answers the questions about held-out scenes. Then, with random weights
of full size: seconds of a training step of the S0 and S1 student on 64 phrases, with a context of 16 and 32 tokens, and
of the teacher's text encoder on as many. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Sheet, arguments, setting, spread, train_once, use_device
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import samdistill
from samdistill.io import write_json
from samdistill.jobs.loading import load_config
from samdistill.jobs.text.evaluate import evaluate
from samdistill.jobs.text.losses import TEXT_TERMS
from samdistill.students import TEXT_SIZES, TextStudent, TextStudentConfig

RECIPE = "text/sandbox"
VARIANTS: dict[str, list[str]] = {
    "the recipe": [],
    "without composed phrases": ["data.composed=0"],
    "a context of 4 tokens, not 6": ["student.context=4"],
}
SIZES: dict[str, list[str]] = {
    "the recipe's size, a fifth of its epochs": ["train.epochs=4"],
    "S0's size, the same": ["train.epochs=4", "student.size=s0", "train.lr=1e-3"],
    "S1's size, the same": ["train.epochs=4", "student.size=s1", "train.lr=1e-3"],
}
"""Full-size layers with the sandbox's vocabulary, with one seed."""
MEASURES = {
    "cosine": ("cosine", ".3f"),
    "of the end token": ("pooled_cosine", ".3f"),
    "nearest to itself": ("own_nearest", ".1%"),
    "cgF1 kept, new phrases": ("kept_new", ".1%"),
    "cgF1 kept, all phrases": ("kept", ".1%"),
}
PHRASES = 64
TEACHER = {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 512,
           "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 32}  # fmt: skip
"""The text encoder of SAM 3."""


def run_of(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Return the evaluation of one run, which is cached, trained and merged if it was not before."""
    name = variant.replace(" ", "_").replace("'", "")
    run = args.work / f"{name}-seed{seed}"
    kept = run / "evaluation.json"
    settings = [
        setting("output", run), setting("evaluate.concepts", args.work / "scenes" / "concepts_val.json"),
        "cache.mode=online", f"train.seed={seed}", f"data.seed={seed}", *(VARIANTS | SIZES)[variant],
        *args.overrides,
    ]  # fmt: skip
    if not kept.is_file():
        train_once(RECIPE, settings, args.work / f"{run.name}.txt", 1, "student/tokenizer.json")
        samdistill.merge(run, "sandbox", run / "merged")
        config = load_config(RECIPE, settings)
        write_json(kept, evaluate(config, str(run / "merged")).to_dict())
    return json.loads(kept.read_text())


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model for model in found["models"] if model["name"] == name)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def full_size(repeats: int) -> dict[str, dict[str, float]]:
    """Return parameters, seconds and phrases of each step at full size, with random weights."""
    found = {}
    for size in ("s0", "s1"):
        for context in (16, 32):
            config = TextStudentConfig(**TEXT_SIZES[size], max_position_embeddings=context)
            student = TextStudent(config)
            ids = torch.randint(0, 49408, (PHRASES, context))
            mask, target = torch.ones_like(ids), torch.randn(PHRASES, context, 256)
            optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4)

            def step(student=student, ids=ids, mask=mask, target=target, optimiser=optimiser) -> None:
                tokens = student(ids, mask).last_hidden_state
                terms = [TEXT_TERMS.get(name)(tokens, target, mask) for name in TEXT_TERMS.weights]
                torch.stack(terms).sum().backward()
                optimiser.step()
                optimiser.zero_grad()

            count = sum(p.numel() for p in student.parameters())
            found[f"{size}, {context} tokens"] = {"parameters": count, "seconds": seconds(step, repeats)}
    teacher = CLIPTextModelWithProjection(CLIPTextConfig(**TEACHER, hidden_act="gelu")).eval()
    ids = torch.randint(0, 49408, (PHRASES, 32))
    with torch.no_grad():
        took = seconds(lambda: teacher(input_ids=ids, attention_mask=torch.ones_like(ids)), repeats)
    count = sum(p.numel() for p in teacher.parameters())
    return found | {"teacher, forward only": {"parameters": count, "seconds": took}}


def say(sheet: Sheet, found: dict[str, list[dict[str, Any]]], sizes: dict[str, dict[str, float]]) -> None:
    say_variants(sheet, {name: found[name] for name in VARIANTS})
    if set(SIZES) <= set(found):
        say_variants(sheet, {name: found[name] for name in SIZES})
    if sizes:
        sheet.table(
            f"full size, random weights: a step on {PHRASES} phrases", ["", "parameters", "seconds"],
            [[name, f"{one['parameters'] / 1e6:.1f}M", f"{one['seconds']:.2f}"] for name, one in sizes.items()],
        )  # fmt: skip


def say_variants(sheet: Sheet, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the figures of some variants."""
    first = next(iter(found.values()))[0]
    rows = [
        [variant, *(spread([row(one, "distilled")[name] for one in runs], form) for name, form in MEASURES.values())]
        for variant, runs in found.items()
    ]
    sheet.table(
        f"{first['phrases']} phrases that were not trained on, {first['trained']} that were; "
        f"{first['concepts']['questions']} questions about {first['concepts']['images']} held-out scenes; "
        f"{len(next(iter(found.values())))} seed(s)", ["", *MEASURES], rows,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "text_student")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--scenes", type=int, default=128, help="held-out scenes (128)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--sizes", action="store_true", help="train the sizes of S0 and S1 too")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps at full size; 0 leaves it out (3)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    sheet = Sheet(use_device(args.device))
    args.work = args.work.resolve()
    if not (args.work / "scenes" / "concepts_val.json").is_file():  # written last
        samdistill.render_sandbox(args.work / "scenes", train=1, val=args.scenes, format="coco", progress=False)
    found = {variant: [run_of(args, variant, seed) for seed in range(args.seeds)] for variant in VARIANTS}
    found |= {variant: [run_of(args, variant, 0)] for variant in SIZES if args.sizes}
    sizes = full_size(args.repeats) if args.repeats else {}
    say(sheet, found, sizes)
    sheet.say()
    sheet.say(
        "Not measured: phrases beside the sandbox's, the published weights, a context of 16 against one of 32 (the "
        "sandbox's phrases have at most 4 tokens)."
    )
    sheet.save(args.out, {"variants": {name: [one["models"] for one in runs] for name, runs in found.items()},
                          "full_size": sizes})  # fmt: skip


if __name__ == "__main__":
    main()
