"""Claims of the results page about hosted detection students, and the functions that read their figures."""

from __future__ import annotations

from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values

HOSTED_STUDENT, CALIBRATED = "hosted", "hosted, calibrated"
SMALL, JOINED, BOTH = "hosted, small text encoder", "the same, then joint fine-tuning", "the same, joint and calibrated"
STITCHED = "described student's features in the teacher's heads"
SHARED = "teacher, the calibrated student's factors"
COLUMNS = ("cgf1", "pmf1", "il_mcc", "mask_ap", "kept")


def rows_of(figures: Figures, name: str) -> list[Figures]:
    """Return the rows of a model in every world and seed."""
    return [
        row for seed in figures["seeds"] for world in seed["worlds"].values()
        for row in world["models"] if row["name"] == name
    ]  # fmt: skip


def kept(name: str) -> Callable[[Figures], Values]:
    """Return a reader of the share of the teacher's cgF1."""
    return lambda figures: [row["kept"] for row in rows_of(figures, name)]


def against_scaled(figures: Figures) -> Values:
    """Return the calibrated student's cgF1 over that of the teacher with the same factors, in the first seed."""
    ours, theirs = rows_of(figures, CALIBRATED), rows_of(figures, SHARED)
    return [one["cgf1"] / other["cgf1"] for one, other in zip(ours[: len(theirs)], theirs, strict=True)]


def world_rows(world: str) -> Callable[[Figures], dict[str, list[Values]]]:
    """Return a reader of all models' figures in a world, by seed."""

    def read(figures: Figures) -> dict[str, list[Values]]:
        found: dict[str, list[Figures]] = {}
        for number, seed in enumerate(figures["seeds"]):
            for row in seed["worlds"][world]["models"]:
                if number == 0 or row["name"] != "teacher":
                    found.setdefault(row["name"], []).append(row)
        return {name: [[row[key] for row in rows if row[key] is not None] for key in COLUMNS]
                for name, rows in found.items()}  # fmt: skip

    return read


def cost_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return parameters in millions, and latency in the first world."""
    rows = figures["seeds"][0]["worlds"]["300"]["models"]
    shown = ("teacher", "described student, bundled", STITCHED, HOSTED_STUDENT, SMALL)
    return {row["name"]: [[row["parameters"] / 1e6], [row["latency_ms"]]] for row in rows if row["name"] in shown}


def error_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return the trunk's error by epoch, in every seed."""
    return {
        name: [[seed["errors"][name][at] for seed in figures["seeds"]] for at in (0, 3, 7, -1)]
        for name in figures["seeds"][0]["errors"]
    }


def choice_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return cgF1 and mask AP in both worlds, by variant of joint fine-tuning, with the starts of the seeds first."""
    starts = {name: found for name, found in figures["beside"].items() if name.startswith("start")}
    runs = {"teacher": [figures["beside"]["teacher"]], "before joint fine-tuning": list(starts.values())}
    runs |= figures["evaluations"]
    pairs = [(world, key) for world in ("300", "400") for key in ("cgf1", "mask_ap")]
    return {
        name: [[run["models"][0]["worlds"][world][key] for run in found] for world, key in pairs]
        for name, found in runs.items()
    }


def gap(variant: str) -> Callable[[Figures], Values]:
    """Return a reader of a variant's cgF1 minus the recipe's of the same seed and world."""

    def read(figures: Figures) -> Values:
        runs = figures["evaluations"]
        pairs = zip(runs[variant], runs["the recipe"], strict=True)
        return [
            ours["models"][0]["worlds"][world]["cgf1"] - theirs["models"][0]["worlds"][world]["cgf1"]
            for ours, theirs in pairs for world in ("300", "400")
        ]  # fmt: skip

    return read


HOSTED = [
    Benchmark(
        "hosted", "A small trunk inside the bundled detector",
        "The recipe `detection/hosted_sandbox`, and questions about scenes of two worlds that no training saw. `kept`: "
        "share of the teacher's cgF1.",
        [
            Claim("share of the teacher's cgF1 without calibration, two worlds", kept(HOSTED_STUDENT), "{:.1%}",
                  Goal("at least", 0.95), headline="Detection: a hosted student, share of its teacher's cgF1"),
            Claim("share of the teacher's cgF1, calibrated, two worlds", kept(CALIBRATED), "{:.1%}"),
            Claim("the same, over the teacher with the student's factors", against_scaled, "{:.1%}"),
            Claim("with a small text encoder too, two worlds", kept(SMALL), "{:.1%}", Goal("at least", 0.95),
                  headline="Detection: the same with a small text encoder"),
            Claim("the same after joint fine-tuning, two worlds", kept(JOINED), "{:.1%}", Goal("at least", 0.95)),
            Claim("the same after joint fine-tuning, calibrated, two worlds", kept(BOTH), "{:.1%}"),
            Claim("described student's features in the teacher's heads, without training", kept(STITCHED), "{:.1%}"),
        ],
        [
            *(Table(f"World {world}", "model", ["cgF1", "pmF1", "IL_MCC", "mask AP", "kept"],
                    ["{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.1%}"], world_rows(world)) for world in ("300", "400")),
            Table("Cost of one question about one image", "model", ["parameters, M", "ms"], ["{:.2f}", "{:.0f}"],
                  cost_rows),
            Table("Squared error of the trunk by epoch", "scenes", ["1", "4", "8", "last"], ["{:.3f}"] * 4, error_rows),
        ],
    ),
    Benchmark(
        "joint", "Choices in joint fine-tuning of a hosted student",
        "One epoch of `detection/hosted_joint_sandbox` after a quarter of the trunk's epochs, in the same two worlds. "
        "Differences are of the same seed and world.",
        [
            Claim("cgF1 of pairs by cost minus pairs by index", gap("pairs by cost"), "{:+.3f}"),
            Claim("cgF1 of presence as BCE minus as squared error", gap("presence as BCE"), "{:+.3f}"),
            Claim("cgF1 of features in units of their deviation minus plain ones",
                  gap("features in units of their deviation"), "{:+.3f}"),
            Claim("cgF1 of a trained neck minus a frozen one", gap("neck trains too"), "{:+.3f}"),
            Claim("cgF1 with labels too minus the teacher alone", gap("labels too"), "{:+.3f}"),
            Claim("the same with a tenth of their weights", gap("labels at a tenth of their weights"), "{:+.3f}"),
            Claim("cgF1 of labels alone minus the teacher alone", gap("labels alone"), "{:+.3f}"),
        ],
        [Table("Variants", "variant", ["cgF1, world 300", "mask AP", "cgF1, world 400", "mask AP"], ["{:.3f}"] * 4,
               choice_rows)],
    ),
]  # fmt: skip
