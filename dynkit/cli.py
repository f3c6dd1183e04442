"""The ``dynkit`` command: the public API from a terminal."""

import json
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

import dynkit as dk  # its names load when used: help must not wait for torch
from dynkit import batch as batches
from dynkit.errors import DynkitError, InvalidInput
from dynkit.html import duration
from dynkit.yaml import parse

__all__ = ["main"]

_PIPE_WIDTH = 200  # columns of a table that goes into a file
_out = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _PIPE_WIDTH)
_wide = Console(width=10_000)  # for tables, whose cells stay whole
_err = Console(stderr=True)

in_workspace = click.option(
    "-w",
    "--workspace",
    type=click.Path(path_type=Path),
    help="Directory; default: $DYNKIT_WORKSPACE, else ./dynkit-workspace.",
)
of_run = click.argument("run")
of_model = click.argument("model")


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors that a user can cause into one line and exit code 2."""
    try:
        yield
    except DynkitError as error:
        _say(f"{type(error).__name__}: {error}", to=_err)
        raise SystemExit(2) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dynkit")
def main() -> None:
    """Train models on datasets that never stop growing."""


def _say(text: str, *, to: Console | None = None, style: str = "", end: str = "\n") -> None:
    """Print text as it is: brackets are no markup, numbers no colours, and long lines stay whole."""
    (to or _out).print(text, style=style, end=end, highlight=False, markup=False, soft_wrap=True)


def _open(workspace: Path | None) -> "dk.Workspace":
    """Open a workspace that is there; looking must not make one."""
    from dynkit.catalog import Catalog

    return dk.Workspace(Catalog.existing(workspace).root)


def _run(workspace: Path | None, run: str) -> "dk.Run":
    return _open(workspace).run(run)


@main.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--device", help="Overrides training.device.")
@in_workspace
def run_pipeline(file: Path, workspace: Path | None, device: str | None) -> None:
    """Run the pipeline written as YAML in FILE here, with progress; exit code 1 when it fails."""
    from dynkit.pipeline import build

    with _told():
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file} is no UTF-8 text: {error}") from None
        ws = _open(workspace)
        sys.path.insert(0, str(file.parent.resolve()))  # modules beside the file, as for a script
        pipeline = build(text, ws.catalog, device=device)
    run: dk.Run | None = None
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[eta]}")
    )
    task = progress.add_task(pipeline.name, total=1.0, eta="")

    def render() -> Progress:
        if run is not None:
            now = run.progress
            left = f"about {duration(now.get('eta_s'))} left" if now.get("eta_s") is not None else ""
            progress.update(task, completed=now["fraction"], description=f"{pipeline.name}: {now['phase']}", eta=left)
        return progress

    try:
        with Live(get_renderable=render, console=_out, refresh_per_second=4, transient=True):
            for event in pipeline.replay():
                run = run or ws.run(event.run)
                _say(str(event), style="dim")
    except Exception as error:
        told = f"{type(error).__name__}: {error}" if isinstance(error, DynkitError) else traceback.format_exc().rstrip()
        _say(told, to=_err)
        if run is not None:
            _say(f"run {run.id} {run.status}; dynkit resume {run.id} continues it", to=_err)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if run is not None:
            _say(f"interrupted; dynkit resume {run.id} continues it", to=_err)
        raise SystemExit(130) from None
    assert run is not None
    status = run.status
    _say(f"run {run.id} {status}")
    _table(*dk.compare([run]).rows_as_text())
    raise SystemExit(0 if status == "finished" else 1)


@main.command("runs")
@in_workspace
def list_runs(workspace: Path | None) -> None:
    """List the runs of a workspace."""
    with _told():
        runs = _open(workspace).runs()
        _table(list(runs.columns), runs.rows_as_text())


@main.command()
@of_run
@click.option(
    "--events", default=10, type=click.IntRange(min=0), show_default=True, help="How many of the last events."
)
@in_workspace
def show(run: str, events: int, workspace: Path | None) -> None:
    """Show RUN: status, last events, scores, and the error if it failed."""
    with _told():
        found = _run(workspace, run)
        _say(repr(found))
        for event in found.events()[-events:] if events else []:
            _say(str(event), style="dim")
        if found.error:
            _say(found.error)
        if found.trained:
            _table(*dk.compare([found]).rows_as_text())


@main.command()
@of_run
@click.option("--timeout", type=float, help="Seconds to wait at most.")
@in_workspace
def wait(run: str, timeout: float | None, workspace: Path | None) -> None:
    """Wait for RUN; exit code 1 unless it finishes."""
    with _told():
        status = _run(workspace, run).wait(timeout)
    _say(f"run {run} {status}")
    raise SystemExit(0 if status == "finished" else 1)


@main.command()
@of_run
@in_workspace
def pause(run: str, workspace: Path | None) -> None:
    """Let RUN stand still."""
    with _told():
        _say(repr(_run(workspace, run).pause()))


@main.command()
@of_run
@in_workspace
def resume(run: str, workspace: Path | None) -> None:
    """Let a paused RUN go on, or continue one that was interrupted, cancelled or failed, in the background."""
    with _told():
        _say(repr(_run(workspace, run).resume()))


@main.command()
@of_run
@in_workspace
def cancel(run: str, workspace: Path | None) -> None:
    """End RUN; what it committed stays."""
    with _told():
        _say(repr(_run(workspace, run).cancel()))


@main.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@in_workspace
def compare(runs: tuple[str, ...], workspace: Path | None) -> None:
    """Compare runs by cost and composite score; without ids, the newest run of each pipeline."""
    with _told():
        ws = _open(workspace)
        chosen = [ws.run(run) for run in runs]
        if not runs:
            newest = {run.name: run for run in reversed(ws.runs()) if run.trained}
            chosen = sorted(newest.values(), key=lambda run: run.created)
        _table(*dk.compare(chosen).rows_as_text())


@main.group()
def lineage() -> None:
    """Ask and change the graph of models."""


@lineage.command("log")
@click.option(
    "-n", "limit", default=20, type=click.IntRange(min=0), show_default=True, help="How many of the newest models."
)
@in_workspace
def lineage_log(limit: int, workspace: Path | None) -> None:
    """List the newest models."""
    with _told():
        _say(repr(_open(workspace).lineage.log(limit)))


@lineage.command("show")
@of_model
@in_workspace
def lineage_show(model: str, workspace: Path | None) -> None:
    """Show all that is known of MODEL."""
    with _told():
        _say(repr(_open(workspace).lineage.show(model)))


@lineage.command("search")
@click.argument("text", required=False)
@click.option("--tag")
@click.option("--run", help="Id or name of the run that trained it.")
@click.option("--dataset", help="That it was trained on.")
@in_workspace
def lineage_search(
    text: str | None, tag: str | None, run: str | None, dataset: str | None, workspace: Path | None
) -> None:
    """List models by TEXT in their names, tags and notes, and more."""
    with _told():
        _say(repr(_open(workspace).lineage.search(text, tag=tag, run=run, dataset=dataset)))


@lineage.command("add")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--parent", "parents", multiple=True, help="A model that it was made from; may be repeated.")
@click.option("--version-of", help="The model that it is the next version of.")
@click.option("--how", default="added", show_default=True, help="How it was made, in words.")
@click.option("--name")
@click.option("--tag", "tags", multiple=True)
@in_workspace
def lineage_add(file: Path, workspace: Path | None, **place: Any) -> None:
    """Store the model in a safetensors FILE with its place in the graph; print its identity."""
    with _told():
        _say(_open(workspace).lineage.add(file, **place))


@lineage.command("place")
@click.argument("file", type=click.Path(path_type=Path))
@in_workspace
def lineage_place(file: Path, workspace: Path | None) -> None:
    """Find the models that the one in a safetensors FILE may come from."""
    with _told():
        _say(repr(_open(workspace).lineage.place(file)))


@lineage.command("name")
@of_model
@click.argument("name")
@click.option("--instead-of", help="The model that has the name now.")
@in_workspace
def lineage_name(model: str, name: str, instead_of: str | None, workspace: Path | None) -> None:
    """Give MODEL a NAME, or move it there."""
    with _told():
        _open(workspace).lineage.name(model, name, instead_of=instead_of)


@lineage.command("diff")
@click.argument("a")
@click.argument("b")
@in_workspace
def lineage_diff(a: str, b: str, workspace: Path | None) -> None:
    """Compare the tensors and scores of two models."""
    with _told():
        _say(repr(_open(workspace).lineage.diff(a, b)))


@lineage.command("merge")
@click.argument("models", nargs=-1, required=True)
@click.option("--operator", type=click.Choice(["mean", "task_arithmetic", "ties"]), help="Merge weights by it.")
@click.option("--name", help="For the merged model.")
@in_workspace
def lineage_merge(models: tuple[str, ...], operator: str | None, name: str | None, workspace: Path | None) -> None:
    """Merge MODELS; exit code 1 when there is a conflict."""
    from dynkit.lineage.operators import OPERATORS

    with _told():
        if len(models) < 2:
            raise InvalidInput("give at least two models to merge")
        chosen = None if operator is None else OPERATORS[operator]()
        merge = _open(workspace).lineage.merge(models[0], models[1], *models[2:], operator=chosen, name=name)
        _say(repr(merge))
    raise SystemExit(0 if merge.model else 1)


@lineage.command("test")
@click.argument("models", nargs=-1)
@click.option("-t", "--test", "tests", multiple=True, help="Name of a test; without, those that apply.")
@in_workspace
def lineage_test(models: tuple[str, ...], tests: tuple[str, ...], workspace: Path | None) -> None:
    """Run the registered tests on MODELS, or on all; exit code 1 when one fails."""
    with _told():
        report = _open(workspace).lineage.test(models or None, tests or None)
        _say(repr(report))
    raise SystemExit(0 if report.passed else 1)


@lineage.command("bisect")
@click.argument("test")
@click.argument("bad")
@click.option("--good", multiple=True, help="A model known to pass; may be repeated.")
@in_workspace
def lineage_bisect(test: str, bad: str, good: tuple[str, ...], workspace: Path | None) -> None:
    """Find the first model that fails TEST among those that BAD comes from."""
    with _told():
        _say(repr(_open(workspace).lineage.bisect(test, good, bad)))


@lineage.command("cascade")
@click.argument("old")
@click.argument("new")
@click.option("--go", is_flag=True, help="Do it; without, only the plan is shown.")
@in_workspace
def lineage_cascade(old: str, new: str, go: bool, workspace: Path | None) -> None:
    """Make all that comes from OLD anew from its version NEW."""
    with _told():
        _say(repr(_open(workspace).lineage.cascade(old, new, dry_run=not go)))


@lineage.command("erase")
@click.argument("keys", nargs=-1, type=int, required=True)
@click.option("--dataset", help="Needed when there are several.")
@click.option("--drop", is_flag=True, help="Remove affected models that have no recipe.")
@click.option("--go", is_flag=True, help="Do it; without, only the plan is shown.")
@in_workspace
def lineage_erase(keys: tuple[int, ...], dataset: str | None, drop: bool, go: bool, workspace: Path | None) -> None:
    """Erase the samples KEYS from a dataset and from all models that learned from them."""
    with _told():
        found = _open(workspace).lineage.erase(keys, dataset=dataset, dry_run=not go, drop=drop)
        _say(repr(found))
    raise SystemExit(1 if go and not found.done else 0)


@lineage.command("save")
@click.argument("file", type=click.Path(path_type=Path))
@in_workspace
def lineage_save(file: Path, workspace: Path | None) -> None:
    """Write the graph to FILE: .graphml, .json or .mmd (Mermaid)."""
    with _told():
        _open(workspace).lineage.save(file)


@main.group()
def remote() -> None:
    """Know other workspaces by a name."""


@remote.command("add")
@click.argument("name")
@click.argument("location")
@in_workspace
def remote_add(name: str, location: str, workspace: Path | None) -> None:
    """Call the workspace at LOCATION, a directory or s3://bucket/prefix, by NAME, to push to and pull from."""
    with _told():
        _open(workspace).lineage.add_remote(name, location)


@main.command()
@click.argument("remote", default="origin")
@click.argument("models", nargs=-1)
@in_workspace
def push(remote: str, models: tuple[str, ...], workspace: Path | None) -> None:
    """Copy MODELS (all) to REMOTE (origin), as far as it lacks them; exit code 1 when a name went apart."""
    with _told():
        done = _open(workspace).lineage.push(remote, models or None)
        _say(repr(done))
    raise SystemExit(1 if done.rejected else 0)


@main.command()
@click.argument("remote", default="origin")
@click.argument("models", nargs=-1)
@in_workspace
def pull(remote: str, models: tuple[str, ...], workspace: Path | None) -> None:
    """Copy MODELS (all) from REMOTE (origin), as far as they are not here."""
    with _told():
        _say(repr(_open(workspace).lineage.pull(remote, models or None)))


@main.command()
@click.argument("source")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--storage", help="s3://bucket/prefix to keep its samples and models in.")
@click.option("--catalog", help="postgresql://user@host/database to keep its catalog in.")
def clone(source: str, path: Path, storage: str | None, catalog: str | None) -> None:
    """Make a workspace at PATH with all models of the one at SOURCE, a directory or s3://bucket/prefix."""
    with _told():
        _say(repr(dk.Workspace.clone(source, path, storage=storage, catalog=catalog).lineage.log(10)))


@main.command()
def schema() -> None:
    """Print the JSON Schema of pipelines written as YAML, for editors."""
    from dynkit.pipeline import schema as pipeline_schema

    click.echo(json.dumps(pipeline_schema(), indent=1))


class _Values(click.ParamType):  # type: ignore[type-arg]  # generic only in newer releases
    name = "NAME=A,B,C"

    def convert(self, value: Any, param: Any, context: Any) -> tuple[str, list[Any]]:
        name, equals, values = str(value).partition("=")
        if not (equals and name and values):
            self.fail(f"{value!r} is not like lr=0.1,0.01", param, context)
        try:
            return name, list(parse(f"[{values}]").value)
        except DynkitError as error:
            self.fail(f"{value!r}: {error}", param, context)


@main.command()
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option("-p", "parameters", type=(str, str), multiple=True, metavar="NAME VALUE", help="One parameter.")
@click.option(
    "--grid", type=_Values(), multiple=True, help="A parameter's values, as YAML; several make all combinations."
)
@click.option("-o", "folder", type=click.Path(path_type=Path), required=True, help="Folder for notebooks and results.")
@click.option(
    "--resume", "resuming", is_flag=True, help="Skip what has finished with the same notebook and parameters."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Longest time for one cell, in seconds.")
@click.option("--html", is_flag=True, help="Write an HTML page beside each executed notebook.")
def batch(
    notebook: Path,
    parameters: tuple[tuple[str, str], ...],
    grid: tuple[tuple[str, list[Any]], ...],
    folder: Path,
    resuming: bool,
    timeout: float | None,
    html: bool,
) -> None:
    """Execute NOTEBOOK headless, once per combination of parameters; exit code 1 when one fails."""
    with _told():
        fixed = {name: parse(value).value for name, value in parameters}
        if len({name for name, _ in grid}) < len(grid):
            raise InvalidInput("a parameter is in two --grid options; give all of its values in one")
        jobs = batches.plan(notebook, folder, [{**fixed, **chosen} for chosen in batches.combinations(dict(grid))])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as an interrupt does
    records: list[dict[str, Any]] = []
    try:
        for number, job in enumerate(jobs, 1):
            earlier = job.finished() if resuming else None
            _say(f"[{number}/{len(jobs)}] {job.output}", end=" ")
            with _told():
                record = earlier or batches.execute(job, timeout_s=timeout, html=html)
            records.append(record)
            seconds = "" if earlier else f" in {duration(record['seconds'])}"
            _say(f"{record['status']}{' before' if earlier else seconds}")
            if record["error"]:
                _say(record["traceback"] or record["error"], to=_err)
            if html and earlier and not job.output.with_suffix(".html").exists():
                from dynkit.batch.worker import write_html

                write_html(job.output)
            if html and job.output.with_suffix(".html").exists():
                _say(f"page: {job.output.with_suffix('.html').resolve()}")
    except KeyboardInterrupt:
        _say("interrupted; the same command with --resume goes on", to=_err)
        for run in batches.left_running(job):
            _say(f"run {run.id} ({run.name}) goes on; dynkit cancel {run.id} ends it", to=_err)
        code = 130
    else:
        code = 1 if any(record["status"] != "finished" for record in records) else 0
    if records:
        table = batches.results(records)
        table.write_csv(folder / "results.csv")
        shown = [name for name in table.columns if name != "notebook"]
        _table(shown, [[_cell(value) for value in row] for row in table.select(shown).iter_rows()])
        _say(f"results: {(folder / 'results.csv').resolve()}")
    raise SystemExit(code)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; wider than the terminal rather than cut."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    _wide.print(table)
