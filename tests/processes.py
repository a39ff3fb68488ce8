# SPDX-License-Identifier: MIT
"""Commands in processes of their own, without the seconds that importing torch and transformers takes in each: a
server imports them once per test process and forks.

A test of what an import does, or of a variable that is read at import, starts a fresh interpreter instead.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ["torch.distributed.fsdp", "fla.models", "fla.training.run", "fla.linearize.run"]
_methods = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if "forkserver" in _methods else "spawn")
if "forkserver" in _methods:
    _context.set_forkserver_preload(PRELOADED)


def _work(command: tuple[str, ...], folder: str, env: dict[str, str]) -> None:
    """What the child does: `python *command`, its output in two files, in a group that can be killed whole."""
    os.setpgrp()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    first, *rest = command
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(command)
        runpy.run_path(first, run_name="__main__")


class Started:
    """A running command, with what tests ask of `subprocess.Popen`."""

    def __init__(self, command: tuple[str, ...], env: dict[str, str] | None = None):
        self.command = command
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, **(env or {})}
        arguments = (command, self._folder.name, environment)
        self._process = _context.Process(target=_work, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.command, timeout, *self._said())
        return self._process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self._said()

    def _said(self) -> tuple[str, str]:
        files = [Path(self._folder.name, name) for name in ("out", "err")]
        out, err = (file.read_text() if file.exists() else "" for file in files)
        return out, err


def start(*command: str | Path, env: dict[str, str] | None = None) -> Started:
    """Start `python *command` in the repository's folder: `-m MODULE ...`, `-c CODE ...` or `FILE ...`."""
    return Started(tuple(map(str, command)), env)


def run(
    *command: str | Path, env: dict[str, str] | None = None, check: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`subprocess.run([python, *command], capture_output=True, text=True)` by a fork."""
    process = start(*command, env=env)
    out, err = process.communicate(timeout)
    done = subprocess.CompletedProcess(process.command, process.returncode, out, err)
    if check:
        assert done.returncode == 0, err
    return done


def start_ranks(
    size: int, *command: str | Path, env: dict[str, str] | None = None
) -> list[Started]:
    """The command in `size` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    shared |= {"LOCAL_WORLD_SIZE": str(size)} | (env or {})
    return [
        start(*command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def run_ranks(
    size: int, *command: str | Path, env: dict[str, str] | None = None, timeout: float = 300
) -> list[str]:
    """What each rank printed; an AssertionError where one failed."""
    ranks = start_ranks(size, *command, env=env)
    said = [rank.communicate(timeout) for rank in ranks]
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors
    return [out for out, _ in said]


def kill_once(process: Started, done, timeout: float = 120) -> None:
    """Kill it without warning as soon as `done()` is true."""
    deadline = time.monotonic() + timeout
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    assert process.pid
    os.killpg(process.pid, signal.SIGKILL)  # its own children too
    process.wait()
