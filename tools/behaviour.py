"""Record the behaviour of the whole package and compare two records, to verify that a refactoring changes nothing.

    python tools/behaviour.py record --out before.json
    python tools/behaviour.py compare before.json after.json

The package is used through the command line only, so that the same script works before and after a change. A record
contains: the packaged recipes as YAML; ``--json`` of every command; losses and gradient norms of the first steps of the
four sandbox recipes; SHA-256 of every record of their caches and of every tensor of their students and merged models;
and the result of ``train`` on a checkpoint of an earlier version (``--earlier``, the folder kept by ``record --keep``).
With ``--demos`` it also contains the tables of the four demos. Times, rates and folders are left out. Each process has
one thread. The values are equal bit for bit on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samdistill.cli import main as samdistill

JOBS = ("encoder", "detection", "prompt", "video", "text")
TIMES = re.compile(r"second|latency|_ms$|per_second|wall|^date$|^time|memory_peak|rss|speed|fps|^device$|machine")
"""Names of values that differ between runs."""
STORES = {"encoder": "embeddings", "prompt": "features", "video": "features", "text": "features"}
SMALL = {
    "encoder": ["data.workers=0", "train.epochs=2", "train.batch_size=8", "train.log_every=1", "cache.batch_size=8",
                "train.warmup_epochs=0.5", "evaluate.images=8"],
    "detection": ["data.workers=0", "train.batch_size=8", "train.log_every=1", "evaluate.images=8",
                  "train.phases=[{name: align, epochs: 1, lr: 2e-3, terms: [fpn]}, {name: all, epochs: 1, lr: 1e-3}]"],
    "prompt": ["data.workers=0", "train.epochs=2", "train.batch_size=8", "train.log_every=1", "evaluate.images=8",
               "distillation.use_precomputed_features=true", "train.warmup_epochs=0.5"],
    "video": ["data.workers=0", "clips.per_video=4", "train.batch_size=4", "train.log_every=1", "evaluate.videos=2",
              "train.phases=[{name: memory, epochs: 2, lr: 3e-3}]"],
    "text": ["train.epochs=2", "data.passes=2", "data.hard=0.5", "train.log_every=1", "train.warmup_epochs=0.5"],
}  # fmt: skip
RENDER = {
    "encoder": ["runs/sandbox-data", "--train", "16", "--val", "8"],
    "detection": ["runs/concepts-data", "--train", "16", "--val", "8", "--format", "coco"],
    "prompt": ["runs/prompt-data", "--train", "16", "--val", "8", "--format", "coco"],
    "video": ["runs/videos", "--train", "4", "--val", "2", "--format", "sav", "--size", "126"],
}  # fmt: skip


def say(*words: str) -> str:
    """Return the output of a command. Ends the program if the command fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = samdistill(list(words))
    if code:
        raise SystemExit(f"samdistill {' '.join(words)}: exit code {code}: {err.getvalue()}")
    return out.getvalue()


def without_times(value: Any) -> Any:
    """Remove values that differ between runs or folders."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if not TIMES.search(name)}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value.replace(os.getcwd(), ".") if isinstance(value, str) else value


def asked(*words: str) -> Any:
    return without_times(json.loads(say(*words, "--json")))


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of dtype, shape and all bytes."""
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def tensors(folder: Path) -> dict[str, str]:
    return {name: digest(tensor) for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()}  # fmt: skip


def records(root: Path) -> dict[str, str]:
    """Return the digest of every record of the stores below ``root``."""
    from samdistill.store import FeatureStore

    found = {}
    for manifest in sorted(root.rglob("manifest.json")):
        store = FeatureStore(manifest.parent)
        for key in sorted(store):
            record = store.read(key)
            found[f"{manifest.parent.relative_to(root)}/{key}"] = f"{record.seed} {digest(record.features)}"
    return found


def history(path: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in path.read_text().splitlines()]


def recipes() -> dict[str, str]:
    """Return every packaged recipe with all settings."""
    from importlib.resources import files

    from samdistill import load_config

    root = Path(str(files("samdistill") / "configs"))
    names = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    return {name: load_config(name).to_yaml() for name in names if not Path(name).name.startswith("_")}


def run_of(job: str, data: bool = True) -> dict[str, Any]:
    """Run plan, check, cache and train of a reduced sandbox recipe, and return their results."""
    recipe, small = f"{job}/sandbox", SMALL[job]
    if data and job in RENDER:
        say("sandbox", "render", *RENDER[job])
    found: dict[str, Any] = {"plan": asked("plan", recipe, *small)}
    run = Path("runs") / job / "sandbox"
    if job in STORES:
        say("cache", recipe, *small)
        found["records"] = records(run / STORES[job])
    found["check"] = asked("check", recipe, *small)
    say("train", recipe, *small)
    return found | trained(run)


def trained(run: Path) -> dict[str, Any]:
    checkpoint = sorted(run.rglob("checkpoint*/*.safetensors"))
    return {
        "history": history(run / "metrics.jsonl"), "student": tensors(run / "student"),
        "student config": without_times(json.loads((run / "student" / "config.json").read_text())),
        "files": sorted(path.name for path in run.iterdir()), "checkpoints": [path.name for path in checkpoint],
        "inspect": asked("inspect", str(run)),
    }  # fmt: skip


def continued(job: str, earlier: Path) -> dict[str, Any]:
    """Resume training from the first checkpoint of an earlier version's run, and return the results."""
    run = Path("runs") / job / "continued"
    shutil.copytree(earlier / "runs" / job / "sandbox", run)
    (run / "ckpt_epoch_2.pt").unlink()
    shutil.rmtree(run / "student")
    say("train", f"{job}/sandbox", *SMALL[job], f"output={run}")
    return {"history": history(run / "metrics.jsonl"), "student": tensors(run / "student")}


def verbs() -> dict[str, Any]:
    """Return the ``--json`` output of the commands that read finished runs, and of those that need none."""
    encoder, detection, prompt = ("runs/encoder/sandbox", "runs/detection/sandbox", "runs/prompt/sandbox")
    merged = "runs/merged"
    say("merge", encoder, "--into", "sandbox", "--out", merged)
    scene = sorted(Path("runs/prompt-data").rglob("*.jpg"))[0]
    video = sorted(Path("runs/videos").rglob("*.mp4"))[0]
    return {
        "merged": tensors(Path(merged)), "merged config": json.loads((Path(merged) / "config.json").read_text()),
        "models": asked("models"), "model": asked("models", "es_rv_m"), "inspect merged": asked("inspect", merged),
        "evaluate merged": asked("evaluate", merged, "runs/sandbox-data", "--teacher", "sandbox", "--images", "6"),
        "evaluate prompt": asked("evaluate", prompt, "runs/prompt-data", "--images", "6", "--geometry", "longest_side"),
        "evaluate words": asked("evaluate", detection, "runs/concepts-data/concepts_val.json", "--concepts"),
        "evaluate videos": asked("evaluate", "runs/video/sandbox", "runs/videos", "--videos", "2"),
        "predict text": asked("predict", str(scene), detection, "--text", "red circle", "--threshold", "0.1"),
        "predict box": asked("predict", str(scene), merged, "--box", "20,20,90,100"),
        "predict point": asked("predict", str(scene), prompt, "--point", "60,60"),
        "predict video": asked("predict", str(video), "runs/video/sandbox", "--text", "red circle", "--frames", "6"),
    }  # fmt: skip


def demos() -> dict[str, str]:
    """Return the evaluation of each demo."""
    found = {}
    for job in JOBS:
        say("demo", "--job", job, "--out", f"runs/demo-{job}")
        path = Path(f"runs/demo-{job}/run/evaluation.json")
        found[job] = without_times(json.loads(path.read_text()))
    return found


def record(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.keep or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    earlier = None if args.earlier is None else args.earlier.resolve()
    home = os.getcwd()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        found: dict[str, Any] = {"recipes": recipes()}
        for job in JOBS:
            print(job, file=sys.stderr, flush=True)
            found[job] = run_of(job)
        print("verbs", file=sys.stderr, flush=True)
        found["verbs"] = verbs()
        for job in JOBS:
            if ((earlier or folder) / "runs" / job).is_dir():  # a job that the earlier version had
                found[f"{job} continued"] = continued(job, earlier or folder)
        if args.demos:
            found["demos"] = demos()
    finally:
        os.chdir(home)
        if args.keep is None:
            shutil.rmtree(folder)
    return found


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each value that differs or exists on one side only."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            if name not in after:
                yield f"{path}/{name}: gone"
            elif name not in before:
                yield f"{path}/{name}: new"
            else:
                yield from differences(before[name], after[name], f"{path}/{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for n, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}[{n}]")
    elif before != after:
        yield f"{path}: {str(before)[:300]} -> {str(after)[:300]}"


def leaves(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(leaves, value.values() if isinstance(value, dict) else value))
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recorded = verbs.add_parser("record")
    recorded.add_argument("--out", type=Path, required=True)
    recorded.add_argument("--keep", type=Path, help="work in this folder and leave everything there")
    recorded.add_argument("--earlier", type=Path, help="a folder kept by an earlier version, to go on from")
    recorded.add_argument("--demos", action="store_true")
    compared = verbs.add_parser("compare")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.verb == "record":
        found = record(args)
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True))
        print(f"{leaves(found)} values")
        return 0
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    found = list(differences(before, after))
    print("\n".join([*found, f"{len(found)} differences in {leaves(before)} values"]))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
