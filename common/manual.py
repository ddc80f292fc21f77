"""The `--help` page of a paper's trials: groups with what each option does, and keys with type, default and meaning.

Everything is read from where it is defined: an option's meaning is the first comment of its YAML file, a key's is the
docstring under its dataclass field.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path

from common.compose import SHARED, Composer, conf_dir
from common.config import schema_keys, type_words
from common.sweeps import text

WIDTH = 120
LAUNCHERS = {
    "basic": "one trial after the other in this process (for debugging)",
    "joblib": "joblib's own defaults",
    "submitit_local": "submitit's own defaults on this machine",
    "submitit_slurm": "submitit's own defaults on Slurm",
}
HEAD = """usage: python -m {paper}.train [key=value | group=option ...] [-m]

  One trial: one config, one record in results/{paper}/trials. A recorded trial is not trained again.
  -m makes a sweep of key=a,b; experiment=<name> is the sweep of one of the paper's tables or figures.
  python -m common.reproduce {paper} runs every experiment and judges every claim.
"""
FLAGS = """Flags
  -m, --multirun             sweep over key=a,b
  --cfg job [--resolve]      print the composed config and stop
  --info defaults            print which files a config is made of and stop
  --hydra-help               Hydra's own options
  HYDRA_FULL_ERROR=1         (environment) show tracebacks
  torchrun --nproc_per_node N -m {paper}.train ...   the same trial on N processes
"""


def page(paper: str, schema: type) -> str:
    """Return the help page of a paper."""
    about = (importlib.import_module(f"{paper}.train").__doc__ or "").strip().splitlines()
    parts = [HEAD.format(paper=paper), *about[:1], ""]
    docs = field_docs(schema)
    parts.append("Groups (group=option; * is the default)")
    for group, default in _groups(paper, schema).items():
        parts += _entry(group, docs.get(group, ""), 0)
        for option, meaning in sorted(_options(paper, group).items()):
            parts += _entry(f"  {'*' if option == default else ' '} {option}", meaning, 24)
    parts += ["", "Keys (key=value, default in brackets)"]
    for key, info in schema_keys(schema).items():
        if info.default is None and inspect.isclass(info.hint) and hasattr(info.hint, "__dataclass_fields__"):
            continue
        parts += _entry(key, f"[{text(info.default)}] {docs.get(key, '')} ({type_words(info.hint)})", 32)
    return "\n".join([*parts, "", FLAGS.format(paper=paper)])


def _groups(paper: str, schema: type) -> dict[str, str | None]:
    """The groups of the primary config with their default options, the launcher last."""
    choices = Composer(paper, schema).full([]).hydra.runtime.choices
    own = {str(k): v for k, v in choices.items() if not str(k).startswith("hydra/")}
    return {**own, "hydra/launcher": choices["hydra/launcher"]}


def _options(paper: str, group: str) -> dict[str, str]:
    """Options of a group and what each does."""
    found = dict(LAUNCHERS) if group == "hydra/launcher" else {}
    for root in (SHARED, conf_dir(paper)):
        for path in sorted((root / group).glob("*.yaml")):
            found[path.stem] = first_comment(path)
    return found


def first_comment(path: Path) -> str:
    """First comment of a YAML file that is not a directive."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def field_docs(schema: type) -> dict[str, str]:
    """Dotted key -> the docstring under its field."""
    found = {}
    for key, info in schema_keys(schema).items():
        found[key] = _class_docs(info.owner).get(key.rpartition(".")[2], "")
    return found


@functools.cache
def _class_docs(owner: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    return dict(_documented(body))


def _documented(body: ast.AST) -> Iterator[tuple[str, str]]:
    statements = getattr(body, "body", [])
    for field, after in itertools.pairwise(statements):
        is_text = (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        )
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            yield field.target.id, " ".join(after.value.value.split())  # type: ignore[attr-defined]


def _entry(name: str, meaning: str, indent: int) -> list[str]:
    """One name with its wrapped meaning beside it."""
    lead = f"  {name}"
    pad = max(indent, 18)
    lines = textwrap.wrap(meaning, WIDTH - pad - 2) or [""]
    first = f"{lead:<{pad}}  {lines[0]}".rstrip()
    return [first, *(f"{'':<{pad}}  {line}" for line in lines[1:])]
