"""A run's view in a notebook: live while it is going and somebody is there, a static picture of the result after.

The view is the output of the cell that showed the run. A thread reads the catalog twice a second and replaces that
output, so it moves while other cells run and needs no widget and no re-execution; when the run ends, the last thing
it writes is the static result, which is what a saved notebook shows.
"""

import logging
import os
import sys
import threading
import time
from typing import Any

import psutil
from IPython.core.getipython import get_ipython
from IPython.display import display

from dynkit.pipeline import Run
from dynkit.pipeline.process import ACTIVE

__all__ = ["is_watched", "show"]

logger = logging.getLogger(__name__)

_EVERY_S = 0.5
_TOOLS = "papermill nbconvert jupyter-nbconvert jupyter-execute dynkit.batch.worker pytest py.test"
_HEADLESS = set(_TOOLS.split())


def is_watched() -> bool:
    """Whether a person sees outputs as they come: a notebook front end, as opposed to papermill or nbconvert.

    ``$DYNKIT_RENDER`` ("live" or "static") overrules what is found.
    """
    chosen = os.environ.get("DYNKIT_RENDER")
    if chosen:
        return chosen == "live"
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return shell is not None  # a terminal: somebody typed it
    if "google.colab" in sys.modules or "__vsc_ipynb_file__" in shell.user_ns:
        return True
    return "JPY_SESSION_NAME" in os.environ and not _started_headless()


def _started_headless() -> bool:
    """Whether a tool without a screen started this kernel; such a one may itself have been started in a notebook."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return False
    program = [word for i, word in enumerate(words) if i < 2 or words[i - 1] == "-m"]  # options may be called so, too
    return bool(_HEADLESS & {os.path.basename(word) for word in program})  # noqa: PTH119  (words, not paths)


def show(run: Run) -> None:
    """Display a run; called by IPython for a Run at the end of a cell."""
    shell = get_ipython()
    moving = is_watched() and hasattr(shell, "kernel") and run.status in ACTIVE
    if not moving:
        display(_bundle(run, picture=True), raw=True)
        return
    handle = display(_bundle(run, picture=False), raw=True, display_id=True)
    threading.Thread(target=_follow, args=(run, handle), name=f"dynkit-view-{run.id}", daemon=True).start()


def _follow(run: Run, handle: Any) -> None:
    """Replace a view's output until its run ends; what goes wrong on the way is its last content."""
    try:
        _update(run, handle)
    except Exception as error:  # nobody would see an exception of this thread
        logger.exception("the view of run %s stopped", run.id)
        handle.update({"text/plain": f"the view of run {run.id} stopped: {error}"}, raw=True)


def _update(run: Run, handle: Any) -> None:
    shown: dict[str, str] = {}
    while True:
        ended = run.status not in ACTIVE
        bundle = _bundle(run, picture=ended)
        if bundle != shown:
            handle.update(bundle, raw=True)
            shown = bundle
        if ended:
            return
        time.sleep(_EVERY_S)


def _bundle(run: Run, *, picture: bool) -> dict[str, str]:
    return {"text/plain": repr(run), "text/html": run.to_html(picture=picture)}
