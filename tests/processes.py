"""Processes that have torch and transformers imported when they begin: forked from one that does nothing else.

That one (multiprocessing's fork server) is started once, with one thread, so that a fork is sound; each process that a
test needs then costs no import, which takes up to 20 s on a slow machine.
"""

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LONG = 600  # seconds that no process needs, on a machine however slow
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["dse_train_runner", "finetune_bert", "run_distillation_logits_creator", "torch.distributed",
     "dse.experiments.predictions", "dse.storage.checkpoint", "dse.training.trainer"]
)  # fmt: skip


def start(function: Callable[..., None], *arguments: object, log: Path, **environment: str) -> ForkServerProcess:
    """A process that calls a module's function.

    Args:
        log: file to which its output and errors are added.
        environment: variables of its own.
    """
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # of the server
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process = _context.Process(target=_run, args=(function, arguments, str(log), environment), daemon=True)
    process.start()
    return process


def _run(function: Callable[..., None], arguments: tuple, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tqdm.set_lock(threading.RLock())  # its own takes a semaphore, which a killed process leaves
    function(*arguments)


def ended(process: ForkServerProcess, log: Path) -> str:
    """What a process logged, after its end, which must be a good one."""
    process.join(LONG)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def start_ranks(function: Callable[..., None], *arguments: object, log: Path) -> list[ForkServerProcess]:
    """Two processes that work together, with the variables that torchrun would set; both log to one file."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(function, *arguments, log=log, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
