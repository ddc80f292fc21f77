"""The Flower strategy with replies that do not fit, dtypes, metrics and wrong arguments."""

import importlib.util
import io
import logging
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]'")

from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies

from clustered_pfl import Quantile, flower
from clustered_pfl.flower import ThresholdClusteringStrategy
from clustered_pfl.tests.flower_grid import (
    RULE,
    D,
    Grid,
    answer,
    ask,
    clustered,
    draw,
    identity,  # noqa: F401
    node,
    play,
    record,
    same,
    vector,
)

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
