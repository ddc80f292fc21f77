"""Plain C kernels built once by the system compiler and called through ctypes.

A kernel is one C or C++ source with a C ABI over raw pointers. It is compiled with -O3 for this very processor into
the user's cache and loaded from there. The file name carries a hash of everything that shapes the code: source,
headers beside it, flags, compiler version, processor. The SHA-256 of the built library is stored beside it and checked
before every load; a library that differs is built again. Without a compiler the caller gets None and one warning.

`COMMON_NATIVE=0` switches native code off. The cache is `$XDG_CACHE_HOME/papers-in-one-house` (default `~/.cache`).
"""

import atexit
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# neither changes a result: they only drop errno and the trap flags, which stop gcc from vectorising sqrt and selects
BASE_FLAGS = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# tried in this order: a compiler without OpenMP, or one that does not know the processor, still gives a correct library
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
COMPILE_SECONDS = 300

_warned = False


class BuildError(RuntimeError):
    """The compiler refused the source under every set of flags."""


def load(
    source: Path, functions: Mapping[str, Sequence[Any]] | Sequence[str], flags: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """Build (if needed), verify and load a C or C++ source.

    Args:
        source: the `.c` or `.cpp` file; headers in its folder count as part of it.
        functions: exported names, with their ctypes argument types where given. Every function returns void.
        flags: further compiler flags, e.g. `("-funroll-loops",)`; part of the cache key.

    Returns:
        The library, or None (after one warning a process) if there is no compiler, the build fails or the library
        cannot be loaded; None without a warning if `COMMON_NATIVE=0`.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: a flag that would make the whole process flush subnormal numbers to zero.
        AttributeError: the library lacks one of `functions`.
    """
    if os.environ.get("COMMON_NATIVE", "1") == "0":
        return None
    source = Path(source).resolve()
    if not source.is_file():
        raise FileNotFoundError(f"source={source}: no such file")
    if {"-ffast-math", "-Ofast"} & set(flags):  # linked by gcc < 13, they set the processor's mode on loading
        raise ValueError(f"flags={flags}: must not hold -ffast-math or -Ofast, which change the process")
    try:
        library = _open(source, tuple(flags))
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        _warn_once(f"{source.name}: {error}")
        return None
    if library is None:
        _warn_once("no C compiler found ($CC, $CXX, cc, gcc, clang)")
        return None
    return _declare(library, functions)


def compiler(language: str = "c") -> list[str] | None:
    """Command of the system's compiler for `language` ("c" or "c++"), or None if there is none."""
    variables, names = (("CC", "CXX"), ("cc", "gcc", "clang", "c++", "g++", "clang++"))
    if language == "c++":
        variables, names = (("CXX", "CC"), ("c++", "g++", "clang++", "cc", "gcc", "clang"))
    candidates = [shlex.split(os.environ.get(variable, "")) for variable in variables] + [[name] for name in names]
    for command in candidates:
        if command and shutil.which(command[0]):
            return [*command, "-x", language]
    return None


def cache_folder() -> Path:
    """The user's private cache folder (mode 0700), or one for this process alone if the home cannot be trusted."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "papers-in-one-house" / "native"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return _process_folder()
        root.chmod(0o700)
    except (OSError, RuntimeError):
        return _process_folder()
    return root if os.access(root, os.W_OK) else _process_folder()


@functools.cache
def _process_folder() -> Path:
    """A private folder that goes with the process (mkdtemp: mode 0700)."""
    folder = tempfile.mkdtemp(prefix="native-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _open(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    command = compiler("c" if source.suffix == ".c" else "c++")
    if command is None:
        return None
    # torch's OpenMP runtime has to be in the process first: the library then joins its thread pool; two pools that
    # spin on the same cores slow each other down
    import torch  # noqa: F401

    target = cache_folder() / f"{source.stem}-{_key(source, command, flags)}.so"
    with _locked(target.with_suffix(".lock")):
        if not _intact(target):
            _build(source, command, flags, target)
        return ctypes.CDLL(str(target))


def _declare(library: ctypes.CDLL, functions: Mapping[str, Sequence[Any]] | Sequence[str]) -> ctypes.CDLL:
    """Set argument and return types; a name the library lacks raises AttributeError."""
    for name in functions:
        function = getattr(library, name)
        function.restype = None
        if isinstance(functions, Mapping):
            function.argtypes = list(functions[name])
    return library


def _key(source: Path, command: list[str], flags: tuple[str, ...]) -> str:
    """Hash of all that shapes the code; a new compiler or another processor means another file."""
    digest = hashlib.sha256()
    headers = sorted(path for path in source.parent.iterdir() if path.suffix in (".h", ".hpp", ".inc"))
    for path in (source, *headers):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for fact in (*BASE_FLAGS, *flags, *command, _compiler_version(command[0]), _processor()):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _compiler_version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout


@functools.cache
def _processor() -> str:
    """What -march=native looks at: model and feature flags (a cache in a shared home serves many machines)."""
    facts = [platform.machine(), platform.system()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts += [line for line in lines if line.split("\t")[0] in ("vendor_id", "cpu family", "model", "flags")]
        facts += [line for line in lines if line.startswith(("Features", "CPU part"))]
    except OSError:
        facts.append(platform.processor())
    return "\n".join(facts)


def _intact(target: Path) -> bool:
    """Is the library there, with the digest that was written when it was built?"""
    try:
        recorded = target.with_suffix(".sha256").read_text().strip()
        return hashlib.sha256(target.read_bytes()).hexdigest() == recorded
    except OSError:
        return False


def _build(source: Path, command: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Compile beside the target, then rename: no other process ever sees half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        built = Path(scratch) / target.name
        complaints = []
        for optional in OPTIONAL_FLAGS:
            line = [*command, *BASE_FLAGS, *optional, *flags, str(source), "-o", str(built), "-lm"]
            # `-x c` would also apply to -lm on some drivers; the language ends after the source
            line[line.index(str(source)) + 1 : line.index(str(source)) + 1] = ["-x", "none"]
            result = subprocess.run(line, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if result.returncode == 0:
                break
            complaints.append(_first_error(result.stderr))
        else:
            raise BuildError(f"{command[0]} failed: {complaints[-1]}")
        digest = hashlib.sha256(built.read_bytes()).hexdigest()
        record = Path(scratch) / "digest"
        record.write_text(digest + "\n")
        os.replace(built, target)
        os.replace(record, target.with_suffix(".sha256"))


def _first_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error" in line.lower()] or stderr.splitlines()
    return lines[0] if lines else "no message"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; a file system without locks (some NFS) only costs a double build."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            print(f"note: no file locks in {path.parent}", file=sys.stderr)
        yield


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"native kernels are off, PyTorch runs instead (slower): {reason}", RuntimeWarning, stacklevel=3)
