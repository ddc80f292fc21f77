"""Native code is built once, checked before it is loaded, and its absence costs speed, not results."""

import ctypes
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from common.kernels import native

SOURCE = """
#include <stdint.h>
void scale(float *x, int64_t n, float factor) {
#pragma omp parallel for
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}
"""
TYPES = {"scale": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float]}

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C compiler here")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_warned", False)
    path = tmp_path / "scale.c"
    path.write_text(SOURCE)
    return path


def scaled(library):
    x = torch.arange(1000, dtype=torch.float32)
    library.scale(x.data_ptr(), x.numel(), 3.0)
    return x


def libraries():
    return sorted(native.cache_folder().glob("*.so"))


@needs_compiler
def test_built_library_computes_the_function(source):
    assert torch.equal(scaled(native.load(source, TYPES)), 3 * torch.arange(1000.0))


@needs_compiler
def test_second_load_runs_no_compiler(source, monkeypatch):
    native.load(source, TYPES)
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("compiled again"))
    assert native.load(source, TYPES) is not None


@needs_compiler
def test_cache_is_private(source, tmp_path):
    (tmp_path / "cache" / "papers-in-one-house" / "native").mkdir(parents=True, mode=0o755)
    native.load(source, TYPES)
    assert stat.S_IMODE(native.cache_folder().stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("damage", ["library", "digest", "both gone"])
def test_library_that_differs_from_its_digest_is_built_again(source, damage):
    native.load(source, TYPES)
    (library,) = libraries()
    if damage == "library":
        # another inode, as an attacker's or a torn file would be: the loaded one stays mapped
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 1
        library.unlink()
        library.write_bytes(content)
    elif damage == "digest":
        library.with_suffix(".sha256").write_text("0" * 64)
    else:
        library.unlink()
        library.with_suffix(".sha256").unlink()
    assert not native._intact(library)
    assert torch.equal(scaled(native.load(source, TYPES)), 3 * torch.arange(1000.0))
    assert native._intact(library)


@needs_compiler
def test_another_source_or_flag_or_header_is_another_library(source):
    native.load(source, TYPES)
    native.load(source, TYPES, flags=("-funroll-loops",))
    assert len(libraries()) == 2
    (source.parent / "part.h").write_text("#define A 1\n")
    native.load(source, TYPES)
    source.write_text(SOURCE + "\n")
    native.load(source, TYPES)
    assert len(libraries()) == 4


@needs_compiler
def test_two_processes_build_one_library(source):
    code = (
        "import sys, torch; from pathlib import Path; from common.kernels import native;"
        "library = native.load(Path(sys.argv[1]), ['scale']); assert library is not None"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    (library,) = libraries()
    assert native._intact(library)
    assert not list(library.parent.glob("build-*"))


def test_no_compiler_gives_none_and_one_warning(source, monkeypatch):
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native.load(source, TYPES) is None
        assert native.load(source, TYPES) is None
    assert len(caught) == 1
    assert "compiler" in str(caught[0].message)


@needs_compiler
def test_source_that_does_not_compile_gives_none_and_the_compilers_words(source):
    source.write_text("void scale( {")
    with pytest.warns(RuntimeWarning, match=r"scale\.c.*error"):
        assert native.load(source, TYPES) is None


def test_environment_variable_switches_native_code_off(source, monkeypatch):
    monkeypatch.setenv("COMMON_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load(source, TYPES) is None


def test_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.c"):
        native.load(tmp_path / "nothing.c", TYPES)


@needs_compiler
def test_missing_function_is_named(source):
    with pytest.raises(AttributeError, match="shrink"):
        native.load(source, ["shrink"])


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the Linux process map")
def test_library_joins_torchs_thread_pool(source):
    code = (
        "import sys; from pathlib import Path; from common.kernels import native;"
        "native.load(Path(sys.argv[1]), ['scale']);"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


def test_flags_that_change_the_arithmetic_of_the_whole_process_are_refused(source):
    with pytest.raises(ValueError, match="-ffast-math"):
        native.load(source, TYPES, flags=("-ffast-math",))
