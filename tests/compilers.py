"""Compilers that run beside the tests: started before the first test, asked for by the last ones, ended with the session.

conftest.py calls ``start_compilers`` of a test module with the parameter ``name`` of its slow tests, and lets these go last.
"""

import os
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
_running: set[subprocess.Popen] = set()
_folder = tempfile.TemporaryDirectory(prefix="nm_act_compiled_", ignore_cleanup_errors=True)
FOLDER = Path(_folder.name)


def submit(function, *arguments) -> Future:
    """The result of a function that compiles, later."""
    return _pool.submit(function, *arguments)


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """subprocess.run at a priority below that of the tests, which measure times."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["nice", "-n5", *map(str, command)], **pipes, **options, process_group=0)
    _running.add(process)
    try:
        output = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, *output)
    finally:
        _running.discard(process)


def stop() -> None:
    """End what no test waits for any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in list(_running):
        os.killpg(process.pid, 9)
    _folder.cleanup()
