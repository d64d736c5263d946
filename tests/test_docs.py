"""The documentation against the program: keys, options, commands, links, and code that runs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from samdistill.cli import _parse, _parser
from samdistill.config import FreezeConfig, PhaseConfig, RateConfig, TeacherEntry, packaged
from samdistill.jobs import JOBS
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.text.config import TextRunConfig
from samdistill.jobs.video.config import VideoRunConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REQUIRED = "required"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Dotted key of every leaf of a config model to its default as YAML holds it."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, f"{prefix}{name}.")
        elif field.is_required():
            found[prefix + name] = REQUIRED
        else:
            default = field.default
            plain = list(default) if isinstance(default, tuple) else default
            found[prefix + name] = str(plain) if isinstance(plain, Path) else plain
    return found


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Every verb's own parser."""
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(verbs.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Long options of a verb and of the actions below it."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options(below)
        found |= {name for name in action.option_strings if name.startswith("--") and name != "--help"}
    return found


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ``samdistill`` line in a page's shell blocks."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and words[0] == "samdistill":
                found.append(words[1:])
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Arguments of every command line inside a table of a page."""
    cells = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [shlex.split(found) for line in cells for found in re.findall(r"`samdistill ([^`]+)`", line)]


def rows(text: str) -> list[tuple[str, str]]:
    """Key and default of every row of the tables of keys."""
    return re.findall(r"^\| `([\w.]+)` \| .+? \| (.+?) \| .+ \|$", text, re.M)


def section(title: str) -> str:
    """What stands below a heading of the configuration page, up to the next of its level."""
    page = (DOCS / "configuration.md").read_text()
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return found


SHARED, IMAGES, TEACHER = "Keys of all jobs", "Keys of images and videos", "Keys of a teacher"
KEYS: dict[tuple[str, ...], type[BaseModel]] = {
    (SHARED, IMAGES, TEACHER, "Keys of the encoder job"): EncoderRunConfig,
    (SHARED, IMAGES, TEACHER, "Keys of the detection job"): DetectionRunConfig,
    (SHARED, IMAGES, "Keys of the prompt job"): PromptRunConfig,
    (SHARED, IMAGES, TEACHER, "Keys of the video job"): VideoRunConfig,
    (SHARED, TEACHER, "Keys of the text job"): TextRunConfig,
    ("Keys of a phase",): PhaseConfig,
    ("Keys of a freeze",): FreezeConfig,
    ("Keys of a rate",): RateConfig,
    ("Keys of one of several teachers",): TeacherEntry,
}
"""Sections of the configuration page, and the model whose keys they list together."""


@pytest.mark.parametrize(("titles", "model"), KEYS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_the_configuration_page_lists_exactly_the_keys_with_their_defaults(
    titles: tuple[str, ...], model: type[BaseModel]
) -> None:
    listed = [row for title in titles for row in rows(section(title))]
    wanted = fields(model)
    assert sorted(key for key, _ in listed) == sorted(wanted)  # none is missing, unknown or there twice
    for key, default in listed:
        assert yaml.safe_load(default.strip("`")) == wanted[key], key


def test_no_table_of_keys_stands_outside_the_sections_that_are_compared() -> None:
    compared = [key for title in {title for titles in KEYS for title in titles} for key, _ in rows(section(title))]
    assert [key for key, _ in rows((DOCS / "configuration.md").read_text())] != []
    assert sorted(compared) == sorted(key for key, _ in rows((DOCS / "configuration.md").read_text()))


def test_every_packaged_recipe_is_mentioned() -> None:
    text = (DOCS / "configuration.md").read_text()
    assert [name for name in packaged() if f"`{name}`" not in text] == []


@pytest.mark.parametrize("verb", sorted(parsers(_parser())))
def test_every_verb_has_a_page_with_all_its_options(verb: str) -> None:
    text = (DOCS / f"{verb}.md").read_text()
    assert text.startswith(f"# samdistill {verb}\n")
    assert sorted(name for name in options(parsers(_parser())[verb]) if f"`{name}" not in text) == []
    assert f"({verb}.md)" in (DOCS / "index.md").read_text()


def test_help_lists_every_verb_once_in_its_group() -> None:
    text = _parser().format_help()
    listed = re.findall(r"^  ([a-z]+) {2,}", text, re.M)
    assert sorted(listed) == sorted(parsers(_parser()))
    assert re.findall(r"^(\w.*):$", text, re.M) == ["start here", "pipeline steps", "models", "data", "options"]
    assert text.index("models:") < text.index("  predict ") < text.index("data:") < text.index("  prepare ")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verb", sorted(parsers(_parser())))
def test_help_of_a_verb_has_an_example_and_every_default(verb: str) -> None:
    parser = parsers(_parser())[verb]
    ((name, *words),) = (shlex.split(line) for line in re.findall(r"^  samdistill (.+)$", parser.format_help(), re.M))
    assert name == verb and _parse([name, *words]).verb == verb
    for below in [parser, *(p for a in parser._actions if isinstance(a.choices, dict) for p in a.choices.values())]:
        text = " ".join(below.format_help().split())
        for action in below._actions:
            assert action.help or action.choices, action.dest
            if (
                action.default not in (None, False, argparse.SUPPRESS)
                and action.option_strings
                and action.default != []
            ):
                shown = " ".join(action.default) if isinstance(action.default, list) else action.default
                assert f"default: {shown})" in text, action.dest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_is_one_the_program_takes(page: Path) -> None:
    for arguments in commands(page):
        _parse(arguments)  # ends the process on an unknown verb or option


def test_the_readme_is_short_and_its_commands_are_ones_the_program_takes() -> None:
    page = ROOT / "README.md"
    assert len(page.read_bytes()) < 8000
    found = inline_commands(page)
    assert {arguments[0] for arguments in found} == {"run", "evaluate", "predict", "export"}
    parsed = [_parse(arguments) for arguments in found]
    assert {arguments.job for arguments in parsed if arguments.verb == "run"} == set(JOBS)


def test_commands_are_found_and_wrong_ones_are_refused() -> None:
    assert ["demo"] in commands(DOCS / "demo.md")
    with pytest.raises(SystemExit):
        _parse(["train", "encoder/es_rv_m", "--nprocs", "8"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """Targets of links into a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_name_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*\.md)?#([^)\s]+)\)", page.read_text())
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


LITERARY = re.compile(
    r"\b(road|roads|story|stories|nobody|somebody|whoever|vouches|walks|tells|house|rooms?|himself|for ever)\b", re.I
)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_pages_use_plain_words(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert LITERARY.findall(text) == []


def test_the_parameters_of_the_bundled_models_are_what_the_program_counts() -> None:
    from samdistill.checkpoints.promptable import load_promptable
    from samdistill.inference.concepts import load_concept_model

    shown = re.findall(r"^\| `([\w-]+)`.*\| ([\d.]+M) \|$", (DOCS / "sandbox.md").read_text(), re.M)
    names = ("sandbox-sam", "sandbox-mobile")
    models = [load_promptable("sandbox"), load_concept_model("sandbox").model, *map(load_promptable, names),
              load_concept_model("sandbox-student").model]  # fmt: skip
    counted = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M" for model in models]
    assert shown == list(zip(("sandbox", "sandbox", *names, "sandbox-student"), counted, strict=True))


def test_the_parts_of_the_detection_student_are_what_the_program_counts() -> None:
    import torch

    from samdistill.students import build_detector, efficient_sam3_config

    with torch.device("meta"):
        detector = build_detector(efficient_sam3_config())
    text = (DOCS / "detection.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \| .+ \| ([\d.]+M) \|$", text, re.M))
    children = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.named_children()}
    assert shown == {name: f"{count / 1e6:.2f}M" for name, count in children.items() if count}
    assert f"| all | | {sum(children.values()) / 1e6:.2f}M |" in text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_whole_and_name_no_place_on_a_machine(path: Path) -> None:
    found = json.loads(path.read_text())
    assert {"command", "date", "figures"} <= found.keys()
    for text in (path.read_text(), path.with_suffix(".txt").read_text()):
        assert not re.search(r"(?<![\w.])/(tmp|work|home|root|Users)/", text)


def test_the_table_of_students_is_what_the_program_counts() -> None:
    from samdistill.students import breakdown, list_students

    rows = re.findall(r"^\| `(es_\w+)` \| `(\w+)` \|(.+)\|$", (DOCS / "models.md").read_text(), re.M)
    shown = {name: (backbone, *(cell.strip() for cell in cells.split("|"))) for name, backbone, cells in rows}
    for student in list_students():
        work = breakdown(student.name)
        assert shown.pop(student.name) == (
            student.backbone, f"{student.trunk_params / 1e6:.3f}", f"{student.head_params / 1e6:.3f}",
            f"{work.trunk_gflops:.1f}", f"{work.head_gflops:.1f}", f"{100 * student.teacher_share:.2f} %",
        )  # fmt: skip
    assert shown == {}


MERGED = """
import samdistill
from samdistill.students import StudentTrunkConfig, build_trunk
build_trunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=192, image_size=126)).save_pretrained("student")
samdistill.merge("student", "sandbox", "runs/demo/run/merged")
"""
PHOTO = """
from PIL import Image
Image.new("RGB", (64, 48), "red").save("photo.jpg")
"""
FILM = """
from pathlib import Path
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
(name,) = write_sav(Path("videos"), 1, 126, 3, "val", VideoStyle(frames=12))
Path("videos/val", f"{name}.mp4").rename("film.mp4")
"""
REMEMBERS = """
from pathlib import Path
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.words import Words
from samdistill.checkpoints.student import load_with_memory
image = locate("sandbox-student")
remembering = load_with_memory(image, latents=12, layers=1, windows=2)
remembering.config.memory_level = 2
run = Path("runs/video/efficient_sam3")
remembering.save_pretrained(run / "student")
Words.load(image, remembering.config.text_config.vocab_size).save(run / "student")
"""
FILM_HOLDS = """
assert session.context == 8 and session.stride == 4 and number == 11
assert dog in [one.object_id for one in session.push(frame)]
"""
MERGED_HOLDS = """
assert masks.shape[:2] == (1, 1) and masks.isfinite().all()
"""
README_HOLDS = """
from pathlib import Path
assert result.masks.shape[1:] == (48, 64) and Path("seen.png").is_file()
assert frame.number == 11
"""


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("docs/extending.md", "", ""),
        ("docs/store.md", "", ""),
        ("docs/video.md", FILM + REMEMBERS, FILM_HOLDS),
        ("docs/merge.md", MERGED, MERGED_HOLDS),
        ("README.md", PHOTO + FILM, README_HOLDS),
    ],
)
def test_code_on_a_page_runs(page: str, before: str, after: str, tmp_path: Path) -> None:
    """In a process of its own: the pages register things that other tests must not see."""
    code = "\n".join([before, *blocks(ROOT / page, "python"), after])
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
