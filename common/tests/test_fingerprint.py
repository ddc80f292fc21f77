"""Editing what a trial's numbers depend on changes its fingerprint; editing anything else does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.fingerprint import sources

FILES = {
    "__init__.py": 'from demo.method import Method\nfrom demo.report import Page\n__all__ = ["Method", "Page"]\n',
    "lazy/__init__.py": '_WHERE = {"Fast": "fast", "Slow": "slow"}\ndef __getattr__(name): ...\n',
    "lazy/fast.py": "class Fast: ...\n",
    "lazy/slow.py": "class Slow: ...\n",
    "method.py": '"""The method."""\nfrom . import helper\nclass Method:\n    """Doc."""\n    lr = 0.1  # why\n',
    "helper.py": "def help(): return 1\n",
    "report.py": "class Page: ...\n",
    "claims.py": "from demo.report import Page\n",
    "typing_only.py": "X = int\n",
    "kernels/__init__.py": "",
    "kernels/native.py": "def load(): ...\n",
    "kernels/step.c": "int step;\n",
    "tasks/__init__.py": "",
    "tasks/other.py": "from demo.report import Page\n",
    "tasks/entry.py": (
        "from typing import TYPE_CHECKING\nimport numpy\nfrom demo import Method\nfrom demo.lazy import Fast\n"
        "from common.trials import Trial\nfrom common.data.tensors import tensors\n"
        "if TYPE_CHECKING:\n    from demo.typing_only import X\n"
        "def run(config, trial):\n    from demo.kernels import native\n    return []\n"
    ),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def ask(folder: Path, what: str = "fingerprint('demo.tasks.entry')") -> str:
    """Answer in a fresh process: what is read is cached in one."""
    code = f"from common.fingerprint import *; print({what})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_imports_are_followed_to_what_a_trial_uses(package: Path) -> None:
    found = ask(package, "[n for n in sorted(sources('demo.tasks.entry')) if not n.startswith('common.')]")
    assert eval(found) == [
        "demo.helper",
        "demo.kernels.native",
        "demo.lazy.fast",
        "demo.method",
        "demo.tasks.entry",
        "kernels/step.c",
    ]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("method.py", FILES["method.py"].replace("0.1", "0.2")),
        ("helper.py", "def help(): return 2\n"),
        ("lazy/fast.py", "class Fast: x = 1\n"),
        ("kernels/step.c", "long step;\n"),
        ("tasks/entry.py", FILES["tasks/entry.py"].replace("return []", "return [1]")),
    ],
)
def test_editing_what_a_trial_uses_changes_the_fingerprint(package: Path, file: str, text: str) -> None:
    before = ask(package)
    (package / "demo" / file).write_text(text)
    assert ask(package) != before


def test_editing_anything_else_keeps_the_fingerprint(package: Path) -> None:
    before = ask(package)
    other = dict.fromkeys(["report.py", "claims.py", "typing_only.py", "lazy/slow.py", "tasks/other.py"], "x = 5\n")
    other["__init__.py"] = FILES["__init__.py"] + "from demo.claims import x\n"
    other["method.py"] = (
        FILES["method.py"].replace("Doc.", "Better doc.").replace("# why", "# because").replace("  lr", "  lr ")
    )
    for name, text in other.items():
        (package / "demo" / name).write_text(text)
    assert ask(package) == before


def test_nothing_is_imported(package: Path) -> None:
    (package / "demo" / "method.py").write_text("raise SystemExit('imported')\n")
    assert len(ask(package)) == 16


def test_infrastructure_is_left_out_and_shared_code_is_not(package: Path) -> None:
    found = eval(ask(package, "sorted(sources('demo.tasks.entry'))"))
    assert "common.data.tensors" in found
    assert not {"common.trials", "common.tracking", "common.config"} & set(found)


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"entry_module=common\.nosuch"):
        sources("common.nosuch")
