"""Start local ranks by fork, watch them, and leave none behind.

Fork after importing torch once costs 0.06 s for two ranks where spawn costs 2.8 s. The condition is
that the parent never starts an OpenMP region or a CUDA context; it only waits. Multi-node and GPU
runs start under torchrun instead (``join_torchrun``).
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from meshwright.errors import LaunchError, MeshwrightError

LINUX_PR_SET_PDEATHSIG = 1
MOST_TIMEOUT_S = 8_640_000
GRACE_S = 2.0
"""After the first failure, how long the others may take to tell what they saw."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    extra: int = 0,
) -> list[Any]:
    """Run ``function(rank, *args)`` in ``world_size`` processes joined by gloo; return the results.

    ``extra`` further processes run the same function with ranks past the world, without a process
    group (a one-process reference beside the world). Results are pickled.

    Raises ``LaunchError`` naming the rank and the cause when a rank fails, dies or is not done
    after ``timeout_s``; a ``MeshwrightError`` of a rank is raised as it is. No process outlives the
    call.
    """
    check_timeout(timeout_s)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        pipes: list[Any] = []
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size + extra):
                ours, theirs = context.Pipe(duplex=False)
                meeting = f"file://{folder}/store" if rank < world_size else ""
                process = context.Process(
                    target=_rank_main,
                    args=(
                        rank,
                        world_size,
                        meeting,
                        timeout_s,
                        theirs,
                        os.getpid(),
                        function,
                        args,
                    ),
                    daemon=True,
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            results = _collect(pipes, processes, timeout_s)
            for process in processes:
                process.join(GRACE_S)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def check_timeout(timeout_s: float) -> None:
    """Raise ``LaunchError`` unless a timeout lies between 0 and a hundred days."""
    if not 0 < timeout_s <= MOST_TIMEOUT_S:
        rule = f"It is a number of seconds above 0, at most {MOST_TIMEOUT_S}."
        raise LaunchError("timeout_s", timeout_s, rule, "Use 120.")


def _rank_main(
    rank: int,
    world_size: int,
    meeting: str,
    timeout_s: float,
    pipe: Any,
    parent: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _die_with_parent(parent)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    try:
        with process_group(rank, world_size, meeting, timeout_s):
            pipe.send(("done", function(rank, *args)))
    except BaseException as error:
        pipe.send(("failed", time.time(), *_describe(error)))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def process_group(
    rank: int, world_size: int, meeting: str, timeout_s: float
) -> Generator[None, None, None]:
    """Join the gloo world that meets at ``meeting`` (an init URL); ``""`` means stay alone.

    Leaving without error waits for everybody: a group destroyed while a peer still talks aborts.
    """
    if not meeting:
        yield
        return
    dist.init_process_group(
        "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def join_torchrun(world_size: int, timeout_s: float) -> Generator[int, None, None]:
    """Join the world that torchrun started (NCCL and gloo on GPUs, else gloo); yields the rank.

    Without torchrun this process is a world of one.

    Raises ``LaunchError`` when there are not ``world_size`` ranks or they do not meet in time.
    """
    check_timeout(timeout_s)
    started, rank = _told("WORLD_SIZE", 1), _told("RANK", 0)
    if rank >= max(1, started):
        rule = f"Of {started} ranks the last is {started - 1}."
        raise LaunchError("RANK", rank, rule, "Start with torchrun, which numbers the ranks.")
    if started != world_size:
        raise LaunchError(
            "world_size",
            started,
            f"The layout has {world_size} ranks.",
            f"torchrun --nproc-per-node {world_size} -m meshwright train ..., or other degrees.",
        )
    if under_torchrun() and sys.platform == "linux":
        # If torchrun is killed, its ranks save and end instead of going on alone.
        ctypes.CDLL(None).prctl(LINUX_PR_SET_PDEATHSIG, signal.SIGTERM)
    if started == 1:
        yield rank
        return
    store = _meet(rank, world_size, _backend(started), timeout_s)
    try:
        yield rank
        dist.barrier()
    except MeshwrightError as error:
        _tell(store, rank, str(error))
        raise
    except torch.OutOfMemoryError as error:
        rule = f"Its GPU is out of memory: {str(error).splitlines()[0]}"
        _tell(store, rank, rule)
        remedy = "Raise tp or pp, recompute, shard more, or use a smaller mbs."
        raise LaunchError("rank", rank, rule, remedy) from None
    except Exception as error:
        own = _describe(error)[1]
        if not _is_echo(own):
            _tell(store, rank, own)
            raise
        _tell(store, rank, own, lost=True)
        culprit, cause = _who_failed(store, world_size, timeout_s) or (rank, own)
        rule = f"It stopped: {cause}."
        raise LaunchError("rank", culprit, rule, "Correct the cause; resume.") from None
    finally:
        # A process that exits with its group alive can abort in the group's threads.
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _told(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "") or str(otherwise)
    if not text.isdigit():
        rule = "The environment variable holds a whole number."
        raise LaunchError(name, text, rule, "Start with torchrun, which sets it.")
    return int(text)


def _backend(world_size: int) -> str:
    """Choose this rank's GPU, or its share of the cores; return the backend to join."""
    if torch.cuda.is_available():
        local, count = _told("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= count:
            rule = f"This machine has {count} GPUs."
            raise LaunchError("LOCAL_RANK", local, rule, f"torchrun --nproc-per-node {count} ...")
        torch.cuda.set_device(local)
        return "cpu:gloo,cuda:nccl"
    beside = _told("LOCAL_WORLD_SIZE", world_size)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))
    return "gloo"


def _meet(rank: int, world_size: int, backend: str, timeout_s: float) -> Store:
    """Meet the others at the address that torchrun told, and leave word of where this rank runs."""
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _rendezvous(timeout_s)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        store.set(f"meshwright/process/{rank}", f"{os.getpid()} {socket.gethostname()}")
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0].rstrip(".")
        rule = f"The ranks did not meet: {text}."
        remedy = "Check that every rank started, and that MASTER_PORT is free."
        raise LaunchError("rank", rank, rule, remedy) from None
    return store


def _rendezvous(timeout_s: float) -> Store:
    """Return the store at the address that torchrun told. Raises ``RuntimeError`` when it fails.

    Connected to a port where something else listens, PyTorch waits for ever.
    """
    found: list[Store | BaseException] = []

    def meet() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0])
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout_s + GRACE_S)
    if not found:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RuntimeError(f"no answer from {where} in {timeout_s:g} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _tell(store: Store, rank: int, cause: str, *, lost: bool = False) -> None:
    """Leave word of a failure; ``lost``: only that the connection to others broke."""
    with contextlib.suppress(RuntimeError):
        store.set(f"meshwright/{'lost' if lost else 'failure'}/{rank}", cause)


def _who_failed(store: Store, world_size: int, timeout_s: float) -> tuple[int | str, str] | None:
    """Return the ranks that broke the connection and why.

    That is a rank's own word, its death on this host, or else the silence of ranks that have not
    even noticed. A rank that died elsewhere without a word counts as silent.
    """
    deadline = time.monotonic() + GRACE_S
    silent: list[int] = []
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            silent = []
            for rank in range(world_size):
                if store.check([f"meshwright/failure/{rank}"]):
                    return rank, store.get(f"meshwright/failure/{rank}").decode()
                pid, host = store.get(f"meshwright/process/{rank}").decode().split()
                if store.check([f"meshwright/lost/{rank}"]):
                    continue  # It ended too, after it saw that others were gone.
                if host == socket.gethostname() and not _is_running(int(pid)):
                    return rank, "its process is gone (killed, or out of memory)"
                silent.append(rank)
        time.sleep(0.1)
    if not silent:
        return None
    who = silent[0] if len(silent) == 1 else ", ".join(map(str, silent))
    return who, f"it gave no sign, with a timeout of {timeout_s:g} s"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as file:
        # A killed process that torchrun has not collected yet is a zombie.
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return True


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_Own = tuple[type[MeshwrightError], tuple[str, str, str, str]]
"""An error of ours as its class and its four attributes, which travel between processes."""


def _describe(error: BaseException) -> tuple[_Own | None, str, str]:
    if isinstance(error, MeshwrightError):
        value = error.value if isinstance(error.value, int | float | str) else str(error.value)
        return (type(error), (error.field, cast("str", value), error.rule, error.remedy)), "", ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "meshwright" in f.filename] or list(frames)
    where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
    text = str(error).strip().splitlines()
    return None, f"{type(error).__name__}: {text[0] if text else ''}", where


def _collect(pipes: list[Any], processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, tuple[float, _Own | None, str, str]] = {}
    deadline, ends = time.monotonic() + timeout_s, time.time() + timeout_s
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [r for r, pipe in waiting.items() if pipe in ready]:
            try:
                kind, *rest = waiting.pop(rank).recv()
            except EOFError:
                failures[rank] = (time.time(), None, _how_it_died(processes[rank]), "")
            else:
                if kind == "done":
                    results[rank] = rest[0]
                else:
                    failures[rank] = cast("tuple[float, _Own | None, str, str]", rest)
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    # What the engine itself gave up after the time was over is no cause of its own.
    late = {rank for rank, (at, own, *_) in failures.items() if own is None and at > ends}
    if failures.keys() - late:
        raise _first_cause(failures)
    if waiting or late:
        raise LaunchError(
            "rank",
            ", ".join(map(str, sorted({*waiting, *late}))),
            f"Not done after {timeout_s:g} s; every process was ended.",
            "Give a longer timeout, or look at what that rank waits for.",
        )
    return [results[rank] for rank in sorted(results)]


def _first_cause(
    failures: dict[int, tuple[float, _Own | None, str, str]],
) -> MeshwrightError:
    """Choose what to tell: a death or an own error before the lost connections that follow it."""

    rank, (_, own, text, where) = min(
        failures.items(), key=lambda item: (_is_echo(item[1][2]), item[1][0])
    )
    if own is not None:
        kind, attributes = own
        return kind(*attributes)
    place = f" at {where}" if where else ""
    return LaunchError("rank", rank, f"It stopped: {text}{place}.", "Every rank was ended.")


def _is_echo(text: str) -> bool:
    """Whether an error only tells that a peer is gone."""
    words = ("onnection", "gloo", "Timed out", "timed out", "peer", "Broken pipe", "NCCL")
    return text.startswith(("RuntimeError", "Dist")) and any(word in text for word in words)


def _how_it_died(process: BaseProcess) -> str:
    process.join(GRACE_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
