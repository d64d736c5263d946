"""Claims of the results page about single steps at full size, and the functions that read their figures."""

from __future__ import annotations

from results_readers import GIB, Benchmark, Claim, Figures, Table, Values


def peak(figures: Figures) -> Values:
    """Return the largest peak memory of all steps, in GiB."""
    return [max(step["peak_bytes"] for step in figures["steps"].values()) / GIB]


def part_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return the seconds of each part, by step."""
    return {name: [[seconds] for seconds in step["parts"].values()] for name, step in figures["steps"].items()}


def size_rows(figures: Figures) -> dict[str, list[Values]]:
    """Return seconds of the step, peak memory, and parameters in millions, by step."""
    return {
        name: [[step["seconds"]], [step["peak_bytes"] / GIB], [step["parameters"] / 1e6], [step["trained"] / 1e6]]
        for name, step in figures["steps"].items()
    }


FULL_SIZE = [
    Benchmark(
        "full_size_hosted", "The hosted detector, the text job and joint fine-tuning at full size",
        "SAM 3 with 840M random float32 parameters as the running teacher, one step of each. The hosted detector has "
        "RepViT-M2.3 and reads one photograph at 1008 px. The steps ran beside other work on the same two cores and "
        "had a third of one on average, so their seconds are rough; the memory is not affected.",
        [Claim("largest peak memory of a step, GiB", peak, "{:.2f}")],
        [
            Table("Steps", "step", ["seconds", "peak GiB", "student, M", "of these train, M"],
                  ["{:.1f}", "{:.2f}", "{:.2f}", "{:.2f}"], size_rows),
            Table("Seconds by part", "step",
                  ["data", "teacher", "student, forward", "terms and matching", "backward", "clip and optimiser"],
                  ["{:.2f}"] * 6, part_rows),
        ],
    ),
]  # fmt: skip
