"""What people store families of models with today, each as a function from a graph to bytes.

Every peer is given its best case: only payload counts, no file system, no catalog. MGit's algorithm is written here from
its description (Hao et al. 2024): tensors paired by the longest common subsequence of shapes with the first parent, the
difference quantised to steps of 2 ln(1 + 1e-4), 64-bit integers, LZMA; the model as a whole is refused when that is not
smaller or when a test gets worse by more than 2 %; equal tensors are stored once; chains are not bounded.
"""

import io
import lzma
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from graphs import Node, State
from numcodecs.zstd import Zstd
from safetensors.torch import save

from dynkit.models import tensor_id
from dynkit.models.tensors import bits_of, raw

try:
    with warnings.catch_warnings(action="ignore"):  # it uses torch.jit
        from zipnn import ZipNN
except ImportError:  # it is built from source, which needs a C compiler
    ZipNN = None

_STEP = 2 * np.log(1 + 1e-4)
_ID_BYTES = 32


def torch_save(nodes: Sequence[Node]) -> int:
    return sum(len(_pickled(node.state)) for node in nodes)


def _pickled(state: State) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def safetensors_zstd(nodes: Sequence[Node]) -> int:
    return sum(len(Zstd(3).encode(save(node.state))) for node in nodes)


def hash_dedup(nodes: Sequence[Node]) -> int:
    sizes = {tensor_id(t): t.nbytes + _ID_BYTES for node in nodes for t in node.state.values()}
    return sum(sizes.values())


def _once(nodes: Sequence[Node], size: Callable[[torch.Tensor, torch.Tensor | None], int]) -> int:
    """Each different tensor by its size, given what the first parent has in its place, but no larger than it is."""
    states = {node.name: node.state for node in nodes}
    sizes: dict[str, int] = {}
    for node in nodes:
        parent = states[node.parents[0]] if node.parents else {}
        for name, tensor in node.state.items():
            key = tensor_id(tensor)
            if key in sizes:
                continue
            base = parent.get(name)
            fits = base is not None and base.shape == tensor.shape and base.dtype == tensor.dtype
            sizes[key] = _ID_BYTES + min(size(tensor, base if fits else None), tensor.nbytes)
    return sum(sizes.values())


def xor_planes(nodes: Sequence[Node]) -> int:
    """Equal tensors once; others as XOR with the first parent's, byte planes, zstd: BitX and ZipLLM."""

    def size(tensor: torch.Tensor, base: torch.Tensor | None) -> int:
        bits = bits_of(tensor) if base is None else bits_of(tensor) ^ bits_of(base)
        return len(Zstd(3).encode(np.ascontiguousarray(bits.view(np.uint8).reshape(-1, bits.itemsize).T)))

    return _once(nodes, size)


def zipnn(nodes: Sequence[Node]) -> int:
    """Equal tensors once; others by ZipNN, alone or as XOR with the first parent's, whichever is smaller."""
    coders = {
        dtype: ZipNN(input_format="byte", bytearray_dtype=str(dtype).removeprefix("torch."))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }

    def size(tensor: torch.Tensor, base: torch.Tensor | None) -> int:
        coder = coders.get(tensor.dtype)
        if coder is None or not tensor.numel():
            return tensor.nbytes
        candidates = [raw(tensor), *([] if base is None else [raw(tensor) ^ raw(base)])]
        return min(len(coder.compress(bytearray(one.tobytes()))) for one in candidates)

    return _once(nodes, size)


LOSSLESS = {
    "torch.save": torch_save,
    "safetensors + zstd": safetensors_zstd,
    "tensor dedup": hash_dedup,
    "dedup + XOR planes + zstd": xor_planes,
} | ({"dedup + XOR + ZipNN": zipnn} if ZipNN is not None else {})


def mgit(nodes: Sequence[Node]) -> tuple[int, float]:
    """Bytes, and the largest relative drop that it accepted."""
    decoded: dict[str, State] = {}
    sizes: dict[str, int] = {}
    worst = 0.0
    for node in nodes:
        state, coded = dict(node.state), {}
        if node.parents:
            parent = decoded[node.parents[0]]
            for name, other in _paired(node.state, parent):
                tensor, base = node.state[name], parent[other].double()
                steps = torch.floor((tensor.double() - base) / _STEP + 0.5).to(torch.int64)
                if not steps.any() or not tensor.is_floating_point():
                    continue
                coded[name] = len(lzma.compress(steps.numpy().tobytes()))
                state[name] = (base + steps.double() * _STEP).to(tensor.dtype)
        smaller = sum(coded.values()) < sum(node.state[name].nbytes for name in coded)
        drop = _drop(node, state) if smaller and coded else 0.0
        if not smaller or drop > 0.02:
            state, coded, drop = dict(node.state), {}, 0.0
        worst = max(worst, drop)
        decoded[node.name] = state
        for name, tensor in state.items():
            sizes.setdefault(tensor_id(tensor), coded.get(name, tensor.nbytes) + _ID_BYTES)
    return sum(sizes.values()), worst


def _drop(node: Node, state: State) -> float:
    if node.score is None:
        return 0.0
    before, after = node.score(node.state).mean(), node.score(state).mean()
    return float((before - after) / abs(before))


def _paired(child: State, parent: State) -> list[tuple[str, str]]:
    """Longest common subsequence of the shapes of two ordered state dicts."""
    a, b = list(child.items()), list(parent.items())
    length = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    for i in range(len(a) - 1, -1, -1):
        for j in range(len(b) - 1, -1, -1):
            same = a[i][1].shape == b[j][1].shape
            length[i, j] = length[i + 1, j + 1] + 1 if same else max(length[i + 1, j], length[i, j + 1])
    i = j = 0
    pairs: list[tuple[str, str]] = []
    while i < len(a) and j < len(b):
        if a[i][1].shape == b[j][1].shape:
            pairs.append((a[i][0], b[j][0]))
            i, j = i + 1, j + 1
        elif length[i + 1, j] >= length[i, j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def raw_bytes(nodes: Sequence[Node]) -> int:
    return sum(raw(tensor).nbytes for node in nodes for tensor in node.state.values())
