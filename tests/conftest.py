"""Real workspaces in temporary directories."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from streams import make_frame

import dynkit as dk


@pytest.fixture
def ws(tmp_path: Path) -> dk.Workspace:
    return dk.Workspace(tmp_path / "ws")


@pytest.fixture
def dataset(ws: dk.Workspace) -> dk.Dataset:
    return ws.ingest("stream", make_frame(), timestamp="when", label="late")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models are faster, and equal on any machine, with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
