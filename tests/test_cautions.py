"""Warnings name the line of whoever called saekit."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import TOKENS, place
from torch import nn

import saekit
from saekit import cautions
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("HookedTransformer", "AutoModelForCausalLM", "TransformerBridge", "fake", "bare")


def place_of(call: Callable[[], object]) -> tuple[str, int]:
    """Where the one warning is from, and that it is the line of ``call``, which is on one."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    (one,) = [one for one in found if "prepend_bos" in str(one.message) or "mine" in str(one.message)]
    return one.filename, one.lineno


def here(call: Any) -> tuple[str, int]:
    return __file__, call.__code__.co_firstlineno


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_first_forward_of_a_splice(kind: str) -> None:
    there = place(kind)
    sae = at(drawn_sae(there.width), there.early, prepend_bos=True)
    with saekit.splice(there.target, sae) as spliced:
        run = lambda: spliced.run(TOKENS, want="loss")  # noqa: E731
        assert place_of(run) == here(run)
    if there.model is not None:
        with saekit.splice(there.target, sae):
            forward = lambda: there.model(TOKENS)  # noqa: E731 - through torch and the model's library
            assert place_of(forward) == here(forward)


def test_of_what_looks_wrong_before() -> None:
    sae = at(drawn_sae(8), "blocks.0.hook_resid_post", model_name="another", prepend_bos=True)
    tokens = torch.arange(1, 33).reshape(2, 16)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with saekit.splice(FakeBackend(), sae):
            pass
        saekit.evaluate(sae, model=FakeBackend(), contexts=tokens, save=False, verbose=False)
    assert len(found) > 1
    assert {one.filename for one in found} == {__file__}


def test_between_a_library_and_saekit() -> None:
    code = compile("def warn_it(text):\n    warn(text)\n", "/somewhere/saekit/inner.py", "exec")
    ours: dict[str, Any] = {"__name__": "saekit.inner", "warn": cautions.warn}
    exec(code, ours)

    class Layer(nn.Module):
        def forward(self, text: str) -> None:
            ours["warn_it"](text)

    of_torch = lambda: nn.Module.__call__(Layer(), "mine")  # noqa: E731 - whose forward is the user's
    assert place_of(of_torch)[0] == __file__
    of_kernel = lambda: ours["warn_it"]("mine")  # noqa: E731
    assert place_of(of_kernel) == here(of_kernel)


def test_where_no_line_is_a_users() -> None:
    """As in a thread of saekit's: then it is the line of who warns."""
    code = compile("def warn_it():\n    warn('mine')\n", "/somewhere/saekit/inner.py", "exec")
    ours: dict[str, Any] = {"__name__": "saekit.inner", "warn": cautions.warn}
    exec(code, ours)

    def in_thread() -> None:
        thread = threading.Thread(target=ours["warn_it"])
        thread.start()
        thread.join()

    assert place_of(in_thread) == ("/somewhere/saekit/inner.py", 2)
