"""Magics in a real kernel, over the real protocol: background runs, the live view, errors, completion, restart."""

import os
import queue
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dynkit_jupyter.completion import candidates
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

import dynkit as dk

SETUP = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, time, dynkit as dk, torch
from torch import nn
from streams import make_frame
%load_ext dynkit
ws = dk.Workspace()
stream = ws.ingest("stream", make_frame(), timestamp="when", label="late")

def make_model():
    return nn.Linear(3, 2)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make_model()
    def forward(self, x):
        time.sleep(0.02)
        return self.body(x)

def after_a_while(new, run):
    return new.height > 5
"""
BODY = """
dataset: stream
model: {model}
trigger: {{amount: 500}}
selection: new
training: {{batch_size: 32}}
evaluation: {{windows: {{tumbling: 3d}}, metrics: [roc_auc]}}
"""


class Kernel:
    """A kernel and a client of it."""

    def __init__(self, folder: Path, watched: bool) -> None:
        self.manager = KernelManager(kernel_name="python3")
        env = {key: value for key, value in os.environ.items() if key not in ("JPY_SESSION_NAME", "DYNKIT_RENDER")}
        env |= {"DYNKIT_WORKSPACE": str(folder / "ws"), "DYNKIT_RENDER": "live" if watched else "static"}
        self.manager.start_kernel(env=env, cwd=str(folder))
        self.connect()

    def connect(self) -> None:
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str, timeout_s: float = 60) -> list[dict[str, Any]]:
        """Execute a cell; return the messages it put out."""
        request = self.client.execute(code)
        found = []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") != request:
                self.strays.append(message)
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                self.client.get_shell_msg(timeout=timeout_s)
                return found
            # A view's thread speaks during any cell; what it says is not that cell's output.
            (self.strays if message["msg_type"] == "update_display_data" else found).append(message)

    strays: list[dict[str, Any]]

    def text(self, code: str) -> str:
        """Execute a cell; return all it put out as text."""
        parts = []
        for message in self.run(code):
            content = message["content"]
            parts += [
                content.get("text", ""),
                *content.get("traceback", []),
                content.get("data", {}).get("text/plain", ""),
            ]
        return "\n".join(part for part in parts if part)

    def updates(self, seconds: float) -> list[str]:
        """HTML of display updates that come in a while without any cell running."""
        found = [m["content"]["data"]["text/html"] for m in self.strays if m["msg_type"] == "update_display_data"]
        self.strays.clear()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                continue
            if message["msg_type"] == "update_display_data":
                found.append(message["content"]["data"]["text/html"])
        return found

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


def make_kernel(folder: Path, watched: bool) -> Kernel:
    kernel = Kernel(folder, watched)
    kernel.strays = []
    assert "Error" not in kernel.text(SETUP)
    return kernel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    made = make_kernel(tmp_path_factory.mktemp("watched"), watched=True)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    made = make_kernel(tmp_path_factory.mktemp("headless"), watched=False)
    yield made
    made.stop()


def test_a_run_trains_in_the_background_while_cells_answer_and_its_view_moves(kernel: Kernel) -> None:
    began = time.perf_counter()
    messages = kernel.run("%%pipeline slow -o run" + BODY.format(model="Slow"))
    assert time.perf_counter() - began < 5
    shown = [m["content"]["data"]["text/html"] for m in messages if m["msg_type"] == "display_data"]
    assert len(shown) == 1
    assert "<progress" in shown[0]
    for _ in range(200):
        if "training" in kernel.text("run.progress['phase']"):
            break
        time.sleep(0.1)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        assert kernel.text("1+1") == "2"
        took.append(time.perf_counter() - began)
    assert kernel.text("run.status") == "'running'"
    assert statistics.median(took) < 0.1, took
    moving = kernel.updates(3)
    assert len(set(moving)) >= 3
    assert all("<progress" in html for html in moving)
    kernel.text("run.wait()")
    last = kernel.updates(6)[-1]  # the first picture of a process loads the drawing library
    assert "<progress" not in last
    assert "data:image/svg+xml;base64," in last


def test_the_same_cell_finds_its_run_and_force_starts_anew(kernel: Kernel) -> None:
    cell = "%%pipeline quick --wait -o VAR" + BODY.format(model="make_model")
    kernel.text(cell.replace("VAR", "first"))
    found = kernel.text(cell.replace("VAR", "again"))
    assert "attached to run" in found
    assert "--force starts anew" in found
    assert kernel.text("first.id == again.id") == "True"
    spaced = kernel.text(cell.replace("VAR", "again").replace("selection: new", "selection:   new  # the same"))
    assert "attached to run" in spaced
    changed = kernel.text(cell.replace("VAR", "other").replace("500", "600"))
    assert "attached" not in changed
    kernel.text(cell.replace("--wait", "--wait --force").replace("VAR", "forced"))
    assert kernel.text("forced.id != first.id, forced.composite().equals(first.composite())") == "(True, True)"
    kernel.text("def make_model():\n    return nn.Sequential(nn.Linear(3, 2))")
    assert "attached" not in kernel.text(cell.replace("VAR", "edited"))
    kernel.text("def make_model():\n    return nn.Linear(3, 2)")
    assert "attached" in kernel.text(cell.replace("VAR", "back"))


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ("%%pipeline p" + BODY.format(model="make_modle"), "SpecError: line 3: model: model 'make_modle' is not known; did you mean 'make_model'?"),
        ("%%pipeline p" + BODY.format(model="make_model") + "sede: 3", "SpecError: line 8: sede: key 'sede' is not known; did you mean 'seed'?"),
        ("%%pipeline\ndataset: stream", "InvalidInput: %%pipeline: the following arguments are required: name; %%pipeline -h explains"),
        ("%%pipeline p --wiat\ndataset: stream", "InvalidInput: %%pipeline: unrecognized arguments: --wiat; %%pipeline -h explains"),
        ("%%pipeline 'p\ndataset: stream", "InvalidInput: cannot read the options \"'p\": No closing quotation"),
        ("%%pipeline a/b" + BODY.format(model="make_model"), "SpecError: line 2: pipeline name 'a/b': use letters, digits"),
        ("%%pipeline p" + BODY.format(model="make_model") + "name: q", "SpecError: line 8: name: the pipeline is called 'p' already"),
        ("%%pipeline p -o my-run" + BODY.format(model="make_model"), "InvalidInput: -o 'my-run' is no name of a variable"),
        ("%dynkit show ''", "InvalidInput: '' is no run"),
        ("%dynkit shw abc", "InvalidInput: %dynkit: argument VERB: invalid choice: 'shw'"),
        ("%dynkit show zzz", "NotFound: no run begins with 'zzz'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_error(kernel: Kernel, cell: str, line: str) -> None:
    (error,) = [m for m in kernel.run(cell) if m["msg_type"] == "error"]
    assert len(error["content"]["traceback"]) == 1
    assert line in error["content"]["traceback"][0]
    assert error["content"]["evalue"]


def test_help_is_printed(kernel: Kernel) -> None:
    assert "--force" in kernel.text("%%pipeline -h\n ")
    assert "compare" in kernel.text("%dynkit -h")
    assert "Error" not in kernel.text("%%pipeline --help\n ")
    assert "--force" in kernel.text("%pipeline -h")
    assert "needs a cell" in kernel.text("%pipeline name")


def test_line_magics_steer_runs(kernel: Kernel) -> None:
    kernel.text("%%pipeline steered -o run" + BODY.format(model="Slow"))
    assert "paused" in kernel.text("%dynkit pause run")
    assert "running" in kernel.text("%dynkit resume run")
    assert "steered" in kernel.text("%dynkit runs")
    assert "cancelled" in kernel.text("%dynkit cancel run")
    assert "Run(" in kernel.text("%dynkit show run")
    kernel.text("%%pipeline compared --wait -o done" + BODY.format(model="make_model"))
    assert "compared" in kernel.text("%dynkit compare done")
    assert "finished" in kernel.text("%dynkit wait done")


def test_a_semicolon_silences(kernel: Kernel) -> None:
    messages = kernel.run("%%pipeline compared" + BODY.format(model="make_model") + ";")
    assert [m["msg_type"] for m in messages if m["msg_type"] in ("display_data", "execute_result", "error")] == []


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("%%pipeline p --f", "--force"),
        ("%%pipeline p\ntri", "trigger:"),
        ("%%pipeline p\ndataset: st", "stream"),
        ("%%pipeline p\nmodel: make", "make_model"),
        ("%%pipeline p\ntrigger: after", "after_a_while"),
        ("%%pipeline p\ntrigger: {am", "amount:"),
        ("%%pipeline p\ntrigger: {amount: {", "n:"),
        ("%%pipeline p\ntrigger:\n  time:\n    ev", "every:"),
        ("%%pipeline p\ntraining: {epochs: 3, warm", "warm_start:"),
        ("%%pipeline p\ntraining:\n  epochs: 3\n  loss: cro", "cross_entropy"),
        ("%%pipeline p\nevaluation:\n  metrics: [accuracy, roc", "roc_auc"),
        ("%%pipeline p\nevaluation:\n  metrics:\n    - acc", "accuracy"),
        ("%%pipeline p\nevaluation: {windows: {tum", "tumbling:"),
        ("%%pipeline p\nseed: $n", "$nn"),
    ],
)
def test_completion_knows_keys_policies_and_names(kernel: Kernel, cell: str, expected: str) -> None:
    request = kernel.client.complete(cell, len(cell))
    while (reply := kernel.client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != request:
        pass
    content = reply["content"]
    assert expected in content["matches"], content["matches"][:10]
    token = cell[content["cursor_start"] : content["cursor_end"]]
    assert expected.startswith(token)


def test_completion_stays_out_of_other_cells() -> None:
    assert "trigger:" in candidates(["%%pipeline p", ""], "", {})
    assert candidates(["%%pipeline p", "seed: "], "", {}) == []


def test_where_nobody_watches_the_cell_waits_and_a_failure_is_an_error(headless: Kernel) -> None:
    messages = headless.run("%%pipeline quick -o run" + BODY.format(model="make_model"))
    (shown,) = [m["content"]["data"]["text/html"] for m in messages if m["msg_type"] == "display_data"]
    assert "finished" in shown
    assert "data:image/svg+xml;base64," in shown
    assert headless.text("run.status") == "'finished'"
    headless.text("def broken(): raise ZeroDivisionError('no')")
    (error,) = [m for m in headless.run("%%pipeline bad" + BODY.format(model="broken")) if m["msg_type"] == "error"]
    assert len(error["content"]["traceback"]) == 1
    assert "RunFailed: run" in error["content"]["traceback"][0]
    assert "ZeroDivisionError: no" in error["content"]["traceback"][0]


def test_the_extension_unloads_and_loads_again(headless: Kernel) -> None:
    assert "Error" not in headless.text("%reload_ext dynkit\n%reload_ext dynkit")
    headless.text("%unload_ext dynkit")
    assert "not found" in headless.text("%dynkit runs")
    headless.text("%load_ext dynkit")
    assert "Error" not in headless.text("%dynkit runs")


def test_a_restarted_kernel_finds_its_run_still_going(tmp_path: Path) -> None:
    kernel = make_kernel(tmp_path, watched=True)
    try:
        kernel.text("%%pipeline slow -o run" + BODY.format(model="Slow"))
        name = kernel.text("print(run.id)").strip()
        kernel.client.stop_channels()
        kernel.manager.restart_kernel(now=True)
        kernel.connect()
        kernel.text("import dynkit as dk\nrun = dk.Workspace().run(" + repr(name) + ")")
        assert kernel.text("run.status") == "'running'"
        before = dk.Workspace(tmp_path / "ws").run(name).progress["fraction"]
        assert kernel.text("run.wait(60)") == "'finished'"
        assert before < 1
    finally:
        kernel.stop()
