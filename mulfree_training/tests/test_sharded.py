"""Steps on parameters that `fully_shard` distributes are those on whole ones."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.tests.bitwise import assert_same

MAKERS = {
    "adamw": lambda p: PAMAdamW(p, 0.1),
    "adamw pam": lambda p: PAMAdamW(p, 0.1, scalars="pam", maximize=True),
    "sgd": lambda p: PAMSGD(p, 0.1, 0.9, 0.1, nesterov=True),
    "plain sgd": lambda p: PAMSGD(p, 0.1),
}
PROCESSES = 2
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))  # a last bias of which one process has nothing


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        for make in MAKERS.values():
            compare(make)
    finally:
        dist.destroy_process_group()


def compare(make):
    whole, sharded = network(), network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (PROCESSES,)))
    optimizers = make(whole.parameters()), make(sharded.parameters())
    for step in range(3):
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            source = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=source)
            q.grad = torch.distributed.tensor.distribute_tensor(p.grad, q.device_mesh, q.placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert_same(q.full_tensor(), p)
        for key, state in optimizers[1].state[q].items():
            if key != "step":
                assert isinstance(state, DTensor) and state.placements == q.placements
                assert_same(state.full_tensor(), optimizers[0].state[p][key])


@pytest.mark.slow
def test_steps_on_shards(tmp_path):
    mp.spawn(work, (str(tmp_path),), PROCESSES)
