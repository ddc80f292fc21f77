"""The Flower strategy moves every node's model as Threshold-Clustering says."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]'")

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from clustered_pfl import Fixed, Quantile
from clustered_pfl.flower import OWNER_KEY, ThresholdClusteringStrategy
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
