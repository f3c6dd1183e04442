"""The verbs of the lineage in a terminal."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from streams import make_pipeline, replayed

import dynkit as dk
from dynkit.cli import main


def run(*arguments: object, code: int = 0) -> str:
    result: Result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def family(ws: dk.Workspace) -> dk.Workspace:
    base = ws.lineage.add({"a.w": torch.ones(8), "b.w": torch.ones(8)}, name="base", tags=["text"])
    ws.lineage.add(lambda s: {**s, "a.w": s["a.w"] + 1}, parents=[base], name="left")
    ws.lineage.add(lambda s: {**s, "b.w": s["b.w"] + 2}, parents=[base], name="right")
    ws.lineage.register(lambda s: bool(s["a.w"].max() < 2), name="small")
    return ws


def test_models_are_listed_shown_compared_and_tested(family: dk.Workspace, tmp_path: Path) -> None:
    at = ("-w", family.path)
    left = family.models.resolve("left")
    assert left[:12] in run("lineage", "log", *at)
    assert "model " + left[:12] in run("lineage", "show", "left", *at)
    assert "base" in run("lineage", "search", "--tag", "text", *at)
    assert "1 changed, 1 same" in run("lineage", "diff", "base", "left", *at)
    assert "failed" in run("lineage", "test", *at, code=1)
    run("lineage", "test", "base", "-t", "small", *at)
    assert f"the first bad model is {left[:12]}" in run("lineage", "bisect", "small", "left", "--good", "base", *at)
    run("lineage", "save", tmp_path / "graph.mmd", *at)
    assert (tmp_path / "graph.mmd").read_text().count("-->") == 2
    assert "NotFound" in run("lineage", "show", "nobody", *at, code=2)


def test_models_are_added_placed_named_merged_and_updated(family: dk.Workspace, tmp_path: Path) -> None:
    at = ("-w", family.path)
    file = tmp_path / "new.safetensors"
    new = family.models.put({"a.w": torch.full((8,), 0.5), "b.w": torch.ones(8)})
    family.models.export_safetensors(new, file)
    assert run("lineage", "add", file, "--version-of", "base", "--name", "newer", *at).strip() == new
    assert "candidates" in run("lineage", "place", file, *at)
    assert "possible conflict" in run("lineage", "merge", "left", "right", *at, code=1)
    assert "merged as" in run("lineage", "merge", "left", "right", "--operator", "mean", "--name", "both", *at)
    assert "Plan to rebuild" in run("lineage", "cascade", "base", "newer", *at)
    assert "Rebuilt" in run("lineage", "cascade", "base", "newer", "--go", *at)
    assert family.models.load("left")["a.w"][0] == 1.5
    run("lineage", "name", new, "best", *at)
    assert "Conflict" in run("lineage", "name", "left", "best", *at, code=2)
    run("lineage", "name", "left", "best", "--instead-of", new, *at)


def test_workspaces_are_cloned_pushed_and_pulled(family: dk.Workspace, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert "3 models" in run("clone", family.path, mine)
    assert "0 models, 0 B" in run("pull", "-w", mine)
    theirs = family.lineage.add({"w": torch.ones(1)}, name="main")
    dk.Workspace(mine).lineage.add({"w": torch.zeros(1)}, name="main")
    assert "apart" in run("push", "-w", mine, code=1)
    run("remote", "add", "upstream", family.path, "-w", mine)
    assert theirs[:12] in run("pull", "upstream", "main", "-w", mine)


def test_samples_are_erased(ws: dk.Workspace, dataset: dk.Dataset) -> None:
    replayed(make_pipeline(dataset))
    assert "Plan to erase 2 samples of stream" in run("lineage", "erase", 3, 4, "-w", ws.path)
    assert len(dataset) == 3000
    assert "Erased 2 samples of stream" in run("lineage", "erase", 3, 4, "--go", "-w", ws.path)
    assert len(dataset) == 2998
