"""Run a function on several gloo ranks of this machine, as torchrun would start it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from nanochat import runtime as runtime_module


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """`function(runtime, *args)` on `size` ranks; what each returned, by rank.

    `function` is at module level. AssertionError with the traceback of a rank that failed;
    an exception that a rank raised on purpose is best returned as a value.
    """
    # A fork server that has imported torch starts a rank in 0.1 s instead of 3, and unlike a
    # plain fork it inherits no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat.runtime", "nanochat.optimizers"])
    port = free_port()
    ranks: list[tuple[Any, Connection]] = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank, args=(sender, rank, size, port, function, args), daemon=True
        )
        process.start()
        sender.close()
        ranks.append((process, receiver))
    try:
        return [
            _result(rank, receiver, timeout_seconds) for rank, (_, receiver) in enumerate(ranks)
        ]
    finally:
        for process, _ in ranks:
            process.join(5)
            process.kill()
            process.join()


def _result(rank: int, receiver: Connection, timeout_seconds: float) -> Any:
    if not wait([receiver], timeout_seconds):
        raise AssertionError(f"rank {rank} did not answer within {timeout_seconds} s")
    try:
        ok, value = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without an answer") from None
    if not ok:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _run_rank(
    sender: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        with runtime_module.start("cpu", dtype="float32") as runtime:
            answer = (True, function(runtime, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Plain pickle: multiprocessing's own would share tensors through file handles of a process
    # that is about to end.
    sender.send_bytes(pickle.dumps(answer))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
