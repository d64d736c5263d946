"""Claims of the results page about hosted detection students, and the functions that read their figures."""

from __future__ import annotations

from collections.abc import Callable

from results_readers import Benchmark, Claim, Figures, Goal, Table, Values

HOSTED_STUDENT, CALIBRATED = "hosted", "hosted, calibrated"
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
    shown = ("teacher", "described student, bundled", HOSTED_STUDENT)
    return {row["name"]: [[row["parameters"] / 1e6], [row["latency_ms"]]] for row in rows if row["name"] in shown}


def error_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return the trunk's error by epoch, in every seed."""
    return {
        name: [[seed["errors"][name][at] for seed in figures["seeds"]] for at in (0, 3, 7, -1)]
        for name in figures["seeds"][0]["errors"]
    }


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
        ],
        [
            *(Table(f"World {world}", "model", ["cgF1", "pmF1", "IL_MCC", "mask AP", "kept"],
                    ["{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.1%}"], world_rows(world)) for world in ("300", "400")),
            Table("Cost of one question about one image", "model", ["parameters, M", "ms"], ["{:.2f}", "{:.0f}"],
                  cost_rows),
            Table("Squared error of the trunk by epoch", "scenes", ["1", "4", "8", "last"], ["{:.3f}"] * 4, error_rows),
        ],
    ),
]  # fmt: skip
