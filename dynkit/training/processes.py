"""One training in several processes of this machine: torch's DistributedDataParallel, a GPU for each or all on the CPU.

Every process reads its own part of every batch and averages gradients with the others. The caller beats twice a
second; when it does not, because its run is paused, they stand still, and when it is gone, so are they.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import multiprocessing, nn
from torch.multiprocessing.spawn import ProcessException, start_processes
from torch.nn.parallel import DistributedDataParallel

from dynkit.catalog import Catalog
from dynkit.data import Dataset
from dynkit.errors import InvalidInput, TrainingError
from dynkit.training.fit import seeded
from dynkit.training.steps import unwrapped
from dynkit.training.train import Fitted, Task, train

__all__ = ["train_together"]

_BEAT_S = 0.2
_SILENCE_S = 2.0  # without a beat
_NEVER = timedelta(days=365)  # a paused run waits in the middle of an exchange


def train_together(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    *,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> Fitted:
    """Train `model` in place, in `processes` processes.

    Parameters
    ----------
    model : nn.Module
    dataset : Dataset
        At the version that has the samples.
    task : Task
    device : torch.device
        Its type says on what: ``cuda``, a GPU for each process, or ``cpu``.
    on_batch : callable
        Called a few times a second with the number of samples since the last call.

    Raises
    ------
    InvalidInput
        When there are not so many GPUs.
    TrainingError
        When a process ended without a result; an exception in one of them is raised as it is.
    """
    processes = task.training.processes
    _check_device(device, processes)
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    beat, passed = context.RawValue("d", time.monotonic()), context.RawValue("q", 0)
    with tempfile.TemporaryDirectory(prefix="dynkit-") as name:
        folder, told = Path(name), 0
        where = dataset.catalog.root, dataset.name, dataset.version
        (folder / "task").write_bytes(cloudpickle.dumps((model.cpu(), where, task, device.type, threads)))
        group: Any = start_processes(  # type: ignore[no-untyped-call]  # torch has no types here
            _process, (name, processes, beat, passed), processes, join=False, start_method="spawn"
        )
        try:
            while not group.join(timeout=_BEAT_S):
                now = passed.value
                on_batch(now - told)  # does not return while the run is paused
                told, beat.value = now, time.monotonic()
        except ProcessException as error:
            raise _first_error(folder, group.processes) or error from None
        finally:
            for process in group.processes:
                process.kill()
                process.join()
        state, outcome = cloudpickle.loads((folder / "result").read_bytes())
    model.load_state_dict(state)
    model.to(device)
    return outcome  # type: ignore[no-any-return]  # as `_process` wrote it


def _check_device(device: torch.device, processes: int) -> None:
    if device.type not in ("cuda", "cpu"):
        raise InvalidInput(f"processes={processes} needs CUDA or the CPU, not {device.type}; add device='cpu'")
    if device.type == "cuda" and processes > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InvalidInput(f"processes={processes} needs a GPU for each, and there are {found}; or add device='cpu'")


def _first_error(folder: Path, processes: list[Any]) -> Exception | None:
    """Return the error of the process that failed first; the others' is only that their connection broke."""
    for rank, process in enumerate(processes):
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:  # which the rest were sent
            name = signal.Signals(-process.exitcode).name
            hint = " (that can mean: out of memory)" if name == "SIGKILL" else ""
            return TrainingError(f"process {rank} of the {len(processes)} that train was ended by {name}{hint}")
    raised = sorted(folder.glob("error-?*"), key=lambda path: path.stat().st_mtime_ns)
    return cloudpickle.loads(raised[0].read_bytes()) if raised else None


def _process(rank: int, name: str, processes: int, beat: Any, passed: Any) -> None:
    """Do one process's part and end; the first one leaves the result, one that fails its error."""
    folder, failed = Path(name), True
    try:
        model, (root, dataset, number), task, kind, threads = cloudpickle.loads((folder / "task").read_bytes())
        torch.set_num_threads(threads)
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        _join(folder, rank, processes, device)

        def on_batch(samples: int) -> None:
            while time.monotonic() - beat.value > _SILENCE_S:
                time.sleep(_BEAT_S)
            if rank == 0:
                passed.value += samples

        with seeded(task.seed + rank):
            shared = _shared(model.to(device), device)
            version = Dataset(Catalog(root), dataset, number).open()
            outcome = train(shared, version, task, device=device, on_batch=on_batch, part=(rank, processes))
        if rank == 0:
            state = {name: value.cpu() for name, value in unwrapped(shared).state_dict().items()}
            (folder / "result").write_bytes(cloudpickle.dumps((state, outcome)))
        torch.distributed.destroy_process_group()
        failed = False
    except Exception as error:
        error.add_note(f"in process {rank} of {processes}:\n{traceback.format_exc()}")
        (folder / f"error-{rank}").write_bytes(cloudpickle.dumps(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)  # as a forked process ends: Gloo's threads outlive DDP's model, and would abort a Python that ends


def _join(folder: Path, rank: int, processes: int, device: torch.device) -> None:
    """Meet the other processes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if sys.platform == "linux":  # they are on this machine; its name may lead nowhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=processes,
        timeout=_NEVER,
    )


def _shared(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model so that its gradients are averaged; statistics of batches are of whole batches on GPUs."""
    if device.type != "cuda":
        return DistributedDataParallel(model, find_unused_parameters=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # torch has no types here
    return DistributedDataParallel(model, device_ids=[device], find_unused_parameters=True)
