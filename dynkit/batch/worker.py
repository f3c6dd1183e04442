"""Execute one notebook in this process: ``python -m dynkit.batch.worker REQUEST RECORD``.

What is recorded is what happened, not what papermill's notebook says: a kernel that died, a cell that took too long
and a run left unfinished are failures; ``sys.exit(0)`` in a cell is an early end, as papermill documents it.
"""

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from dynkit.batch import as_it_is
from dynkit.errors import Conflict
from dynkit.pipeline import Run
from dynkit.pipeline.process import ACTIVE
from dynkit.pipeline.started import started

__all__: list[str] = []

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def main() -> None:
    """Execute, judge, write the record."""
    request, record_path = json.loads(sys.argv[1]), Path(sys.argv[2])
    output = Path(request["output"])
    log = Path(request["runs"])
    os.environ["DYNKIT_RENDER"] = "static"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as for workers: the kernel shares the cores with them
    os.environ["DYNKIT_STARTED"] = str(log)
    beside = str(Path(request["notebook"]).parent.resolve())  # modules there can be imported, as in JupyterLab
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [beside, os.environ.get("PYTHONPATH")]))
    began_s = time.monotonic()
    error, trace = _executed(request)
    runs = [_described(run) for run in started(log)]
    if error is None:
        error = next((run["problem"] for run in runs if run["problem"]), None)
    status = "finished" if error is None else "failed"
    _mark(output, status, error)
    if request["html"] and output.exists():
        try:
            write_html(output)
        except Exception as failed:  # what was executed counts
            trace += f"no page could be written: {type(failed).__name__}: {failed}"
    record = {
        "status": status,
        "error": error,
        "traceback": trace,
        "seconds": time.monotonic() - began_s,
        "runs": runs,
    }
    record_path.write_text(json.dumps(record))


def _executed(request: dict[str, Any]) -> tuple[str | None, str]:
    """Execute the notebook; return what went wrong in a line, and at length."""
    timeout_s = request["timeout_s"]
    try:
        papermill.execute_notebook(
            as_it_is(Path(request["notebook"])),
            as_it_is(Path(request["output"])),
            parameters=request["parameters"],
            progress_bar=False,
            store_widget_state=False,
            execution_timeout=None if timeout_s is None else max(1, round(timeout_s)),
        )
    except PapermillExecutionError as error:
        if error.ename == "SystemExit":
            early = str(error.evalue) in ("0", "None", "")
            return (None, "") if early else (f"a cell ended with sys.exit({error.evalue})", str(error))
        return f"cell {error.exec_count}: {error.ename}: {error.evalue}", _COLOUR.sub("", "\n".join(error.traceback))
    except DeadKernelError:
        return "the kernel died (out of memory, or a crash in native code)", traceback.format_exc()
    except CellTimeoutError:
        return f"a cell took longer than {timeout_s:g} s", traceback.format_exc()
    except Exception as error:  # the edge of the process: whatever it was is the record's
        return f"{type(error).__name__}: {error}", traceback.format_exc()
    return None, ""


def _described(run: Run) -> dict[str, Any]:
    """Record of a run that the notebook started."""
    status, scores = run.status, {}
    problem = None
    if status in ACTIVE:
        problem = f"run {run.id} ({run.name}) was still {status} at the end and was cancelled; add run.wait()"
        try:
            run.cancel()
        except Conflict:  # it has just ended
            return _described(run)
    elif status != "finished":
        problem = f"run {run.id} ({run.name}) {status}: {run.reason or ''}"
    for row in run.scores().iter_rows(named=True):
        scores[row["metric"]] = row["mean"]
    workspace = str(run.folder.parents[1])
    return {
        "id": run.id,
        "name": run.name,
        "workspace": workspace,
        "status": status,
        "problem": problem,
        "scores": scores,
    }


def _mark(output: Path, status: str, error: str | None) -> None:
    """Write the true status into the executed notebook, whatever papermill left there."""
    if not output.exists():
        return
    notebook = nbformat.read(output, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types
    notebook.metadata["dynkit"] = {"status": status, "error": error}
    notebook.metadata.setdefault("papermill", {})["exception"] = error is not None
    nbformat.write(notebook, output)  # type: ignore[no-untyped-call]  # nbformat has no types


def write_html(notebook: Path) -> Path:
    """Write an executed notebook as one HTML page that loads nothing from outside; return its path."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter()
    for trait in (
        "mathjax_url",
        "require_js_url",
        "jquery_url",
        "mermaid_js_url",
        "html_manager_semver_range",
    ):
        if exporter.has_trait(trait):
            setattr(exporter, trait, "")
    body, _ = exporter.from_filename(str(notebook))
    page = notebook.with_suffix(".html")
    page.write_text(body, encoding="utf-8")
    return page


if __name__ == "__main__":
    main()
