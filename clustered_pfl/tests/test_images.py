"""Trials on images: metrics as one client computes them, seeds as they are alone, and a killed run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clustered_pfl.attacks import ATTACKS
from clustered_pfl.clustering import FederatedClustering, MomentumClustering
from clustered_pfl.config import RULES, AttackConfig, ImagesConfig, MethodConfig, ModelConfig, PartitionConfig
from clustered_pfl.federation import stack
from clustered_pfl.models import build as network
from clustered_pfl.radius import Fixed, Quantile, TwoMeans
from clustered_pfl.tasks import images, methods
from clustered_pfl.tasks.clients import Clients, read
from clustered_pfl.tests.trials import config, method, scratch, without_clash
from common.data import partition
from common.streams import key
from common.trials import Trial

torch.set_num_threads(1)
CPU = torch.device("cpu")
SMALL = PartitionConfig(n_clients=8, samples=30)
METHODS = {
    "fc": method(rounds=3),
    "fc in groups": method(rounds=3, groups=2, local_steps=3),
    "momentum": method("momentum_clustering", rounds=3, centers=4),
    "local": method("local"),
    "global": method("global"),
    "ground_truth": method("ground_truth"),
    "ifca": method("ifca"),
    "hypcluster": method("hypcluster", local_steps=4),
    "ditto": method("ditto"),
    "knn_per": method("knn_per", neighbours=5),
}


@pytest.fixture(scope="module", autouse=True)
def read_once():  # type: ignore[no-untyped-def]
    """The digits, read once for all trials."""
    found = read(config(ImagesConfig()), CPU)
    patch = pytest.MonkeyPatch()
    patch.setattr(images, "read", lambda values, device: found)
    yield
    patch.undo()


def trial(folder: Path, how: MethodConfig, seeds: int = 1, seed: int = 0, **values: Any) -> tuple[list[Any], list[Any]]:
    """Rows and history of a trial on the digits."""
    groups = {k: values.pop(k) for k in ("attack", "partition", "model") if k in values}
    task = ImagesConfig(**{"steps": 6, "log_every": 2, "batch_size": 8, **values})
    made = config(task, seed=seed, n_seeds=seeds, method=how, **{"partition": SMALL, **groups})
    found = Trial(folder, list(range(seed, seed + seeds)))
    return without_clash(images.run(made, found), made), found.history_rows()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The federations that trials build."""
    made: list[Any] = []
    monkeypatch.setattr(images, "build", lambda *a: made.append(methods.build(*a)) or made[-1])
    return made


@pytest.mark.parametrize("kind", ["private_label", "rotation", "label_groups"])
def test_metrics_are_those_of_every_clients_model_on_its_view(kind: str, tmp_path: Path, kept: list[Any]) -> None:
    k = 5 if kind == "label_groups" else 4
    dealt = PartitionConfig(kind=kind, n_clusters=k, n_clients=10, samples=20)
    (row,), history = trial(tmp_path, method("local"), steps=4, partition=dealt, own_test_share=True)
    splits = images.read(None, None)
    clusters = [i * k // 10 for i in range(10)]
    net = network("mlp", (1, 8, 8), 10)
    for split in ("test", "validation"):
        hits, losses, count, worst = 0.0, 0.0, 0, 1.0
        for i, c in enumerate(clusters):
            x, y = splits[split].x[i::10], splits[split].y[i::10]
            if kind == "label_groups":
                x, y = x[y // 2 == c], y[y // 2 == c]
            if kind == "rotation":
                x = partition.turn(x, c % 4)
            if kind == "private_label":
                y = (y + c) % 10
            net.load_state_dict({name: p[0, i] for name, p in kept[0].params.items()})
            logits = net(x)
            right = (logits.argmax(1) == y).float()
            hits, losses, count = (
                hits + right.sum().item(),
                losses + F.cross_entropy(logits, y, reduction="sum").item(),
                count + len(y),
            )
            worst = min(worst, right.mean().item())
        found = row if split == "test" else {f"validation_{n.partition('/')[2]}": v for n, v in history[-1].items()}
        assert found[f"{split}_accuracy"] == pytest.approx(hits / count, rel=1e-12)
        assert found[f"{split}_loss"] == pytest.approx(losses / count, rel=1e-5)
        if split == "test":
            assert row["test_worst"] == pytest.approx(worst)
    assert [step["step"] for step in history] == [2, 4] and not row["diverged"]
    assert [sum(counts) for counts in row["label_counts"]] == [20] * 10


def test_validation_is_evaluated_where_it_is_asked_for(tmp_path: Path) -> None:
    (tuned,), history = trial(tmp_path, METHODS["fc"], evaluate="validation")
    assert "test_accuracy" not in tuned
    assert tuned["validation_accuracy"] == history[-1]["validation/accuracy"]


def test_one_step_of_local_training_is_one_step_of_sgd(tmp_path: Path, kept: list[Any]) -> None:
    values = {"steps": 1, "batch_size": 30}
    trial(tmp_path, method("local", lr=0.5), seed=3, **values)
    x, y = Clients(config(ImagesConfig(**values), partition=SMALL), images.read(None, None), [3]).batch(0)
    for i in (0, 7):
        net = network("mlp", (1, 8, 8), 10, seed=key(3, images.WEIGHTS, 0))
        F.cross_entropy(net(x[0, i]), y[0, i]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(kept[0].params[name][0, i], (p - 0.5 * p.grad).detach(), rtol=1e-4, atol=1e-6)


def test_the_official_loss_is_minus_the_probability(tmp_path: Path, kept: list[Any]) -> None:
    values = {"steps": 1, "batch_size": 30}
    (row,), _ = trial(tmp_path, method("local"), loss="neg_prob", **values)
    x, y = Clients(config(ImagesConfig(**values), partition=SMALL), images.read(None, None), [0]).batch(0)
    net = network("mlp", (1, 8, 8), 10, seed=key(0, images.WEIGHTS, 0))
    (-net(x[0, 0]).softmax(1)[torch.arange(30), y[0, 0]]).mean().backward()
    name, p = next(iter(net.named_parameters()))
    torch.testing.assert_close(kept[0].params[name][0, 0], (p - 0.1 * p.grad).detach(), rtol=1e-4, atol=1e-6)
    assert row["test_loss"] > 0  # reported as cross-entropy all the same


@pytest.mark.parametrize("name", METHODS)
def test_seeds_together_are_seeds_alone(name: str, tmp_path: Path) -> None:
    together, history = trial(scratch(tmp_path, "together"), METHODS[name], seeds=3, seed=4)
    (alone,), own = trial(scratch(tmp_path, "alone"), METHODS[name], seed=5)
    assert [row["seed"] for row in together] == [4, 5, 6]
    for key_, value in together[1].items():
        # batched sums are grouped differently; float32 rounding over six steps
        assert alone[key_] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else alone[key_])
    assert len({row["test_loss"] for row in together}) == 3
    assert [row["step"] for row in own] == [row["step"] for row in history if row["seed"] == 5]


class Killed(Exception):
    pass


def killed(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, *arguments: Any, **values: Any) -> None:
    """Run a trial until it logs step `at` a second after its last checkpoint."""
    log = Trial.log

    def stop(self: Trial, metrics: dict[str, Any], step: int) -> None:
        if step == at:
            raise Killed
        log(self, metrics, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "log", stop)
        patch.setattr(images, "CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(Killed):
            trial(folder, *arguments, **values)


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_trial_goes_on_from_its_checkpoint_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"seeds": 2, "steps": 9, "log_every": 2, "redraw": True, "augment": True, "repeat_noise": False}
    if name.startswith("fc"):
        values["attack"] = AttackConfig("large_gradient", 2)  # draws from the federation's own generators
    whole = trial(scratch(tmp_path, "whole"), METHODS[name], **values)
    folder = scratch(tmp_path, "broken")
    killed(folder, monkeypatch, 6, METHODS[name], **values)
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name.startswith("checkpoint-4.")
    steps = []
    batch = Clients.batch
    monkeypatch.setattr(Clients, "batch", lambda self, step, kept=1.0: steps.append(step) or batch(self, step, kept))
    resumed = trial(folder, METHODS[name], **values)
    assert steps == [4, 5, 6, 7, 8]
    assert resumed == whole


def test_dropout_goes_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "build_network", _with_dropout)
    model = ModelConfig(dropout=0.5)
    whole = trial(scratch(tmp_path, "whole"), METHODS["fc"], model=model)
    folder = scratch(tmp_path, "broken")
    killed(folder, monkeypatch, 4, METHODS["fc"], model=model)
    assert trial(folder, METHODS["fc"], model=model) == whole
    other, _ = trial(scratch(tmp_path, "repeated"), METHODS["fc"], model=model, repeat_noise=True)
    assert other[0]["test_loss"] != whole[0][0]["test_loss"]


def _with_dropout(*arguments: Any, dropout: float = 0.0, **values: Any) -> torch.nn.Sequential:
    layers = list(network(*arguments, **values))
    return torch.nn.Sequential(layers[0], torch.nn.Dropout(dropout), *layers[1:])


def test_evaluation_has_no_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost nothing the models stay what they were, and so do their outputs."""
    monkeypatch.setattr(images, "build_network", _with_dropout)
    how = method("local", lr=1e-30)
    _, history = trial(scratch(tmp_path, "noisy"), how, model=ModelConfig(dropout=0.5))
    _, plain = trial(scratch(tmp_path, "plain"), how)
    assert len(history) == 3 and [row["validation/loss"] for row in history] == [
        pytest.approx(row["validation/loss"], rel=1e-6) for row in plain
    ]


def test_a_checkpoint_is_loaded_to_where_the_models_are() -> None:
    net = network("mlp", (1, 8, 8), 10)
    loss = images.module_loss(net, F.cross_entropy)
    here = FederatedClustering(loss, stack(net, 3), lr=0.1)
    there = FederatedClustering(loss, {k: v.to("meta") for k, v in stack(net, 3).items()}, lr=0.1)
    there.load_state_dict(here.state_dict())
    assert there.models.device.type == "meta"


def test_models_start_equal_for_clients_and_different_for_ifca(tmp_path: Path, kept: list[Any]) -> None:
    trial(tmp_path, METHODS["local"], steps=1)
    made = config(ImagesConfig(), partition=SMALL, method=METHODS["local"])
    clients = Clients(made, images.read(None, None), [0, 1])
    first = images.starts(made, clients, [0, 1])
    for values in first.values():
        assert values.shape[:2] == (2, 8) and (values == values[:, :1]).all()
    assert not torch.equal(first["1.weight"][0], first["1.weight"][1])
    for start, models, unlike in (("random", None, 4), ("equal", None, 1), ("random", 6, 6)):
        made = config(ImagesConfig(), partition=SMALL, method=MethodConfig("ifca", start=start, models=models))
        weight = images.starts(made, clients, [0])["1.weight"][0]
        assert len(weight) == (models or 4) and len(weight.flatten(1).unique(dim=0)) == unlike
    made = config(ImagesConfig(), partition=SMALL, method=MethodConfig("ifca", start="shared"))
    assert len(images.starts(made, clients, [0])["1.weight"][0]) == 1  # one object, whatever its names
    one = images.starts(config(ImagesConfig(), partition=SMALL, method=MethodConfig("ifca")), clients, [0])
    assert torch.equal(one["1.weight"][0, 0], first["1.weight"][0, 0])  # the first model is everybody's start


def test_starts_and_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method.start=crowded: must be random, equal or shared for images"):
        trial(tmp_path, MethodConfig("ifca", start="crowded"))
    with pytest.raises(ValueError, match="model.expected_parameters=7: this network has 2410 parameters"):
        trial(tmp_path, METHODS["local"], model=ModelConfig(expected_parameters=7))


def test_what_is_watched(tmp_path: Path, kept: list[Any]) -> None:
    (row,), history = trial(scratch(tmp_path, "fc"), method(rounds=3, q=0.2))
    assert {"clustering_precision", "clustering_recall", "clustering_tau"} <= row.keys()
    assert history[-1]["clustering/precision"] == row["clustering_precision"] and row["clustering_tau"] > 0
    (row,), history = trial(scratch(tmp_path, "local"), METHODS["fc in groups"], steps=7)
    assert (
        "clustering_precision" not in row and "clustering/precision" not in history[0]
    )  # the last step did not cluster
    assert "clustering/precision" in history[2]
    (row,), _ = trial(scratch(tmp_path, "ifca"), METHODS["ifca"])
    chosen = kept[-1].assignment()[0].tolist()
    assert row["clustering_occupied"] == len(set(chosen))
    assert row["clustering_exact"] == float(
        len(set(zip([0, 0, 1, 1, 2, 2, 3, 3], chosen, strict=True))) == 4 == len(set(chosen))
    )
    (row,), _ = trial(scratch(tmp_path, "equal"), MethodConfig("ifca", start="equal"), steps=1)
    assert (row["clustering_occupied"], row["clustering_exact"]) == (1, 0)  # equal models: everybody takes the first
    (row,), _ = trial(scratch(tmp_path, "alone"), METHODS["local"])
    assert not {"clustering_precision", "clustering_occupied"} & row.keys()


def test_knn_per_mixes_with_neighbours_by_the_weight_that_held_out_rows_choose(tmp_path: Path, kept: list[Any]) -> None:
    # two clusters, so that the global model is of use to some
    alike = PartitionConfig(n_clients=8, n_clusters=2, samples=30, cluster_sizes=[6, 2])
    how = method("knn_per", neighbours=3, mixtures=[0.0, 0.3, 0.5, 1.0])
    (row,), _ = trial(tmp_path, how, steps=40, own_test_share=True, partition=alike)
    made = config(ImagesConfig(batch_size=8), partition=alike, method=how)
    clients = Clients(made, images.read(None, None), [0])
    net = network("mlp", (1, 8, 8), 10)
    net.load_state_dict({name: p[0, 0] for name, p in kept[0].params.items()})

    def mixed(x: torch.Tensor, memory: torch.Tensor, labels: torch.Tensor, mix: float) -> torch.Tensor:
        out, stored = net(x), net(memory)
        near = torch.zeros(len(x), 10)
        for q, o in enumerate(out):
            gap = (stored - o).square().sum(1)
            best = gap.argsort()[:3]
            for j, w in zip(best, torch.softmax(-gap[best], 0), strict=True):
                near[q, labels[j]] += w
        return mix * near + (1 - mix) * out.softmax(1)

    hits, losses, count, weights = 0, 0.0, 0, set()
    test = images.read(None, None)["test"]
    with torch.no_grad():
        for i in range(8):
            x, y = clients.seen(clients.rows[:, i : i + 1], slice(i, i + 1))
            x, y = x[0, 0], y[0, 0]  # 24 rows are stored, 6 held out
            scores = [
                (mixed(x[24:], x[:24], y[:24], m).argmax(1) == y[24:]).float().mean().item() for m in how.mixtures
            ]
            mix = how.mixtures[scores.index(max(scores))]
            weights.add(mix)
            labels = (test.y[i::8] + i // 6) % 10
            p = mixed(test.x[i::8], x[:24], y[:24], mix)
            hits, count = hits + int((p.argmax(1) == labels).sum()), count + len(labels)
            losses -= p.gather(1, labels[:, None]).clamp_min(torch.finfo(p.dtype).tiny).log().sum().item()
    assert len(weights) > 1  # clients do choose
    assert row["test_accuracy"] == pytest.approx(hits / count, rel=1e-9)
    assert row["test_loss"] == pytest.approx(losses / count, rel=1e-4)


@pytest.mark.parametrize(("name", "share"), [("knn_per", 0.8), ("global", 1.0)])
def test_only_knn_per_keeps_rows_out_of_training(
    name: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, batch = [], Clients.batch
    monkeypatch.setattr(Clients, "batch", lambda self, step, kept=1.0: asked.append(kept) or batch(self, step, kept))
    trial(tmp_path, METHODS[name], steps=2)
    assert asked == [share, share]


def test_a_client_without_test_rows_is_not_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Clients.test_rows

    def fewer(self: Clients, split: str) -> torch.Tensor:
        found = rows(self, split)
        found[0] = -1
        return found

    monkeypatch.setattr(Clients, "test_rows", fewer)
    (row,), _ = trial(tmp_path, METHODS["local"], own_test_share=True)
    assert 0 <= row["test_worst"] < 1 and not row["diverged"]


def test_divergence_is_a_result(tmp_path: Path) -> None:
    (row,), _ = trial(tmp_path, method("local", lr=1e30), steps=4)
    assert row["diverged"]


@pytest.mark.parametrize("attack", [*ATTACKS, "label_flip"])
@pytest.mark.parametrize("name", ["local", "ground_truth", "ifca", "hypcluster", "ditto", "knn_per"])
def test_methods_that_cannot_be_attacked_refuse_attackers(attack: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"attack.name={attack}: must be none for method.name={name}"):
        trial(tmp_path, METHODS[name], attack=AttackConfig(attack, 2))


@pytest.mark.parametrize("attack", [*ATTACKS, "label_flip"])
@pytest.mark.parametrize("name", ["fc", "momentum", "global"])
def test_every_attack_runs_against_the_methods_that_face_it(attack: str, name: str, tmp_path: Path) -> None:
    (row,), _ = trial(tmp_path, METHODS[name], attack=AttackConfig(attack, 2), steps=2)
    assert row["diverged"] == (name == "global" and attack == "non_finite")


def test_every_rule_aggregates_with_and_without_attackers(tmp_path: Path) -> None:
    losses = {}
    for rule in RULES:
        for attack in (AttackConfig(), AttackConfig("large_gradient", 2)):
            folder = scratch(tmp_path, f"{rule} {attack.name}")
            (row,), _ = trial(folder, method("global", aggregate=rule), attack=attack, steps=3)
            losses[rule, attack.name] = row["test_loss"]
    robust = [rule for rule in RULES if rule != "mean"]
    assert len({losses[rule, "large_gradient"] for rule in robust}) == len(robust)
    for rule in RULES:
        assert losses[rule, "none"] < 10
        held = losses[rule, "large_gradient"] < 10  # messages of size 1e6 are left out
        assert held == (rule != "mean"), rule


def test_settings_reach_the_federation(tmp_path: Path, kept: list[Any]) -> None:
    how = method(rounds=4, groups=2, local_steps=3, lr=0.3, momentum=0.5, momentum_style="ema", q=0.3, memory_mb=5.0)
    trial(scratch(tmp_path, "fc"), how, steps=1, attack=AttackConfig("bit_flip", 2))
    fc = kept[-1]
    assert isinstance(fc, FederatedClustering)
    assert (fc.rounds, fc.groups, fc.local_steps, fc.memory_mb) == (4, 2, 3, 5.0)
    assert (fc.lr, fc.momentum, fc.momentum_style) == (0.3, 0.5, "ema")
    assert (fc.radius, fc.n_byzantine, fc.attack) == (Quantile(0.3), 2, ATTACKS["bit_flip"])
    trial(scratch(tmp_path, "mc"), method("momentum_clustering", alpha=0.3, centers=3, rounds=2), steps=1)
    mc = kept[-1]
    assert isinstance(mc, MomentumClustering) and (mc.alpha, mc.clusters, mc.rounds) == (0.3, 3, 2)
    trial(scratch(tmp_path, "ditto"), method("ditto", pull=0.25), steps=1)
    assert kept[-1].pull == 0.25
    trial(scratch(tmp_path, "ifca"), method("ifca", variant="model", local_steps=2), steps=1)
    assert (kept[-1].variant, kept[-1].local_steps) == ("model", 2)
    for rule, expected in (
        ({"rule": "fixed", "tau": 2.0, "strict": True}, Fixed(2.0, True)),
        ({"rule": "two_means"}, TwoMeans()),
        ({"quantile": 0.1, "factor": 0.99, "strict": True}, Quantile(0.1, True, 0.99)),
    ):
        values = MethodConfig().radius.__class__(**rule)
        assert methods.radius(values) == expected
