"""An ordinary Flower app, PyTorch softmax regression on eight nodes, with FedAvg or with one model a node.

    python -m clustered_pfl.tests.flower_app fedavg local updates updates:attack all_pairs --rounds 8

Nodes 0, 2, 4, 6 label a handwritten digit y as y, nodes 1, 3, 5, 7 as 9 - y: no single model suits both. Each has 60
images, and is tested on 397 others. Under attack node 7 returns weights of a million for class 0 and of minus a million
for all others.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits
from torch import nn

from clustered_pfl import Quantile
from clustered_pfl.flower import ThresholdClusteringStrategy

NODES, IMAGES, TEST = 8, 60, 397
ATTACKER = NODES - 1
DECAY = 1e-2


class Network(nn.Linear):
    """Softmax regression with an integer, the number of its node: such arrays stay with their node."""

    def __init__(self):
        super().__init__(64, 10)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("node", torch.tensor(-1))


def data(partition: int):
    """Training images and labels of a node, and test images and labels as it sees them."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    labels = labels if partition % 2 == 0 else 9 - labels
    own = slice(TEST + partition * IMAGES, TEST + (partition + 1) * IMAGES)
    return images[own], labels[own], images[:TEST], labels[:TEST]


client = ClientApp()


def setup(message: Message, context: Context):
    """The model sent, with the number and the data of this node."""
    torch.set_num_threads(1)
    partition = int(context.node_config["partition-id"])
    network = Network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return network, partition, data(partition)


@client.train()
def train(message: Message, context: Context) -> Message:
    network, partition, (images, labels, _, _) = setup(message, context)
    config = message.content["config"]
    optimizer = torch.optim.SGD(network.parameters(), lr=config["lr"], weight_decay=DECAY)
    for _ in range(config["local-steps"]):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    network.node.fill_(partition)
    if config["attack"] and partition == ATTACKER:  # everything is a zero
        for p in network.parameters():
            nn.init.constant_(p, -1e6)
            nn.init.constant_(p[0], 1e6)
    metrics = MetricRecord({"train-loss": loss.item(), "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    network, partition, (_, _, images, labels) = setup(message, context)
    with torch.no_grad():
        scores = network(images)
    loss = nn.functional.cross_entropy(scores, labels).item()
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "node": partition, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


STRATEGIES = {
    "fedavg": FedAvg,
    "updates": partial(ThresholdClusteringStrategy, radius=Quantile(0.25)),
    "all_pairs": partial(ThresholdClusteringStrategy, radius=Quantile(0.25), exchange="all_pairs"),
    "local": partial(ThresholdClusteringStrategy, radius=Quantile(0.0)),  # everybody alone
}


def serve(grid: Grid, run: str, rounds: int, lr: float = 0.5, local_steps: int = 20) -> dict:
    """Train with one of the strategies, by name or name:attack.

    Returns:
        history: loss and accuracy of every round, mean of the honest nodes; models: flat weights of every node, or of
        "all"; sizes: mean cluster size of every round.
    """
    name, _, attack = run.partition(":")
    history: list[dict[str, float]] = []

    def average(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        honest = [c["metrics"] for c in contents if not (attack and c["metrics"]["node"] == ATTACKER)]
        mean = {key: sum(m[key] for m in honest) / len(honest) for key in ("loss", "accuracy")}
        history.append(mean)
        print(
            f"{run:>16}  round {len(history):2}  loss {mean['loss']:.3f}  accuracy {mean['accuracy']:.1%}", flush=True
        )
        return MetricRecord(mean)

    strategy = STRATEGIES[name](min_train_nodes=NODES, evaluate_metrics_aggr_fn=average)
    config = ConfigRecord({"lr": lr, "local-steps": local_steps, "attack": bool(attack)})
    result = strategy.start(grid, ArrayRecord(Network().state_dict()), num_rounds=rounds, train_config=config)
    models = getattr(strategy, "models", {})
    personal = {int(model["node"].numpy()): flat(model) for model in models.values()}
    sizes = [metrics.get("cluster-size", NODES) for metrics in result.train_metrics_clientapp.values()]
    return {"history": history, "models": personal or {"all": flat(result.arrays)}, "sizes": sizes}


def flat(arrays: ArrayRecord) -> list[float]:
    """Weight and bias as one list."""
    return [*arrays["weight"].numpy().ravel().tolist(), *arrays["bias"].numpy().tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help=f"{', '.join(STRATEGIES)}; with :attack, one node is hostile")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--ray-folder", help="of temporary files; the path must be short")
    options = parser.parse_args()
    server = ServerApp()

    @server.main()
    def serve_all(grid: Grid, context: Context) -> None:
        found = {run: serve(grid, run, options.rounds) for run in options.runs}
        if options.out:
            options.out.write_text(json.dumps(found))

    ray = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    if options.ray_folder:
        ray["_temp_dir"] = options.ray_folder
    backend = {"init_args": ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=NODES, backend_config=backend)


if __name__ == "__main__":
    main()
