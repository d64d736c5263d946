"""The page's files beside an export, and their server. tests/web has the tests of the page itself."""

from __future__ import annotations

import re
import threading
import urllib.request
from pathlib import Path

import pytest

from samdistill.deployment import page
from samdistill.deployment.page import RUNTIME, page_server, serve_page, write_page
from samdistill.errors import UserError

WEB = Path(page.__file__).parent / "web"


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder in which the npm package is installed."""
    dist = tmp_path / "npm" / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in RUNTIME:
        (dist / name).write_text(name)
    return tmp_path / "npm"


@pytest.mark.parametrize("inside", ["", "node_modules/onnxruntime-web"])
def test_page_and_runtime_are_copied(runtime: Path, tmp_path: Path, inside: str) -> None:
    written = write_page(tmp_path / "out", runtime / inside)
    assert sorted(written) == sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert {"index.html", "web/app.js", "web/style.css", *(f"web/ort/{name}" for name in RUNTIME)} <= set(written)
    assert (tmp_path / "out/web/ort" / RUNTIME[0]).read_text() == RUNTIME[0]


def test_runtime_of_the_current_folder(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runtime)
    assert "index.html" in write_page(tmp_path / "out")


def test_missing_runtime_names_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="npm install --ignore-scripts onnxruntime-web") as refused:
        write_page(tmp_path / "out", tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_incomplete_runtime_is_refused(runtime: Path, tmp_path: Path) -> None:
    (runtime / "node_modules/onnxruntime-web/dist" / RUNTIME[-1]).unlink()
    with pytest.raises(UserError, match=re.escape(RUNTIME[-1])):
        write_page(tmp_path / "out", runtime)


def test_every_file_that_the_page_names_is_there_and_no_other_host_is() -> None:
    for file in WEB.iterdir():
        text = file.read_text()
        assert not re.search(r"https?://|//cdn", text), file.name
        for name in re.findall(r"""(?:from|import|URL\() ?"\./([\w.]+)\"""", text):
            assert (WEB / name).is_file(), f"{file.name}: {name}"
    for name in re.findall(r'(?:href|src)="web/([^"]+)"', (WEB / "index.html").read_text()):
        assert (WEB / name).is_file()


def test_modules_stay_short() -> None:
    assert {file.name: n for file in WEB.iterdir() if (n := len(file.read_text().splitlines())) >= 400} == {}


def test_server_isolates_the_page_and_knows_its_types(runtime: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "out", runtime)
    with page_server(tmp_path / "out") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, kind in (
            ("", "text/html"),
            ("web/app.js", "text/javascript"),
            (f"web/ort/{RUNTIME[2]}", "application/wasm"),
        ):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{name}") as answer:
                assert answer.headers["Content-Type"].startswith(kind)
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        server.shutdown()


def test_server_needs_a_page_and_a_port(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export the model with --web"):
        page_server(tmp_path)
    write_page(tmp_path / "out", runtime)
    with page_server(tmp_path / "out") as server, pytest.raises(UserError, match=str(server.server_port)):
        page_server(tmp_path / "out", server.server_port)


def test_serving_says_the_address_and_opens_the_browser_only_when_asked(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page(tmp_path / "out", runtime)
    said, opened = list[str](), list[str]()

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page.webbrowser, "open", opened.append)
    monkeypatch.setattr(page.ThreadingHTTPServer, "serve_forever", interrupted)
    serve_page(tmp_path / "out", said.append)
    assert len(said) == 1 and re.search(r"http://127\.0\.0\.1:\d+/", said[0]) and not opened
    serve_page(tmp_path / "out", said.append, show=True)
    assert len(opened) == 1 and opened[0] in said[1]
