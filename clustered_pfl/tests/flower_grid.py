"""Nodes and messages without a network, for the tests of the Flower strategy."""

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clustered_pfl import Quantile, threshold_clustering

SHAPES = {"w": (3, 2), "b": (2,), "scale": ()}
D = 9
RULE = {"radius": Quantile(0.4), "rounds": 4}


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Messages name the task that sends them."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes, by id."""

    def __init__(self, *nodes):
        self.nodes = list(nodes)

    def get_node_ids(self):
        return self.nodes


def record(flat, dtype=np.float32, **others):
    """A model from D numbers."""
    values, at, arrays = np.asarray(flat), 0, {}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        arrays[name] = Array(values[at : at + size].reshape(shape).astype(dtype))
        at += size
    return ArrayRecord(arrays | {name: Array(np.asarray(value)) for name, value in others.items()})


def vector(model):
    return np.concatenate([model[name].numpy().reshape(-1) for name in SHAPES])


def same(model, flat):
    return np.array_equal(vector(model), np.asarray(flat, np.float32))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def answer(message, flat, examples=1, **metrics):
    """A reply with this model."""
    arrays = flat if isinstance(flat, ArrayRecord) else record(flat)
    found = MetricRecord({"num-examples": examples, **metrics})
    return Message(RecordDict({"arrays": arrays, "metrics": found}), reply_to=message)


def node(message):
    return message.metadata.dst_node_id


def ask(strategy, grid, start, server_round=1):
    arrays = start if isinstance(start, ArrayRecord) else record(start)
    return list(strategy.configure_train(server_round, arrays, ConfigRecord({"lr": 0.1}), grid))


def play(strategy, updates, start=None, server_round=1):
    """One round in which node i answers with the model it was sent, plus updates[i]."""
    start = np.zeros(D) if start is None else start
    sent = ask(strategy, Grid(*updates), start, server_round)
    replies = [answer(m, vector(m.content["arrays"]) + updates[node(m)]) for m in sent]
    return strategy.aggregate_train(server_round, replies)


def clustered(points, starts, **rule):
    found = threshold_clustering(torch.as_tensor(points), torch.as_tensor(starts), **(rule or RULE))
    return found.centers.numpy(), found.members.numpy()


# --- the method
