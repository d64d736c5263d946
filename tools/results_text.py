"""Claims of the results page about the text job, and the functions that read their figures."""

from __future__ import annotations

from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values

MEASURES = ("cosine", "pooled_cosine", "own_nearest", "kept_new", "kept")


def of_students(runs: list[list[Figures]], measure: str) -> Values:
    """Return a measure of the distilled text encoder in each run."""
    return [model[measure] for run in runs for model in run if model["name"] == "distilled"]


def kept(measure: str, variant: str = "the recipe") -> Callable[[Figures], Values]:
    """Return a reader of a measure of a variant's runs."""
    return lambda figures: of_students(figures["variants"][variant], measure)


def text_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return all measures by variant."""
    return {name: [of_students(runs, one) for one in MEASURES] for name, runs in figures["variants"].items()}


TEXT = [
    Benchmark(
        "text_student", "A small text encoder in the bundled detector",
        "The recipe `text/sandbox`. The seed also selects the phrases that are kept out of training.",
        [
            Claim("share of the teacher's cgF1 on phrases that were not trained on", kept("kept_new"), "{:.1%}"),
            Claim("the same without composed phrases", kept("kept_new", "without composed phrases"), "{:.1%}"),
            Claim("share of the teacher's cgF1 on all phrases", kept("kept"), "{:.1%}", Goal("at least", 0.95)),
        ],
        [Table("Phrases that were not trained on", "variant",
               ["cosine", "of the end token", "nearest to itself", "cgF1 kept, new phrases", "cgF1 kept, all phrases"],
               ["{:.3f}", "{:.3f}", "{:.1%}", "{:.1%}", "{:.1%}"], text_rows)],
    ),
]  # fmt: skip
