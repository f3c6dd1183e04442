"""A note of every run that a process starts, for whoever executes a notebook and must know what it left behind.

Whoever sets ``$DYNKIT_STARTED`` to a file finds a line per run there.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from dynkit.catalog import Catalog
from dynkit.errors import NotFound
from dynkit.pipeline.run import Run

__all__ = ["note", "started"]


def note(run: Run) -> None:
    """Append a run to the file, when somebody asked for it."""
    path = os.environ.get("DYNKIT_STARTED")
    if path:
        with Path(path).open("a") as stream:
            stream.write(json.dumps([str(run.folder.parents[1]), run.id]) + "\n")


def started(path: Path) -> list[Run]:
    """Return the runs noted in a file, each once, in order; those that are gone with their workspaces are left out."""
    if not path.exists():
        return []
    runs = []
    for line in dict.fromkeys(path.read_text().splitlines()):
        root, run = json.loads(line)
        with suppress(NotFound):
            runs.append(Run(Catalog.existing(root), run))
    return runs
