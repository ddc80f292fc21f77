"""The paper's W&B workspace: one section a claim, panels that mirror the figures of the report."""

from common.dashboard import Panel, Section


def sections() -> list[Section]:
    """Sections in the order of the claims."""
    accuracy = "summary.test_accuracy"
    walk = [Panel("summary.angle_ratio", kind="bar", group="config.arm"), Panel("summary.norm_ratio", kind="bar")]
    over_rate = Panel(accuracy, x="config.optimizer.lr", kind="scatter", group="config.arm", log_x=True)
    bars = Panel(accuracy, kind="bar", group="config.arm")
    loss = Panel("train/loss", group="config.arm", log_y=True)
    return [
        Section("C1 Equilibrium norm and rotation follow the closed forms", walk),
        Section("C2 Gradient size does not change the rotation", [Panel("summary.slope", kind="bar")]),
        Section("C3 C4 C11 Rotation in real networks", [Panel("summary.mean_angle", kind="bar"), loss]),
        Section("C5 C6 Tuned arms", [bars, loss]),
        Section("C7 Warm-up", [over_rate, Panel("lr", group="config.arm")]),
        Section("C8 Poorly normalised networks", [bars]),
        Section("C9 Learning rate against weight decay", [over_rate]),
        Section("C10 Imbalanced rotation", [bars]),
    ]
