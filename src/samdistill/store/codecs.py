"""How a feature map becomes the payload of a record. Every codec has one payload size, so record i is at i x size.

All numbers are little-endian. Bytes per image of the SAM 3 trunk at 1008 px (1024 x 72 x 72), seed included:
``fp16`` 10,616,836, ``int8`` 5,316,612, ``pca256-int8`` 1,329,156, ``fp32`` 21,233,668 (``record_bytes`` computes it
for any shape).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..registry import CODECS
from ..types import UserError

SEED_BYTES = 4
Shape = tuple[int, int, int]


class FeatureError(UserError):
    """A feature map that a codec cannot hold. The writer adds the key."""


class Codec(ABC):
    """Encodes one map, decodes a batch.

    name: as in the manifest. shape: channels, height, width. dtype: of the bulk of the payload.
    """

    dtype: str

    def __init__(self, name: str, shape: Shape) -> None:
        channels, height, width = (int(n) for n in shape)
        self.name, self.shape = name, (channels, height, width)

    @property
    @abstractmethod
    def payload_bytes(self) -> int:
        """Bytes of one encoded map."""

    @property
    def record_bytes(self) -> int:
        """Bytes of one record on disk: the seed, then the payload."""
        return SEED_BYTES + self.payload_bytes

    @property
    def fitted(self) -> bool:
        """False while ``fit`` has yet to be called. Codecs that learn nothing are born fitted."""
        return True

    def fit(self, samples: Iterable[Float[Tensor, "c h w"]]) -> None:  # noqa: B027 - most learn nothing
        """Learn from sample maps. Nothing to learn here; ``samples`` is not touched."""

    def state(self) -> dict[str, Tensor]:
        """What was learnt; empty for most."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``state`` of an equal codec returned. ``ValueError`` if it does not fit."""
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)}")

    @property
    def digest(self) -> str | None:
        """Hex digest of what was learnt; None if there is nothing. Equal digests decode equally."""
        if not (state := self.state()):
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @abstractmethod
    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        """The payload, ``payload_bytes`` long. ``FeatureError`` for NaN, infinity or what does not fit."""

    @abstractmethod
    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        """Float32 maps on the device where the payloads are: send bytes to a GPU and decode there."""

    def decode(self, payload: bytes | memoryview | np.ndarray) -> Float[Tensor, "c h w"]:
        """One map from bytes, a memoryview or an array of ``payload_bytes`` bytes; it owns its memory."""
        return self.decode_batch(torch.from_numpy(np.frombuffer(payload, np.uint8).copy())[None])[0]

    def _rows(self, features: Float[Tensor, "c h w"]) -> Float[Tensor, "c n"]:
        if tuple(features.shape) != self.shape:
            wanted, given = ("x".join(map(str, shape)) for shape in (self.shape, features.shape))
            raise FeatureError(f"the feature map is {given}, the store holds {wanted}")
        return features.detach().flatten(1)


def make_codec(name: str, shape: Shape) -> Codec:
    """A codec by its name: ``fp16``, ``fp32``, ``int8``, or such as ``pca256-int8``, which is to be fitted first."""
    return CODECS.get(re.sub(r"^pca[1-9]\d*-", "pca{K}-", name))(name, shape)


def record_bytes(codec: str, shape: Shape) -> int:
    """Bytes one image takes in a store (its key and 20 bytes of index apart)."""
    return make_codec(codec, shape).record_bytes


def pack_state(codec: Codec) -> bytes:
    """The content of ``codec.safetensors``."""
    return save(codec.state())


def unpack_state(codec: Codec, path: Path, digest: str) -> None:
    """Load ``path`` into ``codec``; ``UserError`` unless it is what the manifest's ``digest`` says."""
    advice = "restore it, or delete the store and cache again"
    try:
        codec.load_state(load(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, and the store cannot be read without it; {advice}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not the state of codec {codec.name}: {error}; {advice}") from None
    if codec.digest != digest:
        raise UserError(f"{path}: changed since the store was made (digest {codec.digest}, not {digest}); {advice}")


@CODECS.register("fp16")
class Fp16(Codec):
    """The published record: float16, channel-major (c, h, w). Relative error 2^-11."""

    dtype = "float16"

    @property
    def payload_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        half = self._rows(features).to(torch.float16).cpu()
        # NaN goes through amin and amax, so two reductions judge every value without a copy.
        if not np.isfinite([float(half.amin()), float(half.amax())]).all():
            peak = float(features.detach().abs().amax())
            if np.isfinite(peak):
                raise FeatureError(f"features reach {peak:g}, beyond the 65504 of float16; use the codec int8 or fp32")
            raise FeatureError("features hold NaN or infinity")
        return half.numpy().tobytes()

    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        return payloads.flatten().view(torch.float16).float().reshape(-1, *self.shape)


@CODECS.register("fp32")
class Fp32(Codec):
    """float32, channel-major (c, h, w): what went in comes out."""

    dtype = "float32"

    @property
    def payload_bytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        rows = self._rows(features).float().cpu()
        if not np.isfinite([float(rows.amin()), float(rows.amax())]).all():
            raise FeatureError("features hold NaN, infinity or values beyond 3e38")
        return rows.numpy().tobytes()

    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        return _aligned(payloads).view(torch.float32).reshape(-1, *self.shape)


def _aligned(payloads: UInt8[Tensor, "b n"]) -> UInt8[Tensor, " bn"]:
    """Cloned and flattened: neither the stride nor the offset of a slice of bytes need suit a float32."""
    return payloads.clone(memory_format=torch.contiguous_format).flatten()


def _quantise(rows: Float[Tensor, "k n"]) -> bytes:
    """Step and midrange of each row (float32), then levels -127..127 (int8).

    The range of a row is laid on 255 levels, so the error is at most half a step and never above that of symmetric
    scaling, (max - min) / 254 <= 2 absmax / 254; ViT channels with a constant offset gain most. A constant row,
    zeros for instance, has step 0 and comes back exactly.
    """
    rows = rows.float()
    low, high = rows.amin(1), rows.amax(1)
    if not bool(torch.isfinite(low.abs() + high.abs()).all()):
        raise FeatureError("features hold NaN, infinity or values beyond 1e38")
    step, middle = (high - low) / 254, (high + low) / 2
    levels = (rows - middle[:, None]).div_(torch.where(step > 0, step, 1)[:, None]).round_().clamp_(-127, 127)
    parts = (step, middle, levels.to(torch.int8))
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _dequantise(payloads: UInt8[Tensor, "b m"], rows: int) -> Float[Tensor, "b k n"]:
    scales = _aligned(payloads[:, : 8 * rows])
    step, middle = scales.view(torch.float32).reshape(-1, 2, rows, 1).unbind(1)
    levels = payloads[:, 8 * rows :].view(torch.int8).unflatten(1, (rows, -1))
    return levels.float().mul_(step).add_(middle)


@CODECS.register("int8")
class Int8(Codec):
    """Per record and channel a float32 step and midrange, then int8 levels: 8 c + c h w bytes.

    Error at most half a step, (max - min) / 508 of the channel.
    """

    dtype = "int8"

    @property
    def payload_bytes(self) -> int:
        channels, height, width = self.shape
        return channels * (8 + height * width)

    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        return _quantise(self._rows(features))

    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        return _dequantise(payloads, self.shape[0]).reshape(-1, *self.shape)


@CODECS.register("pca{K}-int8")
class PcaInt8(Codec):
    """K principal components over the channels, one basis per store; coefficients quantised as ``Int8`` does.

    8 K + K h w bytes. State: mean (c), components (K, c) and explained (K), the share of the samples' variance that
    each component carries, falling.
    """

    dtype = "int8"

    def __init__(self, name: str, shape: Shape) -> None:
        super().__init__(name, shape)
        match = re.fullmatch(r"pca([1-9]\d*)-int8", name)
        if match is None or int(match[1]) > shape[0]:
            raise UserError(f"codec {name!r}: write pca{{K}}-int8 with K from 1 to {shape[0]}, the channels of the tap")
        self.components = int(match[1])
        self._state: dict[str, Tensor] = {}

    @property
    def payload_bytes(self) -> int:
        _, height, width = self.shape
        return self.components * (8 + height * width)

    @property
    def fitted(self) -> bool:
        return bool(self._state)

    def fit(self, samples: Iterable[Float[Tensor, "c h w"]]) -> None:
        """Eigenvectors of the channel covariance over all cells of all samples, one sample in memory at a time.

        Float64 throughout. The entry of largest magnitude of each component is positive, so the same samples give
        the same basis.
        """
        channels = self.shape[0]
        shift: Tensor | None = None
        total, moment, count = torch.zeros(channels).double(), torch.zeros(channels, channels).double(), 0
        for sample in samples:
            rows = self._rows(sample).cpu().double()
            if not bool(torch.isfinite(rows.abs().amax())):
                raise FeatureError("a sample for the PCA basis holds NaN or infinity")
            # Shifted by the first mean: a channel's constant offset would otherwise swamp its variance.
            shift = rows.mean(1) if shift is None else shift
            rows = rows - shift[:, None]
            total += rows.sum(1)
            moment.addmm_(rows, rows.T)
            count += rows.shape[1]
        if shift is None:
            raise UserError(f"codec {self.name}: no sample to fit the PCA basis on")
        offset = total / count
        variances, vectors = torch.linalg.eigh(moment / count - torch.outer(offset, offset))
        variances, basis = variances.flip(0).clamp(min=0), vectors.flip(1).T[: self.components]
        peaks = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        share = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._state = {
            "mean": (shift + offset).float(),
            "components": (basis * peaks.sign()).float().contiguous(),
            "explained": share[: self.components].float(),
        }

    def state(self) -> dict[str, Tensor]:
        return dict(self._state)

    def load_state(self, state: dict[str, Tensor]) -> None:
        channels = self.shape[0]
        wanted = {"mean": (channels,), "components": (self.components, channels), "explained": (self.components,)}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if given != wanted:
            raise ValueError(f"tensors {given}, not {wanted}")
        self._state = dict(state)

    def _projection(self, device: torch.device) -> tuple[Float[Tensor, "c 1"], Float[Tensor, "k c"]]:
        if not self.fitted:
            raise ValueError(f"codec {self.name} must be fitted first")
        return self._state["mean"].to(device)[:, None], self._state["components"].to(device)

    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        rows = self._rows(features).float()
        mean, basis = self._projection(rows.device)
        return _quantise(basis @ (rows - mean))

    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        mean, basis = self._projection(payloads.device)
        rows = basis.T @ _dequantise(payloads, self.components)
        return rows.add_(mean).reshape(-1, *self.shape)
