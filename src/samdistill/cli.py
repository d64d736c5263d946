"""``samdistill VERB``: parses, calls the package's function of the same name, prints."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from . import __version__
from .errors import UserError
from .io import reason
from .jobs import JOBS
from .output import OutputLost, checked_output
from .processes import INTERRUPTED, INTERRUPTION, end_with_parent, sigterm_interrupts

_RAW = argparse.RawDescriptionHelpFormatter
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
_STARTS_OVER = "interrupted; the same command starts over"


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage before every error; one line that says where to find it is clearer."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _home(text: str) -> str:
    """What may be a path, with ``~`` for the home folder."""
    return os.path.expanduser(text)


def _name(text: str) -> str:
    """A path or a name. An empty one, such as that of an unset shell variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path or a name")
    return _home(text)


def _path(text: str) -> Path:
    return Path(_name(text))


_VERBS = {
    "start here": {
        "demo": "run the whole pipeline on rendered scenes, offline, in minutes",
        "run": "run the whole pipeline on your own images or videos",
    },
    "pipeline steps": {
        "plan": "print shapes, parameters, disk, memory and steps of a config",
        "check": "print value, weight and gradient norm of each loss term",
        "cache": "write the teachers' outputs to disk",
        "train": "train the student with running or cached teachers",
        "merge": "put a trained image or text encoder into its teacher",
    },
    "models": {
        "models": "list the students and their sizes",
        "inspect": "describe a checkpoint, a run or a feature store",
        "evaluate": "measure mIoU, cgF1 or J&F, size and speed of a model",
        "predict": "segment images or a video by a phrase, boxes or points",
        "export": "write files for a device, compared with the model",
    },
    "data": {
        "prepare": "build a data set from downloaded archives",
        "sandbox": "render data sets of scenes or videos",
    },
}
"""Verbs in the groups of ``samdistill --help``."""
_RESUMED = ("demo", "run", "cache", "train", "prepare")
"""Verbs that keep what was finished before an interruption. All others start over."""


def _grouped() -> str:
    groups = (
        [f"{title}:", *(f"  {name:<10}{text}" for name, text in group.items())] for title, group in _VERBS.items()
    )
    return "\n\n".join(map("\n".join, groups))


def _verb(verbs: argparse._SubParsersAction, name: str, example: str) -> argparse.ArgumentParser:
    (text,) = (group[name] for group in _VERBS.values() if name in group)
    return verbs.add_parser(
        name, description=text, epilog=f"example:\n  samdistill {name} {example}", formatter_class=_RAW
    )


def _recipes(**_: object) -> list[str]:
    """What argcomplete offers for a config; the shell offers files where no recipe fits."""
    from .config import packaged

    return packaged()


def _config_verb(verbs: argparse._SubParsersAction, name: str, example: str, *,
                 as_json: bool = False, parallel: bool = False) -> argparse.ArgumentParser:  # fmt: skip
    verb = _verb(verbs, name, example)
    config = verb.add_argument("config", type=_name, help="a YAML file, or a packaged recipe such as encoder/es_rv_m")
    config.completer = _recipes  # type: ignore[attr-defined]
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    if as_json:
        verb.add_argument("--json", action="store_true", help="print JSON")
    if parallel:
        verb.add_argument("--nproc", type=int, default=1, metavar="N",
                          help="processes on this machine (torchrun; default: %(default)s)")  # fmt: skip
    return verb


def _data_verbs(verbs: argparse._SubParsersAction) -> None:
    prepare = _verb(verbs, "prepare", "sa1b downloads/sa1b data/sa1b")
    prepare.add_argument("dataset", choices=["sa1b"], help="which one")
    prepare.add_argument("source", type=_path, metavar="SRC", help="a folder of extracted files or .tar shards")
    prepare.add_argument("target", type=_path, metavar="DST", help="the tree to write")
    prepare.add_argument("--val-fraction", type=float, default=0.01, metavar="F",
                         help="share of the images that is held out (default: %(default)s)")  # fmt: skip
    sandbox = _verb(verbs, "sandbox", "render data --train 48 --val 8")
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "write a rendered data set as SA-1B, COCO or SA-V"
    render = actions.add_parser("render", help=text, description=text)
    render.add_argument("target", type=_path, metavar="DIR", help="the folder to write")
    render.add_argument("--train", type=int, metavar="N", help="to train on (default: 2000 scenes, 64 videos)")
    render.add_argument("--val", type=int, metavar="N", help="held out (default: 128 scenes, 16 videos)")
    render.add_argument("--size", type=int, default=168, metavar="PX",
                        help="side of a scene or a frame (default: %(default)s)")  # fmt: skip
    render.add_argument("--seed", type=int, default=10, metavar="N", help="of the scenes (default: %(default)s)")
    render.add_argument(
        "--format", choices=["sa1b", "coco", "sav"], default="sa1b", help="layout (default: %(default)s)"
    )


def _model_verbs(verbs: argparse._SubParsersAction) -> None:
    evaluate = _verb(verbs, "evaluate", "runs/mine photos --teacher facebook/sam3")
    evaluate.add_argument("model", type=_path, help="a model's folder, a run that holds one, or predictions.json")
    evaluate.add_argument("data", type=_path, nargs="+", help="a folder of images or of videos, or files of concepts")
    evaluate.add_argument("--teacher", type=_name, help="compare with this teacher")
    evaluate.add_argument(
        "--prompts", metavar="KINDS", help="of box, point, refine, refine2 (default: box,point,refine)"
    )
    evaluate.add_argument("--concepts", action="store_true", help="ask in words: data is an SA-Co file of concepts")
    evaluate.add_argument("--masks", action="store_true",
                          help="model is a folder of predicted masks of videos, data one of true masks")  # fmt: skip
    evaluate.add_argument("--iou", choices=["masks", "boxes"],
                          help="what of predictions.json is compared, with --concepts (default: masks)")  # fmt: skip
    evaluate.add_argument("--threshold", type=float, metavar="P",
                          help="least score, with --concepts (default: 0.5)")  # fmt: skip
    evaluate.add_argument("--out", type=_path, metavar="JSON", help="write the predictions, with --concepts")
    evaluate.add_argument("--geometry", help="square or longest_side (default: the model's own)")
    evaluate.add_argument("--images", type=int, metavar="N", help="at most N images")
    evaluate.add_argument("--videos", type=int, metavar="N", help="at most N videos")
    evaluate.add_argument("--convention", metavar="NAME",
                          help="counted frames of videos: davis2017 or sav (default: that of the layout)")  # fmt: skip
    evaluate.add_argument("--every-frame", action="store_true", help="push frames of videos that have no masks too")
    evaluate.add_argument("--workers", type=int, default=1, metavar="N",
                          help="processes that score videos (default: %(default)s)")  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    predict = _verb(verbs, "predict", "photo.jpg sandbox --text star --out seen.png")
    predict.add_argument("image", type=_path,
                         help="an image, a video or a folder of its frames; with --format of images")  # fmt: skip
    predict.add_argument("model", type=_name, help="a detector or a promptable model: a folder, a run that holds one, "
                         "an original file, or a sandbox name")  # fmt: skip
    predict.add_argument("--text", metavar="PHRASE", help="a noun phrase, such as 'red car', for a detector")
    predict.add_argument("--box", action="append", default=[], metavar="X0,Y0,X1,Y1",
                         help="around one instance, in pixels of the image; repeatable")  # fmt: skip
    predict.add_argument("--point", action="append", default=[], metavar="X,Y[,LABEL]",
                         help="on an object (label 1) or off it (0), for a promptable model; repeatable")  # fmt: skip
    predict.add_argument("--threshold", type=float, metavar="P", help="least score, of a detector (default: 0.5)")
    predict.add_argument("--out", type=_path, metavar="PNG", help="draw masks, boxes and scores; an MP4 of a video")
    predict.add_argument("--format", choices=["coco", "yolo"],
                         help="label a folder or a pattern of images; annotations go into --out")  # fmt: skip
    predict.add_argument(
        "--batch-size", type=int, metavar="N", help="images in one call of the model, with --format (default: 8)"
    )
    predict.add_argument("--no-pictures", action="store_true", help="draw no pictures, with --format")
    predict.add_argument("--frames", type=int, metavar="N", help="at most the first N frames of a video")
    predict.add_argument("--geometry", help="square or longest_side (default: the model's own)")
    predict.add_argument("--json", action="store_true", help="print JSON, with the masks")


def _export_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--export", action="append", default=[], metavar="TARGET",
                      help="export the result at the end, such as onnx; repeatable")  # fmt: skip


def _vocabulary_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--vocabulary", type=_home, metavar="PHRASES",
                      help="a fixed list, such as 'red car,dog', or a file of lines, for a detector")  # fmt: skip


def _export_verb(verbs: argparse._SubParsersAction) -> None:
    export = _verb(verbs, "export", "runs/mine --to onnx --out device")
    export.add_argument("model", type=_name, help="a run, a model's folder, an original file, or a sandbox name")
    export.add_argument("--to", nargs="+", default=["onnx"], metavar="TARGET",
                        help="formats: onnx, openvino, executorch, coreml, litert (default: onnx)")  # fmt: skip
    export.add_argument("--out", type=_path, required=True, metavar="DIR", help="the folder to write")
    export.add_argument("--precision", nargs="+", default=["fp32"], metavar="P",
                        help="fp32, fp16 or int8, or several (default: fp32)")  # fmt: skip
    export.add_argument("--calibrate", type=_path, metavar="DATA", help="images from which int8 takes its ranges")
    _vocabulary_option(export)
    export.add_argument("--image-size", type=int, metavar="PX", help="side of the input (default: the model's)")
    export.add_argument("--static", action="store_true", help="fix all axes: one image, one prompt, one point or box")
    export.add_argument("--web", action="store_true", help="add a page that runs the files in a browser")
    export.add_argument("--keep-failed", action="store_true", help="deliver files that fail the gate, named so")
    export.add_argument("--json", action="store_true", help="print JSON")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="samdistill", usage="samdistill [-h] [--version] VERB ...", formatter_class=_RAW,
        description=f"Distil the Segment Anything family.\n\n{_grouped()}",
        epilog="samdistill VERB --help lists the arguments of a verb, with an example.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"samdistill {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", prog="samdistill", help=argparse.SUPPRESS)
    demo = _verb(verbs, "demo", "--out runs/demo")
    demo.add_argument(
        "--job", choices=list(JOBS), default=next(iter(JOBS)), help="what is distilled (default: %(default)s)"
    )
    demo.add_argument("--out", type=_path, help="folder of data and run (default: runs/demo, runs/demo-JOB)")
    _export_option(demo)
    demo.add_argument("--web", action="store_true", help="export to onnx and serve a page that runs it, until Ctrl-C")
    run = _verb(verbs, "run", "photos --teacher facebook/sam3 --student es_rv_m --out runs/mine")
    run.add_argument("images", type=_path, help="images, SA-1B, COCO, images with masks; videos; or phrases")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    run.add_argument(
        "--teacher", required=True, type=_name, help="a SAM 3, SAM 2 or SAM: folder, hub id or file; or 'sandbox'"
    )
    run.add_argument("--student", help="es_rv_m, any timm model, or a model to start from (default: the recipe's)")
    run.add_argument(
        "--job", choices=list(JOBS), default=next(iter(JOBS)), help="what is distilled (default: %(default)s)"
    )
    run.add_argument("--out", type=_path, required=True, help="run folder")
    _export_option(run)
    run.add_argument("--web", action="store_true", help="export to onnx too, with a page that runs it in a browser")
    _vocabulary_option(run)
    models = _verb(verbs, "models", "es_rv_m")
    models.add_argument("name", nargs="?", help="one student or any timm model: its modules")
    models.add_argument("--json", action="store_true", help="print JSON")
    _config_verb(verbs, "plan", "encoder/es_rv_m data.fraction=0.1", as_json=True)
    _config_verb(verbs, "check", "encoder/es_rv_m --json", as_json=True)
    cache = _config_verb(verbs, "cache", "encoder/es_rv_m --nproc 8 --verify", parallel=True)
    cache.add_argument("--verify", action="store_true", help="check every record and recompute a sample")
    cache.add_argument("--layout", choices=["store", "npy"], default="store",
                       help="npy: also a .npy file per image and feature (default: %(default)s)")  # fmt: skip
    train = _config_verb(verbs, "train", "encoder/es_rv_m --nproc 8 train.batch_size=512", parallel=True)
    train.add_argument("--resume", type=_path, metavar="RUN", help="start from another run or checkpoint")
    _merge_verb(verbs)
    inspect = _verb(verbs, "inspect", "runs/mine")
    inspect.add_argument("path", type=_path, help="a file or a folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    _model_verbs(verbs)
    _export_verb(verbs)
    _data_verbs(verbs)
    return parser


def _merge_verb(verbs: argparse._SubParsersAction) -> None:
    merge = _verb(verbs, "merge", "runs/encoder/es_rv_m --into facebook/sam3 --out es_rv_m_sam3")
    add = merge.add_argument
    add("source", type=_path, metavar="RUN_OR_CHECKPOINT", help="holds the trained student")
    add("--into", required=True, type=_name, metavar="TEACHER", help="a folder, hub id, original file or 'sandbox'")
    add("--out", type=_path, required=True, metavar="PATH", help="what to write")
    add("--text", type=_path, metavar="RUN", help="a trained text encoder, merged together with a trunk")
    add("--target-prefix", metavar="P", help="where student keys go")
    add("--replace-prefix", metavar="P", help="teacher keys to drop")
    add("--names", default="samdistill", metavar="WHOSE",
        help="names in a sam3.pt: samdistill or efficientsam3 (default: %(default)s)")  # fmt: skip


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """argparse, with key=value overrides allowed anywhere after the config, and negative values of options."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell's completion alone, which needs the extra of that name
        import argcomplete

        argcomplete.autocomplete(parser)  # ends the process
    args, rest = parser.parse_known_args(_joined(argv))
    stray = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unrecognised: {' '.join(stray)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _joined(argv: Sequence[str]) -> list[str]:
    """``--point -1,5`` as ``--point=-1,5``: argparse takes a value that begins with a minus for an option."""
    found: list[str] = []
    for text in argv:
        option = found and found[-1].startswith("--") and len(found[-1]) > 2 and "=" not in found[-1]
        if option and _NEGATIVE.match(text):
            found[-1] += f"={text}"
        else:
            found.append(text)
    return found


def _dispatch(args: argparse.Namespace) -> int:
    # where torchao (0.18) is installed, transformers imports it, and torch (2.14) warns of its enums at every start
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from . import display

    return getattr(display, args.verb)(args)


def message(error: BaseException) -> str:
    """The error's own words: an error that crossed from a loader's worker process arrives wrapped in a traceback."""
    text = str(error)
    marker = "UserError: "
    return text[text.rindex(marker) + len(marker) :].strip() if "Original Traceback" in text else text


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a term without gradient, or standard output was closed, 2 a user's error, 130
    interrupted by SIGINT or SIGTERM."""
    arguments, name = sys.argv[1:] if argv is None else list(argv), "samdistill"
    verb = ""
    try:
        with sigterm_interrupts(), checked_output():
            args = _parse(arguments)
            verb, name = args.verb, f"samdistill {args.verb}"
            return _run(args, arguments)
    except UserError as error:
        _say(f"{name}: {message(error)}")
        return 2
    except KeyboardInterrupt:
        _say(f"{name}: {INTERRUPTION if verb in _RESUMED else _STARTS_OVER}")
        return INTERRUPTED
    except OutputLost as error:
        if isinstance(error.cause, BrokenPipeError):  # a reader that left, as ``| head`` does
            return 1
        _say(f"{name}: standard output: {reason(error.cause) or error.cause}")
        return 2
    except OSError as error:
        if (found := reason(error)) is None:
            raise
        _say(f"{name}: {found}" if error.filename is None else f"{name}: {error.filename}: {found}")
        return 2


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The verb, or the launcher of several processes that each run it."""
    rank = "LOCAL_RANK" in os.environ
    many = hasattr(args, "nproc") and (args.nproc != 1 or os.environ.get("NNODES", "1") != "1")
    if many and not rank:
        from .engine import launch

        return launch(args.nproc, arguments)
    if not rank:
        return _dispatch(args)
    end_with_parent()
    try:
        return _dispatch(args)
    finally:
        from .engine import leave

        leave()


def _say(text: str) -> None:
    """A line on standard error, where that can be written to."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
