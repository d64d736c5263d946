"""Shared code of the full-size benchmarks: a tiny SAM 3, a tokenizer, timers, and stages in their own processes."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, Sheet, arguments, open_work, run_stage, use_device
from transformers import PreTrainedTokenizerFast

DATA = REPOSITORY.parent / "shared" / "data"
PHOTOGRAPHS = DATA / "coco" / "images"
Row = dict[str, Any]
"""Result of a stage: ``stage``, ``seconds``, ``peak_bytes``, ``found`` and ``parts``."""


def tiny_config() -> dict[str, Any]:
    """Return the configuration of a SAM 3 with 0.4M parameters at 126 px."""
    heads = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vit = {
        "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [1],
        "pretrain_image_size": 42,
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 1000, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "sam3_vision_model", "backbone_config": vit, "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[36, 36], [18, 18], [9, 9]],
    }  # fmt: skip
    return {
        "vision_config": vision, "text_config": text, "geometry_encoder_config": {**heads, "roi_size": 3,
        "num_layers": 1}, "detr_encoder_config": {**heads, "num_layers": 1}, "mask_decoder_config": heads,
        "detr_decoder_config": {**heads, "num_layers": 1, "num_queries": 10},
    }  # fmt: skip


def stand_in_tokenizer(words: Sequence[str], count: int, begin: int, end: int, context: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word and unused tokens up to a vocabulary of ``count``.

    It replaces the published tokenizer, which is not available offline.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    named = {begin: "<bos>", end: "<eos>"}
    free = iter(number for number in range(count) if number not in named)
    named |= {next(free): word for word in ("<pad>", "<unk>", *dict.fromkeys(words))}
    table = {named.get(number, f"<idle{number}>"): number for number in range(count)}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", begin), ("<eos>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        eos_token="<eos>",
    )  # fmt: skip


def peak_bytes() -> int:
    """Return the peak memory of this process.

    The kernel's value is used if there is one, because ``getrusage`` on Linux includes the parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Let ``peak_bytes`` start at the present size. Only Linux can; elsewhere it is the peak of the whole process."""
    if (place := Path("/proc/self/clear_refs")).exists():
        place.write_text("5")


class Clock:
    """Measures the seconds of each part, and the peak memory after it, in the order in which the parts first ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, dict[str, dict[str, float]]()

    def peak(self) -> int:
        cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if cuda else peak_bytes()

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that measures ``work``. The times of several calls are added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = work(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            elif self.device.type == "mps":
                torch.mps.synchronize()
            before = self.parts.get(name, {"seconds": 0.0})["seconds"]
            self.parts[name] = {"seconds": before + time.perf_counter() - start, "peak_bytes": self.peak()}
            return found

        return timed


def stage_arguments(doc: str | None, work: str, tiny: str, keep: str) -> argparse.ArgumentParser:
    """Return a parser with the common options. ``tiny`` and ``keep`` are parts of the help of these options."""
    parser = arguments(doc, work)
    parser.add_argument("--tiny", action="store_true", help=f"{tiny}, to try this script")
    parser.add_argument("--keep", action="store_true", help=f"keep --work (about {keep} at full size)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def run(
    script: str, args: argparse.Namespace, stages: Mapping[str, Callable[[Clock], Any]], words: Sequence[str],
    say: Callable[[Sheet, dict[str, Row]], None],
) -> None:  # fmt: skip
    """Run all stages in their own processes and print the results or, in such a process, run its stage.

    ``stages`` has the functions of the stages by name, in order; ``args.work`` is absolute when they are called.
    ``words`` are further arguments of the script that the stages need. ``say`` prints the results to the sheet.
    """
    device = use_device(args.device)
    args.work = args.work.resolve()
    if args.stage is not None:
        clock = Clock(torch.device(device))
        found = stages[args.stage](clock)
        row = {"found": found, "parts": clock.parts, "peak_bytes": clock.peak()}
        args.result.write_text(json.dumps(row, default=str))
        return
    sheet = Sheet(device)
    given = [*words, "--device", args.device, *(["--tiny"] if args.tiny else [])]
    open_work(args.work, Path(script).stem, given)
    rows = {stage: run_stage(script, args.work, stage, [*given, "--stage", stage]) for stage in stages}
    say(sheet, rows)
    sheet.save(args.out, {"tiny": args.tiny, "stages": rows})
    if not args.keep:
        shutil.rmtree(args.work)


def stage_table(sheet: Sheet, title: str, rows: Mapping[str, Row]) -> None:
    """Print seconds and peak memory of every stage."""
    cells = [[name, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 2**30:.2f}"] for name, row in rows.items()]
    title = f"{title}; every stage in a process of its own, imports included"
    sheet.table(title, ["stage", "seconds", "peak GiB"], cells)


def part_table(sheet: Sheet, title: str, parts: Mapping[str, Mapping[str, float]]) -> None:
    """Print the seconds of the parts of a stage, and the peak memory after each."""
    cells = [[name, f"{part['seconds']:.2f}", f"{part['peak_bytes'] / 2**30:.2f}"] for name, part in parts.items()]
    sheet.table(title, ["", "seconds", "peak GiB so far"], cells)


def check_table(sheet: Sheet, title: str, terms: Sequence[Mapping[str, Any]]) -> None:
    """Print the terms of a check."""
    cells = [
        [term["name"], term["phase"], f"{term['value']:.4g}", f"{term['weight']:g}", f"{term['grad_norm']:.4g}"]
        for term in terms
    ]
    sheet.table(title, ["term", "phase", "value", "weight", "norm of the weighted gradient"], cells)


def say_limits(sheet: Sheet, told: str, missing: str) -> None:
    """Print the last lines: threads, numbers of repeats, and what was not measured."""
    sheet.say()
    sheet.say(f"{os.environ.get('OMP_NUM_THREADS', 'one per core')} thread(s) in the stages. {told}")
    sheet.say(f"Not measured: the published weights (they cannot be had here), {missing}.")
