"""Two processes give the losses of one, within rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def losses(folder, *launcher):
    command = [sys.executable, *launcher, str(WORKER), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_two_gloo_processes_give_the_losses_of_one(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two", *launcher)
    assert (one["world"], two["world"]) == (1, 2)
    assert two["wrapped"] and not one["wrapped"]
    # AdamW divides by the gradient's size, so a rounding of the gradient moves a weight by at most lr * eps a term;
    # 16 terms a batch and 6 steps
    bound = 16 * 6 * torch.finfo(torch.float32).eps
    assert one["losses"] == pytest.approx(two["losses"], rel=bound)
    assert len(set(one["losses"])) == 6
