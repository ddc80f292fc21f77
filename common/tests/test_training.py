"""A training resumes bit-exactly, stores nothing that could run code, and says clearly what it cannot do."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from common.checkpoint import load_checkpoint, load_extra, save_checkpoint
from common.training import seed_everything, setup

WORKER = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from torch import nn
    from common.checkpoint import load_checkpoint, save_checkpoint
    from common.training import setup

    folder, last, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    run = setup(threads=1, device="cpu", seed=3)
    model = run.place(nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    first = load_checkpoint(folder, model, optimizer, scheduler=scheduler) or 0
    for step in range(first, last):
        x = torch.randn(16, 8)  # from the global generator: its state has to be restored as well
        run.backward(nn.functional.cross_entropy(model(x), torch.arange(16) % 3))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 == 10:
            save_checkpoint(folder, model, optimizer, step=10, scheduler=scheduler)
        if step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save([*model.state_dict().values(), torch.randn(4)], folder + "/end.pt")
    """
)


def train(folder, last=20, kill_at=0):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, str(folder), str(last), str(kill_at)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_killed_and_resumed_training_ends_in_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole).returncode == 0
    assert train(broken, kill_at=13).returncode == -signal.SIGKILL
    assert not (broken / "end.pt").exists()
    done = train(broken)
    assert done.returncode == 0, done.stderr
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, broken)]
    assert len(ends[0]) == len(ends[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_random_states_of_python_numpy_and_torch_come_back(tmp_path):
    model = network()
    seed_everything(5)
    save_checkpoint(tmp_path, model, step=1)
    drawn = random.random(), np.random.normal(), torch.randn(3)
    assert load_checkpoint(tmp_path, model) == 1
    again = random.random(), np.random.normal(), torch.randn(3)
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_functions_in_parameter_groups_come_from_the_code(tmp_path):
    model = network()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "rotation": lambda group: 1.0}], lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05
    save_checkpoint(tmp_path, model, optimizer, step=4)
    other = network()
    fresh = torch.optim.SGD([{"params": other.parameters(), "rotation": lambda group: 2.0}], lr=0.1, momentum=0.9)
    assert load_checkpoint(tmp_path, other, fresh) == 4
    assert fresh.param_groups[0]["lr"] == 0.05
    assert fresh.param_groups[0]["rotation"]({}) == 2.0
    buffers = [[state["momentum_buffer"] for state in o.state.values()] for o in (optimizer, fresh)]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = network()
    model[1] = nn.Linear(4, 4)
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path, model, step=1)
    other = network()
    other[1] = nn.Linear(4, 4)
    other[1].weight = other[0].weight
    load_checkpoint(tmp_path, other)
    assert other[1].weight is other[0].weight
    assert torch.equal(other[0].weight, model[0].weight)


def test_only_the_newest_checkpoint_is_kept_and_torn_ones_are_ignored(tmp_path):
    model = network()
    assert load_checkpoint(tmp_path, model) is None
    for step in (9, 10, 10):
        with torch.no_grad():
            model[0].bias.fill_(step)
        save_checkpoint(tmp_path, model, step=step, extra={"losses": [1.0, 2.0]})
    (tmp_path / ".checkpoint-torn").mkdir()
    (tmp_path / ".checkpoint-torn" / "state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path, model) == 10
    assert load_extra(tmp_path) == {"losses": [1.0, 2.0]}
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    save_checkpoint(tmp_path, model, step=11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-11.0"]


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    model = network()
    path = save_checkpoint(tmp_path, model, step=1)
    torch.save({"step": 1, "random": [Payload()], "extra": {}}, path / "state.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_checkpoint(tmp_path, model)
    assert not (tmp_path / "ran").exists()
    assert zipfile.is_zipfile(path / "state.pt")


def test_checkpoint_of_another_model_or_optimizer_is_named(tmp_path):
    save_checkpoint(tmp_path, network(), torch.optim.SGD(network().parameters(), lr=0.1), step=1)
    with pytest.raises(ValueError, match="not a checkpoint of this model"):
        load_checkpoint(tmp_path, nn.Linear(3, 3))
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    with pytest.raises(ValueError, match="1 parameter groups stored, 2 here"):
        load_checkpoint(tmp_path, model, torch.optim.SGD(groups, lr=0.1))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("threads", 0, "threads=0: must be >= 1"),
        ("accumulate", 0, "accumulate=0: must be >= 1"),
        ("precision", "fp8", "precision='fp8': must be one of fp32, bf16, fp16"),
        ("device", "tpu", "device=tpu: must be one of auto, cpu"),
    ],
)
def test_bad_setting_is_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        setup(**{argument: value})


def test_one_worker_runs_trials_of_different_precision():
    x = torch.randn(4, 8)
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        run = setup(device="cpu", precision=precision)
        layer = nn.Linear(8, 8)
        with run.autocast():
            assert layer(x).dtype == kind
        assert run.device.type == "cpu"
        assert run.is_main and run.world == 1


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    gradients = []
    for parts in (1, 4):
        run = setup(device="cpu", accumulate=parts, seed=0)
        model = run.place(network())
        wrapped = run.distribute(model)
        for micro_x, micro_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with run.accumulate(wrapped):
                run.backward(nn.functional.mse_loss(wrapped(micro_x), micro_y))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    # sums of 8 terms in another order
    bound = 8 * torch.finfo(torch.float32).eps * gradients[0].abs().max().item()
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=4 * bound)


def test_setup_seeds_all_generators():
    draws = []
    for _ in range(2):
        setup(device="cpu", seed=11)
        draws.append((random.random(), np.random.normal(), torch.randn(1).item()))
    assert draws[0] == draws[1]
