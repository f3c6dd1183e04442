"""Families of models such as people keep: the graphs B1 to B7 that the model store is measured on.

All are trained here, from data in the standard library and scikit-learn, with fixed seeds: a character model on Python
sources (GPT), small convolutional and fully connected networks on digits. ``smoke`` takes a minute, ``standard`` is of the
published shape (91 fine-tuned versions, 60 federated models, ...) with larger networks.
"""

import copy
import functools
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

State = dict[str, torch.Tensor]

DOMAINS = ("asyncio", "email", "unittest", "xml", "http", "json", "logging", "multiprocessing", "ctypes")
_LETTERS = 97
_CONTEXT = 64
_CLASSES = 8  # of characters


@dataclass(frozen=True)
class Tier:
    width: int  # of the character model
    layers: int
    channels: int  # of the convolutional network
    tasks: int
    versions: int
    rounds: int
    checkpoints: int
    steps: int  # of one fine-tuning
    pretraining: int


TIERS = {
    "smoke": Tier(64, 2, 24, 3, 4, 3, 5, 20, 150),
    "standard": Tier(128, 3, 48, 9, 10, 10, 12, 30, 300),
}


@dataclass
class Node:
    """A model of a graph: its state, its parents by name, and how well it does, one number a test sample."""

    name: str
    state: State
    parents: list[str] = field(default_factory=list)
    score: Callable[[State], np.ndarray] | None = None
    kind: str = ""


class GPT(nn.Module):
    def __init__(self, tier: Tier, outputs: int = _LETTERS) -> None:
        super().__init__()
        width = tier.width
        self.token = nn.Embedding(_LETTERS, width)
        self.place = nn.Embedding(_CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, tier.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h, mask=mask, is_causal=True)))


def cnn(tier: Tier) -> nn.Module:
    c = tier.channels
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3, padding=1),
        nn.BatchNorm2d(2 * c),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * c, 4 * c, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * c * 16, 10),
    )


def mlp(tier: Tier) -> nn.Module:
    w = 8 * tier.channels
    return nn.Sequential(nn.Flatten(), nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))


@functools.cache
def text(domain: str) -> torch.Tensor:
    """Characters of a package of the standard library, as numbers."""
    folder = Path(sysconfig.get_path("stdlib")) / domain
    joined = "".join(path.read_text(errors="ignore") for path in sorted(folder.rglob("*.py")))[:300_000]
    codes = np.frombuffer(joined.encode("ascii", "replace"), np.uint8).astype(np.int64)
    return torch.from_numpy(np.where((codes >= 32) & (codes < 127), codes - 32, 95))


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    return x, torch.tensor(data.target[order])


def lm_batches(domain: str, seed: int, noise: float = 0.0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    letters, rng = text(domain), torch.Generator().manual_seed(seed)
    letters = letters[: len(letters) * 9 // 10]
    while True:
        starts = torch.randint(len(letters) - _CONTEXT - 1, (16,), generator=rng)
        part = letters[starts[:, None] + torch.arange(_CONTEXT + 1)]
        x = part[:, :-1].clone()
        x[torch.rand(x.shape, generator=rng) < noise] = 3  # a perturbed version of the data
        yield x, part[:, 1:]


def digit_batches(seed: int, rows: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits()
    rows = torch.arange(1400) if rows is None else rows
    rng = torch.Generator().manual_seed(seed)
    while True:
        chosen = rows[torch.randint(len(rows), (32,), generator=rng)]
        yield x[chosen], y[chosen]


def train(model: nn.Module, batches: Any, steps: int, lr: float, optimizer: Any = None, after: Any = None) -> Any:
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _, (x, y) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        if after is not None:
            after()
    return optimizer


def state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def class_of(letters: torch.Tensor) -> torch.Tensor:
    """Kind of a character: a gap, punctuation, a digit, an upper or lower letter, the end of a line."""
    return torch.bucketize(letters.contiguous(), torch.tensor([0, 15, 25, 32, 58, 64, 90]))


def lm_score(model: nn.Module, domain: str, label: Any = lambda y: y) -> Callable[[State], np.ndarray]:
    """Which next characters of held-out text are right."""
    letters = text(domain)
    part = letters[len(letters) * 9 // 10 :]
    part = part[: min(60, len(part) // (_CONTEXT + 1)) * (_CONTEXT + 1)].reshape(-1, _CONTEXT + 1)
    return _score(model, part[:, :-1], label(part[:, 1:]))


def digit_score(model: nn.Module) -> Callable[[State], np.ndarray]:
    x, y = digits()
    return _score(model, x[1400:], y[1400:])


def _score(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[State], np.ndarray]:
    model = copy.deepcopy(model).eval()

    def score(state: State) -> np.ndarray:
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(x).argmax(-1) == y).double().reshape(-1).numpy()

    return score


@functools.cache
def base_gpt(tier: Tier) -> GPT:
    torch.manual_seed(0)
    model = GPT(tier)
    mixed = (batch for batches in zip(*(lm_batches(d, 0) for d in DOMAINS), strict=True) for batch in batches)
    train(model, mixed, tier.pretraining, 1e-3)
    return model


def b1_mixed(tier: Tier) -> Iterator[Node]:
    """Several architectures, each with two generations of children."""
    for make, name in ((cnn, "cnn"), (mlp, "mlp")):
        torch.manual_seed(1)
        model = make(tier)
        train(model, digit_batches(0), 200, 1e-3)
        yield Node(name, state_of(model), [], digit_score(model))
        for child in range(3):
            tuned = copy.deepcopy(model)
            train(tuned, digit_batches(child), tier.steps, 3e-4)
            yield Node(f"{name}-{child}", state_of(tuned), [name], digit_score(tuned))
            train(tuned, digit_batches(child + 9), tier.steps, 1e-4)
            yield Node(f"{name}-{child}-next", state_of(tuned), [f"{name}-{child}"], digit_score(tuned))
    gpt = copy.deepcopy(base_gpt(tier))
    yield Node("gpt", state_of(gpt), [], lm_score(gpt, "json"))
    for child in DOMAINS[:4]:
        tuned = copy.deepcopy(gpt)
        train(tuned, lm_batches(child, 1), tier.steps, 1e-4)
        yield Node(f"gpt-{child}", state_of(tuned), ["gpt"], lm_score(tuned, child))


@functools.cache
def b2_versions(tier: Tier) -> list[Node]:
    """A base, tasks from it, and versions of each on data perturbed more and more."""
    base = base_gpt(tier)
    nodes = [Node("base", state_of(base), [], lm_score(base, "json"))]
    for task, lr in zip(DOMAINS, np.geomspace(2e-5, 1e-3, tier.tasks), strict=False):
        model, parent = copy.deepcopy(base), "base"
        for version in range(tier.versions):
            train(model, lm_batches(task, version, 0.02 * version), tier.steps, float(lr))
            name = f"{task}-{version}"
            nodes.append(Node(name, state_of(model), [parent], lm_score(model, task)))
            parent = name
    return nodes


def b2_bfloat16(tier: Tier) -> Iterator[Node]:
    """The same in half the bytes."""
    for node in b2_versions(tier):
        yield Node(node.name, _cast(node.state, torch.bfloat16), node.parents, node.score)


def _cast(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def b3_federated(tier: Tier) -> Iterator[Node]:
    """Rounds of five workers of forty, each on its own classes, and their mean."""
    torch.manual_seed(2)
    model = mlp(tier)
    score = digit_score(model)
    _, y = digits()
    rng = np.random.default_rng(0)
    yield Node("master-0", state_of(model), [], score)
    for turn in range(tier.rounds):
        workers = []
        for silo in rng.choice(40, 5, replace=False):
            own = torch.isin(y[:1400], torch.tensor([silo % 10, (silo * 3 + 1) % 10])).nonzero()[:, 0]
            local = copy.deepcopy(model)
            train(local, digit_batches(int(silo), own), tier.steps, 0.0, torch.optim.SGD(local.parameters(), 0.05))
            workers.append(Node(f"worker-{turn}-{silo}", state_of(local), [f"master-{turn}"], score))
        yield from workers
        mean = {name: sum(w.state[name] for w in workers) / len(workers) for name in workers[0].state}
        model.load_state_dict(mean)
        yield Node(f"master-{turn + 1}", mean, [w.name for w in workers], score, "master")


def b4_pruned(tier: Tier) -> Iterator[Node]:
    """Ladders of global magnitude pruning, each rung also fine-tuned."""
    for name, make in (("cnn", cnn), ("mlp", mlp), ("gpt", base_gpt)):
        torch.manual_seed(3)
        model = copy.deepcopy(make(tier))
        batches = functools.partial(lm_batches, "json") if name == "gpt" else digit_batches
        if name != "gpt":
            train(model, batches(0), 200, 1e-3)
        score = lm_score(model, "json") if name == "gpt" else digit_score(model)
        yield Node(name, state_of(model), [], score)
        parent = name
        for share in (0.3, 0.5, 0.7):
            weights = [p for p in model.parameters() if p.dim() > 1]
            limit = torch.cat([w.detach().abs().flatten() for w in weights]).quantile(share, interpolation="lower")
            masks = [(w.detach().abs() > limit) for w in weights]

            def apply(weights: Any = weights, masks: Any = masks) -> None:
                with torch.no_grad():
                    for w, m in zip(weights, masks, strict=True):
                        w.mul_(m)

            apply()
            yield Node(f"{name}-{share}", state_of(model), [parent], score, "rung")
            train(model, batches(1), tier.steps, 3e-4, after=apply)
            parent = f"{name}-{share}-tuned"
            yield Node(parent, state_of(model), [f"{name}-{share}"], score)


def b5_shared(tier: Tier) -> Iterator[Node]:
    """A base and nine models with one backbone, trained together, and a head each that tells what comes next."""
    base = base_gpt(tier)
    yield Node("base", state_of(base), [], lm_score(base, "json"))
    backbone = copy.deepcopy(base)
    heads = {domain: nn.Linear(tier.width, _CLASSES) for domain in DOMAINS}
    parameters = [*backbone.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.Adam(parameters, 5e-5)
    streams = {domain: ((x, class_of(y)) for x, y in lm_batches(domain, 5)) for domain in DOMAINS}
    for _ in range(tier.steps):
        for domain, head in heads.items():
            backbone.head = head
            train(backbone, streams[domain], 1, 0.0, optimizer)
    for domain, head in heads.items():
        backbone.head = head
        yield Node(domain, state_of(backbone), ["base"], lm_score(backbone, domain, class_of))


def b6_stream(tier: Tier) -> Iterator[Node]:
    """Checkpoints of one training, with the optimizer's state."""
    model = copy.deepcopy(base_gpt(tier))
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    batches = lm_batches("asyncio", 6)
    parent: list[str] = []
    for checkpoint in range(tier.checkpoints):
        train(model, batches, 10, 0.0, optimizer)
        state = state_of(model)
        for i, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{key}": value.detach().clone() for key, value in values.items()}
        yield Node(f"step-{checkpoint}", state, parent)
        parent = [f"step-{checkpoint}"]


def b7_children(tier: Tier) -> Iterator[Node]:
    """Kinds of children of one base: LoRA, frozen parts, other precisions, another vocabulary."""
    base = state_of(base_gpt(tier))
    yield Node("base", base)
    torch.manual_seed(7)
    matrices = [name for name, tensor in base.items() if tensor.dim() == 2 and min(tensor.shape) >= tier.width]
    factors = {
        name: (torch.randn(base[name].shape[0], 4) * 0.02, torch.randn(4, base[name].shape[1]) * 0.02)
        for name in matrices
    }
    merged = {name: t + factors[name][0] @ factors[name][1] if name in factors else t for name, t in base.items()}
    yield Node("lora-merged", merged, ["base"])
    adapters = {f"{name}.lora_{'BA'[i]}": part for name, pair in factors.items() for i, part in enumerate(pair)}
    yield Node("lora", base | adapters, ["base"])
    for name, frozen in (("head-only", ("head",)), ("top-half", ("head", "norm", f"blocks.layers.{tier.layers - 1}"))):
        model = copy.deepcopy(base_gpt(tier))
        for key, parameter in model.named_parameters():
            parameter.requires_grad = key.startswith(frozen)
        train(model, lm_batches("http", 7), tier.steps, 3e-4)
        yield Node(name, state_of(model), ["base"])
    model = copy.deepcopy(base_gpt(tier))
    train(model, lm_batches("http", 7, 0.2), tier.steps, 1e-4)
    yield Node("hardened", state_of(model), ["base"])
    yield Node("bfloat16", _cast(base, torch.bfloat16), ["base"])
    scales = {name: base[name].abs().max() / 127 for name in matrices}
    yield Node(
        "int8", {n: (t / scales[n]).round().to(torch.int8) if n in scales else t for n, t in base.items()}, ["base"]
    )
    larger = torch.cat([base["token.weight"], torch.randn(8, tier.width) * 0.02])
    yield Node("resized", base | {"token.weight": larger}, ["base"])


GRAPHS: dict[str, Callable[[Tier], Iterable[Node]]] = {
    "B1 mixed pool": b1_mixed,
    "B2 versions, fp32": b2_versions,
    "B2 versions, bf16": b2_bfloat16,
    "B3 federated": b3_federated,
    "B4 pruned": b4_pruned,
    "B5 shared backbone": b5_shared,
    "B6 checkpoints": b6_stream,
    "B7 children": b7_children,
}
