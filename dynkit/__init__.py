"""Train models on datasets that never stop growing, from a notebook.

>>> import dynkit as dk
>>> dk.triggers.Time("30d"), dk.selection.Random(fraction=0.5)
(Time(every='30d', start=None), Random(fraction=0.5, n=None))

Names load when they are first used: importing dynkit imports neither torch nor a plotting library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynkit import drift, errors, lineage, plots, selection, streams, testing, training, triggers
    from dynkit.data import Dataset
    from dynkit.evaluation import Evaluation, metrics, windows
    from dynkit.models.guard import guard
    from dynkit.pipeline import Pipeline, Run
    from dynkit.pipeline.compare import compare
    from dynkit.pipeline.sweep import sweep
    from dynkit.pipeline.what_if import what_if
    from dynkit.training import Training
    from dynkit.types import Event, Window
    from dynkit.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
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

_HOME = {
    "Dataset": "dynkit.data:Dataset",
    "Evaluation": "dynkit.evaluation.settings:Evaluation",
    "Event": "dynkit.types:Event",
    "Pipeline": "dynkit.pipeline:Pipeline",
    "Run": "dynkit.pipeline:Run",
    "Training": "dynkit.training.settings:Training",
    "Window": "dynkit.types:Window",
    "Workspace": "dynkit.workspace:Workspace",
    "compare": "dynkit.pipeline.compare:compare",
    "drift": "dynkit.drift:",
    "errors": "dynkit.errors:",
    "guard": "dynkit.models:guard",
    "lineage": "dynkit.lineage:",
    "metrics": "dynkit.evaluation.metrics:",
    "plots": "dynkit.plots:",
    "selection": "dynkit.selection:",
    "streams": "dynkit.streams:",
    "sweep": "dynkit.pipeline.sweep:sweep",
    "testing": "dynkit.testing:",
    "training": "dynkit.training:",
    "triggers": "dynkit.triggers:",
    "what_if": "dynkit.pipeline.what_if:what_if",
    "windows": "dynkit.evaluation.windows:",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynkit' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    loaded = importlib.import_module(module)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def load_ipython_extension(shell: Any) -> None:
    """Register the magics and completion: ``%load_ext dynkit``."""
    from dynkit_jupyter import load_ipython_extension as load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Remove what `load_ipython_extension` registered."""
    from dynkit_jupyter import unload_ipython_extension as unload

    unload(shell)
