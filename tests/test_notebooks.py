"""The notebooks that are shipped: stored without outputs, and each runs headless to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_headless(path: Path, tmp_path: Path) -> None:
    env = {**os.environ, "DYNKIT_WORKSPACE": str(tmp_path / "ws")}
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", "batch", str(path), "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(found.read_text()) for found in tmp_path.glob("*.json"))
    assert record["status"] == "finished"


def test_in_the_quickstart_monthly_training_beats_training_once(tmp_path: Path) -> None:
    """The notebook says so in words; here are the numbers of another seed."""
    (path,) = [found for found in NOTEBOOKS if found.stem == "01_quickstart"]
    env = {**os.environ, "DYNKIT_WORKSPACE": str(tmp_path / "ws")}
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", "batch", str(path), "-p", "seed", "7"]
    done = subprocess.run([*command, "-o", str(tmp_path)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(found.read_text()) for found in tmp_path.glob("*.json"))
    score = {run["name"]: run["scores"]["roc_auc"] for run in record["runs"]}
    assert score["monthly"] > score["once"] + 0.02
