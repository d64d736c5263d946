"""Claims of the results page about SAM 2 as a teacher and host, and the functions that read their figures."""

from __future__ import annotations

from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values, at, worst_relative

TRIED = "SAM 2.1 tiny"
IMAGE = ("level", "masks", "predicted IoU")
"""Beginnings of the names of stages without the memory."""


def worst(kind: str = "") -> Callable[[Figures], Values]:
    """Return a reader of the worst relative difference of each random model, over stages that begin with ``kind``."""

    def read(figures: Figures) -> Values:
        models = figures["differences"][TRIED]
        return [worst_relative({n: pair for n, pair in found.items() if n.startswith(kind)}) for found in models]

    return read


def lost(figures: Figures) -> Values:
    """Return the number of tensors that the merge should have kept and did not."""
    return [figures["kept tensors"] - figures["kept tensors equal"]]


def time_ratio(figures: Figures) -> Values:
    return [figures["seconds per frame"]["merged"] / figures["seconds per frame"]["teacher"]]


def misfits(figures: Figures) -> Values:
    """Return the number of tensors of all published files that have no name, no place or another shape."""
    return [sum(counts["faults"] for counts in figures["coverage"].values())]


def smallest_gradient(figures: Figures) -> Values:
    return [min(figures["gradient norms"].values())]


HOSTS = [
    Benchmark(
        "sam2_host", "A trunk in SAM 2.1 tiny",
        "`es_rv_m` is distilled from the architecture of SAM 2.1 tiny with random weights at 256 px, merged, and "
        "tracks a real SA-V video with the teacher's memory.",
        [
            Claim("tensors outside the image encoder that the merge changed", lost, "{:.0f}", Goal("at most", 0)),
            Claim("largest difference of a mask logit to the teacher's own modules on the trunk's levels",
                  at("largest difference to the teacher's modules"), "{:.1e}", Goal("at most", 1e-4)),
            Claim("smallest gradient norm of a term at the student", smallest_gradient, "{:.2g}"),
            Claim("frames with a mask, of 60", at("frames with a mask"), "{:.0f}", Goal("at least", 60)),
            Claim("seconds per frame, merged model over teacher", time_ratio, "{:.2f}"),
            Claim("peak memory, GiB", at("peak memory GiB"), "{:.1f}"),
        ],
    ),
]  # fmt: skip

OWN, TOKENS = "own tracker", "64 tokens"


def of_objects(name: str) -> Callable[[Figures], Values]:
    """Return a reader of the KiB that a tracker keeps for one object."""

    def read(figures: Figures) -> Values:
        found = figures["stages"][name]
        return [found["bytes"] / found["objects"] / 1024]

    return read


def frame_ratio(figures: Figures) -> Values:
    return [figures["stages"][OWN]["ms"] / figures["stages"][TOKENS]["ms"]]


def tracker_rows(figures: Figures) -> dict[str, Values]:
    """Return J&F, J, F, milliseconds, MiB added and KiB per object of each tracker."""
    rows = {}
    for name, found in figures["stages"].items():
        if "evaluation" not in found:
            continue
        row = next(row for row in found["evaluation"] if row["name"] == "student")
        cost = [found["ms"], found["peak MiB added"], *of_objects(name)(figures)]
        rows[name] = [[value] for value in (row["jf"], row["j"], row["f"], *cost)]
    return rows


TRACKERS = [
    Benchmark(
        "video_tracker", "A trunk in SAM 3's own tracker",
        "`es_ev_s` inside a `Sam3TrackerVideoModel` of the bundled tracker's sizes, and the 64-token memory on the "
        "bundled student, on the same rendered videos. **The memory of the own tracker has random weights**, because "
        "no trained ones are at hand and no job trains them: its J&F says nothing about SAM 3. `own decoder, boxes` "
        "prompts every frame with the box of the last mask instead; its trunk had 48 steps of training, so it is low "
        "too. Time and memory do not depend on the weights.",
        [
            Claim("CPU time of a frame with four objects, own tracker over 64 tokens", frame_ratio, "{:.1f}"),
            Claim("KiB per object that the own tracker keeps", of_objects(OWN), "{:.0f}"),
            Claim("KiB per object that the 64-token memory keeps", of_objects(TOKENS), "{:.0f}"),
        ],
        [Table("Four objects at 126 px", "tracker", ["J&F", "J", "F", "CPU ms a frame", "MiB added", "KiB an object"],
               ["{:.3f}", "{:.3f}", "{:.3f}", "{:.1f}", "{:.0f}", "{:.0f}"], tracker_rows)],
    ),
]  # fmt: skip

SAM2 = Benchmark(
    "sam2_equality", "SAM 2", "`sam2*_hiera_*.pt` beside the original code, with random weights.",
    [
        Claim(f"{TRIED}: worst difference relative to the largest value, image and prompts",
              lambda figures: [max(pair) for pair in zip(*(worst(kind)(figures) for kind in IMAGE), strict=True)],
              "{:.1e}", Goal("at most", 1e-4)),
        Claim(f"{TRIED}: the same, masks of a tracked object", worst("tracked masks"), "{:.1e}", Goal("at most", 1e-4)),
        Claim("tensors of all eight files whose name or shape does not fit", misfits, "{:.0f}", Goal("at most", 0)),
    ],
)  # fmt: skip
