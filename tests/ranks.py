"""Running a function in several processes of one gloo group; a rank that dies or hangs ends the test, not the suite."""

import datetime
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


def run_ranks(function, *arguments, size: int = 2, timeout: float = 150) -> None:
    """Call ``function(*arguments)`` in ``size`` processes that form the default process group.

    Raises what torch.multiprocessing raises for the first rank that fails, with its traceback; the others are ended.
    TimeoutError if they take too long.
    """
    _prepare_server()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _rank,
            (size, os.path.join(folder, "store"), function, arguments),
            nprocs=size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout
        try:
            while not processes.join(timeout=1, grace_period=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: not done after {timeout} s")
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()


def _prepare_server() -> None:
    """The ranks are forked from a process that has imported everything and computed nothing: a start takes no time."""
    os.environ["OMP_NUM_THREADS"] = "1"  # every rank would take all cores
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # Python 3.11's server takes no other
    mp.get_context("forkserver").set_forkserver_preload(["tp_cases"])


def _rank(rank: int, size: int, store: str, function, arguments) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
