"""Notebooks headless: one execution per set of parameters, and the truth about how each ended.

Every notebook is executed by papermill in a process of its own (`dynkit.batch.worker`), so a dying kernel, a time-out
or a notebook that leaves a run unfinished is seen and recorded; papermill's own notebook says "completed" then. A
record beside each notebook lets a later call skip what has finished.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from blake3 import blake3

from dynkit.errors import InvalidInput, NotFound, StorageError, did_you_mean

if TYPE_CHECKING:
    from dynkit.pipeline import Run

__all__ = ["Job", "as_it_is", "combinations", "execute", "left_running", "plan", "results"]

_ENDING_S = 20.0  # for a kernel to end
_COLUMNS = ("status", "seconds", "notebook", "error")  # of every table of results


@dataclass(frozen=True)
class Job:
    """One execution of a notebook.

    Parameters
    ----------
    notebook : Path
        The one to execute.
    output : Path
        Where the executed one goes; the record goes beside it with the suffix .dynkit.json.
    parameters : dict
    """

    notebook: Path
    output: Path
    parameters: dict[str, Any]

    @property
    def record_path(self) -> Path:
        """Where the record of the last execution is."""
        return self.output.with_suffix(".dynkit.json")

    @property
    def runs_path(self) -> Path:
        """Where the runs that it starts are noted while it is executed."""
        return self.output.with_suffix(".dynkit.runs")

    def digest(self) -> str:
        """Identity of notebook and parameters."""
        return blake3(self.notebook.read_bytes()).update(json.dumps(self.parameters).encode()).hexdigest()

    def finished(self) -> dict[str, Any] | None:
        """Record of an earlier execution that finished with the same notebook and parameters, if there is one."""
        try:
            record: dict[str, Any] = json.loads(self.record_path.read_text())
        except (OSError, ValueError):
            return None
        done = record.get("status") == "finished" and record.get("digest") == self.digest() and self.output.exists()
        return record if done else None


def combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values, the last name changing fastest.

    >>> list(combinations({"a": [1, 2], "b": ["x"]}))
    [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'x'}]
    """
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def plan(notebook: Path, folder: Path, parameter_sets: Sequence[Mapping[str, Any]]) -> list[Job]:
    """Make a job per set of parameters.

    Raises
    ------
    NotFound
        When there is no such notebook.
    InvalidInput
        When it does not declare one of the parameters; papermill would run it with the default.
    """
    if not notebook.is_file():
        raise NotFound(f"no notebook {str(notebook)!r}")
    declared = _declared(notebook)
    for name in sorted({name for parameters in parameter_sets for name in parameters}):
        if name not in declared:
            advice = did_you_mean(name, declared) or "; it has no cell tagged 'parameters'"
            raise InvalidInput(f"notebook {notebook.name!r} has no parameter {name!r}{advice}")
    jobs = [Job(notebook, folder / f"{_stem(notebook, chosen)}.ipynb", dict(chosen)) for chosen in parameter_sets]
    if any(job.output.resolve() == notebook.resolve() for job in jobs):
        raise InvalidInput(f"the executed notebook would overwrite {str(notebook)!r}; choose another folder")
    return list({job.output: job for job in jobs}.values())


def _declared(notebook: Path) -> list[str]:
    import papermill

    try:
        return list(papermill.inspect_notebook(as_it_is(notebook)))
    except Exception as error:  # nbformat and papermill raise many kinds for a file that is no notebook
        raise InvalidInput(f"{str(notebook)!r} is not a notebook: {error}") from None


def as_it_is(path: Path) -> str:
    """Spell a path so that papermill, which puts parameters into it, leaves it as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _stem(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """File name that tells the parameters and differs for different ones."""
    if not parameters:
        return notebook.stem
    spelled = ",".join(f"{name}={value}" for name, value in parameters.items())
    safe = re.sub(r"[^A-Za-z0-9=,._-]+", "_", spelled)[:80]
    return f"{notebook.stem}-{safe}-{blake3(json.dumps(parameters).encode()).hexdigest()[:6]}"


def execute(job: Job, *, timeout_s: float | None = None, html: bool = False) -> dict[str, Any]:
    """Execute one notebook and return its record.

    Parameters
    ----------
    job : Job
    timeout_s : float or None
        Longest time for one cell.
    html : bool
        Write an HTML page beside the notebook, too.

    Returns
    -------
    dict
        status ("finished" or "failed"), error, traceback, seconds, runs (id, workspace, name, status, scores).

    Raises
    ------
    StorageError
        When the folder cannot be made or written.
    """
    request = {
        "notebook": str(job.notebook),
        "output": str(job.output),
        "runs": str(job.runs_path),
        "parameters": job.parameters,
        "timeout_s": timeout_s,
        "html": html,
    }
    digest = job.digest()  # of what is executed, not of what it may be edited to meanwhile
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        job.record_path.unlink(missing_ok=True)
        job.runs_path.write_text("")
    except OSError as error:
        raise StorageError(f"cannot write to {job.output.parent}: {error.strerror or error}") from error
    command = [sys.executable, "-m", "dynkit.batch.worker", json.dumps(request), str(job.record_path)]
    process = _ended(command)
    try:
        record: dict[str, Any] = json.loads(job.record_path.read_text())
    except (OSError, ValueError):
        record = {
            "status": "failed",
            "error": f"the executing process ended with code {process.returncode}",
            "traceback": process.stderr.decode(errors="replace"),
            "seconds": None,
            "runs": [],
        }
    record |= {"digest": digest, "parameters": job.parameters, "notebook": str(job.output)}
    job.record_path.write_text(json.dumps(record, indent=1))
    job.runs_path.unlink(missing_ok=True)
    return record


def _ended(command: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
    """Run a command to its end; when this process is interrupted, it is too, and may end its kernel first."""
    # Both pipes: where Polars handles SIGINT, only waiting for several files can be interrupted, not reading one.
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:  # type: ignore[call-overload]
        try:
            _, told = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.communicate(timeout=_ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, b"", told)


def left_running(job: Job) -> "list[Run]":
    """Return the runs that an interrupted execution started and that go on."""
    from dynkit.pipeline.process import ACTIVE
    from dynkit.pipeline.started import started

    found = [run for run in started(job.runs_path) if run.status in ACTIVE]
    job.runs_path.unlink(missing_ok=True)
    return found


def results(records: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """One row per execution: parameters, status, seconds, scores of its runs, notebook, error."""
    rows = []
    for record in records:
        names = _numbered([run["name"] for run in record["runs"]])
        scores = {
            f"{name}.{metric}": value
            for name, run in zip(names, record["runs"], strict=True)
            for metric, value in run["scores"].items()
        }
        rows.append(
            {
                **{
                    f"parameter {name}" if name in _COLUMNS else name: _plain(value)
                    for name, value in record["parameters"].items()
                },
                "status": record["status"],
                "seconds": record["seconds"],
                **scores,
                "notebook": record["notebook"],
                "error": record["error"],
            }
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    tail = [name for name in ("notebook", "error") if name in names]
    order = [*(name for name in names if name not in tail), *tail]
    return pl.DataFrame([{name: row.get(name) for name in order} for row in rows], infer_schema_length=None)


def _numbered(names: list[str]) -> list[str]:
    """Tell equal names apart.

    >>> _numbered(["a", "b", "a"])
    ['a 1', 'b', 'a 2']
    """
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _plain(value: Any) -> Any:
    """Value of a table's cell: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
