"""Headless notebooks: the truth about seven ways to end, grids, resuming, and plain papermill."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import polars as pl
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from streams import make_frame

import dynkit as dk
from dynkit import batch
from dynkit.errors import InvalidInput, NotFound

TESTS = str(Path(__file__).parent)
SETUP = f"""
import sys, os, time; sys.path.insert(0, {TESTS!r})
import dynkit as dk
from streams import make_frame, make_pipeline
from torch import nn
%load_ext dynkit
stream = dk.Workspace().ingest("stream", make_frame(), timestamp="when", label="late")
make_model = lambda: nn.Linear(3, 2)
class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)
"""
PIPELINE = """%%pipeline flow
dataset: stream
model: make_model
trigger: {amount: 500}
selection: new
training: {lr: $lr}
evaluation: {windows: {tumbling: 3d}, metrics: [roc_auc]}
"""


def notebook(path: Path, *cells: str, parameters: str = "lr: float = 0.01  # learning rate") -> Path:
    made = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *(new_code_cell(cell) for cell in cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=made, metadata=kernel), path)
    return path


def dynkit(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command, in a workspace of its own below `folder`."""
    env = {**os.environ, "DYNKIT_WORKSPACE": str(folder / "ws"), **more}
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)


@pytest.mark.parametrize(
    ("cell", "status", "error"),
    [
        ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "finished", None),
        ("import sys; sys.exit(3)", "failed", "a cell ended with sys.exit(3)"),
        ("import os; os._exit(1)", "failed", "the kernel died"),
        ("import time; time.sleep(60)", "failed", "a cell took longer than 3 s"),
        (SETUP + "run = make_pipeline(stream, model=lambda: Slow(3, 2)).start()", "failed", "was still running at the end and was cancelled; add run.wait()"),
        (SETUP + "run = make_pipeline(stream, model=lambda: 1 / 0).start(); run.wait()", "failed", "failed: ZeroDivisionError"),
        (SETUP + "run = make_pipeline(stream).start(); run.wait()", "finished", None),
    ],
)  # fmt: skip
def test_status_exit_code_and_notebook_tell_what_happened(
    tmp_path: Path, cell: str, status: str, error: str | None
) -> None:
    path = notebook(tmp_path / "case.ipynb", cell, "after = 1")
    timeout = "3" if "sleep(60)" in cell else "100"
    done = dynkit(tmp_path, "batch", str(path), "-o", "out", "--timeout", timeout)
    record = json.loads((tmp_path / "out/case.dynkit.json").read_text())
    executed = nbformat.read(tmp_path / "out/case.ipynb", as_version=4)
    assert record["status"] == status, done.stderr
    assert done.returncode == (0 if status == "finished" else 1)
    assert executed.metadata["dynkit"]["status"] == status
    assert executed.metadata["papermill"]["exception"] == (status == "failed")
    assert (error or "") in (record["error"] or "")
    assert (record["error"] is None) == (error is None)
    if error is not None:
        assert error.split(";")[0] in " ".join((done.stdout + done.stderr).split())
    for run in record["runs"]:
        assert dk.Workspace(run["workspace"]).run(run["id"]).status not in ("running", "paused")


def test_a_grid_keeps_failures_carries_on_and_resumes(tmp_path: Path) -> None:
    path = notebook(
        tmp_path / "study.ipynb", SETUP, "assert lr != 0.5, 'too much'", PIPELINE, parameters="lr = 0.01\nseed = 1"
    )
    arguments = ["batch", str(path), "-p", "seed", "2", "--grid", "lr=0.01,0.5,0.1", "-o", "out"]
    done = dynkit(tmp_path, *arguments)
    assert done.returncode == 1
    assert "AssertionError: too much" in done.stderr
    table = pl.read_csv(tmp_path / "out/results.csv")
    assert table["lr"].to_list() == [0.01, 0.5, 0.1]
    assert table["seed"].to_list() == [2, 2, 2]
    assert table["status"].to_list() == ["finished", "failed", "finished"]
    assert table["flow.roc_auc"].is_null().to_list() == [False, True, False]
    assert "AssertionError: too much" in table["error"][1]
    assert len(list((tmp_path / "out").glob("*.ipynb"))) == 3
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.ipynb")}
    again = dynkit(tmp_path, *arguments, "--resume", "--html")
    assert again.stdout.count("finished before") == 2
    assert again.returncode == 1
    kept = [p for p in (tmp_path / "out").glob("*.ipynb") if p.stat().st_mtime_ns == stamps[p.name]]
    assert len(kept) == 2
    assert len(list((tmp_path / "out").glob("*.html"))) == 3
    assert pl.read_csv(tmp_path / "out/results.csv")["flow.roc_auc"].to_list() == table["flow.roc_auc"].to_list()
    notebook(path, SETUP, PIPELINE, parameters="lr = 0.01\nseed = 1")  # another notebook: nothing has finished with it
    fixed = dynkit(tmp_path, *arguments, "--resume")
    assert (fixed.returncode, fixed.stdout.count("finished before")) == (0, 0)
    assert fixed.stdout.count("finished in") == 3


def test_parameters_that_the_notebook_does_not_have_are_refused(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", "1")
    done = dynkit(tmp_path, "batch", str(path), "-p", "lrr", "3", "-o", "out")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "InvalidInput: notebook 'a.ipynb' has no parameter 'lrr'; did you mean 'lr'?",
    )
    assert not (tmp_path / "out").exists()
    plain = tmp_path / "plain.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), plain)
    with pytest.raises(InvalidInput, match="has no parameter 'lr'; it has no cell tagged 'parameters'"):
        batch.plan(plain, tmp_path / "out", [{"lr": 1}])
    with pytest.raises(NotFound, match="no notebook"):
        batch.plan(tmp_path / "none.ipynb", tmp_path / "out", [{}])
    (tmp_path / "text.ipynb").write_text("hello")
    with pytest.raises(InvalidInput, match="is not a notebook"):
        batch.plan(tmp_path / "text.ipynb", tmp_path / "out", [{"lr": 1}])
    assert "is not like lr=0.1,0.01" in dynkit(tmp_path, "batch", str(path), "--grid", "lr", "-o", "out").stderr


def test_an_executed_notebook_never_overwrites_its_source(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", "1")
    done = dynkit(tmp_path, "batch", "a.ipynb", "-o", ".")
    assert (done.returncode, "would overwrite 'a.ipynb'" in done.stderr) == (2, True)
    assert nbformat.read(path, as_version=4).cells[0].get("execution_count") is None


def test_values_of_parameters_are_yaml(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", "assert (lr, when, xs) == (0.001, '2013-01-01', [1, 2]), (lr, when, xs)",
                    parameters="lr = 1\nwhen = ''\nxs = None")  # fmt: skip
    done = dynkit(
        tmp_path, "batch", str(path), "--grid", "lr=1e-3", "-p", "when", "2013-01-01", "-p", "xs", "[1, 2]", "-o", "out"
    )
    assert done.returncode == 0, done.stderr
    assert pl.read_csv(tmp_path / "out/results.csv")["xs"].to_list() == ["[1, 2]"]


def test_what_surrounds_a_notebook_does_not_decide_its_fate(tmp_path: Path) -> None:
    """Bytes on stderr, a workspace that is gone at the end, braces in paths, modules beside, equal names of runs."""
    folder = tmp_path / "sub{x}"
    folder.mkdir()
    (folder / "helper_beside.py").write_text("value = 3")
    cells = [
        "import os, tempfile; assert os.write(2, b'\\xff\\xfe') == 2",
        SETUP + "import helper_beside; assert helper_beside.value == 3",
        "for lr in (0.01, 0.5):\n  make_pipeline(stream, name='same', training=dk.Training(lr=lr)).start().wait()",
        "with tempfile.TemporaryDirectory() as gone:\n"
        "  other = dk.Workspace(gone).ingest('stream', make_frame(), timestamp='when', label='late')\n"
        "  make_pipeline(other, name='gone').start().wait()",
    ]
    notebook(folder / "a.ipynb", *cells, parameters="lr = 1\nstatus = 2")
    done = dynkit(tmp_path, "batch", "sub{x}/a.ipynb", "-o", "out{lr}", "-p", "status", "5")
    assert done.returncode == 0, done.stderr
    table = pl.read_csv(tmp_path / "out{lr}/results.csv")
    assert table["status"].to_list() == ["finished"] and table["parameter status"].to_list() == [5]
    assert {"same 1.accuracy", "same 2.accuracy"} <= set(table.columns)
    assert not any(name.startswith("gone") for name in table.columns)


def test_wrong_options_and_folders_are_told(tmp_path: Path) -> None:
    notebook(tmp_path / "a.ipynb", "1")
    (tmp_path / "file").write_text("mine")
    for arguments, message in [
        (["-o", "file"], "StorageError: cannot write to file"),
        (["-o", "file/sub"], "StorageError: cannot write to file/sub"),
        (["-o", "out", "--grid", "lr=[1,2"], "'lr=[1,2'"),
        (["-o", "out", "--grid", "lr=1", "--grid", "lr=2"], "is in two --grid options"),
        (["-o", "out", "--timeout", "-3"], "-3"),
    ]:
        done = dynkit(tmp_path, "batch", "a.ipynb", *arguments)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    done = dynkit(tmp_path, "batch", "a.ipynb", "-o", "out", "--grid", "lr=[1,2],1,1")
    assert pl.read_csv(tmp_path / "out/results.csv")["lr"].to_list() == ["[1, 2]", "1"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grid_ends_its_kernel_and_tells_what_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    started = "run = make_pipeline(stream, model=lambda: Slow(3, 2)).start()\nopen('up', 'w').write(str(os.getpid()))"
    notebook(tmp_path / "a.ipynb", SETUP, started, "time.sleep(300)")
    env = {**os.environ, "DYNKIT_WORKSPACE": str(tmp_path / "ws")}
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", "batch", "a.ipynb", "-o", "out"]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests run in the background
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env, preexec_fn=default
    ) as process:
        while not (tmp_path / "up").exists() or not (tmp_path / "up").read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(how)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command with --resume goes on" in told
    (run,) = dk.Workspace(tmp_path / "ws").runs()
    assert f"run {run.id} (test) goes on; dynkit cancel {run.id} ends it" in told
    run.cancel()
    assert not psutil.pid_exists(int((tmp_path / "up").read_text()))


def test_looking_makes_no_workspace(tmp_path: Path) -> None:
    done = dynkit(tmp_path, "runs", "-w", "typo")
    assert (done.returncode, done.stderr.startswith("NotFound: no workspace at")) == (2, True)
    assert not (tmp_path / "typo").exists()


def test_jobs_of_different_parameters_have_different_names(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", "1")
    jobs = batch.plan(path, tmp_path, [{"lr": 1}, {"lr": "1"}, {"lr": "a/b c"}, {"lr": "a b/c"}])
    assert len({job.output for job in jobs}) == 4
    assert all(job.output.parent == tmp_path for job in jobs)


def test_the_same_notebook_runs_under_plain_papermill(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", SETUP, PIPELINE, "print('status', run.status)".replace("run", "_"))
    env = {**os.environ, "DYNKIT_WORKSPACE": str(tmp_path / "ws")}
    env.pop("JPY_SESSION_NAME", None)
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "b.ipynb"), "-p", "lr", "0.1"]
    subprocess.run(command, check=True, env=env, capture_output=True)
    outputs = [
        output for cell in nbformat.read(tmp_path / "b.ipynb", as_version=4).cells for output in cell.get("outputs", [])
    ]
    assert any("status finished" in output.get("text", "") for output in outputs)
    pictures = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("data:image/svg+xml;base64," in picture for picture in pictures)
    notebook(path, SETUP, PIPELINE.replace("amount", "amont"))
    failed = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "SpecError: line 4: trigger: trigger 'amont' is not known; did you mean 'amount'?" in failed.stderr


def cli_workspace(tmp_path: Path) -> dk.Workspace:
    ws = dk.Workspace(tmp_path / "ws")
    ws.ingest("stream", make_frame(), timestamp="when", label="late")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef model(): return nn.Linear(3, 2)\ndef broken(): raise ValueError('no')\n"
    )
    text = PIPELINE.replace("%%pipeline flow", "name: flow").replace("make_model", "mine:model").replace("$lr", "0.01")
    (tmp_path / "pipeline.yaml").write_text(text)
    return ws


def test_the_command_runs_a_pipeline_and_steers_runs(tmp_path: Path) -> None:
    ws = cli_workspace(tmp_path)
    done = dynkit(tmp_path, "run", "pipeline.yaml")
    assert done.returncode == 0, done.stderr
    (run,) = ws.runs()
    assert f"run {run.id} finished" in done.stdout
    assert "trained" in done.stdout
    assert run.id in dynkit(tmp_path, "runs").stdout
    assert "roc_auc" in dynkit(tmp_path, "compare").stdout
    shown = dynkit(tmp_path, "show", run.id[:6], "--events", "3").stdout
    assert "finished triggers=6" in shown
    assert dynkit(tmp_path, "wait", run.id).returncode == 0
    refused = dynkit(tmp_path, "resume", run.id)
    assert (refused.returncode, "has finished" in refused.stderr) == (2, True)
    assert json.loads(dynkit(tmp_path, "schema").stdout)["title"] == "dynkit pipeline"
    assert "version 0.1.0" in dynkit(tmp_path, "--version").stdout


def test_the_command_tells_failures_by_exit_code_and_text(tmp_path: Path) -> None:
    cli_workspace(tmp_path)
    file = tmp_path / "pipeline.yaml"
    file.write_text(file.read_text().replace("mine:model", "mine:broken"))
    done = dynkit(tmp_path, "run", "pipeline.yaml")
    assert done.returncode == 1
    assert "ValueError: no" in done.stderr
    assert "continues it" in done.stderr
    file.write_text("dataset: stream")
    done = dynkit(tmp_path, "run", "pipeline.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "SpecError: line 1: key 'model' is missing" in done.stderr
    file.write_bytes(b"name: caf\xe9")
    assert dynkit(tmp_path, "run", "pipeline.yaml").stderr.startswith("InvalidInput: pipeline.yaml is no UTF-8 text")
    assert dynkit(tmp_path, "run", "none.yaml").stderr.startswith("InvalidInput: cannot read none.yaml: No such file")
    assert dynkit(tmp_path, "show", "zzz").stderr.startswith("NotFound: no run begins with 'zzz'")


def records(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    base = {"parameters": {}, "status": "finished", "seconds": 1.0, "runs": [], "notebook": "n", "error": None}
    return [{**base, **change} for change in changes]


def test_results_of_different_runs_share_one_table() -> None:
    scores = [{"name": "a", "scores": {"auc": 0.5}}, {"name": "b", "scores": {"auc": 0.6}}]
    table = batch.results(
        records({"parameters": {"x": 1}, "runs": scores[:1]}, {"parameters": {"x": 2}, "runs": scores})
    )
    assert table.columns == ["x", "status", "seconds", "a.auc", "b.auc", "notebook", "error"]
    assert table["b.auc"].to_list() == [None, 0.6]
