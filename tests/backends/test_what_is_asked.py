"""What ``run`` says of tokens that are none of the model's, and of a forward of which nothing would be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.causal_lms import make_causal_lm
from support.spliced import KINDS, TOKENS, place
from torch import Tensor

import saekit
from saekit.backends import InsideBackend, checked_tokens
from saekit.backends.asked import odd_tokens
from saekit.errors import ModelError
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = torch.zeros(1, 65, dtype=torch.long)
ODD: dict[str, tuple[Any, str]] = {
    "one context": (TOKENS[0], r"\[batch, position\], found a tensor of shape \[7\]; those of one context are tokens"),
    "one token": (TOKENS[0, 0], r"found a tensor of shape \[\]$"),
    "vectors": (torch.zeros(2, 3, 4), r"found a tensor of shape \[2, 3, 4\]$"),
    "floats": (TOKENS.float(), r"whole numbers \(int64\), found float32; if they are ids .* tokens.long\(\)"),
    "a mask": (TOKENS > 3, r"whole numbers \(int64\), found bool$"),
    "a text": ("import os", r"found 'import os'; those of a text are model.to_tokens\(text\)"),
    "no token": (TOKENS[:, :0], r"no token in contexts of the shape \[2, 0\]"),
    "below 0": (TOKENS.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(-1)),
                r"id -1 at \[1, 3\] is none of .*, whose ids are 0 to [\d,]+; those of a text are model.to_tokens"),
    "beyond": (TOKENS.index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(50_000)),
               r"the token id 50000 at \[0, 2\] is none of the model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODD)
def test_tokens_that_are_none_of_the_model(kind: str, odd: str) -> None:
    tokens, says = ODD[odd]
    there = place(kind)
    with pytest.raises(ModelError, match=says):
        there.backend.run(tokens, want="loss")
    if isinstance(there.backend, InsideBackend):
        entry = there.backend.entry_of([there.late])
        value = there.backend.run(TOKENS, read=[entry]).held[entry]
        with pytest.raises(ModelError, match=says):
            there.backend.run_from(tokens, entry, value, want="loss")


def test_a_model_that_computes_positions_takes_longer_contexts() -> None:
    model = saekit.load_model(make_causal_lm("llama"))
    assert model.n_ctx == 64
    assert model.run(LONG, want="loss").loss.shape == (1, 64)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "HookedMamba"])
def test_contexts_that_are_too_long(kind: str) -> None:
    there = place(kind)
    assert there.backend.n_ctx == 64
    assert there.backend.run(LONG[:, :64], want="loss").loss.shape == (1, 63)
    with pytest.raises(ModelError, match=r"contexts of 65 tokens are too long: .* at most 64; cut them \(\[:, :64\]\)"):
        there.backend.run(LONG, want="loss")
    assert place("HookedMamba").backend.n_ctx is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_every_whole_type_are_taken(kind: str, dtype: torch.dtype) -> None:
    """transformer_lens would take ``uint8`` for a mask."""
    backend = place(kind).backend
    assert torch.equal(backend.run(TOKENS.to(dtype), want="loss").loss, backend.run(TOKENS, want="loss").loss)


def test_ids_elsewhere_are_not_waited_for() -> None:
    class Elsewhere:
        """Tokens on a device that nobody may look at."""

        ndim, shape, dtype = 2, torch.Size([2, 7]), torch.int64
        device = torch.device("cuda")

        def contiguous(self) -> None: ...

        def is_floating_point(self) -> bool:
            return False

        is_complex = is_floating_point

        def numel(self) -> int:
            return 14

    tokens: Any = Elsewhere()
    assert checked_tokens(tokens, FakeBackend()) is tokens
    meta: Tensor = torch.empty(2, 7, dtype=torch.long, device="meta")
    assert odd_tokens(meta, FakeBackend()) is None
    assert odd_tokens(torch.empty(0, 7, dtype=torch.long), FakeBackend()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_which_nothing_would_be_seen(kind: str) -> None:
    there = place(kind)
    says = r"so that no forward would run: ask for want='logits' or want='loss', or with read=\[...\]"
    with pytest.raises(ModelError, match=rf"^nothing is asked for, {says}"):
        there.backend.run(TOKENS)
    with pytest.raises(ModelError, match=rf"^nothing is asked for beside what replaces '{there.early}', {says}"):
        there.backend.run(TOKENS, replace={there.early: torch.zeros(3)})
    if isinstance(there.backend, InsideBackend):
        value = there.backend.run(TOKENS, read=[there.early]).held[there.early]
        with pytest.raises(ModelError, match=r"^nothing is asked for, so that no forward would run"):
            there.backend.run_from(TOKENS, there.early, value)
    with pytest.raises(ModelError, match=r"must be a tensor of shape .*, found \[3\]"):
        there.backend.run(TOKENS, replace={there.early: torch.zeros(3)}, want="loss")
