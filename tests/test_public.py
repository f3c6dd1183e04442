"""What a user imports: names, and how long the import takes."""

import json
import subprocess
import sys

import dynkit as dk


def test_public_names_are_these() -> None:
    assert dk.__all__ == [
        "Dataset",
        "Evaluation",
        "Event",
        "Pipeline",
        "Run",
        "Training",
        "Window",
        "Workspace",
        "compare",
        "drift",
        "errors",
        "guard",
        "lineage",
        "metrics",
        "plots",
        "selection",
        "streams",
        "sweep",
        "testing",
        "training",
        "triggers",
        "what_if",
        "windows",
    ]
    assert all(getattr(dk, name) is not None for name in dk.__all__)


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import json, sys, time; t = time.perf_counter(); import dynkit; s = time.perf_counter() - t;"
        "print(json.dumps([s, sorted(sys.modules)]))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    heavy = {"torch", "papermill", "ipywidgets", "altair", "zarr", "sqlalchemy"}
    assert not heavy & set(runs[0][1])
    assert min(seconds for seconds, _ in runs) < 0.3


def test_command_help_does_not_load_torch() -> None:
    code = "import sys; import dynkit.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
