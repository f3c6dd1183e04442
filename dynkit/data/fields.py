"""What a field of a sample is: how a user's values become stored rows, and stored rows become tensors.

A sample of a fixed kind is one row of bytes; a sample of a varying kind is a span of a long array. Storage knows only
these two (`Rows` and `Spans`); the meaning stays here.

========  =========================================  ============================  =============================
kind      declared as                                stored as                     a batch has
========  =========================================  ============================  =============================
array     ``"float32"``, ``("uint8", (3, 32, 32))``  the dtype (bfloat16: uint16)  tensor (N, ...)
record    a NumPy structured dtype                   uint8 (N, bytes)              one tensor per name in it
sequence  ``("int32", (None,))``                     values and spans              jagged nested tensor (N, j)
bytes     ``"bytes"``                                values and spans              jagged nested tensor of uint8
image     ``("image", (3, 224, 224))``               the encoded files             uint8 tensor (N, 3, H, W)
========  =========================================  ============================  =============================
"""

import ast
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.lib.recfunctions import repack_fields

from dynkit.errors import InvalidInput

__all__ = ["Array", "Field", "Spans", "Stored", "field_of", "hash_stored", "parse_fields", "span_index"]

Array = np.ndarray[Any, Any]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 _-]{0,99}")
_DTYPES = {
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


@dataclass(frozen=True)
class Spans:
    """Samples of varying length: sample i is ``values[starts[i] : starts[i] + lengths[i]]``, one after the other."""

    values: Array
    lengths: Array

    @property
    def starts(self) -> Array:
        """Where each sample begins in `values` (N,)."""
        starts: Array = np.cumsum(self.lengths) - self.lengths
        return starts

    def __len__(self) -> int:
        return len(self.lengths)


Stored = Array | Spans


@dataclass(frozen=True)
class Field:
    """One field of a schema.

    Parameters
    ----------
    kind : str
        ``"array"``, ``"record"``, ``"sequence"``, ``"bytes"`` or ``"image"``.
    dtype : str
        Element type; of a record, the JSON-able ``descr`` of its dtype as text.
    shape : tuple of int
        Shape of one sample; of an image (C, H, W), or () for whatever size each has.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether samples differ in length."""
        return self.kind in ("sequence", "bytes", "image")

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Element type on disk."""
        if self.kind == "record" or (self.varies and self.kind != "sequence"):
            return np.dtype(np.uint8)
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored row; of a varying field, of one element."""
        if self.varies:
            return ()
        return (self.record.itemsize,) if self.kind == "record" else self.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample as stored; of a varying field, of its span."""
        if self.varies:
            return 16
        return self.stored_dtype.itemsize * math.prod(self.stored_shape)

    @cached_property
    def record(self) -> np.dtype[Any]:
        """The structured dtype of a record."""
        return np.dtype([tuple(part) for part in ast.literal_eval(self.dtype)])

    def to_json(self) -> dict[str, Any]:
        """As in the schema of a manifest."""
        return {**({} if self.kind == "array" else {"kind": self.kind}), "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Field":
        """Read what `to_json` wrote."""
        return cls(value.get("kind", "array"), value["dtype"], tuple(value["shape"]))

    def store(self, name: str, value: Any) -> Stored:
        """Convert a user's values of N samples to what is stored.

        Raises
        ------
        InvalidInput
            When dtype or shape differ; nothing is cast silently but Python's own numbers.
        """
        if self.kind == "image":
            return _spans([_encoded(name, image) for image in value], np.uint8)
        if isinstance(value, Spans):
            if value.values.dtype != self.stored_dtype:
                raise InvalidInput(
                    f"field {name!r} holds {self.dtype}, the new samples {value.values.dtype}; cast them"
                )
            if self.varies:
                return value
        if self.kind == "bytes":
            return _spans([np.frombuffer(bytes(one), np.uint8) for one in value], np.uint8)
        if self.kind == "sequence":
            if isinstance(value, torch.Tensor) and value.is_nested:
                value = value.unbind()
            return _spans([self._sequence(name, one) for one in value], self.stored_dtype)
        array = _as_array(name, value)
        if self.kind == "record":
            if array.dtype.names:
                array = np.asarray(repack_fields(array))
            if array.dtype != self.record:
                raise InvalidInput(f"field {name!r} holds records {self.record}, the new samples {array.dtype}")
            return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), self.record.itemsize)
        bfloat16 = self.dtype == "bfloat16" and isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        found = "bfloat16" if bfloat16 else str(array.dtype)
        if isinstance(value, list | tuple) and self.dtype != "bfloat16":
            array = _cast(name, array, self.stored_dtype)
            found = str(array.dtype)
        if (found, array.shape[1:]) != (self.dtype, self.shape):
            raise InvalidInput(
                f"field {name!r}: the dataset has {self.dtype} {self.shape} per sample, the new samples have "
                f"{found} {array.shape[1:]}"
            )
        return np.ascontiguousarray(array)

    def _sequence(self, name: str, one: Any) -> Array:
        array = _as_array(name, one)
        if array.ndim != 1:
            raise InvalidInput(f"field {name!r}: each sample is a sequence, not an array of shape {array.shape}")
        if not array.size:
            return np.empty(0, self.stored_dtype)
        if array.dtype != self.stored_dtype and isinstance(one, np.ndarray | torch.Tensor):
            raise InvalidInput(f"field {name!r} holds {self.dtype}, the new samples {array.dtype}")
        return _cast(name, array, self.stored_dtype)

    def tensors(self, name: str, rows: Stored) -> dict[str, torch.Tensor]:
        """Convert stored samples to what a batch has, without a copy where the layout allows it."""
        if isinstance(rows, Spans):
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(rows.lengths)]))
            values = torch.from_numpy(rows.values)
            values = values.view(torch.bfloat16) if self.dtype == "bfloat16" else values
            return {name: torch.nested.nested_tensor_from_jagged(values, offsets)}
        if self.kind == "record":
            return _columns(self.record, rows)
        tensor = torch.from_numpy(rows)
        return {name: tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor}

    def decode(self, data: Array) -> Array:
        """Decode one image file to uint8 (C, H, W), resized to the declared shape."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data.tobytes())) as image:
                channels = self.shape[0] if self.shape else None
                wanted = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels or 0, image.mode if image.mode == "L" else "RGB")
                converted = image.convert(wanted)
                if self.shape and converted.size != (self.shape[2], self.shape[1]):
                    converted = converted.resize((self.shape[2], self.shape[1]), Image.Resampling.BILINEAR)
                array = np.asarray(converted)
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidInput(f"an image cannot be decoded: {error}") from error
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def parse_fields(fields: Mapping[str, Any]) -> dict[str, Field]:
    """Read the declaration of `Workspace.create_dataset`.

    Raises
    ------
    InvalidInput
    """
    if not isinstance(fields, Mapping) or not fields:
        raise InvalidInput('fields is a mapping of name to kind, such as {"x": ("float32", (10,))}')
    return {check_field_name(name): _parse(name, spec) for name, spec in fields.items()}


def check_field_name(name: Any) -> str:
    """Return `name` if it can be an array of a Zarr group and a keyword argument of a model."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(f"field name {name!r}: use letters, digits, '_' and '-'")
    return name


def _parse(name: str, spec: Any) -> Field:
    if isinstance(spec, np.dtype) and spec.names:
        return _record(name, spec)
    dtype, shape = spec if isinstance(spec, tuple | list) and len(spec) == 2 else (spec, ())
    shape = () if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
    if dtype in ("bytes", "image"):
        if dtype == "image" and shape and (len(shape) != 3 or shape[0] not in (1, 3, 4)):
            raise InvalidInput(f"field {name!r}: an image has the shape (1 | 3 | 4, height, width), not {shape}")
        return Field(dtype, "uint8", shape if dtype == "image" else ())
    text = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else ""
    try:
        text = text or ("bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name)
    except TypeError:
        text = str(dtype)
    if text not in _DTYPES:
        raise InvalidInput(f"field {name!r}: {dtype!r} is no type of a field; use one of {', '.join(sorted(_DTYPES))}")
    if shape == (None,):
        return Field("sequence", text)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidInput(f"field {name!r}: shape {shape} must be positive whole numbers, or (None,) for sequences")
    return Field("array", text, shape)


def _record(name: str, dtype: np.dtype[Any]) -> Field:
    packed = repack_fields(dtype)
    for part in packed.names or ():
        base = packed[part].base
        if base.name not in _DTYPES or not base.isnative or base.names:
            raise InvalidInput(f"field {name!r}: {part!r} of the record is {base}; use native numbers and booleans")
    return Field("record", repr(packed.descr))


def _cast(name: str, array: Array, dtype: np.dtype[Any]) -> Array:
    """Convert Python's numbers to a field's type, if that loses nothing but precision."""
    with np.errstate(over="ignore"):
        cast: Array = array.astype(dtype)
    if dtype.kind in "iub" and array.dtype.kind in "iub":
        fits = np.array_equal(cast, array)
    else:
        fits = np.can_cast(array.dtype, dtype, "same_kind") and np.array_equal(np.isinf(cast), np.isinf(array))
    if not fits:
        raise InvalidInput(f"field {name!r} holds {dtype}, the new samples {array.dtype} that do not fit")
    return cast


def field_of(name: str, value: Any) -> Field:
    """Say which field a user's array is, where nothing was declared."""
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return Field("array", str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
    if isinstance(value, Spans):
        return Field("sequence", value.values.dtype.name)
    array = value if isinstance(value, np.ndarray) else None
    if array is not None and array.dtype.names:
        return _record(name, array.dtype)
    if array is not None and array.dtype == object and array.ndim > 1:
        raise InvalidInput(f"array {name!r} holds Python objects; every sample needs the same shape and a number type")
    if array is not None and array.dtype != object:
        if array.dtype.name not in _DTYPES:
            raise InvalidInput(f"array {name!r} has dtype {array.dtype}; fields hold booleans, integers or floats")
        return Field("array", array.dtype.name, array.shape[1:])
    first = next(iter(value.unbind() if isinstance(value, torch.Tensor) else value), None)
    if isinstance(first, bytes | bytearray | memoryview | os.PathLike) or hasattr(first, "save"):
        return Field("image" if not isinstance(first, bytes) or _is_image(first) else "bytes", "uint8")
    if isinstance(first, np.ndarray | torch.Tensor | list | tuple):
        one = _as_array(name, first)
        if one.ndim == 1 and one.dtype.name in _DTYPES:
            return Field("sequence", one.dtype.name)
    raise InvalidInput(f"array {name!r} holds Python objects; every sample needs the same shape and a number type")


def span_index(starts: Array, lengths: Array) -> Array:
    """Index of every element of these spans, one after the other: ``concat(arange(s, s + n) for s, n)``."""
    before = np.cumsum(lengths) - lengths
    index: Array = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return index


def hash_stored(name: str, stored: Stored) -> bytes:
    """BLAKE3 of the values of a field."""
    parts = [stored.lengths, stored.values] if isinstance(stored, Spans) else [stored]
    hasher = blake3(name.encode(), max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(f"{part.dtype}{part.shape};".encode())
        hasher.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return hasher.digest()


def _spans(samples: Sequence[Array], dtype: Any) -> Spans:
    lengths = np.fromiter((len(one) for one in samples), np.int64, len(samples))
    return Spans(np.concatenate([*samples, np.empty(0, dtype)]).astype(dtype, copy=False), lengths)


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InvalidInput(f"array {name!r} has masked values; a field has none that are missing: fill them")
    array: Array = np.asarray(value)
    if 0 in array.shape[1:]:
        raise InvalidInput(f"array {name!r} has shape {array.shape}: nothing per sample")
    if array.dtype == object:
        raise InvalidInput(f"array {name!r} holds Python objects; every sample needs the same shape and a number type")
    return array


def _encoded(name: str, image: Any) -> Array:
    """Return the bytes of an image file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return np.frombuffer(image, np.uint8)
    if isinstance(image, str | os.PathLike):
        return np.frombuffer(Path(image).read_bytes(), np.uint8)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        from PIL import Image

        image = Image.fromarray(image)
    if hasattr(image, "save"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return np.frombuffer(buffer.getvalue(), np.uint8)
    raise InvalidInput(
        f"field {name!r}: an image is an encoded file (bytes or path), a Pillow image or a uint8 array (H, W, C), "
        f"not {type(image).__name__}"
    )


def _is_image(data: bytes) -> bool:
    """Whether bytes begin as JPEG, PNG, GIF, BMP, TIFF or WebP do."""
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    return data.startswith(known) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")


def _columns(record: np.dtype[Any], rows: Array) -> dict[str, torch.Tensor]:
    """Split records (N, bytes) into one tensor per name."""
    structured = rows.view(record).reshape(len(rows))
    return {part: _contiguous(structured[part]) for part in record.names or ()}


def _contiguous(column: "np.ndarray[Any, Any]") -> torch.Tensor:
    """Copy a column of records to a tensor, with torch's threads where torch can address it."""
    addressable = column.flags.aligned and all(stride % column.itemsize == 0 for stride in column.strides)
    return torch.from_numpy(column if addressable else np.ascontiguousarray(column)).contiguous()
