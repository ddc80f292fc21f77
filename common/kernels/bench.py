"""Speed tables: interleaved rounds behind a correctness gate, as ratios, beside the physical floor.

Every round times each contender once, in a new order, so that a slow moment of the machine hits all of them alike; a
ratio is taken inside each round, and the row quotes the median ratio with its 20 and 80 % quantiles. `check` runs
before any timing: what is wrong is not timed. The floor is the larger of bytes over measured memory bandwidth (with
buffers of the same size, so that a cache counts as a cache) and operations over the measured matrix-product rate.
"""

import contextlib
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from common.kernels import device as devices
from common.provenance import git_state, versions

STARTED = time.time()
MIN_SAMPLE_S = 2e-3
SMALLEST_PROBE = 1 << 20


class WrongResultError(AssertionError):
    """A contender's result is wrong, so its speed means nothing."""


@dataclass(frozen=True)
class Row:
    """One comparison (times in milliseconds a call; `ratio` > 1 means that ours is faster).

    `ratio` = baseline time / our time, median over rounds; `ratio_lo`, `ratio_hi` its 20 and 80 % quantiles;
    `floor_ms` the time the machine's measured rates would need; `memory_mb` the peak that our call allocates beyond
    its inputs (10^6 bytes, through PyTorch's allocator); `n` the number of rounds.
    """

    what: str
    size: str
    threads: int
    ours: str
    ours_ms: float
    baseline: str
    baseline_ms: float
    ratio: float
    ratio_lo: float
    ratio_hi: float
    floor_ms: float
    memory_mb: float
    n: int


def compare(
    what: str,
    size: str,
    ours: tuple[str, Callable[[], Any]],
    baselines: Mapping[str, Callable[[], Any]],
    *,
    check: Callable[[], None],
    threads: int = 1,
    device: str = "cpu",
    bytes_moved: float = 0.0,
    operations: float = 0.0,
    rate: float = 0.0,
    rounds: int = 31,
    budget_s: float = 20.0,
) -> list[Row]:
    """Time our call against each baseline, interleaved in one process.

    Args:
        what: the quantity, e.g. "optimizer step".
        size: the size axis, e.g. "124M parameters".
        ours: name and call.
        baselines: name -> call, each at its best settings.
        check: raises (AssertionError) if ours is not right; runs first, outside the clock.
        threads: CPU threads for torch, BLAS and OpenMP during this comparison.
        device: torch device; on CUDA the clock stops after a synchronize.
        bytes_moved: bytes that any implementation must read and write once.
        operations: multiply-adds times two that any implementation needs.
        rate: operations per second of one thread, where a faster matrix product than torch's is known.
        rounds: rounds at most; at least 5 are run, however long they take.
        budget_s: no new round after this many seconds.

    Returns:
        One row a baseline.

    Raises:
        WrongResultError: `check` failed.
        ValueError: no baseline, or fewer than one thread.
    """
    if not baselines:
        raise ValueError("baselines={}: must name at least one")
    contenders = {ours[0]: ours[1], **baselines}
    if len(contenders) != len(baselines) + 1:
        raise ValueError(f"ours={ours[0]!r}: must differ from the names of the baselines")
    with threads_of(threads):
        gate(what, size, check)
        samples = interleaved(contenders, device=device, rounds=rounds, budget_s=budget_s)
        floor_ms = floor(bytes_moved, operations, threads, device, rate) * 1e3
        memory_mb = peak_bytes(ours[1], device) / 1e6
    shared = {"what": what, "size": size, "threads": threads, "ours": ours[0]}
    shared |= {"floor_ms": floor_ms, "memory_mb": memory_mb}
    return [_row(shared, name, samples[ours[0]], samples[name]) for name in baselines]


def gate(what: str, size: str, check: Callable[[], None]) -> None:
    """Run `check`; a failure is reported as WrongResultError, and no speed is measured."""
    try:
        check()
    except AssertionError as error:
        raise WrongResultError(f"{what}, {size}: not timed, the result is wrong: {error}") from error


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, device: str = "cpu", rounds: int = 31, budget_s: float = 20.0
) -> dict[str, list[float]]:
    """Seconds a call of every contender in every round (lists of equal length, paired by round)."""
    repeats = {name: _repeats(call, device) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffler = list(contenders), random.Random(0)
    stop = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > stop:
            break
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(_seconds(contenders[name], repeats[name], device))
    return samples


def floor(bytes_moved: float, operations: float, threads: int, device: str = "cpu", rate: float = 0.0) -> float:
    """Seconds that the measured machine needs at least: the larger of the memory and the arithmetic time.

    rate: operations per second of one thread by another matrix product than torch's; the faster one counts.
    """
    seconds = []
    # on a busy machine more threads can be slower; the floor takes the better of one and all
    for n in {1, threads}:
        with threads_of(n):
            memory = bytes_moved / bandwidth(_probe_size(bytes_moved), n, device) if bytes_moved else 0.0
            arithmetic = operations / max(gemm_rate(n, device), n * rate) if operations else 0.0
            seconds.append(max(memory, arithmetic))
    return min(seconds)


@functools.cache
def bandwidth(working_set: int, threads: int, device: str = "cpu") -> float:
    """Best measured bytes per second over copy, scale-add, in-place add and sum on `working_set` bytes of float32."""
    n = working_set // 12
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    whole = torch.ones(3 * n, device=device)
    probes = (
        (8 * n, lambda: b.copy_(a)),
        (12 * n, lambda: torch.add(a, b, alpha=0.5, out=c)),
        (24 * n, lambda: whole.add_(1e-9)),
        (12 * n, lambda: whole.sum()),
    )
    return max(moved / min(_timings(call, device, 15)) for moved, call in probes)


@functools.cache
def gemm_rate(threads: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Best measured operations per second of a square matrix product (2 n^3 operations)."""
    n = 1024 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(_timings(lambda: a @ b, device, 9))


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Peak bytes that one call allocates through PyTorch beyond what was live before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # the C++ side of the profiler greets on file descriptor 2 at every start and stop
    with _without_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def threads_of(n: int) -> Iterator[None]:
    """Limit torch, BLAS and every OpenMP pool of this process to `n` threads, and restore them afterwards."""
    if n < 1:
        raise ValueError(f"threads={n}: must be >= 1")
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(limits=n):
        torch.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def options(arguments: Sequence[str] | None = None) -> tuple[str, float, str]:
    """Read a bench's command line `[device=cpu] [seconds=8] [results=results]` (default: sys.argv).

    Returns: torch device, seconds a comparison, folder of the results. Anything else exits with one line.
    """
    found = {"device": "cpu", "seconds": "8", "results": "results"}
    for argument in sys.argv[1:] if arguments is None else arguments:
        key, _, value = argument.partition("=")
        if key not in found or not value:
            sys.exit(f"{argument}: must be key=value with a key of {', '.join(found)}")
        found[key] = value
    return found["device"], float(found["seconds"]), found["results"]


def write(paper: str, rows: Sequence[Row], device: str = "cpu", results: Path | str = "results") -> Path:
    """Write `<results>/<paper>/bench-<device>.json` (atomically) and return its path.

    Args:
        paper: the paper's package name.
        rows: what `compare` returned; rows where we lose belong in it.
        device: torch device string; the file name carries its short name ("cpu", "h200").
        results: root of the results.
    """
    folder = Path(results) / paper
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"bench-{devices.slug(device)}.json"
    content = {"provenance": provenance(device, rows), "rows": [asdict(row) for row in rows]}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
    Path(handle.name).chmod(0o644)
    os.replace(handle.name, target)
    return target


def provenance(device: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Commit, dirty flag, versions, device, threads, start (UTC) and wall seconds of this bench."""
    return {
        **git_state(),
        "versions": versions(),
        "device": devices.facts(device),
        "threads": sorted({row.threads for row in rows}),
        "started": datetime.fromtimestamp(STARTED, UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.time() - STARTED, 1),
    }


def show(rows: Sequence[Row], title: str = "") -> None:
    """Print the rows as a table (rich); ratios below one say so without colour."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, caption="ratio = baseline time / our time, median [20 %, 80 % quantile]")
    for name in ("what", "size", "threads", "ours", "ms", "baseline", "ms", "ratio", "floor ms", "MB", "n"):
        table.add_column(name, justify="left" if name in ("what", "ours", "baseline") else "right", no_wrap=True)
    for row in rows:
        ratio = f"{row.ratio:.2f} [{row.ratio_lo:.2f}, {row.ratio_hi:.2f}]" + (" slower" if row.ratio < 1 else "")
        names = (row.what, row.size, str(row.threads), row.ours, f"{row.ours_ms:.3g}", row.baseline)
        numbers = (f"{row.baseline_ms:.3g}", ratio, f"{row.floor_ms:.3g}", f"{row.memory_mb:.3g}", str(row.n))
        table.add_row(*names, *numbers)
    # a pipe has no width: do not cut the table to 80 columns there
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _row(common: Mapping[str, Any], baseline: str, mine: list[float], theirs: list[float]) -> Row:
    """Row of one baseline; `common` holds the fields that all rows of a comparison share."""
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    return Row(
        **common,
        baseline=baseline,
        ours_ms=statistics.median(mine) * 1e3,
        baseline_ms=statistics.median(theirs) * 1e3,
        ratio=statistics.median(ratios),
        ratio_lo=_quantile(ratios, 0.2),
        ratio_hi=_quantile(ratios, 0.8),
        n=len(ratios),
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics (numpy's default)."""
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _repeats(call: Callable[[], Any], device: str) -> int:
    """Calls a sample, so that one sample lasts long beside the clock's resolution; warms the call up on the way."""
    repeats = 1
    while (seconds := _seconds(call, repeats, device) * repeats) < MIN_SAMPLE_S and repeats < 1 << 20:
        repeats = max(2 * repeats, int(1.2 * repeats * MIN_SAMPLE_S / max(seconds, 1e-9)) if repeats > 8 else 1)
    return repeats


def _seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    wait = functools.partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else None
    if wait:
        wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if wait:
        wait()
    return (time.perf_counter() - start) / repeats


def _timings(call: Callable[[], Any], device: str, n: int) -> list[float]:
    repeats = _repeats(call, device)
    return [_seconds(call, repeats, device) for _ in range(n)]


def _probe_size(bytes_moved: float) -> int:
    """Working set of the bandwidth probe, a power of two between 1 MiB and 1 GiB.

    At least half of the traffic: an in-place kernel reads and writes each byte, and a floor must not be too high.
    """
    size = SMALLEST_PROBE
    while size < bytes_moved / 2 and size < 1 << 30:
        size *= 2
    return size
