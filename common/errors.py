"""One clear line for everything a user can get wrong: the name, the value, what is allowed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from common.config import did_you_mean, schema_keys, type_words

EXTRAS = {"submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
"""Launchers that come with an optional dependency."""
FULL_ERROR = "HYDRA_FULL_ERROR"
ASKED = "HYDRA_FULL_ERROR_ASKED"


class UsageError(Exception):
    """The command line cannot be read at all (exit code 2)."""


def explain(error: BaseException, schema: type | None = None) -> str:
    """Say in one line what went wrong.

    Args:
        error: what was raised, by Hydra, OmegaConf, a range check or a trial.
        schema: the trial's schema, for allowed types and nearest names.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not key=value ({_first(str(error))})"
    if isinstance(error, ConfigCompositionException):
        return _composition(str(error), cause, schema)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error, schema)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"not enough memory ({_first(str(error)) or type(error).__name__}); what was recorded is kept"
    if type(error).__name__ in ("TerminatedWorkerError", "BrokenProcessPool"):
        codes = re.search(r"exit codes of the workers are \{(.*?)\}", str(error))
        how = f" ({codes.group(1)})" if codes else ""
        return f"a worker died{how}, perhaps for want of memory; what was recorded is kept: run the same line again"
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    if isinstance(error, ValueError | TypeError | OSError | UsageError | RuntimeError) and str(error):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {_first(str(error))} ({FULL_ERROR}=1 shows where)"


def report(error: BaseException, schema: type | None = None) -> int:
    """Print the one line (and the traceback when HYDRA_FULL_ERROR=1) to stderr; return the exit code."""
    if wants_traceback() and not hasattr(error, "trace"):
        traceback.print_exception(error)
    sys.stderr.write(f"error: {explain(error, schema)}\n")
    return 2 if isinstance(error, UsageError | OverrideParseException) else 1


@contextlib.contextmanager
def from_hydra() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them; what the user asked for is kept for worker processes too."""
    before = {name: os.environ.get(name) for name in (FULL_ERROR, ASKED)}
    os.environ[ASKED] = os.environ.get(ASKED) or os.environ.get(FULL_ERROR, "0")
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks (HYDRA_FULL_ERROR=1)."""
    return (os.environ.get(ASKED) or os.environ.get(FULL_ERROR)) == "1"


def _first(text: str) -> str:
    """First non-empty line of a message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _missing_option(error: MissingConfigException) -> str:
    path = str(error.missing_cfg_file or "")
    group, _, option = path.rpartition("/")
    if not group:
        return _first(str(error)) or f"{path}: no such config"
    options = sorted(error.options or [])
    if group == "hydra/launcher" and option in EXTRAS:
        return f"{group}={option}: not installed; pip install '.[{EXTRAS[option]}]'"
    allowed = f"is one of {', '.join(options)}" if options else "has no options"
    return f"{group}={option}: no such option; {group} {allowed}{did_you_mean(option, options)}"


def _composition(text: str, cause: OmegaConfBaseException | None, schema: type | None) -> str:
    known = schema_keys(schema) if schema else {}
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        given = re.search(r"use \+(.+)", text)
        return f"{given.group(1) if given else key}: unknown key{did_you_mean(key, known)} (--help lists them)"
    merging = re.match(r"Error merging override (.+)", text)
    if merging:
        override = merging.group(1)
        key = override.partition("=")[0].lstrip("+~")
        return f"{override}: {'must be ' + type_words(known[key].hint) if key in known else _first(str(cause))}"
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text)
    if several:
        return f"{several.group(1)}: several values make a sweep: add -m (or quote the value to mean a text)"
    return _omegaconf(cause, schema) if cause else " ".join(_first(text).split())


def _omegaconf(error: OmegaConfBaseException, schema: type | None) -> str:
    known = schema_keys(schema) if schema else {}
    key = getattr(error, "full_key", None) or ""
    if key in known and "is not in struct" not in str(error) and "not in '" not in str(error):
        return f"{key}: {_first(str(error))}; must be {type_words(known[key].hint)}"
    return f"{key}: {_first(str(error))}{did_you_mean(key, known)}" if key else _first(str(error))


def _system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}no space left; what was recorded is kept: free some and run the same line again"
    if isinstance(error, FileNotFoundError):
        return f"{where}no such file"
    return f"{where}{error.strerror or error}"
