"""Ranks are started, watched and ended. Provenance: ours."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meshwright.errors import LaunchError, LayoutError
from meshwright.runtime import launch
from meshwright.runtime.launch import join_torchrun, run_ranks

pytestmark = pytest.mark.parity


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _add_up(rank: int, start: int) -> float:
    x = torch.tensor(float(start + rank))
    dist.all_reduce(x)
    return float(x)


def _one_rank_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such weight")
    dist.barrier()


def _one_rank_refuses(rank: int) -> None:
    if rank == 1:
        raise LayoutError("layout.tp", 3, "It must divide 4.", "Use 2.")
    dist.barrier()


def _one_rank_is_killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _one_rank_hangs(rank: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()), encoding="ascii")
    if rank == 1:
        time.sleep(60)


def test_results_come_in_the_order_of_ranks_beyond_the_world_too() -> None:
    assert run_ranks(3, _add_up, 1, timeout_s=20) == [6.0, 6.0, 6.0]
    assert run_ranks(2, lambda rank: rank, extra=1, timeout_s=20) == [0, 1, 2]


def test_a_failing_rank_is_named_with_its_cause() -> None:
    with pytest.raises(LaunchError, match=r"rank = 1: .*ValueError: no such weight"):
        run_ranks(2, _one_rank_raises, timeout_s=20)


def test_an_error_of_ours_is_raised_as_it_is() -> None:
    with pytest.raises(LayoutError, match="It must divide 4"):
        run_ranks(2, _one_rank_refuses, timeout_s=20)


def test_a_killed_rank_is_named_and_told_apart_from_its_lost_peers() -> None:
    with pytest.raises(LaunchError, match=r"rank = 1: .*SIGKILL"):
        run_ranks(2, _one_rank_is_killed, timeout_s=20)


def test_a_rank_that_hangs_is_named_after_the_timeout_and_none_survives(tmp_path: Path) -> None:
    start_s = time.monotonic()
    with pytest.raises(LaunchError, match=r"rank = .*1.*Not done after 1 s"):
        run_ranks(2, _one_rank_hangs, str(tmp_path), timeout_s=1)
    assert time.monotonic() - start_s < 10
    pids = [int((tmp_path / str(rank)).read_text(encoding="ascii")) for rank in range(2)]
    assert not any(map(_alive, pids))


def test_what_the_engine_gives_up_after_the_time_is_no_cause() -> None:
    ours, theirs = Pipe()
    theirs.send(("failed", time.time() + 10, None, "RuntimeError: Connect timeout", "a.py:1"))
    with pytest.raises(LaunchError, match="Not done after 5 s"):
        launch._collect([ours], [], 5.0)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number_of_seconds(timeout_s: float) -> None:
    with pytest.raises(LaunchError, match="timeout_s"):
        run_ranks(1, lambda rank: rank, timeout_s=timeout_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _as_torchrun(rank: int, port: int, fault: str) -> str:
    """Meet another process as torchrun's ranks do; rank 1 has a fault. Returns what was told."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in told.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        with join_torchrun(2, timeout_s=3.0):
            if rank == 1 and fault == "hangs":
                time.sleep(7)
            if rank == 1 and fault == "disk":
                raise OSError(28, "No space left on device")
            dist.barrier()
    except LaunchError as error:
        return str(error)
    except OSError:
        return "raised as it is"
    return ""


def _never_there(rank: int, port: int) -> str:
    return _as_torchrun(rank, port, "") if rank == 0 else ""


def test_a_rank_that_gives_no_sign_is_named_within_the_timeout() -> None:
    told = run_ranks(0, _as_torchrun, _free_port(), "hangs", extra=2, timeout_s=30)
    assert told[0].startswith("rank = 1: It stopped: it gave no sign, with a timeout of 3 s")


def test_rank_0_tells_what_went_wrong_at_another() -> None:
    told = run_ranks(0, _as_torchrun, _free_port(), "disk", extra=2, timeout_s=20)
    assert told[0].startswith("rank = 1: It stopped: OSError: [Errno 28] No space left on device")
    assert told[1] == "raised as it is"


def test_ranks_that_never_come_end_the_wait() -> None:
    told = run_ranks(0, _never_there, _free_port(), extra=2, timeout_s=20)
    assert told[0].startswith("rank = 0: The ranks did not meet")


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        told = run_ranks(0, _never_there, taken.getsockname()[1], extra=1, timeout_s=20)
    assert "The ranks did not meet" in told[0]
    assert "MASTER_PORT is free" in told[0]


def test_a_rank_that_ended_after_others_were_gone_is_not_the_culprit() -> None:
    store, gone = dist.HashStore(), 2**22 + 1  # above the largest process number of Linux
    for rank in range(3):
        pid = os.getpid() if rank == 1 else gone
        store.set(f"meshwright/process/{rank}", f"{pid} {socket.gethostname()}")
    store.set("meshwright/lost/0", "Connection closed by peer")
    found = launch._who_failed(store, 3, 5.0)
    assert found == (2, "its process is gone (killed, or out of memory)")


def test_a_port_where_something_else_listens_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        start_s = time.monotonic()
        with (
            pytest.raises(LaunchError, match=f"no answer from 127.0.0.1:{port} in 1 s"),
            join_torchrun(2, 1.0),
        ):
            pass
        assert time.monotonic() - start_s < 10
    # Other tests fork, which they may not do beside a thread.
    for thread in threading.enumerate():
        if thread.name == "rendezvous":
            thread.join(10)
