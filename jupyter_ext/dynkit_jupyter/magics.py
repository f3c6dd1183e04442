"""``%%pipeline`` and ``%dynkit``: the public API with fewer keystrokes.

An error that a user can cause is one line in the notebook, and an error all the same: papermill and CI see it.
"""

import argparse
import functools
import shlex
from collections.abc import Callable
from typing import Any, NoReturn, cast

from IPython.core.magic import (
    Magics,
    line_cell_magic,
    line_magic,
    magics_class,
    no_var_expand,
    output_can_be_silenced,
)

from dynkit.catalog import Catalog
from dynkit.errors import DynkitError, InvalidInput, RunFailed
from dynkit.pipeline import Run, build
from dynkit.pipeline.compare import compare
from dynkit.pipeline.process import ACTIVE
from dynkit.pipeline.started import note
from dynkit.workspace import Workspace
from dynkit_jupyter.live import is_watched, show

__all__ = ["DynkitMagics", "pipeline_parser", "workspace_of"]


class _Help(Exception):
    """Help was asked for and printed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{self.prog}: {message}; {self.prog} -h explains")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Help


def pipeline_parser() -> argparse.ArgumentParser:
    """Options of ``%%pipeline``."""
    parser = _Parser(
        "%%pipeline",
        description="Declare a pipeline as YAML and run it in the background. The same cell with the same inputs "
        "finds its run again.",
    )
    parser.add_argument("name", help="name of the pipeline")
    parser.add_argument("--wait", action="store_true", help="wait for the end (always so where nobody is watching)")
    parser.add_argument("--force", action="store_true", help="start anew even if there is a run of the same inputs")
    parser.add_argument("--device", help="overrides training.device")
    parser.add_argument("-o", "--output", metavar="VAR", help="variable to put the run in")
    parser.add_argument("-w", "--workspace", help="variable or path; default: the notebook's workspace")
    return parser


def _line_parser() -> argparse.ArgumentParser:
    parser = _Parser("%dynkit", description="List, show and steer runs.")
    parser.add_argument("-w", "--workspace", help="variable or path; default: the notebook's workspace")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    verbs.add_parser("runs", help="list the runs")
    for verb, about in (
        ("show", "show a run, live while it is going"),
        ("wait", "wait for the end of a run"),
        ("pause", "let a run stand still"),
        ("resume", "let a run go on, or continue one that was interrupted"),
        ("cancel", "end a run"),
    ):
        verbs.add_parser(verb, help=about).add_argument("run", help="id of a run, a beginning of it, or a variable")
    verbs.add_parser("compare", help="compare runs").add_argument("run", nargs="+", help="ids or variables")
    return parser


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InvalidInput(f"cannot read the options {line!r}: {error}") from None


def workspace_of(namespace: dict[str, Any], chosen: str | None = None) -> Workspace:
    """Find the workspace of a notebook: the one chosen by variable or path, else the one its variables hold."""
    if chosen is not None:
        found = namespace.get(chosen)
        return found if isinstance(found, Workspace) else Workspace(Catalog.existing(chosen).root)
    held = {str(value.path): value for name, value in list(namespace.items()) if _is_workspace(name, value)}
    if len(held) > 1:
        raise InvalidInput(f"the notebook has several workspaces ({', '.join(sorted(held))}); choose one with -w VAR")
    return next(iter(held.values())) if held else Workspace(Catalog.existing().root)


def _is_workspace(name: str, value: Any) -> bool:
    return isinstance(value, Workspace) and not name.startswith("_")


def _in_one_line(method: Callable[..., Any]) -> Callable[..., Any]:
    """Show dynkit's own errors without a traceback; they stay errors."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except _Help:
            return None
        except DynkitError as error:
            line = f"{type(error).__name__}: {error}"
            error._render_traceback_ = lambda *_: [line]  # type: ignore[attr-defined]  # IPython asks for it
            raise error from None

    return wrapped


def _magic(kind: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a method as a line or cell magic of the usual manners."""
    return lambda method: cast(Callable[..., Any], kind(output_can_be_silenced(no_var_expand(_in_one_line(method)))))


@magics_class
class DynkitMagics(Magics):  # type: ignore[misc]  # IPython is untyped here
    """The magics of dynkit."""

    @_magic(line_cell_magic)
    def pipeline(self, line: str, cell: str | None = None) -> Run | None:
        """Declare a pipeline as YAML and run it in the background; ``%%pipeline -h`` lists the options.

        The body mirrors the constructor of `dynkit.Pipeline`; functions and classes of the notebook go by their
        names. Returns the Run, whose view moves while it is going; with ``--wait`` the view is shown at once.
        """
        namespace = self.shell.user_ns
        options = pipeline_parser().parse_args(_split(line))
        if cell is None:
            raise InvalidInput("%pipeline needs a cell: write %%pipeline NAME and the pipeline as YAML below it")
        workspace = workspace_of(namespace, options.workspace)
        if options.output and not options.output.isidentifier():
            raise InvalidInput(f"-o {options.output!r} is no name of a variable")
        body = "\n" + cell.rstrip().removesuffix(";")  # with a line for the magic's own, so that numbers are the cell's
        pipeline = build(body, workspace.catalog, name=options.name, namespace=namespace, device=options.device)
        run = None if options.force else workspace.find(pipeline)
        status = None if run is None else run.status
        if run is not None and (status == "interrupted" or (status == "paused" and not is_watched())):
            run.resume()
            print(f"run {run.id} of the same inputs was {status} and goes on; --force starts anew")  # noqa: T201
            note(run)
        elif run is not None:
            print(f"attached to run {run.id} of the same inputs ({status}); --force starts anew")  # noqa: T201
            note(run)
        else:
            run = pipeline.start()
        if options.output:
            namespace[options.output] = run
        if is_watched() and not options.wait:
            return run
        if is_watched():
            show(run)
        _wait(run)
        return None if is_watched() else run

    @_magic(line_magic)
    def dynkit(self, line: str) -> Any:
        """List, show, wait for, pause, resume, cancel and compare runs; ``%dynkit -h`` explains."""
        options = _line_parser().parse_args(_split(line))
        workspace = workspace_of(self.shell.user_ns, options.workspace)
        if options.verb == "runs":
            return workspace.runs()
        if options.verb == "compare":
            return compare(self._run(workspace, run) for run in options.run)
        run = self._run(workspace, options.run)
        if options.verb == "wait":
            _wait(run)
        elif options.verb != "show":
            getattr(run, options.verb)()
        return run

    def _run(self, workspace: Workspace, name: str) -> Run:
        value = self.shell.user_ns.get(name)
        return value if isinstance(value, Run) else workspace.run(name)


def _wait(run: Run) -> None:
    try:
        status = run.wait()
    except KeyboardInterrupt as error:
        line = f"interrupted: run {run.id} goes on; %dynkit cancel {run.id} ends it"
        error._render_traceback_ = lambda *_: [line]  # type: ignore[attr-defined]  # IPython asks for it
        raise
    if status not in ("finished", *ACTIVE):
        raise RunFailed(f"run {run.id} ({run.name}) {status}: {run.reason or ''}; see ws.run({run.id!r}).error")
