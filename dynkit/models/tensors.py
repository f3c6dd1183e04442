"""Identity and bits of tensors.

A tensor's identity is BLAKE3 over dtype, shape and little-endian bytes; a model's is BLAKE3 over the sorted list of
names and tensor identities. Coding works on bits: unsigned numbers of the element's width (complex numbers are two),
brought into an order in which neighbours are neighbouring values, so that two close values have a small difference.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3

__all__ = [
    "Bits",
    "bits_of",
    "digest",
    "dtype_name",
    "exponents",
    "is_float",
    "manifest_id",
    "ordered",
    "raw",
    "restored",
    "tensor_id",
    "tensor_of",
    "torch_dtype",
    "width",
]

Bits = np.ndarray[Any, np.dtype[Any]]  # (N,) unsigned


def tensor_id(tensor: torch.Tensor) -> str:
    """Identity of a tensor: BLAKE3 of dtype, shape and bytes."""
    return digest(dtype_name(tensor.dtype), tensor.shape, raw(tensor)).hex()


def manifest_id(manifest: Mapping[str, str]) -> str:
    """Identity of a model: BLAKE3 of its sorted names and tensor identities."""
    return blake3(json.dumps(sorted(manifest.items()), separators=(",", ":")).encode()).hexdigest()


def digest(dtype: str, shape: "torch.Size | tuple[int, ...]", data: Bits) -> bytes:
    """BLAKE3 (32 bytes) of dtype, shape and bytes."""
    return blake3(f"{dtype}:{','.join(map(str, shape))}:".encode()).update(data.data).digest()


def dtype_name(dtype: torch.dtype) -> str:
    """Spell a dtype: ``float32``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def raw(tensor: torch.Tensor) -> Bits:
    """Bytes of a tensor; of a contiguous one on the CPU without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def bits_of(tensor: torch.Tensor) -> Bits:
    """Elements as unsigned numbers of their width; complex ones as two each."""
    return raw(tensor).view(f"<u{width(tensor.dtype)}")


def tensor_of(bits: Bits, dtype: torch.dtype, shape: "torch.Size | tuple[int, ...]") -> torch.Tensor:
    """Inverse of `bits_of` and `raw`; shares the memory, which must be writable."""
    if not bits.size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def width(dtype: torch.dtype) -> int:
    """Bytes of the numbers that `bits_of` makes."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


@functools.cache
def is_float(dtype: torch.dtype) -> bool:
    """Whether elements are a sign, an exponent and a mantissa."""
    return _mantissa(dtype) is not None


@functools.cache
def _mantissa(dtype: torch.dtype) -> int | None:
    """Bits of the mantissa, None where there is no sign or no mantissa."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return None
    try:
        bits = round(-np.log2(torch.finfo(dtype).eps))
    except (RuntimeError, TypeError):  # packed formats of several numbers a byte
        return None
    return bits or None


def ordered(bits: Bits, dtype: torch.dtype) -> Bits:
    """Map floats to numbers that are ordered as their values are; whole numbers stay (differences are modulo 2^w).

    A sign and a magnitude become one scale: negative ones inverted, positive ones with the top bit set
    (Lindstrom and Isenburg 2006, section 3.2).
    """
    if not is_float(dtype):
        return bits
    width = bits.itemsize * 8
    mapped: Bits = (bits.view(f"<i{bits.itemsize}") >> (width - 1)).view(bits.dtype)  # all ones where negative
    mapped |= bits.dtype.type(1 << (width - 1))
    mapped ^= bits
    return mapped


def restored(mapped: Bits, dtype: torch.dtype) -> Bits:
    """Inverse of `ordered`."""
    if not is_float(dtype):
        return mapped
    width = mapped.itemsize * 8
    bits: Bits = (mapped.view(f"<i{mapped.itemsize}") >> (width - 1)).view(mapped.dtype)  # all ones where positive
    np.invert(bits, out=bits)
    bits |= mapped.dtype.type(1 << (width - 1))
    bits ^= mapped
    return bits


def exponents(bits: Bits, dtype: torch.dtype) -> Bits | None:
    """Exponent of each float, as the smallest unsigned type; None for whole numbers."""
    mantissa = _mantissa(dtype)
    if mantissa is None:
        return None
    narrow: Bits = np.empty(len(bits), np.uint16 if bits.itemsize == 8 else np.uint8)
    np.right_shift(bits, bits.dtype.type(mantissa), out=narrow, casting="unsafe")
    narrow &= narrow.dtype.type((1 << (bits.itemsize * 8 - 1 - mantissa)) - 1)
    return narrow
