"""Reading weight files safely and lazily: safetensors (single or sharded) and torch files with ``weights_only=True``.

Nothing here ever runs code from a file. Tensors are memory-mapped: looking at names and shapes reads no weights, and
a tensor costs memory when it is used.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel
from safetensors import safe_open
from torch import Tensor

from ..io import as_path
from ..names import key_problem
from ..reading import foreign, one_line, read_json
from ..types import UserError

SANDBOX = "sandbox"
PACKAGED = {"sandbox-sam": "sam", "sandbox-mobile": "mobile", "sandbox-student": "student"}
"""Names beside ``sandbox``, which is the tracker or the detector, and the packaged folders they stand for."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What can be said about a tensor without reading it. ``bytes`` counts its elements, not its padding."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tensor.dtype)


class _Index(BaseModel):
    """What is read of a sharded checkpoint's index: tensor name to the file that holds it."""

    weight_map: dict[str, str]


class Weights(Mapping[str, Tensor]):
    """Named tensors of a checkpoint, read when indexed. ``info`` has the shape and dtype of each without reading.

    ``wrapped``: the torch file kept them under a ``"model"`` key. ``source``: the file or folder, for messages.
    """

    def __init__(
        self, source: Path, info: dict[str, TensorInfo], files: dict[str, Path], tensors: dict[str, Tensor],
        wrapped: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.info, self.wrapped = source, info, wrapped
        self._files, self._tensors = files, tensors
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __contains__(self, name: object) -> bool:
        return name in self.info


def open_weights(path: str | Path) -> Weights:
    """The tensors of a Hugging Face folder, a ``.safetensors`` file or a torch file.

    Raises ``UserError`` for what is missing, damaged, not a table of tensors, or a pickle that needs more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _safetensors(path, [path])
    content = load_torch(path)
    inner = content.get("model")
    wrapped = isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values())
    table = inner if wrapped and isinstance(inner, dict) else content
    tensors = {str(k): v for k, v in table.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors (top-level keys: {', '.join(map(str, list(content)[:8]))})")
    return Weights(path, {k: TensorInfo.of(v) for k, v in tensors.items()}, {}, tensors, wrapped)


def load_torch(path: Path) -> dict[Any, Any]:
    """The dictionary in a torch file, memory-mapped on the CPU; never runs code from it.

    A pickle that asks for anything but tensors and plain containers is refused before it can run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols; the error below says what matters
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        asked = re.search(r"Unsupported (?:global|operand|class)[^\n.]*?([\w.]+\.\w+)", str(error))
        wants = f" (it asks for {asked[1]})" if asked else ""
        raise UserError(
            f"{path}: refused: not a plain table of tensors but a pickle that needs to run code, or no pickle at all"
            f"{wants}; re-save the weights as safetensors where you trust them"
        ) from None
    except Exception as error:  # a damaged zip or pickle surfaces as anything, depending on where it was cut
        raise UserError(f"{path}: damaged or not a torch checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a table of named tensors")
    return content


def check_archive(path: Path) -> None:
    """Compare every record of a torch file with its CRC-32, which ``torch.load`` does not. ``UserError`` for damage."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a flipped bit can turn up anywhere in the archive's tables
        raise UserError(f"{path}: damaged ({one_line(error)})") from None
    if bad is not None:
        raise UserError(f"{path}: damaged ({bad} does not match its checksum)")


def _folder(folder: Path) -> Weights:
    index = folder / _INDEX
    if index.is_file():
        mapping = read_json(index, _Index, "not a readable safetensors index").weight_map
        for name in set(mapping.values()):
            if key_problem(name) or "/" in name:
                raise UserError(f"{index}: {name!r} is no file beside it; a shard is named by its file's name alone")
        weights = _safetensors(folder, [folder / name for name in sorted(set(mapping.values()))])
        lost = sorted(set(mapping) - set(weights.info))
        if lost:
            raise UserError(f"{folder}: {len(lost)} tensors of the index are in no shard, such as {lost[0]}")
        return weights
    if (folder / _SINGLE).is_file():
        return _safetensors(folder, [folder / _SINGLE])
    torch_files = sorted(p.name for p in folder.iterdir() if p.suffix in TORCH_SUFFIXES)
    hint = f"; it holds {torch_files[0]}: give that file itself" if torch_files else ""
    raise UserError(f"{folder}: no {_SINGLE} and no {_INDEX} in this folder{hint}")


def _safetensors(source: Path, shards: list[Path]) -> Weights:
    info: dict[str, TensorInfo] = {}
    where: dict[str, Path] = {}
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: missing; the index of {source} names it (download the folder again)")
        with foreign(shard, "damaged or not a safetensors file"), safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                view = opened.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise UserError(f"{shard}: {name} is of the type {view.get_dtype()}, which is not supported")
                info[name] = TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()])
                where[name] = shard
    return Weights(source, info, where, {})


def locate(
    path: str | Path, patterns: Iterable[str] = ("*.json", "*.txt", "*.model", "*.safetensors"),
    packaged: Literal["tracker", "detector"] = "tracker",
) -> Path:  # fmt: skip
    """A local file or folder for a path, ``sandbox`` and its like (packaged models) or a hub id (``facebook/sam3``).

    A hub id is downloaded into the Hugging Face cache, only files that match ``patterns``. packaged: which model
    ``sandbox`` means. ``UserError`` when there is no such path, or the hub cannot be reached or refuses.
    """
    text = str(path)
    if text in (SANDBOX, *PACKAGED):
        name = PACKAGED.get(text, packaged)
        folder = Path(str(files("samdistill") / "sandbox" / "weights" / name))
        if not folder.is_dir():
            way = "install it again" if name == "student" else f"run: samdistill sandbox train-teacher {name}"
            raise UserError(f"this installation lacks the sandbox's {name}; {way}")
        return folder
    local = as_path(path)
    if local.exists():
        return local
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", text) or local.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise UserError(f"{text}: no such file or folder")
    return _download(text, list(patterns))


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub, its HTTP library (httpx, httpx2, requests by version) or the disk
        raise UserError(
            f"{repository}: no such folder here, and as a hub id it could not be fetched ({type(error).__name__}: "
            f"{one_line(error)}); give a local folder, or log in and accept the model's terms"
        ) from error
