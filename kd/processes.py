"""What a run needs where torchrun started several processes, and where somebody tells it to stop."""

import os
import signal
import time
from types import FrameType

import torch
from torch import Tensor, distributed, nn


def rank() -> int:
    """Return this process's number; 0 is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device: str) -> torch.device:
    """Join the other processes where torchrun started several; return this one's device."""
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars averaged over all processes, the same on each; waits once for the device."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist()))


def gather(value: object) -> list:
    """Return the value of each process, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when every process has come this far. torchrun ends all as soon as one has ended with an error."""
    if world_size() > 1:
        distributed.barrier()


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of rank 0: after a step, batch norm's statistics are each process's own."""
    if world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


class StopSignal:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that an iteration can end and its state be saved.

    A second signal, at least a second later, ends the process at once. The second in between is for torchrun, which
    passes on to its processes a Ctrl-C that the terminal has already sent to each of them.

    Attributes:
        number: of the signal that came, 0 before.
    """

    def __init__(self):
        self.number = 0
        self._time = 0.0
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._time > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self._time = number, time.monotonic()
            if rank() == 0:
                print("\nstopping after this iteration; once more to leave at once", flush=True)

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Let a data loading process outlive the signals that its parent notes; the parent ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
