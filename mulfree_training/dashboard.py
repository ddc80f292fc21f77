"""The paper's W&B workspace: one section a claim, panels that mirror the figures of the report."""

from common.dashboard import Panel, Section


def sections() -> list[Section]:
    """Sections in the order of the claims."""
    accuracy = Panel("summary.test_accuracy", kind="bar", group="config.arm")
    loss = Panel("summary.test_nll", kind="bar", group="config.arm")
    tempered = Panel("summary.test_nll_tempered", kind="bar", group="config.arm")
    curve = Panel("train/loss", group="config.arm")
    found = [
        Panel(f"summary.{metric}", kind="bar", group="config.arm")
        for metric in ("findings", "machine_findings", "ptx_findings")
    ]
    errors = [Panel(f"summary.{metric}", kind="bar", group="config.arm") for metric in ("mul_min", "div_max", "gain")]
    bends = [Panel(f"summary.curvature_{h}", kind="bar", group="config.arm") for h in ("1e-05", "1e-06", "1e-07")]
    return [
        Section("C1 Matrix products", [accuracy, loss, curve]),
        Section("C2 Convolutions", [accuracy, curve]),
        Section("C3 Row by row", [accuracy, loss]),
        Section("C4 No multiplication", [accuracy, loss, *found]),
        Section("C5 Exact and approximate rule", [loss, tempered]),
        Section("C6 Error law", errors),
        Section("C7 Piecewise affine", [*bends, Panel("summary.gradient_right", kind="bar", group="config.arm")]),
        Section("C8 Cost", [Panel("summary.cost_ratio_step", kind="bar", group="config.arm")]),
        Section("C9 Alpha", [accuracy, loss]),
        Section("C10 Baselines", [accuracy]),
    ]
