"""How what holds tensors is shown, which may be large."""

from __future__ import annotations

import torch

import saekit
from saekit.forwards import Forward
from saekit.kernels.sparse import SparseFeatures
from saekit.measuring import Outcome, Seen
from saekit.saved import PretrainedSAE
from saekit.testing import FakeBackend
from saekit.values import Batch, StepInput, StepOutput

ROWS, IDS = torch.zeros(3, 4), torch.arange(3)
SITE = saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)


def test_a_forward() -> None:
    tokens = torch.arange(8)[None]
    forward = FakeBackend().run(tokens, read=["hook_embed"], want="logits")
    assert repr(forward) == "Forward(held={'hook_embed': float32[1, 8, 8]}, logits=float32[1, 8, 128])"
    assert repr(FakeBackend().run(tokens, want="loss")) == "Forward(loss=float32[1, 7])"
    many = repr(Forward({f"hook_{n}": ROWS for n in range(1000)}))
    assert many.endswith("'hook_7': float32[3, 4], and 992 others})")
    assert len(many) < 300


def test_a_name_is_harmless() -> None:
    assert "\x1b" not in repr(Forward({"\x1b[31m": ROWS}))


def test_others() -> None:
    sparse = SparseFeatures(IDS, IDS, ROWS[:, 0], 3, 8)
    shown = "SparseFeatures(rows=int64[3], features=int64[3], values=float32[3], n=3, d_sae=8)"
    assert repr(sparse) == shown
    assert (
        repr(Batch({SITE: ROWS}, tokens=IDS)) == f"Batch(activations={{{SITE.name!r}: float32[3, 4]}}, tokens=int64[3])"
    )
    outcome = Outcome(loss=ROWS)
    assert repr(outcome) == "Outcome(loss=float32[3, 4])"
    seen = Seen(numbers=(4,), tokens=IDS, kept=IDS > 0, sites=saekit.Sites.one(SITE), features=sparse, clean=outcome)
    assert "kept=bool[3], " in repr(seen)
    assert repr(seen).endswith(f"features={shown}, clean=Outcome(loss=float32[3, 4]))")
    step = StepInput(3, torch.Generator(), dead=IDS > 1)
    assert repr(step).startswith("StepInput(step=3, generator=<torch.")
    assert repr(step).endswith(", dead=bool[3])")
    out = StepOutput(loss=ROWS[0, 0], losses={"mse_loss": ROWS[0, 0]}, output=ROWS, fired=IDS, metrics={"l0": 2.0})
    assert repr(out) == (
        "StepOutput(loss=float32[], losses={'mse_loss': float32[]}, output=float32[3, 4], fired=int64[3], "
        "metrics={'l0': 2.0})"
    )
    read = PretrainedSAE(options={"d_in": 4}, tensors={"W_enc": ROWS})
    assert "options={'d_in': 4}, tensors={'W_enc': float32[3, 4]}" in repr(read)
