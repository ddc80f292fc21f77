"""Numbers, verdicts and machines as words, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.claims import CONTRADICTED, SHAPES


def effect_text(row: Mapping[str, Any]) -> str:
    """Give `effect unit [low, high]` with the decimals that its interval supports; `–` without an effect."""
    effect, low, high = (row[key] for key in ("effect", "ci_low", "ci_high"))
    if effect is None:
        return "–"
    unit = row.get("unit") or ""
    known = low is not None and high is not None
    width = (high - low) / 2 if known and high > low else abs(effect) / 50
    decimals = max(0, min(8, 1 - math.floor(math.log10(width)))) if width > 0 else 0
    if max(abs(v) for v in (effect, low, high) if v is not None) >= 1e6 or decimals > 6:
        numbers = [f"{v:.3g}" for v in (effect, low, high) if v is not None]
    else:
        numbers = [f"{v:.{decimals}f}" for v in (effect, low, high) if v is not None]
    numbers = [_typographic(n) for n in numbers]
    unit = f" {unit}" if unit and unit not in ("×", "%") else unit
    return f"{numbers[0]}{unit} [{numbers[1]}, {numbers[2]}]" if known else f"{numbers[0]}{unit}"


def p_text(p: float | None) -> str:
    """Give a p-value with two significant digits, `<0.001` below that, `–` without one."""
    if p is None:
        return "–"
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def p_cell(row: Mapping[str, Any]) -> str:
    """Give a row's adjusted p; of a contradicted row also the p of the opposite, which decided."""
    if row["verdict"] == CONTRADICTED:
        return f"{p_text(row['p_adjusted'])} (opposite {p_text(row['p_opposite'])})"
    return p_text(row["p_adjusted"])


def number_text(value: Any) -> str:
    """Give a plain number or text for a table cell: four significant digits, `–` for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return _typographic(f"{value:.4g}")
    return str(value)


def status_text(status: Mapping[str, int]) -> str:
    """Give `✓ 3 reproduced · ✗ 1 contradicted · …` in the fixed order, zeros included."""
    return " · ".join(f"{shape} {status.get(word, 0)} {word}" for word, shape in SHAPES.items())


def wall_text(seconds: float | None) -> str:
    """Give a duration as `40 s`, `5.4 min` or `2.1 h`."""
    if seconds is None:
        return "unknown time"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def machine_text(provenance: Mapping[str, Any]) -> str:
    """Give the machine that trained the records: device, processor and threads, as far as recorded."""
    device = provenance.get("device", "")
    devices = ", ".join(map(str, device)) if isinstance(device, list) else str(device)
    machine = provenance.get("machine") or {}
    parts = [devices]
    if isinstance(machine, Mapping) and machine.get("cpu"):
        parts.append(f"{machine['cpu']}, {machine.get('cores', '?')} cores")
    threads = provenance.get("threads")
    if threads is not None:
        words = ", ".join(map(str, threads)) if isinstance(threads, list) else str(threads)
        parts.append(f"{words} thread{'' if words == '1' else 's'} a trial")
    return " · ".join(part for part in parts if part)


def table_cell(text: Any) -> str:
    """Give text that is safe inside a Markdown table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _typographic(number: str) -> str:
    zero = number.lstrip("-").replace("0", "").replace(".", "") == ""
    return number.lstrip("-") if zero else number.replace("-", "−")
