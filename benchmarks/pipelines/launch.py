"""Starts a function on several gloo processes of one thread each, and gives back what each returned."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
from collections.abc import Callable
from typing import Any


def on_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, environment: dict[str, str] | None = None
) -> list[Any]:
    """`function(*args)` on every rank, in new processes with these variables; the results by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    os.environ |= {"OMP_NUM_THREADS": "1"} | (environment or {})
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        context.Process(target=_main, args=(pipes[r][1], function, args, r, num_ranks, port)) for r in range(num_ranks)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()
    results = [here.recv() for here, _ in pipes]
    for process in processes:
        process.join()
    return results


def _main(pipe: Any, function: Callable[..., Any], args: Any, rank: int, num_ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pipe.send(function(*args))
    pipe.close()
