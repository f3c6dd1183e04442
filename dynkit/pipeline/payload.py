"""How a pipeline travels to the process that executes it.

Its dataset goes by name, so that a workspace can be moved; the rest by cloudpickle. Functions of a notebook, and of
scripts that are not installed packages, go by value, so that a run can continue after the notebook is gone or the
script has changed. `parts` is the only place where user code is loaded, and only for a run that somebody starts,
resumes or asks a what-if of.
"""

import json
import linecache
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from dynkit.disk import flush
from dynkit.errors import InvalidInput, StorageError
from dynkit.lineage.origins import facts
from dynkit.policies import is_user_code

__all__ = ["Payload", "load", "pack", "parts"]

_PIPELINE = "pipeline.pkl"
_ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Payload:
    """A pipeline and what its code needs around it, ready to be written beside a run."""

    pipeline: bytes
    environment: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write both files into a new folder.

        Raises
        ------
        StorageError
        """
        try:
            folder.mkdir(parents=True)
            (folder / _ENVIRONMENT).write_text(json.dumps(self.environment))
            (folder / _PIPELINE).write_bytes(self.pipeline)
            flush(folder / _ENVIRONMENT, folder / _PIPELINE, folder, folder.parent)
        except OSError as error:
            raise StorageError(f"cannot write the run's folder {folder}: {error.strerror or error}") from error


def pack(name: str, parts: Mapping[str, Any]) -> Payload:
    """Pickle the parts of a pipeline with the user's code by value.

    Parameters
    ----------
    name : str
        Of the pipeline, for the message.
    parts : mapping
        Arguments of `Pipeline` but the dataset.

    Raises
    ------
    InvalidInput
        When something in it (an open file, a lock, a generator) cannot be pickled.
    """
    try:
        try:
            with _by_value():
                pickled = cloudpickle.dumps(dict(parts))
        except Exception:  # a module of the user's holds something that cannot be pickled: import it there instead
            pickled = cloudpickle.dumps(dict(parts))
    except Exception as error:
        which = ", ".join(part for part, value in parts.items() if not _travels(value))
        raise InvalidInput(f"the {which} of pipeline {name!r} cannot travel to a worker process: {error}") from error
    torch = sys.modules.get("torch")
    environment = {
        "cwd": str(Path.cwd()),
        "sys_path": [str(Path(entry).resolve()) for entry in sys.path],
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "sources": _sources(),
        **facts(),
    }
    return Payload(pickled, environment)


def _travels(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


@contextmanager
def _by_value() -> Iterator[None]:
    """Let cloudpickle take the functions of the user's own modules by value."""
    registered = cloudpickle.list_registry_pickle_by_value()
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name not in registered and name != "__main__" and getattr(module, "__file__", None) and is_user_code(name)
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _sources() -> dict[str, str]:
    """Text of notebook cells by the file name in their code, so that a worker's traceback shows their lines."""
    cached = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4}
    return {name: "".join(entry[2]) for name, entry in cached.items() if not Path(name).exists()}


def load(folder: Path) -> dict[str, Any]:
    """Set this process up as the pipeline's code expects it, and unpickle what `pack` was given."""
    environment = json.loads((folder / _ENVIRONMENT).read_text())
    if Path(environment["cwd"]).is_dir():
        os.chdir(environment["cwd"])
    for name, text in environment["sources"].items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    if environment["torch_threads"] is not None:
        import torch

        torch.set_num_threads(environment["torch_threads"])
    return parts(folder)


def parts(folder: Path) -> dict[str, Any]:
    """Unpickle what `pack` was given; of this process, only where it imports from is changed."""
    environment = json.loads((folder / _ENVIRONMENT).read_text())
    sys.path += [entry for entry in environment["sys_path"] if entry not in sys.path]
    unpickled: dict[str, Any] = cloudpickle.loads((folder / _PIPELINE).read_bytes())
    return unpickled
