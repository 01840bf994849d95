"""Tables of features: cosines, firing, and the distribution of their logits, against float64 and closed forms."""

from __future__ import annotations

import attrs
import numpy as np
import pandas as pd
import pytest
import torch
from support.causal_lms import TOKENS, causal_lm_folder, make_causal_lm
from support.tiny import hooked_transformer

import saekit
from saekit.analysis.directions import LogitPath, feature_directions, logit_path
from saekit.analysis.feature_statistics import COLUMNS, layer_of, statistics_table
from saekit.analysis.moments import row_moments
from saekit.testing import FakeBackend

RESIDUAL = saekit.Site(hook_name="blocks.0.hook_resid_post")


def made(
    site: saekit.Site = RESIDUAL, d_in: int = 8, d_sae: int = 24, name: str = "standard", **options: object
) -> saekit.SAE:
    sae = saekit.SAE.from_dict({"name": name, "d_in": d_in, "d_sae": d_sae, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(site))
    return sae


def test_moments_are_those_of_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(600, 6, generator=generator)
    columns = torch.randn(6, 5000, generator=generator).exp() + 50  # means large beside the spread
    rows[3] = 0
    found = row_moments(lambda part: rows[part], len(rows), columns)
    product = rows.double() @ columns.double()
    z = (product - product.mean(1, keepdim=True)) / product.std(1, correction=0, keepdim=True)
    some = torch.arange(len(rows)) != 3
    torch.testing.assert_close(found.mean, product.mean(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.std[some], product.std(1, correction=0)[some], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.skewness[some], (z**3).mean(1)[some], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.kurtosis[some], (z**4).mean(1)[some], rtol=1e-4, atol=1e-4)
    assert found.std[3] == 0
    assert found.skewness[3].isnan()
    assert found.kurtosis[3].isnan()


def test_the_kurtosis_of_a_normal_distribution_is_3() -> None:
    columns = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    found = row_moments(lambda part: torch.ones(1, 1)[part], 1, columns)
    assert float(found.kurtosis) == pytest.approx(3, abs=0.05)
    assert float(found.skewness) == pytest.approx(0, abs=0.03)


def test_cosines_are_over_the_width_of_the_model() -> None:
    """The reference normalized over features instead: fault 27."""
    sae = made()
    table = saekit.feature_statistics(sae, logits=False, verbose=False)
    encoder, decoder = sae.W_enc.detach().double(), sae.W_dec.detach().double()
    wanted = [float(encoder[:, f] @ decoder[f] / encoder[:, f].norm() / decoder[f].norm()) for f in range(24)]
    assert table["encoder_decoder_cosine"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert table["b_enc"].tolist() == pytest.approx(sae.b_enc.tolist())
    assert table["b_dec_projection"].tolist() == pytest.approx((sae.W_dec @ sae.b_dec).tolist(), rel=1e-4, abs=1e-5)
    with torch.no_grad():
        sae.W_enc.copy_(5 * sae.W_dec.T)
    ones = saekit.feature_statistics(sae, logits=False, verbose=False)["encoder_decoder_cosine"]
    assert ones.tolist() == pytest.approx([1.0] * 24, rel=1e-6)


def test_logarithms_have_no_epsilon() -> None:
    """The reference added 1e-10, so that what never fires had -10: fault 27."""
    sae = made()
    fractions = torch.tensor([0.0, 1.0, 0.5, 1e-8] + [0.01] * 20, dtype=torch.float64)
    sae.log_sparsity = torch.log10(fractions + 1e-10).float()  # as it is saved
    found = saekit.feature_statistics(sae, logits=False, verbose=False)
    given = saekit.feature_statistics(sae, fractions=fractions, logits=False, verbose=False)
    for table in (found, given):
        assert table["log_feature_sparsity"][0] == -np.inf
        assert table["log_feature_sparsity"][1:].tolist() == pytest.approx(fractions[1:].log10().tolist(), abs=1e-5)
        assert table["dead"].tolist() == [True] + [False] * 23
    sae.log_sparsity = None
    table = saekit.feature_statistics(sae, logits=False, verbose=False)
    assert table["dead"].isna().all()
    (why,) = table.attrs["left_out"].values()
    assert "does not say how often" in why["dead"]


def test_logits_of_the_residual_stream_and_of_what_leads_there() -> None:
    model = hooked_transformer()
    backend = saekit.load_model(model)
    unembedding = model.W_U.detach().double()
    block = model.blocks[1]
    ways = {
        "blocks.1.hook_resid_post": (torch.eye(16), None),
        "blocks.1.attn.hook_z": (block.attn.W_O.detach().flatten(0, 1), None),
        "blocks.1.mlp.hook_post": (block.mlp.W_out.detach(), None),
        "blocks.1.mlp.hook_pre": (block.mlp.W_out.detach(), None),
        "blocks.1.attn.hook_z.head1": (block.attn.W_O.detach()[1], 1),
    }
    for hook, (weights, head) in ways.items():
        sae = made(saekit.Site(hook_name=hook.removesuffix(".head1"), hook_head_index=head), d_in=len(weights))
        table = saekit.feature_statistics(sae, model=backend, verbose=False)
        logits = sae.W_dec.detach().double() @ weights.double() @ unembedding
        assert table["logit_std"].tolist() == pytest.approx(logits.std(1, correction=0).tolist(), rel=1e-4), hook
        assert "logit_std" not in table.attrs["left_out"].get(table["sae"][0], {})
    for hook in ("blocks.1.attn.hook_q", "blocks.1.ln1.hook_normalized"):
        sae = made(saekit.Site(hook_name=hook), d_in=16)
        table = saekit.feature_statistics(sae, model=backend, verbose=False)
        assert table["logit_mean"].isna().all()
        assert "is not in the residual stream" in table.attrs["left_out"][table["sae"][0]]["logit_mean"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_transformers_models_have_the_same_ways(kind: str) -> None:
    backend = saekit.load_model(make_causal_lm(kind))
    layer = (backend.model.transformer.h if kind == "gpt2" else backend.model.model.layers)[1]
    attention, mlp = (
        (layer.attn.c_proj, layer.mlp.c_proj) if kind == "gpt2" else (layer.self_attn.o_proj, layer.mlp.down_proj)
    )
    names = {id(module): name for name, module in backend.model.named_modules()}
    for module in (attention, mlp):
        found = backend.to_residual_stream(f"{names[id(module)]}.input")
        if kind == "gemma2":  # which normalizes what it adds
            assert found is None
            continue
        x = torch.randn(3, len(found))
        bias = 0 if getattr(module, "bias", None) is None else module.bias
        torch.testing.assert_close(x @ found + bias, module(x))
    gate = backend.hook_like("blocks.1.mlp.hook_pre")
    assert (backend.to_residual_stream(gate) is None) == (kind != "gpt2"), "a gate is multiplied with what is behind it"
    assert backend.to_residual_stream("nowhere") is None


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "gemma2"])
def test_bridges_have_the_same_ways(kind: str, compatible: bool) -> None:
    options = {"name": "TransformerBridge", "compatibility_mode": compatible}
    backend = saekit.load_model(causal_lm_folder(kind), backend=options, device="cpu")
    for inside, added in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
        inside, added = f"blocks.1.{inside}", f"blocks.1.{added}"
        weights = backend.to_residual_stream(inside)
        if kind == "gemma2":  # which normalizes what it adds
            assert weights is None
            continue
        held = backend.run(TOKENS, read=[inside, added]).held
        twice = backend.run(TOKENS, read=[added], replace={inside: lambda x: 2 * x}).held[added]
        torch.testing.assert_close(twice - held[added], held[inside].flatten(2) @ weights, rtol=1e-4, atol=1e-4)
    assert (backend.to_residual_stream("blocks.1.mlp.hook_pre") is not None) == (kind in ("gpt2", "neox"))
    for nowhere in ("blocks.1.attn.hook_q", "blocks.1.hook_resid_mid", "nowhere"):
        assert backend.to_residual_stream(nowhere) is None


def test_gated_mlps_of_transformer_lens_have_no_way_from_before_the_gate() -> None:
    backend = saekit.load_model(hooked_transformer())
    assert backend.to_residual_stream("blocks.0.mlp.hook_pre") is not None
    backend.model.cfg.gated_mlp = True
    assert backend.to_residual_stream("blocks.0.mlp.hook_pre") is None
    backend.model.cfg.use_normalization_before_and_after = True
    assert backend.to_residual_stream("blocks.0.mlp.hook_post") is None


def test_several_saes_are_one_table_that_parquet_keeps(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    other = saekit.Site(hook_name="blocks.1.hook_resid_post")
    table = saekit.feature_statistics(
        {"low": made(), "high": made(other, d_sae=10)}, model=FakeBackend(), verbose=False
    )
    assert list(table.columns) == list(COLUMNS)
    assert table.groupby("sae", observed=True, sort=False).size().to_dict() == {"low": 24, "high": 10}
    assert table.groupby("sae", observed=True, sort=False)["layer"].first().to_dict() == {"low": 1, "high": 2}
    table.to_parquet(folder / "table.parquet")
    again = pd.read_parquet(folder / "table.parquet")
    pd.testing.assert_frame_equal(again, table)
    assert again.attrs == table.attrs


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.8.hook_resid_pre", 8), ("blocks.8.hook_resid_post", 9), ("blocks.3.attn.hook_z", 3),
     ("transformer.h.3", 4), ("transformer.h.3.input", 3), ("model.layers.2.mlp.down_proj.input", 2),
     ("hook_embed", None)],
)  # fmt: skip
def test_layers(hook: str, layer: int | None) -> None:
    assert layer_of(saekit.Sites.one(saekit.Site(hook_name=hook))) == layer
    assert layer_of(None) is None


def test_what_has_no_meaning_is_left_out_with_a_reason() -> None:
    transcoder = saekit.SAE.from_dict(
        {"name": "transcoder", "d_in": 8, "d_sae": 12, "apply_b_dec_to_input": False},
        ports=saekit.Ports({"in": 8}, {"out": 6}),
    )
    table = statistics_table(transcoder, name="it", sites=None, path="none")
    assert table["encoder_decoder_cosine"].isna().all()
    assert "writes vectors of 6" in table.attrs["left_out"]["encoder_decoder_cosine"]
    assert table.attrs["left_out"]["logit_std"] == "none"
    assert not table["b_dec_projection"].isna().any()
    gated = statistics_table(made(name="gated"), name="it", sites=None, path="none")
    assert "has no b_enc" in gated.attrs["left_out"]["b_enc"]


def test_directions_are_what_decoding_does() -> None:
    sae = made()
    sae.add_scaling_factor()
    with torch.no_grad():
        sae.scaling_factor.copy_(torch.rand(24) + 0.5)  # type: ignore[union-attr]
    torch.testing.assert_close(feature_directions(sae, slice(0, 24)), sae.scaling_factor[:, None] * sae.W_dec)  # type: ignore[index]

    class Halved(type(sae)):  # type: ignore[misc]
        def decode(self, features: torch.Tensor, **more: object) -> torch.Tensor:
            return super().decode(features / 2, **more)  # type: ignore[no-any-return]

    sae.__class__ = Halved
    torch.testing.assert_close(
        feature_directions(sae, torch.tensor([5])), 0.5 * (sae.scaling_factor[5] * sae.W_dec[5])[None]
    )  # type: ignore[index]
    assert isinstance(logit_path(sae, FakeBackend(), RESIDUAL), LogitPath)


def test_bad_fractions_are_told() -> None:
    with pytest.raises(saekit.ConfigError, match=r"must be \[24\] numbers from 0 to 1 of it"):
        statistics_table(made(), name="it", sites=None, path="none", fractions=torch.full((24,), -3.0))
    with pytest.raises(saekit.ConfigError, match="mapping of the names one, two"):
        saekit.feature_statistics({"one": made(), "two": made()}, fractions=torch.ones(24), logits=False, verbose=False)


def test_without_a_model_the_weights_can_still_be_looked_at() -> None:
    with pytest.raises(saekit.SaekitError, match="logits=False"):
        saekit.feature_statistics(made(), verbose=False)
