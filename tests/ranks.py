"""Gloo processes on this machine, each importing torch once for all tests of a run."""

import os
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import get_context

MOMENT = 3.0  # seconds for the others once a rank has failed: they may be waiting for it


class Ranks:
    """`world` processes in one group; a job that fails or hangs takes the processes with it."""

    def __init__(self, world):
        self.world, self.processes, self.pipes = world, [], []

    def run(self, function, *arguments, seconds=60):
        """What function(rank, *arguments) returns on each rank; a function of a module's top level.

        A rank's exception is raised here with its traceback, or a TimeoutError if nobody failed
        and somebody has not come back within `seconds`.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        ends, results, failures = time.monotonic() + seconds, {}, []
        while len(results) < self.world and (left := ends - time.monotonic()) > 0:
            for pipe in wait([pipe for pipe in self.pipes if pipe not in results], left):
                try:
                    results[pipe], failure = pipe.recv()
                except EOFError:
                    results[pipe], failure = None, "the process died"
                if failure is not None:
                    failures.append(f"rank {self.pipes.index(pipe)}: {failure}")
                    ends = min(ends, time.monotonic() + MOMENT)
        if failures or len(results) < self.world:
            self.stop()
            missing = self.world - len(results)
            failures.append(f"{missing} of {self.world} ranks did not come back")
            raise (TimeoutError if len(failures) == 1 else RuntimeError)("\n".join(failures))
        return [results[pipe] for pipe in self.pipes]

    def _start(self):
        context = get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, store, there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self):
        for process in self.processes:
            process.kill()
        self.processes, self.pipes = [], []


def _serve(rank, world, store, pipe):
    """A process's life: one function after another, in one process group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate asks for them
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # nobody reads them
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = pipe.recv()
            _forget_accelerate()
            answer = function(rank, *arguments), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def start_deepspeed():
    """Has this process's DeepSpeed run on its gloo group, without what it compiles for a minute."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": os.environ["WORLD_SIZE"]}
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")


def _forget_accelerate():
    """Its state is the process's own: made for one trainer, it would decide for the next."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Sent:
    """Bytes a rank gives to collectives, by their name."""

    def __init__(self, monkeypatch):
        self.bytes = {"all_gather": 0, "all_reduce": 0}
        for name, position in (("all_gather", 1), ("all_reduce", 0)):
            monkeypatch.setattr(distributed, name, self.counting(name, position))

    def counting(self, name, position):
        stock = getattr(distributed, name)

        def counted(*args, **kwargs):
            self.bytes[name] += args[position].nbytes
            return stock(*args, **kwargs)

        return counted
