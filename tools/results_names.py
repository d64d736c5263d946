"""Claims of the results page about files in other projects' names, and the functions that read their figures."""

from __future__ import annotations

from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values, at, worst_relative

EXACT = "at most", 1e-4
OPENED, WRITTEN = ("stage 1 opened", "merged opened"), ("written",)
FOLDED = ("folded", "folded, root mean square")
MASKED = "the same, padding masked as by transformers"
CAUSAL = "b"
"""MobileCLIP-B, whose causal mask no class of transformers has. It is in the table, and no claim is about it."""


def _relative(row: Figures, kind: str) -> float:
    difference, size = row[kind]
    return difference / size


def worst_of(part: str, kinds: tuple[str, ...]) -> Callable[[Figures], Values]:
    """Return a reader of the largest relative difference of these kinds, over all models of a part."""
    return lambda figures: [
        max(_relative(row, kind) for name, row in figures[part].items() if name != CAUSAL for kind in kinds)
    ]


def names_left(figures: Figures) -> Values:
    """Return the number of names that a written file and EfficientSAM3's model do not share, over all files."""
    return [sum(sum(row["names"].values()) for part in ("trunks", "texts") for row in figures[part].values())]


def worst_whole(figures: Figures) -> Values:
    return [max(worst_relative(found) for found in figures["whole"].values())]


def unmet(part: str, *kinds: str) -> Callable[[Figures], Values]:
    """Return a reader of the number of names that merged files and the model of an original code do not share."""

    def read(figures: Figures) -> Values:
        counts = (row.get("names", row) for row in figures[part].values())
        return [sum(one[kind] for one in counts for kind in kinds)]

    return read


def merged_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return stages, the worst of them, and what SAM 3's own builder lacks and does not know, by merged file."""
    own = figures["sam3"]
    return {
        name: [
            [len(row["differences"])], [worst_relative(row["differences"])],
            [own[name]["missing, replaced parts"]], [own[name]["unexpected, replaced parts"]],
        ] for name, row in figures["efficientsam3"].items()
    }  # fmt: skip


def worst_merged(figures: Figures) -> Values:
    return [max(worst_relative(row["differences"]) for row in figures["efficientsam3"].values())]


def rows(part: str, kinds: tuple[str, ...]) -> Callable[[Figures], dict[str, list[Values]]]:
    """Return a reader of the relative differences of a part by model."""
    return lambda figures: {
        name: [[_relative(row, kind)] if kind in row else [] for kind in kinds] for name, row in figures[part].items()
    }


def whole_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return the relative difference of the embedding, its largest value, and the worst stage, by merged file."""
    return {
        name: [[_relative(found, "trunk")], [found["trunk"][1]], [worst_relative(found)]]
        for name, found in figures["whole"].items()
    }


NAMES = [
    Benchmark(
        "names_equality", "EfficientSAM3's, EdgeSAM's and MobileSAM's files",
        "Nine trunks and MobileCLIP's text encoders, opened from files that EfficientSAM3's own scripts wrote, and "
        "written with `merge --names efficientsam3` and opened by its builder. Random weights.",
        [
            Claim("nine trunks, opened: worst difference relative to the largest value", worst_of("trunks", OPENED),
                  "{:.1e}", Goal(*EXACT)),
            Claim("nine trunks, written: the same", worst_of("trunks", WRITTEN), "{:.1e}", Goal(*EXACT)),
            Claim("text encoders S0, S1 and L, opened: the same", worst_of("texts", OPENED), "{:.1e}", Goal(*EXACT)),
            Claim("text encoders S0, S1 and L, written: the same", worst_of("texts", WRITTEN), "{:.1e}", Goal(*EXACT)),
            Claim("names in thirteen written files that are missing, unexpected or of another shape", names_left,
                  "{:.0f}", Goal("at most", 0)),
            Claim("trunk and text encoder in one file, as detector and tracker: worst stage", worst_whole, "{:.1e}",
                  Goal(*EXACT)),
        ] + [
            Claim(f"{name}: worst difference relative to the largest value",
                  lambda f, name=name: [worst_relative(f["prompted"][name])], "{:.1e}", Goal(*EXACT))
            for name in ("EdgeSAM", "MobileSAM")
        ] + [
            Claim(f"{name}: tensors whose name or shape does not fit", at("coverage", name, "faults"), "{:.0f}",
                  Goal("at most", 0))
            for name in ("EdgeSAM", "MobileSAM")
        ],
        [
            Table("Trunks, relative difference of the embedding. ImageNet's statistics are folded into the first "
                  "convolution, which is not exact near the edge", "trunk",
                  ["stage 1 opened", "merged opened", "written", "folded", "folded, root mean square"],
                  ["{:.1e}"] * 5, rows("trunks", (*OPENED, *WRITTEN, *FOLDED))),
            Table("Text encoders, relative difference of the tokens. B has a causal mask, unlike S1", "size",
                  ["stage 1 opened", "merged opened", "written", "stage 1, padding masked as by transformers"],
                  ["{:.1e}"] * 4, rows("texts", (*OPENED, *WRITTEN, MASKED))),
            Table("Merged files. A random EfficientViT has single values that are very large, and heads then amplify "
                  "rounding", "trunk and text encoder", ["embedding", "its largest value", "worst stage"],
                  ["{:.1e}", "{:.1e}", "{:.1e}"], whole_rows),
        ],
    ),
    Benchmark(
        "merged_equality", "A merged `sam3.pt` in the original code",
        "Students of this package with random weights, merged with `merge --names efficientsam3` into a `sam3.pt` of "
        "reduced depth. SAM 3's own builder always makes its ViT and its text encoder, so it cannot host a student; "
        "EfficientSAM3's is a copy of it that can.",
        [
            Claim("EfficientSAM3's builder: names that are missing, unexpected or of another shape",
                  unmet("efficientsam3", "missing", "unexpected", "of another shape"), "{:.0f}", Goal("at most", 0)),
            Claim("its answers as detector and tracker: worst difference relative to the largest value", worst_merged,
                  "{:.1e}", Goal(*EXACT)),
            Claim("SAM 3's own builder: names outside of trunk and text encoder that do not meet",
                  unmet("sam3", *(f"{kind}, all others" for kind in ("missing", "unexpected", "of another shape"))),
                  "{:.0f}", Goal("at most", 0)),
        ],
        [Table("Merged files", "trunk and text encoder",
               ["stages compared", "worst difference", "names that SAM 3's builder misses",
                "names that it does not know"], ["{:.0f}", "{:.1e}", "{:.0f}", "{:.0f}"], merged_rows)],
    ),
]  # fmt: skip
