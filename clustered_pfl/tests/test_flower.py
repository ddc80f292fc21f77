"""The Flower strategy moves every node's model as Threshold-Clustering says, whatever nodes send or fail to send."""

import functools
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from clustered_pfl import Fixed, Quantile, flower, threshold_clustering
from clustered_pfl.flower import OWNER_KEY, ThresholdClusteringStrategy
from clustered_pfl.tests import flower_app

ROOT = Path(__file__).parents[2]
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


def test_models_move_by_the_clustering_of_the_updates():
    strategy, start, updates = ThresholdClusteringStrategy(**RULE), draw(D, seed=1), draw(6, D)
    ids = [50, 10, 40, 20, 60, 30]  # as they come; members are kept by id
    at = start
    arrays, metrics = play(strategy, dict(zip(ids, updates, strict=True)), start)
    order = np.argsort(ids)
    for moved in (1, 2):
        centers, members = clustered(updates[order], updates[order])
        at = np.broadcast_to(at, (6, D)) + centers
        for k, i in enumerate(np.array(ids)[order].tolist()):
            np.testing.assert_allclose(vector(strategy.models[i]), at[k], rtol=1e-6, atol=1e-6)
            assert strategy.members[i] == dict(zip(np.array(ids)[order].tolist(), members[k].tolist(), strict=True))
        np.testing.assert_allclose(vector(arrays), at.mean(0), atol=1e-6)
        assert metrics["cluster-size"] == members.sum(1).mean() and 1 < members.sum(1).mean() < 6
        if moved == 1:
            updates = draw(6, D, seed=5)
            arrays, metrics = play(strategy, dict(zip(ids, updates, strict=True)), server_round=2)


def test_momenta_are_clustered():
    strategy = ThresholdClusteringStrategy(alpha=0.25, **RULE)
    first, second = draw(5, D), draw(5, D, seed=1)
    play(strategy, dict(enumerate(first)))
    play(strategy, dict(enumerate(second)), server_round=2)
    momenta = 0.25 * second + 0.75 * first
    expected = clustered(first, first)[0] + clustered(momenta, momenta)[0]
    got = np.stack([vector(strategy.models[i]) for i in range(5)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_all_pairs_clusters_the_answers_about_each_model():
    strategy, nodes = ThresholdClusteringStrategy(exchange="all_pairs", **RULE), [2**63 + 5, 11, 12, 13, 14]
    strategy.models = {n: record(draw(D, seed=k)) for k, n in enumerate(nodes)}
    before = {n: vector(m) for n, m in strategy.models.items()}
    deltas = {(o, n): draw(D, seed=100 + 10 * k + j) for k, o in enumerate(nodes) for j, n in enumerate(nodes)}
    sent = ask(strategy, Grid(*nodes), np.zeros(D))
    replies = []
    for m in sent:
        config = m.content["config"]
        assert set(config) == {"lr", "server-round", OWNER_KEY}
        owner = config[OWNER_KEY]
        assert same(m.content["arrays"], before[owner])
        replies.append(answer(m, before[owner] + deltas[owner, node(m)], loss=float(owner == node(m))))
    assert sorted((m.content["config"][OWNER_KEY], node(m)) for m in sent) == sorted(deltas)  # N^2, once each
    _, metrics = strategy.aggregate_train(1, replies[::-1])
    assert metrics["loss"] == 1  # each node's own model only
    ids = sorted(nodes)
    for k, owner in enumerate(ids):
        # the server sees returned minus sent, rounded
        points = np.stack([before[owner] + deltas[owner, n] - before[owner] for n in ids])
        centers, members = clustered(points, points[k])
        np.testing.assert_allclose(vector(strategy.models[owner]), before[owner] + centers[0], rtol=1e-5, atol=1e-6)
        assert strategy.members[owner] == dict(zip(ids, members[0].tolist(), strict=True))


def test_an_infinite_radius_is_fedavg_and_quantile_zero_is_local_training():
    updates, start = dict(enumerate(draw(4, D))), draw(D, seed=1)
    fedavg = FedAvg()
    mean, _ = play(fedavg, updates, start)
    together = ThresholdClusteringStrategy(radius=Fixed(float("inf")), rounds=1)
    play(together, updates, start)
    alone = ThresholdClusteringStrategy(radius=Quantile(0.0))
    play(alone, updates, start)
    for i, update in updates.items():
        np.testing.assert_allclose(vector(together.models[i]), vector(mean), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(vector(alone.models[i]), start + update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exchange", ["updates", "all_pairs"])
@pytest.mark.parametrize("sent", [1e12, 1e30, np.inf, np.nan])
def test_what_an_attacker_sends_does_not_move_the_others(exchange, sent):
    def end(value):
        strategy = ThresholdClusteringStrategy(radius=Quantile(0.3), exchange=exchange)
        updates = dict(enumerate(draw(6, D)))
        for server_round in (1, 2):
            messages = ask(strategy, Grid(*range(7)), np.zeros(D), server_round)
            replies = []
            for m in messages:
                sent_model = vector(m.content["arrays"])
                replies.append(answer(m, sent_model + (updates[node(m) - 1] if node(m) else np.float32(value))))
            strategy.aggregate_train(server_round, replies)
        return [vector(strategy.models[i]) for i in range(1, 7)]

    np.testing.assert_array_equal(end(sent), end(1e6))


# --- who takes part


def test_late_joiners_start_from_the_initial_arrays_and_the_absent_keep_their_model():
    strategy, start = ThresholdClusteringStrategy(**RULE), draw(D, seed=3)
    mean, _ = play(strategy, dict(enumerate(draw(4, D))), start)
    kept = vector(strategy.models[0])
    sent = ask(strategy, Grid(1, 2, 3, 9), mean, server_round=2)
    models = {node(m): m.content["arrays"] for m in sent}
    assert same(models[9], start) and all(same(models[i], vector(strategy.models[i])) for i in (1, 2, 3))
    strategy.aggregate_train(2, [answer(m, vector(m.content["arrays"]) + 1) for m in sent])
    assert same(strategy.models[0], kept) and set(strategy.members) == {1, 2, 3, 9}
    np.testing.assert_allclose(vector(strategy.models[9]), start + 1, rtol=1e-6)


@pytest.mark.parametrize("exchange", ["updates", "all_pairs"])
def test_only_sampled_nodes_take_part(exchange):
    strategy = ThresholdClusteringStrategy(0.5, exchange=exchange)
    sent = ask(strategy, Grid(*range(10)), np.zeros(D))
    chosen = {node(m) for m in sent}
    assert len(chosen) == 5 and len(sent) == (5 if exchange == "updates" else 25)
    assert set(strategy.models) == chosen
    assert all(m.metadata.message_type == "train" for m in sent)


def test_nothing_to_train():
    strategy = ThresholdClusteringStrategy(fraction_train=0.0)
    assert ask(strategy, Grid(1, 2), np.zeros(D)) == [] and strategy.aggregate_train(1, []) == (None, None)


def test_everybody_is_evaluated_on_the_own_model():
    strategy, start = ThresholdClusteringStrategy(**RULE), draw(D, seed=3)
    mean, _ = play(strategy, dict(enumerate(draw(4, D))), start)
    config = ConfigRecord({"batch": 3})
    sent = list(strategy.configure_evaluate(1, mean, config, Grid(0, 1, 2, 3, 9)))
    assert len(sent) == 5
    for m in sent:
        assert m.metadata.message_type == "evaluate" and m.content["config"]["batch"] == 3
        assert same(m.content["arrays"], vector(strategy.models[node(m)]) if node(m) != 9 else start)
    losses = {0: 1.0, 1: 3.0, 2: 5.0, 3: 7.0}
    replies = [
        Message(RecordDict({"m": MetricRecord({"num-examples": 1 + (i == 0), "loss": loss})}), reply_to=sent[i])
        for i, loss in losses.items()
    ]
    replies.append(Message(Error(1, "gone"), reply_to=sent[4]))
    assert strategy.aggregate_evaluate(1, replies) == {"loss": pytest.approx((2 * 1 + 3 + 5 + 7) / 5)}
    assert strategy.aggregate_evaluate(1, []) is None


def test_saved_models_go_on():
    saved = {i: record(draw(D, seed=i)) for i in range(3)}
    strategy = ThresholdClusteringStrategy(radius=Quantile(0.0))
    strategy.models = dict(saved)
    play(strategy, {i: np.full(D, 2.0, np.float32) for i in range(3)})
    for i, model in saved.items():
        np.testing.assert_allclose(vector(strategy.models[i]), vector(model) + 2, rtol=1e-6)


# --- what is wrong with replies


def spoiled(kind):
    """A record of arrays that does not fit."""
    good = record(np.ones(D))
    if kind == "missing":
        return ArrayRecord({name: array for name, array in good.items() if name != "b"})
    if kind == "extra":
        return ArrayRecord({**good, "more": Array(np.ones(2))})
    if kind == "shape":
        return ArrayRecord({**good, "b": Array(np.ones((2, 1), np.float32))})
    if kind == "text":
        return ArrayRecord({**good, "b": Array(np.array(["1", "2"]))})
    if kind == "complex":
        return ArrayRecord({**good, "b": Array(np.ones(2, complex))})
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, np.ones(2))
        return ArrayRecord({**good, "b": Array("float32", (2,), "numpy.ndarray", buffer.getvalue())})
    if kind == "pickle":
        buffer = io.BytesIO()
        np.save(buffer, np.array([1, "2"], object), allow_pickle=True)
        return ArrayRecord({**good, "b": Array("float32", (2,), "numpy.ndarray", buffer.getvalue())})
    return ArrayRecord({**good, "b": Array("float32", (2,), "numpy.ndarray", b"garbage")})


@pytest.mark.parametrize("exchange", ["updates", "all_pairs"])
@pytest.mark.parametrize(
    "kind", ["error", "none", "two", "missing", "extra", "shape", "text", "complex", "npz", "pickle", "garbage"]
)
def test_replies_that_do_not_fit_are_left_out(exchange, kind, caplog):
    updates = dict(enumerate(draw(5, D)))

    def reply(m):
        if node(m) != 4:
            return answer(m, vector(m.content["arrays"]) + updates[node(m)])
        if kind == "error":
            return Message(Error(1, "out of memory"), reply_to=m)
        metrics = MetricRecord({"num-examples": 1})
        if kind == "none":
            return Message(RecordDict({"metrics": metrics}), reply_to=m)
        if kind == "two":
            content = {"one": record(np.ones(D)), "other": record(np.ones(D)), "metrics": metrics}
            return Message(RecordDict(content), reply_to=m)
        return answer(m, spoiled(kind))

    strategy = ThresholdClusteringStrategy(exchange=exchange, **RULE)
    with caplog.at_level(logging.INFO, "flwr"):
        sent = ask(strategy, Grid(*range(5)), np.zeros(D))
        strategy.aggregate_train(1, [reply(m) for m in sent])
    reference = ThresholdClusteringStrategy(exchange=exchange, **RULE)
    play(reference, {i: updates[i] for i in range(4)})
    assert strategy.members == reference.members
    assert all(same(strategy.models[i], vector(reference.models[i])) for i in range(4))
    assert same(strategy.models[4], np.zeros(D))
    assert re.search(
        r"error in reply from node 4: out of memory" if kind == "error" else "Left out .* node 4: ", caplog.text
    )


def test_an_app_without_arrays_is_refused_and_a_round_of_errors_is_not():
    strategy = ThresholdClusteringStrategy()
    sent = ask(strategy, Grid(1, 2), np.zeros(D))
    with pytest.raises(InconsistentMessageReplies, match="arrays that were sent"):
        strategy.aggregate_train(1, [Message(RecordDict({"m": MetricRecord()}), reply_to=m) for m in sent])
    assert strategy.aggregate_train(1, [Message(Error(1, ""), reply_to=m) for m in sent]) == (None, None)
    assert same(strategy.models[1], np.zeros(D))


def test_arrays_may_come_under_another_key():
    strategy = ThresholdClusteringStrategy(radius=Quantile(0.0), arrayrecord_key="model", configrecord_key="settings")
    sent = ask(strategy, Grid(1, 2), np.zeros(D))
    assert all(set(m.content) == {"model", "settings"} for m in sent)
    strategy.aggregate_train(1, [answer(m, np.ones(D)) for m in sent])  # answered under "arrays"
    assert same(strategy.models[1], np.ones(D))


def test_replies_nobody_asked_for_and_second_replies_are_ignored():
    strategy = ThresholdClusteringStrategy(radius=Quantile(0.0), exchange="all_pairs")
    sent = ask(strategy, Grid(1, 2), np.zeros(D))
    stray = Message(RecordDict(), 7, "train", group_id="1")
    lost = Message(RecordDict(), 1, "train", group_id="8")
    replies = [answer(m, np.full(D, 10.0 * node(m))) for m in sent]
    again = [answer(m, np.full(D, 99.0)) for m in [*sent, stray, lost]]
    strategy.aggregate_train(1, [*replies, *again])
    assert set(strategy.models) == set(strategy.members) == set(strategy.members[1]) == {1, 2}
    assert all(same(strategy.models[i], np.full(D, 10.0 * i)) for i in (1, 2))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_node_whose_update_is_not_finite_keeps_its_model(bad, alpha, caplog):
    strategy, updates = ThresholdClusteringStrategy(alpha=alpha, **RULE), dict(enumerate(draw(5, D)))
    play(strategy, updates)
    kept = vector(strategy.models[2])
    with caplog.at_level(logging.WARNING, "flwr"):
        play(strategy, updates | {2: np.where(np.arange(D) == 4, bad, 0)}, server_round=2)
    assert same(strategy.models[2], kept) and "Node 2 keeps its model" in caplog.text
    assert not any(row[2] for row in strategy.members.values())
    assert not any(strategy.members[2].values())
    play(strategy, updates, server_round=3)  # back in
    assert strategy.members[2][2] and np.isfinite([vector(m) for m in strategy.models.values()]).all()
    assert not same(strategy.models[2], kept)


# --- dtypes


def test_integers_stay_with_their_node():
    strategy = ThresholdClusteringStrategy(**RULE)
    start = record(np.zeros(D), seen=np.int64(0), mask=np.array([True, False]))
    updates = draw(5, D)
    for server_round in (1, 2):
        sent = ask(strategy, Grid(*range(5)), start, server_round)
        replies = []
        for m in sent:
            arrays = m.content["arrays"]
            seen = arrays["seen"].numpy() + 1 + node(m)
            back = record(vector(arrays) + updates[node(m)], seen=seen, mask=np.array([False, True]))
            replies.append(answer(m, back))
        mean, _ = strategy.aggregate_train(server_round, replies)
    for i in range(5):
        seen = strategy.models[i]["seen"]
        assert seen.numpy() == 2 * (1 + i) and seen.dtype == "int64"
        assert strategy.models[i]["mask"].numpy().tolist() == [False, True]
    reference = ThresholdClusteringStrategy(**RULE)
    play(reference, dict(enumerate(updates)))
    play(reference, dict(enumerate(updates)), server_round=2)
    assert all(same(strategy.models[i], vector(reference.models[i])) for i in range(5))
    assert mean["seen"].dtype == "int64" and mean["w"].dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_dtypes_are_kept(dtype):
    strategy, updates = ThresholdClusteringStrategy(**RULE), draw(5, D)
    sent = ask(strategy, Grid(*range(5)), record(np.zeros(D), dtype))
    mean, _ = strategy.aggregate_train(1, [answer(m, record(updates[node(m)], dtype)) for m in sent])
    wide = np.float64 if dtype == "float64" else np.float32
    points = updates.astype(dtype).astype(wide)
    centers, _ = clustered(points, points)
    for i in range(5):
        assert strategy.models[i]["w"].dtype == dtype
        ulp = np.finfo(np.dtype(dtype)).eps
        np.testing.assert_allclose(vector(strategy.models[i]), centers[i].astype(dtype), rtol=8 * ulp, atol=8 * ulp)
    assert mean["b"].dtype == dtype and mean["scale"].shape == ()


def test_bfloat16():
    def half(flat):
        bits = torch.as_tensor(flat).to(torch.bfloat16)
        raw = Array(bits.view(torch.int16).numpy().view("V2"))
        return ArrayRecord({"w": Array("bfloat16", tuple(bits.shape), raw.stype, raw.data)}), bits.float().numpy()

    strategy, updates = ThresholdClusteringStrategy(**RULE), draw(5, D)
    sent = ask(strategy, Grid(*range(5)), half(np.zeros(D))[0])
    points = np.stack([half(u)[1] for u in updates])
    strategy.aggregate_train(1, [answer(m, half(updates[node(m)])[0]) for m in sent])
    centers, _ = clustered(points, points)
    for i in range(5):
        model = strategy.models[i]["w"]
        expected, _ = half(centers[i])
        assert (model.dtype, model.shape, model.data) == ("bfloat16", (D,), expected["w"].data)


def test_a_model_that_overflows_its_dtype_is_not_taken(caplog):
    strategy = ThresholdClusteringStrategy(radius=Quantile(0.0))
    sent = ask(strategy, Grid(0, 1), record(np.full(D, -6e4), "float16"))
    full = {0: record(np.full(D, 6e4), "float16"), 1: record(np.full(D, -5e4), "float16")}
    strategy.aggregate_train(1, [answer(m, full[node(m)]) for m in sent])
    assert vector(strategy.models[0])[0] == np.float16(6e4)
    sent = ask(strategy, Grid(0, 1), record(np.zeros(D), "float16"), 2)
    single = {0: record(np.full(D, 1e5)), 1: record(np.zeros(D))}  # the client answers in float32
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy.aggregate_train(2, [answer(m, single[node(m)]) for m in sent])
    assert vector(strategy.models[0])[0] == np.float16(6e4) and "Node 0 keeps its model" in caplog.text
    assert vector(strategy.models[1])[0] == 0


# --- metrics


def test_metrics_are_averaged_over_the_replies_that_fit(caplog):
    strategy = ThresholdClusteringStrategy(radius=Quantile(0.0))
    sent = ask(strategy, Grid(*range(7)), np.zeros(D))
    said = [
        {"examples": 1, "loss": 1.0},
        {"examples": 3, "loss": 2.0},
        {"examples": float("inf"), "loss": 9.0},
        {"examples": -4, "loss": 9.0},
        {"examples": 1, "loss": [9.0, 9.0]},
        {"examples": 1, "other": 9.0},
        {"examples": 2, "loss": 4.0},
    ]
    replies = [answer(m, np.full(D, 1.0 + node(m)), **said[node(m)]) for m in sent]
    with caplog.at_level(logging.WARNING, "flwr"):
        _, metrics = strategy.aggregate_train(1, replies)
    assert metrics == {"loss": pytest.approx((1 + 6 + 8) / 6), "cluster-size": 1.0}
    assert "metrics of 4 nodes" in caplog.text and len(strategy.members) == 7
    bare = [answer(m, np.full(D, 5.0 + 3 * node(m)), examples=0) for m in sent]
    assert strategy.aggregate_train(1, bare)[1] == {"cluster-size": 1.0}


def test_the_own_aggregation_of_metrics_is_used():
    def count(contents, weighted_by):
        return MetricRecord({"n": len(contents), "weight": sum(c["metrics"][weighted_by] for c in contents)})

    strategy = ThresholdClusteringStrategy(
        train_metrics_aggr_fn=count, evaluate_metrics_aggr_fn=count, weighted_by_key="rows", exchange="all_pairs"
    )
    sent = ask(strategy, Grid(1, 2, 3), np.zeros(D))
    _, metrics = strategy.aggregate_train(1, [answer(m, np.ones(D), rows=node(m)) for m in sent])
    assert (metrics["n"], metrics["weight"]) == (3, 6)


# --- arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"radius": 0.2}, "radius=0.2: must be a rule such as Quantile"),
        ({"rounds": -1}, "rounds=-1: must be an integer >= 0"),
        ({"rounds": 1.5}, "rounds=1.5: must be an integer >= 0"),
        ({"normalize": "none"}, "normalize='none': must be 'all' or 'members'"),
        ({"exchange": "pairs"}, "exchange='pairs': must be 'updates' or 'all_pairs'"),
        ({"alpha": 0.0}, r"alpha=0.0: must be in \(0, 1\]"),
        ({"alpha": 0.5, "exchange": "all_pairs"}, "alpha=0.5: must be 1 with exchange='all_pairs'"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ThresholdClusteringStrategy(**wrong)


def test_unknown_arguments_and_unsuitable_models_are_refused():
    with pytest.raises(TypeError, match="fraction_fit"):
        ThresholdClusteringStrategy(fraction_fit=1.0)
    for arrays, error, message in [
        ({"n": np.arange(3)}, ValueError, r"arrays=\['n'\]: must hold at least one floating-point array"),
        ({"w": np.ones(2, complex)}, TypeError, r"arrays\['w'\]: complex128, must be"),
    ]:
        with pytest.raises(error, match=message):
            ask(ThresholdClusteringStrategy(), Grid(1, 2), ArrayRecord({k: Array(v) for k, v in arrays.items()}))


def test_fedavg_arguments_keep_their_names_and_places(caplog):
    strategy = ThresholdClusteringStrategy(0.5, 0.25, min_train_nodes=3)
    assert (strategy.fraction_train, strategy.fraction_evaluate, strategy.min_train_nodes) == (0.5, 0.25, 3)
    with caplog.at_level(logging.INFO, "flwr"):
        strategy.summary()
    assert "Quantile(q=0.2" in caplog.text and "Fraction: train (0.50)" in caplog.text


def test_without_flower_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    spec = importlib.util.spec_from_file_location("flower_alone", flower.__file__)
    with pytest.raises(ImportError, match=re.escape("pip install '.[flower]'")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- an app with two kinds of nodes: what it learns is checked in one process, then in Flower's own engine


def optimum(partitions):
    """Weights and bias of the regularised softmax regression on all images of these nodes."""
    network = flower_app.Network()
    parts = [flower_app.data(p) for p in partitions]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in network.parameters()) * flower_app.DECAY / 2
        value = torch.nn.functional.cross_entropy(network(images), labels) + decay
        value.backward()
        return value

    optimizer.step(loss)
    return torch.cat([network.weight.flatten(), network.bias]).detach()


def check_learned(found, exchange):
    """Personal models are near their own cluster's optimum and agree inside it; the global one is in between."""
    even, odd = optimum([0, 2, 4, 6]), optimum([1, 3, 5])
    gap = (even - odd).norm()
    to_even, to_odd = ((torch.tensor(found["fedavg"]["models"]["all"]) - x).norm() / gap for x in (even, odd))
    assert abs(to_even - to_odd) < 0.1 and min(to_even, to_odd) > 0.4
    assert found["fedavg"]["history"][-1]["accuracy"] < 0.5
    learned = found[f"{exchange}:attack"]
    models = torch.tensor([learned["models"][p] for p in range(flower_app.ATTACKER)])  # honest nodes
    own, other = (even, odd), (odd, even)
    for p, model in enumerate(models):
        assert (model - own[p % 2]).norm() / gap < (0.35 if exchange == "updates" else 0.25)
        assert (model - other[p % 2]).norm() / gap > 0.75
    apart = torch.cdist(models, models) / gap
    kind = torch.arange(len(models)) % 2
    alike = kind[:, None] == kind
    assert apart[alike].max() < 0.3 and apart[~alike].min() > 0.6
    assert learned["history"][-1]["accuracy"] > 0.78
    assert learned["sizes"] == [3.0] * len(learned["sizes"])


class LocalGrid(Grid):
    """Runs the client app in this process."""

    def __init__(self, count):
        super().__init__(*(10 + 7 * i for i in range(count)))
        config = [UserConfig({"partition-id": i, "num-partitions": count}) for i in range(count)]
        self.contexts = {
            n: Context(run_id=1, node_id=n, node_config=config[i], state=RecordDict(), run_config=UserConfig())
            for i, n in enumerate(self.nodes)
        }

    def send_and_receive(self, messages, *, timeout=None):
        return [flower_app.client(m, self.contexts[node(m)]) for m in messages]


def test_an_unchanged_client_app_learns_one_model_a_kind(monkeypatch):
    monkeypatch.setattr(flower_app, "data", functools.cache(flower_app.data))
    runs = ["fedavg", "local", "updates", "updates:attack", "all_pairs:attack", "fedavg:attack"]
    found = {run: flower_app.serve(LocalGrid(flower_app.NODES), run, 6) for run in runs}
    accuracy = {run: result["history"][-1]["accuracy"] for run, result in found.items()}
    for exchange in ("updates", "all_pairs"):
        check_learned(found, exchange)
        assert accuracy[f"{exchange}:attack"] > accuracy["local"] + 0.05
    assert abs(accuracy["updates:attack"] - accuracy["updates"]) < 0.03
    assert accuracy["fedavg:attack"] < 0.15  # the attack is one


def remaining(mark, patience=15.0):
    """Processes with this in their environment that are still there after a while."""
    end = time.monotonic() + patience
    while True:
        left = [p for p in psutil.process_iter(["environ"]) if mark.items() <= (p.info["environ"] or {}).items()]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_flower_simulation_learns_the_same_and_leaves_nothing_behind(tmp_path):
    mark = {"FLWR_HOME": str(tmp_path / "home")}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env = os.environ | mark | quiet | {"PYTHONPATH": str(ROOT)}
    app = [sys.executable, "-m", "clustered_pfl.tests.flower_app"]
    command = [*app, "fedavg", "updates:attack", "all_pairs:attack", "--rounds", "6"]
    # sockets lie in this folder, and their paths must be short
    with tempfile.TemporaryDirectory(prefix="flwr", ignore_cleanup_errors=True) as short:
        command += ["--out", str(tmp_path / "found.json"), "--ray-folder", short]
        try:
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        finally:
            left = remaining(mark)
            for process in left:
                process.kill()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not left
    assert not Path(short).exists()
    print(done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    for result in found.values():
        result["models"] = {int(p) if p.isdigit() else p: model for p, model in result["models"].items()}
    for exchange in ("updates", "all_pairs"):
        check_learned(found, exchange)
        assert len(found[f"{exchange}:attack"]["history"]) == 6
