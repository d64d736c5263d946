"""The page: segmentation in a browser, beside the exported files, without any other server than one for files."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import as_file, files
from pathlib import Path

from ..errors import UserError
from ..io import copy_file, make_folder

PACKAGE = "onnxruntime-web"
RUNTIME = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
)  # fmt: skip
"""Files of ``onnxruntime-web``: the first three for wasm, the others, which a browser loads only if it has a graphics
card, for WebGPU."""
_INSTALL = f"npm install --ignore-scripts {PACKAGE}"
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


def write_page(folder: Path, runtime: Path | None = None) -> list[str]:
    """Copy the page and the runtime that it needs into an exported folder.

    Args:
        folder: The exported folder. It gets ``index.html`` and ``web/``.
        runtime: The npm package ``onnxruntime-web``, or a folder whose ``node_modules`` has it. None searches the
            current folder.

    Returns:
        Paths of the written files, relative to ``folder``.

    Raises:
        UserError: The npm package is not installed, or lacks a file.

    Example:
        >>> write_page(Path("exported"))  # doctest: +SKIP
        ['index.html', 'web/app.js', ...]
    """
    package = find_runtime(runtime)
    written = []
    make_folder(folder / "web" / "ort")
    with as_file(files("samdistill") / "deployment" / "web") as source:
        for file in sorted(source.iterdir()):
            name = file.name if file.suffix == ".html" else f"web/{file.name}"
            copy_file(file, folder / name)
            written.append(name)
    for name in RUNTIME:
        copy_file(package / "dist" / name, folder / "web" / "ort" / name)
        written.append(f"web/ort/{name}")
    return written


def find_runtime(place: Path | None = None) -> Path:
    """Return the folder of the installed npm package ``onnxruntime-web``.

    Args:
        place: As ``runtime`` of ``write_page``.

    Raises:
        UserError: As for ``write_page``.
    """
    root = Path() if place is None else place
    package = next((p for p in (root, root / "node_modules" / PACKAGE) if (p / "dist" / RUNTIME[0]).is_file()), None)
    if package is None:
        raise UserError(
            f"--web needs the npm package {PACKAGE}, not in {(root / 'node_modules').absolute()}: {_INSTALL}"
        )
    if missing := [name for name in RUNTIME if not (package / "dist" / name).is_file()]:
        raise UserError(f"{package}: the package has no {missing[0]}; install a newer one: {_INSTALL}@latest")
    return package


class _Handler(SimpleHTTPRequestHandler):
    """Serve files with the headers that let wasm use several threads, and without a log."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | _TYPES

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def page_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of an exported folder for this machine alone. It serves once ``serve_forever`` is called.

    Args:
        folder: The exported folder.
        port: Port; 0 for a free one.

    Raises:
        UserError: The folder has no page, or the port is in use.
    """
    if not (folder / "index.html").is_file():
        raise UserError(f"{folder}: no page here; export the model with --web")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used: {error}; give another one") from error


def serve_page(folder: Path, say: Callable[[str], object], port: int = 0, show: bool = False) -> None:
    """Serve the page of an exported folder until Ctrl-C.

    Args:
        folder: The exported folder.
        say: Function that gets the address, as a line for the person.
        port: Port; 0 for a free one.
        show: Open the address in the browser.

    Raises:
        UserError: As for ``page_server``.
    """
    with page_server(folder, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        say(f"the page is at {address} (Ctrl-C ends)")
        if show:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
