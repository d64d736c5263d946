"""Safe, lazy reading of weight files: safetensors (single or sharded) and torch files with ``weights_only=True``.

No function in this module runs code from a file. Tensors are memory-mapped. Reading names and shapes reads no weights,
and a tensor takes memory only when it is used.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
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
"""Packaged models other than ``sandbox``: name to folder in ``sandbox/weights``. ``sandbox`` itself is the tracker or
the detector, see ``locate``.
"""
STUDENT_FOLDER = "student"
"""Folder of the finished student in a run."""
_SETTINGS = "yacs.config.CfgNode"
"""A dictionary with attributes, which EfficientSAM3's training saves with the weights. It is read as a dictionary."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, known without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size of the elements in bytes, without padding."""
        return self.count * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Return the shape and dtype of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)


class _Index(BaseModel):
    """Index of a sharded checkpoint: tensor name to the file that holds the tensor."""

    weight_map: dict[str, str]


class Weights(Mapping[str, Tensor]):
    """Named tensors of a checkpoint. A tensor is read from disk when it is indexed.

    Args:
        source: File or folder of the checkpoint. It is used in error messages.
        info: Shape and dtype of each tensor by name.
        files: Name of a tensor to the safetensors file that holds it.
        tensors: Tensors that are already open (memory-mapped from a torch file), by name.
        wrapped: True if the torch file keeps the tensors under a key, such as ``"model"``.
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
    """Open the tensors of a Hugging Face folder, a ``.safetensors`` file or a torch file.

    Args:
        path: A folder with ``model.safetensors`` or ``model.safetensors.index.json``, a ``.safetensors`` file, or a
            torch file. A torch file holds a dictionary of tensors, or one under the key ``"model"`` or
            ``"state_dict"``.

    Returns:
        The tensors by name, read lazily.

    Raises:
        UserError: The path is missing, damaged, not a table of dense tensors, or a pickle that contains more than
            tensors.

    Example:
        >>> weights = open_weights("runs/encoder/es_rv_m/student")
        >>> weights.info["head.output.0.weight"].shape
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _safetensors(path, [path])
    content = load_torch(path)
    wrapped, tensors = named_tensors(content)
    if not tensors:
        raise UserError(f"{path}: holds no named tensors (top-level keys: {', '.join(map(str, list(content)[:8]))})")
    if sparse := [name for name, tensor in tensors.items() if tensor.layout != torch.strided]:
        raise UserError(f"{path}: {sparse[0]} is a sparse tensor; save it with .to_dense()")
    return Weights(path, {k: TensorInfo.of(v) for k, v in tensors.items()}, {}, tensors, wrapped)


def named_tensors(content: Mapping[Any, Any]) -> tuple[bool, dict[str, Tensor]]:
    """Return the tensors of a torch file by name, and whether they are under the key ``model`` or ``state_dict``."""
    inner = (content.get("model"), content.get("state_dict"))
    table = next((t for t in inner if isinstance(t, dict) and any(isinstance(v, Tensor) for v in t.values())), None)
    found = content if table is None else table
    return table is not None, {str(k): v for k, v in found.items() if isinstance(v, Tensor)}


def load_torch(path: Path) -> dict[Any, Any]:
    """Load the dictionary in a torch file, memory-mapped on the CPU, without running code from it.

    A pickle that needs anything other than tensors and plain containers is refused before it runs.

    Raises:
        UserError: The file is refused, damaged, or does not hold a dictionary.
    """
    try:
        settings = torch.serialization.safe_globals([(OrderedDict, _SETTINGS)])
        with warnings.catch_warnings(), settings:
            warnings.simplefilter("ignore", UserWarning)  # torch warns of pickle protocols; the error below is enough
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        asked = re.search(r"Unsupported (?:global|operand|class)[^\n.]*?([\w.]+\.\w+)", str(error))
        wants = f" (it asks for {asked[1]})" if asked else ""
        raise UserError(
            f"{path}: refused: not a plain table of tensors but a pickle that needs to run code, or no pickle at all"
            f"{wants}; convert the weights to safetensors if you trust the file"
        ) from None
    except Exception as error:  # a damaged zip or pickle raises any type of error, depending on where it was cut
        raise UserError(f"{path}: damaged or not a torch checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a table of named tensors")
    return content


def check_archive(path: Path) -> None:
    """Compare every record of a torch file with its CRC-32 checksum. ``torch.load`` does not do this.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zipfile raises any type of error if the archive's own tables are damaged
        raise UserError(f"{path}: damaged ({one_line(error)})") from None
    if bad is not None:
        raise UserError(f"{path}: damaged ({bad} does not match its checksum)")


def _folder(folder: Path) -> Weights:
    index = folder / _INDEX
    if index.is_file():
        mapping = read_json(index, _Index, "not a readable safetensors index").weight_map
        for name in set(mapping.values()):
            if key_problem(name) or "/" in name:
                raise UserError(f"{index}: shard {name!r} must be the name of a file beside the index, without a path")
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
                    raise UserError(f"{shard}: {name} has the unsupported dtype {view.get_dtype()}")
                info[name] = TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()])
                where[name] = shard
    return Weights(source, info, where, {})


def locate(
    path: str | Path, patterns: Iterable[str] = ("*.json", "*.txt", "*.model", "*.safetensors"),
    packaged: Literal["tracker", "detector"] = "tracker",
) -> Path:  # fmt: skip
    """Return the local file or folder of a path, a packaged model or a Hugging Face hub id.

    Args:
        path: A local path, the name of a packaged model (``sandbox``, ``sandbox-sam``, ``sandbox-mobile``,
            ``sandbox-student``), or a hub id such as ``facebook/sam3``. A hub id is downloaded into the Hugging Face
            cache.
        patterns: Only files of a hub repository that match one of these patterns are downloaded.
        packaged: The model that ``sandbox`` names.

    Raises:
        UserError: The path does not exist, the packaged model is not installed, or the hub cannot be reached or
            refuses.
    """
    text = str(path)
    if text in (SANDBOX, *PACKAGED):
        name = PACKAGED.get(text, packaged)
        folder = Path(str(files("samdistill") / "sandbox" / "weights" / name))
        if not folder.is_dir():
            raise UserError(f"this installation lacks the sandbox's {name}; install it again")
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
    except Exception as error:  # the type depends on the hub's HTTP library (httpx, httpx2 or requests) and on the disk
        raise UserError(
            f"{repository}: not a local folder, and it could not be downloaded from the hub ({type(error).__name__}: "
            f"{one_line(error)}); give a local folder, or log in and accept the model's terms"
        ) from error
