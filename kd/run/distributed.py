"""The processes that torchrun started, or the only one."""

import os

import torch
from torch import Tensor, distributed, nn


def rank() -> int:
    """Return the number of this process; process 0 writes files and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device: str) -> torch.device:
    """Join the process group if torchrun started this process; return the device of this process."""
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def say(text: str) -> None:
    """Print in process 0."""
    if rank() == 0:
        print(text, flush=True)


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars averaged over all processes; synchronises with the device once."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist()))


def gather(value: object) -> list:
    """Return the values of all processes, ordered by rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here. If one fails, torchrun ends the others."""
    if world_size() > 1:
        distributed.barrier()


def share_buffers(module: nn.Module) -> None:
    """Copy buffers of process 0 to the others. DDP does so before each forward, so only the last update differs."""
    if world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
