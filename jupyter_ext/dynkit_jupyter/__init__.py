"""dynkit in notebooks: magics, completion and live views. Loaded by ``%load_ext dynkit``."""

from typing import Any

from dynkit_jupyter.completion import matcher
from dynkit_jupyter.live import show
from dynkit_jupyter.magics import DynkitMagics

__all__ = ["load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(shell: Any) -> None:
    """Register magics, completion and the live view of runs; doing it twice is doing it once."""
    from dynkit.pipeline import Run

    unload_ipython_extension(shell)
    shell.register_magics(DynkitMagics)
    shell.Completer.custom_matchers.append(matcher)
    shell.display_formatter.ipython_display_formatter.for_type(Run, show)


def unload_ipython_extension(shell: Any) -> None:
    """Remove what was registered."""
    from dynkit.pipeline import Run

    matchers = shell.Completer.custom_matchers
    matchers[:] = [one for one in matchers if getattr(one, "matcher_identifier", None) != "dynkit"]
    formatter = shell.display_formatter.ipython_display_formatter
    if Run in formatter.type_printers:
        formatter.pop(Run)
    for kind, names in (("line", ("dynkit", "pipeline")), ("cell", ("pipeline",))):
        for name in names:
            shell.magics_manager.magics[kind].pop(name, None)
