"""Threshold-Clustering as a Flower strategy: it stands where an app has FedAvg, and every node gets its own model.

The client app stays as it is: it receives arrays and a config, trains, answers with arrays and metrics. The server
keeps one model a node and moves it by the Threshold-Clustering of the nodes' updates, started from the node's own:
nodes whose data ask for the same model train together, nobody says how many kinds there are, far updates count nothing.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clustered_pfl.federation import check
from clustered_pfl.radius import Quantile, Radius
from clustered_pfl.threshold import threshold_clustering

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.exception import InconsistentMessageReplies
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    raise ImportError("clustered_pfl.flower needs Flower: pip install '.[flower]'") from error

OWNER_KEY = "model-owner"
"""Config key, with exchange="all_pairs": id of the node whose model is sent. Client apps may ignore it."""
BFLOAT16 = "bfloat16"

_logger = logging.getLogger("flwr")


class ThresholdClusteringStrategy(FedAvg):
    """One model a node, trained with the nodes that want the same one.

    exchange="updates" (the idea of Momentum-Clustering): node i trains its model x_i, one message a node and round;

        Delta_i = returned_i - x_i,   x_i <- x_i + Threshold-Clustering({Delta_j}_j from Delta_i).

    exchange="all_pairs" (Federated-Clustering, as in the paper): every node trains every participant's model, N^2
    messages a round, and x_i moves by the clustering of {Delta_j(x_i)}_j from Delta_i(x_i). The client app trains N
    models a round, so it must not carry anything from one to the next, or keep it apart by config["model-owner"].

    With N nodes in a round a quantile q averages over about q N + 1 of them: below N = 1/q nodes train alone.

    Floating-point arrays are clustered, float16 and bfloat16 in float32; of all others (counters, integers) a node
    keeps what it returned itself. Batch-norm statistics are clustered like weights; GroupNorm has none. Nodes that
    join later start from the initial arrays, nodes that drop out keep their model, replies with errors or with arrays
    that do not fit are left out, and a node whose update is not finite keeps its model. All of it is logged.

    Args:
        *args, **kwargs: those of Flower's FedAvg (fraction_train, min_train_nodes, arrayrecord_key ...), same
            defaults. weighted_by_key weighs metrics only: in the clustering all nodes are equal, as anyone could claim
            a million examples.
        radius, rounds, normalize: of `threshold_clustering`; rounds is its M, not Flower's num_rounds.
        exchange: "updates" or "all_pairs".
        alpha: with "updates", cluster m_i <- alpha Delta_i + (1 - alpha) m_i (first m_i = Delta_i) instead of Delta_i;
            in (0, 1], 1 is no smoothing.

    Attributes:
        models: node id -> ArrayRecord, the personal models. May be filled before the start, to go on with saved ones.
        members: node id -> {node id: bool}, whose updates the last round averaged over for each node that trained.

    Raises:
        ValueError: a value out of range; a model without floating-point arrays.
        TypeError: an argument that FedAvg does not know; complex or opaque arrays.
    """

    def __init__(
        self,
        *args: Any,
        radius: Radius = Quantile(0.2),  # noqa: B008  (frozen)
        rounds: int = 10,
        normalize: Literal["all", "members"] = "all",
        exchange: Literal["updates", "all_pairs"] = "updates",
        alpha: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        rule = callable(radius) and hasattr(radius, "strict")
        check("radius", radius, rule, "a rule such as Quantile(0.2) or Fixed(1.0)")
        whole = isinstance(rounds, int) and not isinstance(rounds, bool)
        check("rounds", rounds, whole and rounds >= 0, "an integer >= 0")
        check("normalize", repr(normalize), normalize in ("all", "members"), "'all' or 'members'")
        check("exchange", repr(exchange), exchange in ("updates", "all_pairs"), "'updates' or 'all_pairs'")
        check("alpha", alpha, 0 < alpha <= 1, "in (0, 1]")
        check("alpha", alpha, alpha == 1 or exchange == "updates", "1 with exchange='all_pairs'")
        self.radius, self.rounds, self.normalize, self.exchange, self.alpha = radius, rounds, normalize, exchange, alpha
        self.models: dict[int, ArrayRecord] = {}
        self.members: dict[int, dict[int, bool]] = {}
        self._layout: _Layout | None = None
        self._asked: list[int] = []
        self._momenta: dict[int, Tensor] = {}

    def summary(self) -> None:
        """Log the settings."""
        _logger.info("\t├──> Threshold-Clustering:")
        _logger.info("\t│\t├── Exchange: %s | alpha: %s", self.exchange, self.alpha)
        _logger.info("\t│\t└── Radius: %s | rounds: %d | normalize: %s", self.radius, self.rounds, self.normalize)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send sampled nodes their own model or, with "all_pairs", everybody's; those without one start from `arrays`.

        Only the first `arrays` count, the initial ones: later it is the mean model, which nobody trains.
        """
        layout = self._layout = self._layout or _Layout.of(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = sorted(message.metadata.dst_node_id for message in messages)
        for node in self._asked:
            self.models.setdefault(node, layout.initial)
        if self.exchange == "updates":
            return [self._personal(message, self.models[message.metadata.dst_node_id]) for message in messages]
        return [self._about(message, config, owner) for owner in self._asked for message in messages]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send sampled nodes their own model; those that never trained, the initial one."""
        initial = self._layout.initial if self._layout else arrays
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return [self._personal(message, self.models.get(message.metadata.dst_node_id, initial)) for message in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move every model whose owner answered.

        Returns:
            The mean of all personal models (a summary for `Result.arrays`; no node receives it, and an attacker's own
            model spoils it: use `models`), and the metrics of the nodes on their own models, with "cluster-size", the
            mean number of updates averaged over. None and None when nobody answered.

        Raises:
            InconsistentMessageReplies: there were answers, but none with the arrays that were sent.
        """
        answered = self._answered(replies, "aggregate_train")
        about = self._by_owner(answered)
        together = [sorted(about)] if self.exchange == "updates" else [[owner] for owner in sorted(about)]
        self.members, own, readable = {}, [], 0
        for owners in together:
            sent = {owner: self._flat(self.models[owner]) for owner in owners}
            replied = [(owner, message) for owner in owners for message in about[owner]]
            updates = {m.metadata.src_node_id: u for o, m in replied if (u := self._read(sent[o], m)) is not None}
            readable += len(updates)
            sent = {owner: model for owner, model in sent.items() if owner in updates}
            if sent:
                self._smooth(updates)
                self._move(sent, updates)
                own += [updates[owner].content for owner in sent]
        if not readable:
            if answered:
                raise InconsistentMessageReplies("No reply had the arrays that were sent, in name and shape.")
            return None, None
        metrics = self._average(own, self.train_metrics_aggr_fn) or MetricRecord()
        if self.members:
            metrics["cluster-size"] = sum(sum(row.values()) for row in self.members.values()) / len(self.members)
        return self._mean(), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the metrics of the nodes, each on its own model."""
        answered = self._answered(replies, "aggregate_evaluate")
        return self._average([message.content for message in answered], self.evaluate_metrics_aggr_fn)

    def _personal(self, message: Message, model: ArrayRecord) -> Message:
        """The message with this model in place of the global one."""
        message.content = RecordDict({**message.content, self.arrayrecord_key: model})
        return message

    def _about(self, message: Message, config: ConfigRecord, owner: int) -> Message:
        """A message like this one about the owner's model; a reply inherits its group_id, which says whose it is."""
        content = RecordDict({**message.content, self.configrecord_key: ConfigRecord({**config, OWNER_KEY: owner})})
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        return self._personal(Message(content, node, kind, group_id=str(owner)), self.models[owner])

    def _answered(self, replies: Iterable[Message], stage: str) -> list[Message]:
        """Replies with content; errors are logged."""
        replies = list(replies)
        failed = [message for message in replies if message.has_error()]
        answered = [message for message in replies if message.has_content()]
        if replies:
            _logger.info("%s: Received %d results and %d failures", stage, len(answered), len(failed))
        for message in failed:
            node, reason = message.metadata.src_node_id, message.error.reason
            _logger.info("\t> Received error in reply from node %d: %s", node, reason)
        return answered

    def _by_owner(self, answered: list[Message]) -> dict[int, list[Message]]:
        """Owner of the model -> replies about it, one a node that was asked, in the order of their ids."""
        owners = {str(node): node for node in self._asked}
        about: dict[int, dict[int, Message]] = {}
        for message in answered:
            sender = message.metadata.src_node_id
            owner = sender if self.exchange == "updates" else owners.get(message.metadata.group_id)
            if sender in self._asked and owner is not None:
                about.setdefault(owner, {}).setdefault(sender, message)
        return {owner: [messages[sender] for sender in sorted(messages)] for owner, messages in about.items()}

    def _flat(self, model: ArrayRecord) -> Tensor:
        """The clustered part of a model, (D,)."""
        assert self._layout is not None  # models are sent before replies come
        return self._layout.flatten(model)

    def _read(self, sent: Tensor, message: Message) -> _Update | None:
        """The update of the model `sent` (D,) in a reply; None, with a warning, if its arrays are not the model's."""
        content = message.content
        try:
            record = content.get(self.arrayrecord_key)
            if not isinstance(record, ArrayRecord):
                (record,) = content.array_records.values()
            return _Update(self._flat(record) - sent, record, content)
        except Exception as problem:  # a reply is hostile until read: nothing in it may stop the others
            _logger.warning("Left out the reply of node %d: %s", message.metadata.src_node_id, problem)
            return None

    def _smooth(self, updates: dict[int, _Update]) -> None:
        """Put momenta in place of updates; what is not finite stays out of them."""
        if self.alpha == 1:
            return
        for node, update in updates.items():
            if update.delta.isfinite().all():
                last = self._momenta.get(node)
                update.delta = update.delta if last is None else last.lerp(update.delta, self.alpha)
                self._momenta[node] = update.delta

    def _move(self, sent: dict[int, Tensor], updates: dict[int, _Update]) -> None:
        """x_i <- x_i + Threshold-Clustering of the updates from the owner's own; sent: owner -> x_i (D,)."""
        assert self._layout is not None
        nodes = list(updates)
        points = torch.stack([updates[node].delta for node in nodes])  # (N, D)
        owners = [node for node in nodes if node in sent]
        starts = points[[nodes.index(owner) for owner in owners]]  # (K, D)
        options: dict[str, Any] = {"radius": self.radius, "rounds": self.rounds, "normalize": self.normalize}
        found = threshold_clustering(points, starts, **options)
        for owner, center, members in zip(owners, found.centers, found.members.tolist(), strict=True):
            self.members[owner] = dict(zip(nodes, members, strict=True))
            moved = self._layout.record(sent[owner] + center, updates[owner].record)
            if self._flat(moved).isfinite().all():  # as written: float16 overflows early
                self.models[owner] = moved
            else:
                _logger.warning("Node %d keeps its model: its update is not finite.", owner)

    def _average(
        self, contents: list[RecordDict], aggregate: Callable[[list[RecordDict], str], MetricRecord]
    ) -> MetricRecord | None:
        """Aggregate the metrics that fit together: those of the commonest form; one odd reply must not stop a run."""
        forms = [self._form(content) for content in contents]
        common = Counter(form for form in forms if form is not None).most_common(1)
        same = [content for content, form in zip(contents, forms, strict=True) if common and form == common[0][0]]
        if len(same) < len(contents):
            rule = f"one MetricRecord with '{self.weighted_by_key}' > 0 and the keys of the others"
            _logger.warning("Left out the metrics of %d nodes: must be %s.", len(contents) - len(same), rule)
        return aggregate(same, self.weighted_by_key) if same else None

    def _form(self, content: RecordDict) -> tuple[tuple[str, int], ...] | None:
        """Keys and lengths of a reply's metrics (-1 for a number); None without one MetricRecord and a weight."""
        records = list(content.metric_records.values())
        weight = records[0].get(self.weighted_by_key) if len(records) == 1 else None
        if not isinstance(weight, int | float) or not (weight > 0 and math.isfinite(weight)):
            return None
        return tuple(sorted((key, len(v) if isinstance(v, list) else -1) for key, v in records[0].items()))

    def _mean(self) -> ArrayRecord:
        """Mean of the personal models; arrays that are not clustered as the first node has them."""
        assert self._layout is not None
        total = torch.zeros(self._layout.size, dtype=torch.float64)
        for model in self.models.values():
            total += self._layout.flatten(model)
        mean = (total / len(self.models)).to(self._layout.dtype)
        return self._layout.record(mean, self.models[min(self.models)])


@dataclass
class _Update:
    """A reply about one model: returned minus sent (D,), and the records it came in."""

    delta: Tensor
    record: ArrayRecord
    content: RecordDict


@dataclass(frozen=True)
class _Layout:
    """Where the floating-point arrays of a model lie in a flat vector of D numbers."""

    initial: ArrayRecord
    floats: tuple[str, ...]
    dtype: torch.dtype
    """Of the flat vector: float64 if any array has more than 32 bits, else float32."""

    @classmethod
    def of(cls, model: ArrayRecord) -> _Layout:
        """Layout of a model.

        Raises:
            TypeError: complex or opaque arrays.
            ValueError: no floating-point array.
        """
        kinds = {name: _kind(array) for name, array in model.items()}
        for name, kind in kinds.items():
            if kind is not None and kind.kind not in "fiub":
                raise TypeError(f"arrays[{name!r}]: {kind}, must be floating-point, integer or bool")
        floats = {name: kind for name, kind in kinds.items() if kind is None or kind.kind == "f"}
        if not floats:
            raise ValueError(f"arrays={list(model)}: must hold at least one floating-point array")
        wide = any(kind is not None and kind.itemsize > 4 for kind in floats.values())
        return cls(model, tuple(floats), torch.float64 if wide else torch.float32)

    @property
    def size(self) -> int:
        """D."""
        return sum(math.prod(self.initial[name].shape) for name in self.floats)

    def flatten(self, record: ArrayRecord) -> Tensor:
        """The floating-point arrays of a record as one vector (D,).

        Raises:
            ValueError: names or shapes other than the model's, or values that are no numbers.
        """
        if set(record) != set(self.initial):
            raise ValueError(f"arrays={sorted(record)}: must be {sorted(self.initial)}")
        flat = np.empty(self.size, np.float64 if self.dtype == torch.float64 else np.float32)
        at = 0
        for name, like in self.initial.items():
            values = _decode(record[name]) if name in self.floats else record[name].numpy()
            if (
                not isinstance(values, np.ndarray)
                or values.shape != tuple(like.shape)
                or values.dtype.kind not in "fiub"
            ):
                raise ValueError(f"arrays[{name!r}]: must be numbers of shape {tuple(like.shape)}")
            if name in self.floats:
                with np.errstate(over="ignore"):  # becomes infinite, and is treated so
                    flat[at : at + values.size] = values.reshape(-1)
                at += values.size
        return torch.from_numpy(flat)

    def record(self, flat: Tensor, others: ArrayRecord) -> ArrayRecord:
        """The model with floating-point arrays from a vector (D,), in their own dtypes, and all else from `others`."""
        values, at, new = flat.numpy(), 0, {}
        for name, like in self.initial.items():
            if name in self.floats:
                size = math.prod(like.shape)
                new[name] = _encode(values[at : at + size].reshape(like.shape), like)
                at += size
            else:
                new[name] = others[name]
        return ArrayRecord(new)


def _kind(array: Array) -> np.dtype | None:
    """NumPy dtype of an array; None for bfloat16, which NumPy does not have."""
    return None if array.dtype == BFLOAT16 else np.dtype(array.dtype)


def _decode(array: Array) -> np.ndarray:
    """Values of an array; those of bfloat16, two opaque bytes to NumPy, as float32."""
    values = array.numpy()
    if array.dtype != BFLOAT16:
        return values
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _encode(values: np.ndarray, like: Array) -> Array:
    """An array of the dtype of another one."""
    if like.dtype == BFLOAT16:
        half = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16)
        return Array(BFLOAT16, tuple(like.shape), like.stype, Array(half.numpy().view("V2")).data)
    with np.errstate(over="ignore"):
        return Array(values.astype(np.dtype(like.dtype)))
