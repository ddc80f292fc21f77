"""Students of online courses (EDU): the paper's data were not released; this reads a table of our own convention.

`cohort.path` is a CSV, one row a student: columns `<modality>__<feature>` (numbers, empty where not recorded) and
`task__<name>` (0, 1, or empty where not known), and perhaps `group` (students of one course stay in one split).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.config import check
from multimodn.cohorts.base import Cohort
from multimodn.cohorts.tables import binary, cohort, renumbered

if TYPE_CHECKING:
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 10
TASK = "task"


def load(config: CohortConfig) -> Cohort:
    """Read the CSV.

    Raises:
        ValueError: no path, a header without modalities or tasks, or labels other than 0, 1 and empty.
        FileNotFoundError: no such file.
    """
    import dataclasses

    import pandas as pd

    allowed = "a CSV with columns <modality>__<feature> and task__<name>; cohort=star needs no file"
    check("cohort.path", repr(config.path), bool(config.path), allowed)
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    frame = pd.read_csv(path)
    parts: dict[str, list[str]] = {}
    for name in frame.columns:
        head, mark, _ = name.partition("__")
        if mark:
            parts.setdefault(head, []).append(name)
    labels = parts.pop(TASK, [])
    check("cohort.path", path, bool(parts) and bool(labels), allowed)
    for name in labels:
        values = frame[name].dropna().unique()
        check(f"{path} {name}", values.tolist()[:5], set(values) <= {0, 1}, "0, 1 or empty in every row")
    tasks = {name.partition("__")[2]: binary(frame[name], name) for name in labels}
    found = cohort("edu", frame, parts, tasks, natural=True)
    if "group" in frame:
        codes, _ = pd.factorize(frame["group"])
        found = dataclasses.replace(found, groups=torch.from_numpy(codes).long())
    if config.natural:
        return found
    whole = torch.stack([~x.isnan().any(1) for x in found.modalities.values()]).all(0)
    return renumbered(found.select(whole))
