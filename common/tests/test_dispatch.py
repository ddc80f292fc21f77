"""The first face that can serve a call runs; a wish is granted or refused with the reason, never overruled."""

from __future__ import annotations

import threading

import pytest
import torch

from common.kernels.dispatch import choose, forced

FACES = {
    "fast": lambda size, kind: f"needs even sizes, got {size}" if size % 2 else None,
    "other": lambda size, kind: None if kind == "special" else "needs kind special",
    "plain": lambda size, kind: "needs sizes below 100" if size >= 100 else None,
}


def test_the_first_that_does_not_refuse_is_chosen() -> None:
    assert choose(FACES, 4, "") == "fast"
    assert choose(FACES, 3, "") == "plain"
    assert choose(FACES, 3, "special") == "other"


def test_later_faces_are_not_asked() -> None:
    faces = {"first": lambda: None, "second": lambda: pytest.fail("asked although the first serves")}
    assert choose(faces) == "first"


def test_if_all_refuse_every_reason_is_given() -> None:
    with pytest.raises(
        ValueError, match=r"no backend serves this call: fast: needs even sizes, got 101; other: .*; plain"
    ):
        choose(FACES, 101, "")


def test_a_wish_goes_before_the_order() -> None:
    assert choose(FACES, 4, "", backend="plain") == "plain"


def test_a_wish_that_is_refused_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"^backend='fast': needs even sizes, got 3$"):
        choose(FACES, 3, "", backend="fast")


@pytest.mark.parametrize("name", ["faster", "", "FAST"])
def test_an_unknown_wish_names_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^backend='{name}': must be None or one of fast, other, plain$"):
        choose(FACES, 4, "", backend=name)


def test_a_forced_face_is_a_wish_for_the_block() -> None:
    with forced("plain"):
        assert choose(FACES, 4, "") == "plain"
        assert choose(FACES, 4, "", backend="fast") == "fast"  # the caller's own wish is nearer
        with forced("other"), pytest.raises(ValueError, match="backend='other': needs kind special"):
            choose(FACES, 4, "")
        with forced(None):
            assert choose(FACES, 4, "") == "fast"
        assert choose(FACES, 4, "") == "plain"
    assert choose(FACES, 4, "") == "fast"


def test_an_unknown_forced_face_is_refused_on_use() -> None:
    with forced("none"), pytest.raises(ValueError, match="backend='none': must be None or one of"):
        choose(FACES, 4, "")


def test_an_error_in_the_block_ends_it() -> None:
    with pytest.raises(KeyError), forced("plain"):
        raise KeyError
    assert choose(FACES, 4, "") == "fast"


def test_a_forced_face_holds_in_other_threads() -> None:
    """Autograd runs a backward in threads of its own."""
    found = []
    with forced("plain"):
        thread = threading.Thread(target=lambda: found.append(choose(FACES, 4, "")))
        thread.start()
        thread.join()
    assert found == ["plain"]


def test_compiled_code_sees_which_face_is_forced() -> None:
    faces = {"a": lambda: None, "b": lambda: None}
    torch._dynamo.reset()
    run = torch.compile(lambda x: x + (choose(faces) == "b"), fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert run(x) == 0
    with forced("b"):
        assert run(x) == 1
    assert run(x) == 0
