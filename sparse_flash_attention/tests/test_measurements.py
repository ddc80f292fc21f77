"""What the timing, coverage and exactness trials measure, against counts by hand and planted faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.streams import generator
from sparse_flash_attention import naive_qk_sparse_attention, operator, qk_sparse_attention
from sparse_flash_attention.hashing import lsh_hash, random_buckets, random_keep
from sparse_flash_attention.kernels import cpp_face, torch_face
from sparse_flash_attention.reference import masked_attention, visible
from sparse_flash_attention.tasks import coverage, exactness, runtime, step, timing
from sparse_flash_attention.tests.trials import config, run

FAST = ["device=cpu", "threads=1", "tracking.mode=disabled", "n_seeds=2", "seed=4"]


def small(*overrides: str) -> Any:
    return config(*FAST, *overrides)


RUNTIME = ["task=runtime", "task.length=96", "task.batch=2", "task.heads=3", "task.head_dim=16", "task.naive=true"]
KEEPS, COUNTS = ("1", "0.7", "0.5", "0.3", "0.1"), (2, 8, 16, 32)


def test_every_contender_is_timed_on_masks_and_buckets_of_its_seed(tmp_path: Path) -> None:
    chosen = small(*RUNTIME)
    rows, _ = run(tmp_path, chosen)
    assert [row["seed"] for row in rows] == [4, 5]
    timed = ["dense", *(f"{kind}_{k}" for k in KEEPS for kind in ("keep", "naive")), *(f"buckets_{n}" for n in COUNTS)]
    shares = [*(f"density_keep_{k}" for k in KEEPS), *(f"density_buckets_{n}" for n in COUNTS)]
    for row in rows:
        assert set(row) == {"seed", *shares, *(f"{name}_ms" for name in timed)}
        assert all(row[f"{name}_ms"] > 0 for name in timed)
    shape = (2, 3, 96)
    pairs = 6 * 96 * 97 / 2
    for row in rows:
        for k in KEEPS:
            rng = generator(row["seed"], runtime.MASKS, round(float(k) * 1000))
            q_keep, k_keep = (random_keep(shape, float(k), rng) for _ in range(2))
            assert row[f"density_keep_{k}"] == pytest.approx(int(visible((*shape, 96), q_keep, k_keep).sum()) / pairs)
        for n in COUNTS:
            ids = random_buckets(shape, n, generator(row["seed"], runtime.BUCKETS, n))
            live = int(visible((*shape, 96), q_hash=ids, k_hash=ids).sum())
            assert row[f"density_buckets_{n}"] == pytest.approx(live / pairs)
    assert rows[0]["density_keep_1"] == 1 and rows[0]["density_keep_0.5"] != rows[1]["density_keep_0.5"]


def test_contenders_compute_what_they_are_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every timed call is attention over the mask whose density is noted."""
    seen: dict[str, Tensor] = {}

    def watched(calls: Any, rounds: int, device: torch.device) -> dict[str, float]:
        return dict.fromkeys(calls, 1.0)

    def noting(task: Any, seed: int, device: torch.device, row: dict[str, Any]) -> Any:
        found = attentions(task, seed, device, row)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 3, 96, 16, dtype=torch.float64)
        for name, attention in found.items():
            weights = attention(q, k, torch.eye(96, dtype=torch.float64).expand(2, 3, 96, 96))
            seen[f"{seed} {name}"] = weights
            share = (weights != 0).sum().item() / (6 * 96 * 97 / 2)
            noted = row.get(f"density_{name.replace('naive', 'keep')}", 1.0)
            assert share == pytest.approx(noted), name
            mask = weights != 0
            assert torch.allclose(attention(q, k, v), masked_attention(q, k, v, mask, 0.25), atol=1e-10), name
        return found

    attentions = runtime._attentions
    monkeypatch.setattr(runtime, "_attentions", noting)
    monkeypatch.setattr(runtime, "fastest", watched)
    run(tmp_path, small(*RUNTIME))
    assert len(seen) == 2 * (1 + 2 * len(KEEPS) + len(COUNTS))


@pytest.mark.parametrize("task", ["runtime", "step"])
def test_max_steps_shortens_the_measurement_and_not_the_config(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"runtime": runtime, "step": step}[task]
    lengths = []
    draw = torch.randn if task == "runtime" else torch.randint

    def noting(*args: Any, **options: Any) -> Tensor:
        found = draw(*args, **options)
        lengths.append(max(found.shape[1:3]))
        return found

    monkeypatch.setattr(module.torch, draw.__name__, noting)
    options = ["task.keeps=[0.1]", "task.buckets=[32]"] if task == "runtime" else ["task.drops=[]", "model.d_model=16"]
    chosen = small(f"task={task}", "task.length=4096", "max_steps=1", "n_seeds=1", "model.context=4096", *options)
    rows, _ = run(tmp_path, chosen)
    assert chosen.task.length == 4096 and rows[0]["dense_ms"] > 0
    assert lengths and max(lengths) <= module.SMALL + 1


def test_step_times_every_model(tmp_path: Path) -> None:
    sizes = ["model.vocab=20", "model.d_model=16", "model.n_head=2", "model.context=64"]
    rows, _ = run(tmp_path, small("task=step", "task.length=64", "task.buckets=[4,8]", "task.drops=[0.3]", *sizes))
    assert [row["seed"] for row in rows] == [4, 5]
    assert set(rows[0]) == {"seed", "dense_ms", "hash_4_ms", "hash_8_ms", "drop_0.3_ms"}
    assert all(value > 0 for row in rows for name, value in row.items() if name.endswith("_ms"))
    with pytest.raises(ValueError, match="task.length=65: must be <= model.context=64"):
        run(tmp_path, small("task=step", "task.length=65", *sizes))


def test_a_timed_step_trains_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward, backward and an update; not, say, a forward alone."""
    moved: dict[str, bool] = {}

    def watched(calls: Any, rounds: int, device: torch.device) -> dict[str, float]:
        for name, call in calls.items():
            model = call.__closure__[[c for c in call.__code__.co_freevars].index("model")].cell_contents
            before = [p.detach().clone() for p in model.parameters()]
            call()
            moved[name] = all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert all(p.grad is None for p in model.parameters())
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(step, "fastest", watched)
    sizes = ["model.vocab=20", "model.d_model=16", "model.n_head=2", "model.context=64"]
    run(tmp_path, small("task=step", "task.length=64", "task.buckets=[4]", "task.drops=[0.3]", *sizes))
    assert moved == {"dense": True, "hash_4": True, "drop_0.3": True}


def test_fastest_takes_turns_and_keeps_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"now": 0.0}
    costs = {"a": iter([0.5, 0.2, 0.3]), "b": iter([0.1, 0.4, 0.2])}

    def call(name: str) -> Any:
        def made() -> None:
            order.append(name)
            clock["now"] += next(costs[name])

        return made

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    found = timing.fastest({name: call(name) for name in costs}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 3 and found == pytest.approx({"a": 200.0, "b": 100.0})


def test_a_training_pass_is_forward_and_backward() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    assert timing.training_pass(lambda a: a**3, (x,))() == (torch.tensor([12.0]),)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_the_naive_way_equals_the_reference(keep: float, length: int) -> None:
    torch.manual_seed(length)
    q, k, v, grad = torch.randn(4, 2, 3, length, 8, dtype=torch.float64)
    q_keep, k_keep = (random_keep((2, 3, length), keep) for _ in range(2))
    k_keep[0, 0] = False  # a head without any key
    found = []
    for attention in (naive_qk_sparse_attention, qk_sparse_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        options = {} if attention is naive_qk_sparse_attention else {"backend": "reference"}
        out = attention(*leaves, q_keep, k_keep, **options)
        found.append([out, *torch.autograd.grad(out, leaves, grad, allow_unused=True)])
    for mine, exact in zip(*found, strict=True):
        assert torch.allclose(mine, exact, atol=1e-12) and torch.isfinite(mine).all()


def brute_coverage(ids: Tensor, chunk: int) -> float:
    """Share of same-bucket causal pairs in the same or the next chunk of the sorted rows, pair by pair."""
    shares = []
    for row in ids.flatten(0, -2).tolist():
        order = sorted(range(len(row)), key=lambda t: (row[t], t))
        place = {t: rank // chunk for rank, t in enumerate(order)}
        pairs = [(t, u) for t in range(len(row)) for u in range(t + 1) if row[t] == row[u]]
        shares.append(sum(place[t] - place[u] in (0, 1) for t, u in pairs) / len(pairs))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("hashing", ["uniform", "angular"])
def test_coverage_is_that_of_all_pairs(hashing: str, tmp_path: Path) -> None:
    chosen = small(
        "task=coverage", "task.length=200", "task.heads=2", "task.n_buckets=4", "task.chunk=16",
        f"task.hashing={hashing}",
    )  # fmt: skip
    rows, _ = run(tmp_path, chosen)
    for row in rows:
        rng = generator(row["seed"], coverage.HASHES)
        if hashing == "uniform":
            ids = random_buckets((1, 2, 200), 4, rng)
        else:
            ids = lsh_hash(torch.randn(1, 2, 200, 32, generator=rng), 4, generator=rng)
        assert row["ours"] == 1.0 and row["reformer"] == pytest.approx(brute_coverage(ids, 16))
    assert 0.3 < rows[0]["reformer"] < 0.9 and rows[0]["reformer"] != rows[1]["reformer"]
    once = small("task=coverage", "task.length=100000", "max_steps=1", "n_seeds=1")
    assert run(tmp_path, once)[0][0]["reformer"] > 0.9 and once.task.length == 100000  # 256 rows


def test_coverage_of_ours_is_counted_and_not_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = coverage.plan

    def short(*args: Any, **options: Any) -> Any:
        made = plan(*args, **options)
        lost = made.k_end.clone()
        lost[0, -1] -= 1
        return made._replace(k_end=lost)

    monkeypatch.setattr(coverage, "plan", short)
    rows, _ = run(tmp_path, small("task=coverage", "task.length=200"))
    assert all(0.99 < row["ours"] < 1 for row in rows)


EXACT = ["task=exactness", "task.patterns=12", "task.longest=120"]


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [("fp32", 1e-5, 1e-5), ("bf16", 3e-2, 6e-2), ("fp16", 4e-3, 8e-3)]
)
@pytest.mark.parametrize("backend", ["null", "torch"])
def test_exactness_of_what_runs_here(backend: str, dtype: str, forward: float, backward: float, tmp_path: Path) -> None:
    rows, _ = run(tmp_path, small(*EXACT, f"task.dtype={dtype}", f"task.backend={backend}"))
    for row in rows:
        assert 0 < row["forward_error"] < forward and 0 < row["backward_error"] < backward
        assert row["bad_numbers"] == row["stranded_nonzero"] == 0 and row["stranded"] > 100
    assert rows[0]["stranded"] != rows[1]["stranded"]


def planted(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """The plain PyTorch face with a fault in its forward or backward."""
    real = {name: getattr(torch_face, name) for name in ("forward", "backward")}
    for name, fault in faults.items():
        monkeypatch.setattr(torch_face, name, lambda *args, n=name, f=fault: f(*real[n](*args)))


@pytest.mark.parametrize(
    ("name", "fault", "metric", "low", "high"),
    [
        ("forward", lambda out, lse: (out + 1e-3, lse), "forward_error", 0.99e-3, 1.01e-3),
        ("backward", lambda dq, dk, dv: (dq + 1e-2, dk, dv), "backward_error", 1e-3, 1.01e-2),
        ("backward", lambda dq, dk, dv: (dq, dk + 1e-2, dv), "backward_error", 1e-3, 1.01e-2),
        ("backward", lambda dq, dk, dv: (dq, dk, dv + 1e-2), "backward_error", 1e-3, 1.01e-2),
    ],
)
def test_a_planted_error_is_reported(
    name: str, fault: Any, metric: str, low: float, high: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, **{name: fault})
    for row in run(tmp_path, small(*EXACT, "task.backend=torch"))[0]:
        assert low < row[metric] < high and row["bad_numbers"] == 0


def test_a_planted_leak_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that sees nothing but outputs, or passes a gradient, the smallest of numbers."""
    tiny = torch.finfo(torch.float32).tiny
    for fault in ({"forward": lambda o, lse: (o + tiny, lse)}, {"backward": lambda dq, dk, dv: (dq + tiny, dk, dv)}):
        with monkeypatch.context() as patch:
            planted(patch, **fault)
            for row in run(tmp_path, small(*EXACT, "task.backend=torch"))[0]:
                assert row["stranded_nonzero"] == row["stranded"] > 0
                assert row["forward_error"] < 1e-5


def test_planted_nans_are_counted_and_no_error_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        out[..., 0, 0] = torch.nan
        return out, lse

    planted(monkeypatch, forward=spoil)
    rows, _ = run(tmp_path, small(*EXACT, "task.backend=torch"))
    assert all(row["bad_numbers"] >= 12 * 3 and row["forward_error"] == float("inf") for row in rows)


def test_patterns_hash_and_drop_and_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kinds: list[frozenset[str]] = []
    real = exactness.visible

    def noting(shape: Any, device: Any = "cpu", **sparsity: Tensor) -> Tensor:
        kinds.append(frozenset(sparsity))
        return real(shape, **sparsity, device=device)

    monkeypatch.setattr(exactness, "visible", noting)
    run(tmp_path, small(*EXACT, "n_seeds=1", "max_steps=6"))
    keeps, hashes = {"q_keep", "k_keep"}, {"q_hash", "k_hash"}
    assert kinds == [keeps, hashes, keeps, keeps | hashes, keeps, hashes]


def test_the_face_that_runs_by_default_is_the_one_on_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if cpp_face.library() is None:
        pytest.skip("no compiler")
    called = []
    real = cpp_face.forward
    monkeypatch.setattr(cpp_face, "forward", lambda *args: (called.append(1), real(*args))[1])
    run(tmp_path, small(*EXACT, "n_seeds=1", "max_steps=6"))
    assert len(called) == 6 and operator.face("cpp") is cpp_face
