"""The paper's W&B workspace: one section a claim, panels that mirror the figures of the report."""

from common.dashboard import Panel, Section


def sections() -> list[Section]:
    """Sections in the order of the claims."""
    full = Panel("summary.auroc_full", kind="bar", group="config.arm")
    same = Panel("summary.auroc_same", kind="bar", group="config.arm")
    flip = Panel("summary.auroc_flip", kind="bar", group="config.arm")
    loss = Panel("train_loss", group="config.arm")
    shares = Panel("summary.auroc_flip", x="config.corruption.share", kind="scatter", group="config.arm")
    places = Panel("summary.auroc_flip", x="config.corruption.modality", kind="scatter", group="config.arm")
    sizes = Panel("summary.auroc_flip", x="config.task.batch_size", kind="scatter", group="config.arm", log_x=True)
    random = Panel("summary.auroc_same", x="config.corruption.share", kind="scatter", group="config.arm")
    return [
        Section("C1 One task at a time", [full, loss]),
        Section("C2 All tasks at once", [full, Panel("summary.parameters", kind="bar", group="config.arm")]),
        Section("C3 P-Fusion for all tasks", [full, loss]),
        Section("C4 Contributions", [Panel("summary.prefix_gap", kind="bar", group="config.cohort.name"), loss]),
        Section("C5 Missing by label", [shares, same, flip, places, sizes]),
        Section("C6 Any subset", [full]),
        Section("C7 Missing at random", [random]),
        Section("C8 Robust rule", [full, same, flip]),
        Section("C9 Really missing", [full]),
    ]
