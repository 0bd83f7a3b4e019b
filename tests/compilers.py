"""Compilers that run beside the tests: started before the first test, asked for by the last ones, ended with the session.

conftest.py calls ``start_compilers`` of a test module with the parameter ``name`` of its slow tests, and lets these go last.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
_running: set[subprocess.Popen] = set()
_folders: list[tempfile.TemporaryDirectory] = []


def folder() -> Path:
    """Of the whole session, made when it is first asked for: processes of the tests import this module too."""
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="nm_act_compiled_", ignore_cleanup_errors=True))
    return Path(_folders[0].name)


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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _pool.shutdown()
    for each in _folders:
        each.cleanup()
