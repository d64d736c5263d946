"""Codecs that convert a feature map to the payload of a record.

Every payload of a codec has the same size, so record i begins at byte i x size. All numbers are little-endian. Bytes
per image of the SAM 3 trunk at 1008 px (1024 x 72 x 72), including the seed: ``fp16`` 10,616,836, ``int8`` 5,316,612,
``pca256-int8`` 1,329,156, ``fp32`` 21,233,668. ``record_bytes`` computes the size for any shape.
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

from ..ops.pca import principal_axes
from ..registry import CODECS
from ..types import UserError

SEED_BYTES = 4
"""Bytes of the augmentation seed (int32) before each payload."""
Shape = tuple[int, int, int]
"""Channels, height, width."""


class FeatureError(UserError):
    """A codec cannot store a feature map. The writer adds the key to the message."""


class Codec(ABC):
    """Base class of codecs, which encode single maps and decode batches.

    Attributes:
        name: Name of the codec as in the manifest.
        shape: Channels, height, width of a map.
        dtype: Type of most of the payload.
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
        """Bytes of one record on disk: the seed and the payload."""
        return SEED_BYTES + self.payload_bytes

    @property
    def fitted(self) -> bool:
        """Whether the codec is ready to encode. False until ``fit`` if the codec learns parameters."""
        return True

    def fit(self, samples: Iterable[Float[Tensor, "c h w"]]) -> None:  # noqa: B027 - most learn nothing
        """Learn the codec's parameters from sample maps. The default has no parameters and ignores ``samples``."""

    def state(self) -> dict[str, Tensor]:
        """Return the learned parameters. Empty for most codecs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load parameters that ``state`` of an equal codec returned.

        Raises:
            ValueError: The parameters do not fit the codec.
        """
        if state:
            raise ValueError(f"{self.name} keeps no state, got {sorted(state)}")

    @property
    def digest(self) -> str | None:
        """Hexadecimal hash of the learned parameters, or None if there are none. Equal digests mean equal decoding."""
        if not (state := self.state()):
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(state.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @abstractmethod
    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        """Encode a map.

        Args:
            features: Map of ``shape``, of any float dtype, on any device.

        Returns:
            The payload, ``payload_bytes`` long.

        Raises:
            FeatureError: The map has NaN, infinity, values beyond the range of the codec, or another shape.
        """

    @abstractmethod
    def decode_batch(self, payloads: UInt8[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        """Decode payloads on their device.

        Args:
            payloads: Encoded maps, uint8, of shape (b, ``payload_bytes``).

        Returns:
            Float32 maps of shape (b, c, h, w).
        """

    def decode(self, payload: bytes | memoryview | np.ndarray) -> Float[Tensor, "c h w"]:
        """Decode one payload to a float32 map of shape (c, h, w), which does not share memory with the payload."""
        return self.decode_batch(torch.from_numpy(np.frombuffer(payload, np.uint8).copy())[None])[0]

    def _rows(self, features: Float[Tensor, "c h w"]) -> Float[Tensor, "c n"]:
        if tuple(features.shape) != self.shape:
            wanted, given = ("x".join(map(str, shape)) for shape in (self.shape, features.shape))
            raise FeatureError(f"the feature map is {given}, the store holds {wanted}")
        return features.detach().flatten(1)


def make_codec(name: str, shape: Shape) -> Codec:
    """Create a codec by name.

    Args:
        name: ``fp16``, ``fp32``, ``int8`` or ``pca{K}-int8`` with a number K, such as ``pca256-int8``, which must be
            fitted before use.
        shape: Channels, height, width of a map.

    Raises:
        UserError: The name is unknown, or K exceeds the number of channels.
    """
    return CODECS.get(re.sub(r"^pca[1-9]\d*-", "pca{K}-", name))(name, shape)


def record_bytes(codec: str, shape: Shape) -> int:
    """Return the bytes of one record in a store, without its key and the 20 bytes of its index entry.

    Example:
        >>> record_bytes("fp16", (1024, 72, 72))
        10616836
    """
    return make_codec(codec, shape).record_bytes


def pack_state(codec: Codec) -> bytes:
    """Return the content of ``codec.safetensors``."""
    return save(codec.state())


def unpack_state(codec: Codec, path: Path, digest: str) -> None:
    """Load the parameters of a codec from ``path``.

    Raises:
        UserError: The file is missing or damaged, or its digest differs from the manifest's ``digest``.
    """
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
    """The published record format: float16 values, channel-major (c, h, w).

    The relative rounding error is at most 2^-11.
    """

    dtype = "float16"

    @property
    def payload_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def encode(self, features: Float[Tensor, "c h w"]) -> bytes:
        half = self._rows(features).to(torch.float16).cpu()
        # amin and amax return NaN if there is one, so two reductions check every value without a copy.
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
    """Float32 values, channel-major (c, h, w). Lossless for float32 maps."""

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
    """Copy and flatten payloads, because stride and offset of a slice of bytes may not be valid for float32."""
    return payloads.clone(memory_format=torch.contiguous_format).flatten()


def _quantise(rows: Float[Tensor, "k n"]) -> bytes:
    """Quantise each row to int8.

    The result has the step and the midrange of each row (float32), then the levels -127..127 (int8). The range of a row
    is divided into 254 steps, so the error is at most half a step, (max - min) / 508. The step is never larger than
    that of symmetric scaling, because (max - min) / 254 <= 2 absmax / 254. ViT channels with a constant offset gain
    most. A constant row, such as zeros, has step 0 and is restored exactly.
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
    """Restore the rows that ``_quantise`` encoded."""
    scales = _aligned(payloads[:, : 8 * rows])
    step, middle = scales.view(torch.float32).reshape(-1, 2, rows, 1).unbind(1)
    levels = payloads[:, 8 * rows :].view(torch.int8).unflatten(1, (rows, -1))
    return levels.float().mul_(step).add_(middle)


@CODECS.register("int8")
class Int8(Codec):
    """Int8 levels with a float32 step and midrange per record and channel.

    A payload has 8 c + c h w bytes. The error is at most half a step, which is (max - min) / 508 of the channel.
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
    """K principal components of the channels, with one basis per store, quantised as in ``Int8``.

    A payload has 8 K + K h w bytes. The parameters are ``mean`` (c), ``components`` (K, c) and ``explained`` (K), the
    fraction of the samples' variance that each component explains, in descending order.
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
        """Compute eigenvectors of the channel covariance over all positions of all samples.

        One sample is in memory at a time. Computation is in float64. The entry of largest magnitude of each component
        is positive, so equal samples give an equal basis.

        Args:
            samples: Maps of ``shape``.

        Raises:
            FeatureError: A sample has NaN or infinity.
            UserError: There is no sample.
        """
        channels = self.shape[0]
        shift: Tensor | None = None
        total, moment, count = torch.zeros(channels).double(), torch.zeros(channels, channels).double(), 0
        for sample in samples:
            rows = self._rows(sample).cpu().double()
            if not bool(torch.isfinite(rows.abs().amax())):
                raise FeatureError("a sample for the PCA basis holds NaN or infinity")
            # The mean of the first sample is subtracted, because a large constant offset would hide the variance.
            shift = rows.mean(1) if shift is None else shift
            rows = rows - shift[:, None]
            total += rows.sum(1)
            moment.addmm_(rows, rows.T)
            count += rows.shape[1]
        if shift is None:
            raise UserError(f"codec {self.name}: no sample to fit the PCA basis on")
        offset = total / count
        variances, basis = principal_axes(moment / count - torch.outer(offset, offset), self.components)
        variances = variances.clamp(min=0)
        share = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
        self._state = {
            "mean": (shift + offset).float(),
            "components": basis.float().contiguous(),
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
        """Return mean and components on ``device``."""
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
