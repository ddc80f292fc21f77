"""Train a tiny network for a few steps on this process's part of every batch; rank 0 prints the losses as JSON."""

import json
import os
import sys

import torch
import torch.nn.functional as F

from common.checkpoint import load_checkpoint, save_checkpoint
from common.training import setup

STEPS, BATCH = 6, 16


def main(folder: str) -> None:
    run = setup(threads=1, device="cpu")
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, BATCH, 8), torch.randint(3, (STEPS, BATCH))
    model = run.place(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    wrapped = run.distribute(model)
    losses = []
    for step in range(STEPS):
        mine = slice(run.rank, None, run.world)
        loss = F.cross_entropy(wrapped(x[step, mine]), y[step, mine])
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(run.mean(loss.detach()).item())
        if step == STEPS // 2:
            save_checkpoint(folder, wrapped, optimizer, step=step + 1)
            load_checkpoint(folder, wrapped, optimizer)
    if run.is_main:
        print(json.dumps({"losses": losses, "world": run.world, "wrapped": wrapped is not model}), flush=True)
    run.wait()
    os._exit(0)  # gloo's threads now and then abort a process on its way out ("terminate called without ...")


if __name__ == "__main__":
    main(sys.argv[1])
