"""The paper's W&B workspace: one section a claim, panels that mirror the figures of the report."""

from common.dashboard import Panel, Section


def sections() -> list[Section]:
    """Sections in the order of the claims."""
    kinds = ("output", "forward_error"), ("gradients", "backward_error"), ("not finite", "bad_numbers")
    errors = [Panel(f"summary.{y}", kind="bar", group="config.task.dtype", title=title) for title, y in kinds]
    shares = [
        Panel(f"summary.{y}", x="config.task.length", kind="scatter", group="config.arm", log_x=True)
        for y in ("ours", "reformer")
    ]
    loss = Panel("summary.test_loss", kind="bar", group="config.arm")
    curves = [Panel("train/loss", group="config.arm"), Panel("density", group="config.arm")]
    dropping = Panel("summary.dropping_loss", kind="bar", group="config.arm")
    return [
        Section("C1 Exactness", errors),
        Section("C2 Hash-sparse runtime", _over_length("dense", "buckets_2", "buckets_8", "buckets_16", "buckets_32")),
        Section("C3 QK-sparse runtime", _over_length("dense", "keep_0.7", "keep_0.5", "keep_0.3", "keep_0.1")),
        Section("C4 Naive crossing", [_bar(f"{kind}_{keep}") for keep in (0.9, 0.5) for kind in ("keep", "naive")]),
        Section("C5 Coverage", shares),
        Section("C6 Training steps", _over_length("dense", "hash_16")),
        Section("C7 Hash-sparse perplexity", [loss, *curves]),
        Section("C8 Dropped rows", [loss, dropping, *_over_length("drop_0.3", "drop_0.5", "drop_0.7")]),
        Section("C9 Reformer's chunks", [loss]),
        Section("C10 Kernels for GPUs", [Panel("summary.wall_s", kind="bar", group="config.arm")]),
    ]


def _over_length(*contenders: str) -> list[Panel]:
    """Milliseconds against the length, a panel a contender."""
    return [
        Panel(f"summary.{name}_ms", x="config.task.length", kind="scatter", log_x=True, log_y=True)
        for name in contenders
    ]


def _bar(contender: str) -> Panel:
    return Panel(f"summary.{contender}_ms", kind="bar", group="config.experiment")
