"""From which tokens an attention brings what makes a feature active, against a loop over heads and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.saes import at, drawn_sae
from support.spliced import bridge
from support.tiny import hooked_transformer

import saekit
from saekit.analysis.attribution import AttentionSources
from saekit.errors import ModelError
from saekit.testing import FakeBackend

Z = "blocks.1.attn.hook_z"
TOKENS = torch.randint(1, 2000, (3, 9), generator=torch.Generator().manual_seed(0))


def grouped() -> Any:
    """Four heads in two groups, each of which has its values once."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 2048}
    more: dict[str, Any] = {"n_key_value_heads": 2, "act_fn": "gelu", "d_mlp": 8, "seed": 0, "device": "cpu"}
    return HookedTransformer(HookedTransformerConfig(**shape, **more))


OTHERS = {"grouped heads": grouped, "a bridge": bridge}


@pytest.fixture(scope="module")
def plain() -> Any:
    return saekit.load_model(hooked_transformer().double())


def slowly(sae: Any, model: Any, feature: int, row: int, place: int) -> list[float]:
    held = model.run(TOKENS, read=[Z, Z.replace("_z", "_pattern"), Z.replace("_z", "_v")]).held
    z, pattern, v = (held[Z.replace("_z", end)][row] for end in ("_z", "_pattern", "_v"))
    heads, width = z.shape[1:]
    column = sae.W_enc.detach()[:, feature].reshape(-1, width)
    head = sae.info.sites.inputs[0].hook_head_index
    found = []
    for source in range(len(z)):
        total = 0.0
        for number, own in enumerate([head] if head is not None else range(heads)):
            group = own // (heads // v.shape[1])
            for d in range(width):
                total += float(pattern[own, place, source] * v[source, group, d] * column[number, d])
        found.append(total)
    return found


@pytest.mark.parametrize("which", ["all heads", "one head", *OTHERS])
def test_contributions_are_those_of_a_loop_and_sum_up_to_the_linear_part(which: str, plain: Any) -> None:
    model = plain
    if which in OTHERS:
        model = saekit.load_model(OTHERS[which]().double())
    head = 1 if which == "one head" else None
    sae = at(
        drawn_sae(8 if head is not None else 16, d_sae=5, dtype="float64"),
        saekit.Site(hook_name=Z, hook_head_index=head),
    )
    sources = AttentionSources.of(sae, model)
    rows, places = [0, 2, 2], [8, 0, 5]
    found = sources.at(TOKENS, 3, rows, places)
    assert found.dtype == torch.float64
    wanted = torch.tensor([slowly(sae, model, 3, *one) for one in zip(rows, places, strict=True)], dtype=found.dtype)
    assert torch.allclose(found, wanted, atol=1e-12, rtol=1e-9)
    assert (found[1, 1:] == 0).all()
    assert float(found.abs().max()) > 1e-3
    z = sae.info.sites.inputs[0].extract(model.run(TOKENS, read=[Z]).held[Z])[rows, places]
    with torch.no_grad():
        linear = (sae.pre_activations(z) - sae.pre_activations(torch.zeros_like(z)))[:, 3]
    assert torch.allclose(found.sum(1), linear, atol=1e-12)


class Attentive(FakeBackend):
    """One that has hooks of that name, which hold something else."""

    def hook_names(self) -> Sequence[str]:
        return [*super().hook_names(), *(f"blocks.0.attn.hook_{name}" for name in ("pattern", "v"))]

    def forward(self, tokens: torch.Tensor, hooks: Any) -> torch.Tensor | None:
        batch, length = tokens.shape
        hooks("blocks.0.attn.hook_pattern", torch.eye(length).expand(batch, 2, length, length))
        hooks("blocks.0.attn.hook_v", torch.ones(batch, length, 2, 4))
        return super().forward(tokens, hooks)


def test_no_sources_are_claimed_where_none_can_be_told() -> None:
    heads = "blocks.0.attn.hook_z"
    with pytest.raises(
        ModelError, match=r"only where an SAE reads the heads of an attention.* reads blocks\.1\.hook_res"
    ):
        AttentionSources.of(at(drawn_sae(8), "blocks.1.hook_resid_post"), FakeBackend())
    with pytest.raises(ModelError, match=r"'fake' has no hook blocks\.0\.attn\.hook_pattern, blocks\.0\.attn\.hook_v"):
        AttentionSources.of(at(drawn_sae(8), heads), FakeBackend())
    sources = AttentionSources.of(at(drawn_sae(8), heads), Attentive())
    with pytest.raises(ModelError, match=r"does not hold blocks\.0\.attn\.hook_pattern times blocks\.0\.attn\.hook_v"):
        sources.at(TOKENS % 100, 3, [0], [2])
    odd = at(drawn_sae(8), heads)
    odd.pre_activations = lambda x: x.abs() @ odd.W_enc
    with pytest.raises(ModelError, match="are no linear function of what is read"):
        AttentionSources.of(odd, Attentive())._encoder(3, torch.randn(2, 2, 4))
