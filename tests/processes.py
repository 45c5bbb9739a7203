"""A few gloo processes that take jobs: started once, shared by all tests."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

WORLD = 4
SECONDS = 60  # for a job in which a rank might wait for ever
RANKS = {1: [2], 2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}  # which processes form the group of each size


class Here(NamedTuple):
    """What a job knows of its process: rank in the group, and the group."""

    rank: int
    group: Any


def serve(process: int, connection: Any, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=process, world_size=WORLD, timeout=timedelta(seconds=40)
    )
    groups = {size: dist.new_group(ranks) for size, ranks in RANKS.items()}
    groups[WORLD] = None  # the default
    while True:
        size, function, arguments = connection.recv()
        try:
            answer = function(Here(RANKS[size].index(process), groups[size]), *arguments)
        except Exception as error:
            answer = error
        connection.send(answer)


Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(size, function, *arguments): what function(Here, *arguments) returns or raises on each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ser_reg"])
    folder = str(tmp_path_factory.mktemp("store"))
    pipes = [context.Pipe() for _ in range(WORLD)]
    processes = [
        context.Process(target=serve, args=(rank, theirs, folder), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        mine = [pipes[rank][0] for rank in RANKS[size]]
        for connection in mine:
            connection.send((size, function, arguments))
        end = time.monotonic() + SECONDS
        answered = [connection for connection in mine if connection.poll(max(0.0, end - time.monotonic()))]
        answers = [connection.recv() for connection in answered]
        if len(answers) < size:
            for process in processes:
                process.kill()
            pytest.fail(f"{size - len(answers)} of {size} ranks hang, the others: {answers}")
        return answers

    yield run
    for process in processes:
        process.kill()
