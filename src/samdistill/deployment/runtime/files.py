"""Files of an exported folder: the record with checksums, and ONNX files opened with onnxruntime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # newest version of export.json that this file reads
PRECISIONS = ("fp32", "fp16", "int8")
_TYPES = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}

Array = np.ndarray


class ModelError(ValueError):
    """A model folder, an image or a prompt cannot be used. The message is one line."""


class Network:
    """An ONNX file, opened on its first use with some of onnxruntime's execution providers."""

    def __init__(self, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0) -> None:
        self.path, self._providers, self._threads = path, list(providers), threads

    @cached_property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``."""
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self._threads, 3
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=self._providers)
        except Exception as error:  # onnxruntime raises many types
            raise ModelError(f"{self.path}: not a readable ONNX file: {one_line(error)}") from None

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs by name, with ``type`` and ``shape``."""
        return {one.name: one for one in self.session.get_inputs()}

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run the network. ``values`` may hold more than its inputs. Floats are returned as float32."""
        if missing := [name for name in self.inputs if name not in values]:
            raise ModelError(f"{self.path}: needs the input {missing[0]}, which this prompt does not have")
        feeds = {n: np.ascontiguousarray(values[n], _TYPES[one.type[7:-1]]) for n, one in self.inputs.items()}
        self.check(feeds)
        try:
            found = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime raises many types
            raise ModelError(f"{self.path}: cannot run: {one_line(error)}") from None
        names = [one.name for one in self.session.get_outputs()]
        return {n: v.astype(np.float32) if v.dtype == np.float16 else v for n, v in zip(names, found, strict=True)}

    def check(self, given: Mapping[str, Array]) -> None:
        """Raise ``ModelError`` if an axis of the file is fixed and an input has another length."""
        for name, one in self.inputs.items():
            for axis, length in zip(one.shape, given[name].shape, strict=True):
                if isinstance(axis, int) and axis != length:
                    raise ModelError(
                        f"{self.path}: its axes are fixed, and an axis of {name} has {length} elements instead of "
                        f"{axis}; give it one prompt of its kind, or export without --static"
                    )

    def rows(self, given: Mapping[str, Array], shared: Mapping[str, Array], most: int = 0) -> dict[str, Array]:
        """Run the network on at most ``most`` rows of ``given`` at a time (0: all) and join the results.

        A row is a prompt, a phrase or an image. ``shared`` are the inputs that are the same for all rows. A file of
        fixed axes reads one row.
        """
        count = len(next(iter(given.values())))
        fixed = any(isinstance(self.inputs[name].shape[0], int) for name in given if name in self.inputs)
        step = 1 if fixed else most or count
        found = [self({**shared, **{n: v[i : i + step] for n, v in given.items()}}) for i in range(0, count, step)]
        return found[0] if len(found) == 1 else {n: np.concatenate([one[n] for one in found]) for n in found[0]}


def load_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        how = "pip install onnxruntime, or pip install 'samdistill[onnx]'"
        raise ModelError(f"onnxruntime is not installed; {how}") from None
    return onnxruntime


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object")
    return found


def check_folder(folder: Path) -> dict[str, Any]:
    """Return ``export.json`` of a folder after a check of its version and of the SHA-256 of every file it lists."""
    record = read_json(folder / "export.json")
    version = record.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise ModelError(
            f"{folder}: export.json has format {version!r}, this reader knows 1 to {FORMAT}; use the predict.py that "
            "lies in the folder, or a newer samdistill"
        )
    for name, digest in {**{row["path"]: row["sha256"] for row in record["files"]}, **record["others"]}.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{folder}: export.json lists {name!r}, which is outside the folder")
        if not path.is_file():
            raise ModelError(f"{path}: missing; export.json lists it")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ModelError(f"{path}: damaged: its SHA-256 is not the one in export.json; export or copy it again")
    return record
