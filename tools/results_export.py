"""Claims of the results page about exported files, and the functions that read their figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values


def _onnx(figures: Figures, precision: str) -> list[Figures]:
    rows = [row for row in figures["rows"] if "bytes" in row and row["target"] == "onnx"]
    return [row for row in rows if row["precision"] == precision]


def exported(key: str, precision: str, worst: Callable[[list[float]], float]) -> Callable[[Figures], Values]:
    """Return a reader of the worst figure of the ONNX files in a precision."""
    return lambda figures: [worst([row[key] for row in _onnx(figures, precision)])]


def exported_size(precision: str) -> Callable[[Figures], Values]:
    """Return a reader of the largest size of an ONNX file in a precision, relative to its fp32 file."""

    def read(figures: Figures) -> Values:
        whole = {(row["model"], row["part"]): row["bytes"] for row in _onnx(figures, "fp32")}
        return [max(row["bytes"] / whole[row["model"], row["part"]] for row in _onnx(figures, precision))]

    return read


def exported_loss(figures: Figures) -> Values:
    """Return the largest loss of mIoU or cgF1 of int8 ONNX files."""
    found = [row["quality"] for row in figures["rows"] if "quality" in row and "int8" in row["quality"]]
    return [max(one["eager"][metric] - one["int8"][metric] for one in found for metric in one["eager"])]


def exported_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return files that passed the gate, and all, by format."""
    rows = [row for row in figures["rows"] if "quality" not in row]
    found = {}
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        found[name] = [[sum(not row["reason"] for row in own)], [len(own)]]
    return found


def full_size_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return eager milliseconds, and for both formats the ratio to eager of each round, by case."""
    found = {}
    for row in figures["rows"]:
        if "eager" in row["ms"]:
            spent = row["ms"]
            name = f"{row['case']}, {row['size']} px, {row['threads']} thread(s)"
            ratios = [[a / b for a, b in zip(spent[k], spent["eager"], strict=True)] for k in ("onnx", "openvino")]
            found[name] = [spent["eager"], *ratios]
    return found


def slowest(name: str, threads: int, detector: bool) -> Callable[[Figures], Values]:
    """Return a reader of the largest ratio to eager in a format: that of the detector, or that of all encoders."""

    def read(figures: Figures) -> Values:
        rows = [row for row in figures["rows"] if row["threads"] == threads and "eager" in row["ms"]]
        each = [row["ms"] for row in rows if (row["case"] == "detector") is detector]
        ratios = [[a / b for a, b in zip(ms[name], ms["eager"], strict=True)] for ms in each]
        return max(ratios, key=statistics.median)

    return read


def detector_size(name: str) -> Callable[[Figures], Values]:
    """Return a reader of the detector's size in MB."""
    return lambda figures: [next(row["bytes"][name] for row in figures["rows"] if "int8" in row["bytes"]) / 1e6]


def other_exports(figures: Figures) -> dict[str, list[Values]]:
    """Return the ratio of our ONNX file's time to that of another project's in each round, by case."""
    found = {}
    for row in figures["rows"]:
        name = row.get("peer", {}).get("name")
        if name in row["ms"] and "onnx" in row["ms"]:
            pairs = zip(row["ms"]["onnx"], row["ms"][name], strict=True)
            found[f"{row['case']}, {row['size']} px, {row['threads']} thread(s), {name}"] = [[a / b for a, b in pairs]]
    return found


def int8_rows(figures: Figures) -> dict[str, list[Values]]:
    return {
        name: [[row["cgf1"]["model"]], [row["cgf1"]["file"]], [row["agreement"]]]
        for name, row in figures["rows"].items()
    }  # fmt: skip


EXPORT = [
    Benchmark(
        "export", "Exported files",
        "Bundled models in every format and precision, compared with eager. The whole table is in "
        "[export targets](export_targets.md#what-works).",
        [
            Claim("largest difference of an output of an ONNX file, of its largest value",
                  exported("difference", "fp32", max), "{:.1e}", Goal("at most", 1e-4)),
            Claim("least agreement of an fp16 ONNX file", exported("agreement", "fp16", min), "{:.4f}",
                  Goal("at least", 0.98)),
            Claim("largest size of an fp16 ONNX file, of fp32", exported_size("fp16"), "{:.3f}", Goal("at most", 0.6)),
            Claim("largest size of an int8 ONNX file, of fp32", exported_size("int8"), "{:.3f}", Goal("at most", 0.3)),
            Claim("largest loss of mIoU or cgF1 of the int8 files that passed", exported_loss, "{:.4f}",
                  Goal("at most", 0.01)),
        ],
        [Table("Files that passed", "format", ["passed", "files"], ["{:.0f}"] * 2, exported_rows)],
    ),
    Benchmark(
        "export_full", "Export at full size",
        "Image encoders with random weights and the detection student with three phrases as constants, one image. "
        "Exported file and eager alternate with the same threads; so do our file and that of another project.",
        [
            *(Claim(f"largest time over eager, {which}, {name}, {threads} thread{'s' * (threads > 1)}",
                    slowest(target, threads, detector), "{:.2f}", Goal("at most", 0.7))
              for detector, which in ((False, "image encoders"), (True, "detector"))
              for target, name in (("onnx", "ONNX"), ("openvino", "OpenVINO")) for threads in (1, 2)),
            *(Claim(f"size of the detector's ONNX file, {name}, MB", detector_size(key), "{:.1f}",
                    Goal("at most", most))
              for name, key, most in (("fp32", "onnx", 145), ("fp16", "fp16", 75), ("int8", "int8", 40))),
        ],
        [
            Table("Time of a file over eager", "case", ["eager, ms", "ONNX / eager", "OpenVINO / eager"],
                  ["{:.0f}", "{:.2f}", "{:.2f}"], full_size_rows),
            Table("Our ONNX file beside another project's", "case", ["ours / theirs"], ["{:.2f}"], other_exports),
        ],
    ),
    Benchmark(
        "qat", "Training for int8", "The bundled student, trained on with and without `train.qat`, as int8 ONNX files.",
        [
            Claim("IoU of the int8 file with its model, bundled student",
                  lambda f: [f["rows"]["bundled student"]["agreement"]], "{:.3f}", Goal("at least", 0.90)),
            Claim("size of the int8 file, of fp32", lambda f: [f["rows"]["bundled student"]["size"]], "{:.3f}"),
        ],
        [Table("Held-out questions", "student", ["cgF1", "cgF1 in int8", "IoU of both"], ["{:.3f}"] * 3, int8_rows)],
    ),
]  # fmt: skip
