"""The paper's W&B workspace: one section a claim, panels that mirror the figures of the report."""

from common.dashboard import Panel, Section


def sections() -> list[Section]:
    """Sections in the order of the claims."""
    distance = Panel("distance", group="config.arm", log_y=True)
    accuracy = Panel("summary.test_accuracy", kind="bar", group="config.arm")
    curve = Panel("validation/accuracy", group="config.arm")
    clustering = [Panel("clustering/precision", group="config.arm"), Panel("clustering/tau", group="config.arm")]
    quantile = Panel(
        "summary.test_accuracy", x="config.method.radius.quantile", kind="scatter", group="config.arm", log_x=True
    )
    attack = Panel("summary.test_accuracy", x="config.attack.name", kind="scatter", group="config.arm")
    error = Panel("summary.error", x="config.task.clients", kind="scatter", group="config.arm", log_x=True, log_y=True)
    pairs = Panel("summary.pairs", kind="bar", group="config.arm")
    return [
        Section("C1 Synthetic regression", [distance, Panel("summary.log10_distance", kind="bar", group="config.arm")]),
        Section("C2 Assumptions", [Panel("intra_max", log_y=True), Panel("inter_min", log_y=True)]),
        Section("C3 Images in clusters", [accuracy, curve, *clustering]),
        Section("C4 Quantile and local steps", [quantile, curve]),
        Section("C5 Clusters of classes", [accuracy, curve]),
        Section("C6 Byzantine clients", [attack, curve]),
        Section("C7 Rounds on blobs", [Panel("distance", group="config.task.std", log_y=True)]),
        Section("C8 Error terms", [Panel("summary.wall_s", kind="bar", group="config.arm")]),
        Section("C9 Rate and assignment", [error, pairs]),
        Section("C10 Momentum", [Panel("summary.pairs", x="config.method.alpha", kind="scatter", log_x=True)]),
        Section("C11 Motivation", [pairs]),
    ]
