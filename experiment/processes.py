"""Several processes, started by torchrun, that train one set of networks. With one process, none of this does anything.

    torchrun --standalone --nproc_per_node=2 kalei_matd3_mamujoco.py

Each process has its own environments, storage and random numbers. All hold the same networks: they start with the same
parameters, and each step takes the mean of their gradients. The first process (rank 0) logs, evaluates and saves.
"""

import os

import numpy as np
import torch
import torch.distributed as dist

from experiment.command_line import require
from experiment.hardware import device_type


def setup_processes(device):
    """(torch.device, rank, number of processes) from auto, cpu or cuda. Joins the other processes of torchrun."""
    kind = device_type(device)
    if not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return torch.device(kind), 0, 1
    if kind == "cuda":
        asked, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(asked <= gpus, f"--nproc_per_node is {asked}, expected at most {gpus}, the GPUs here, or --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(kind), *rank_and_size()


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_of_process(seed, rank):
    """`seed` for the first process, others for the others; 32 bits, since PyTorch's CPU generator keeps no more."""
    return seed if rank == 0 else int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])


def all_reduce_mean(tensors):
    """Replace tensors, in place, by their means over the processes, in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def mean_std(x):
    """Mean and standard deviation over the entries of x in all processes; x has the same shape in each."""
    if not dist.is_initialized():
        return x.mean(), x.std(correction=0)
    mean, square = moments = torch.stack([x.mean(), x.square().mean()])
    all_reduce_mean([moments])
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def broadcast_parameters(network):
    """Copy the first process's parameters to all processes, after each has drawn random ones."""
    if dist.is_initialized():
        for parameter in network.parameters():
            dist.broadcast(parameter, 0)


def broadcast_object(value):
    """Return the first process's value in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def any_process(condition, device):
    """Whether the condition holds in at least one process."""
    if not dist.is_initialized():
        return condition
    holds = torch.tensor(float(condition), device=device)
    dist.all_reduce(holds, dist.ReduceOp.MAX)
    return holds.item() > 0
