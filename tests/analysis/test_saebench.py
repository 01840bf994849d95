"""What SAEBench's evals take of an SAE, by its interface; and its own checks where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import saekit
from saekit.analysis.saebench import for_saebench
from saekit.errors import ConfigError
from saekit.kinds import SAE_ARCHITECTURES
from saekit.sae.build import build_module
from saekit.sae.module import SAEModule
from saekit.values import Ports

D, F = 12, 40
NOT_OF_ONE_SITE = {"temporal"}
ROW_WISE = ("layer_norm", "constant_norm", "rms")


def every_sae() -> list[Any]:
    """Each built-in architecture of one site, with rescaling and not, with b_dec taken from inputs and not."""
    found = []
    for item in saekit.default_manager().registry(SAE_ARCHITECTURES).items:
        config = item.entry.config()
        if not item.key.startswith("saekit:") or item.entry.name in NOT_OF_ONE_SITE:
            continue
        options: list[dict[str, Any]] = [
            {"apply_b_dec_to_input": False},
            *([{}] if config.apply_b_dec_to_input else []),
        ]
        options += [{name: False} for name in ("rescale_acts_by_decoder_norm",) if hasattr(config, name)]
        for chosen in options:
            small = {"k": 5, "skip_connection": False, **chosen}
            made = attrs.evolve(config, **{name: one for name, one in small.items() if hasattr(config, name)})
            found.append(pytest.param(made, id=f"{item.entry.name} {chosen}"))
    return found


def make(
    config: Any, ports: Ports | int = D, transform: Any = None, hook: str = "blocks.3.hook_resid_post"
) -> SAEModule:
    plugins = saekit.default_manager()
    sae = build_module(
        plugins.find(SAE_ARCHITECTURES, config), attrs.evolve(config, d_sae=F), ports, plugins, transform
    )
    generator = torch.Generator().manual_seed(4)
    for value in sae.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.6)
        value.requires_grad_(False)
    if hasattr(sae, "threshold_average"):
        sae.threshold_average.fill_(0.4)
        sae.threshold_updates.fill_(torch.inf)
    sae.after_update()
    site = saekit.Site(hook_name=hook)
    known = {"model_name": "gpt2-small", "context_size": 64, "prepend_bos": False, "seqpos_slice": [1, None]}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(site), metadata=known)
    return sae


def standard(**options: Any) -> Any:
    return attrs.evolve(saekit.default_manager().get(SAE_ARCHITECTURES, "saekit:standard").entry.config(), **options)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("config", every_sae())
def test_every_architecture_has_the_interface(config: Any) -> None:
    sae, x = make(config), rows(3, 7, D)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    bench = for_saebench(sae)
    assert isinstance(bench, nn.Module)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    assert {name: tuple(getattr(bench, name).shape) for name in shapes} == shapes
    assert close(bench.W_dec.norm(dim=1), torch.ones(F))
    features = bench.encode(x)
    assert features.shape == (3, 7, F)
    assert torch.equal(features != 0, sae.encode(x) != 0), "the same features are active"
    assert bool((features != 0).any())
    expected = sae(x)
    assert close(bench.decode(features), expected)
    assert close(bench(x), expected)
    assert close(bench(x.flatten(0, 1)).reshape(x.shape), expected), "flattened"
    assert close(features @ bench.W_dec + bench.b_dec, expected), "rows of W_dec are the features' directions"
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items()), "the SAE itself"


PLAIN = ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated", "groupmax")


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_active_is_as_large_as_the_encoder_says(name: str) -> None:
    """With a relu, or a selection among what a relu leaves."""
    config = saekit.default_manager().get(SAE_ARCHITECTURES, f"saekit:{name}").entry.config()
    sae, x = make(attrs.evolve(config, k=5) if hasattr(config, "k") else config), rows(9, D)
    if hasattr(sae, "r_mag"):
        sae.r_mag.zero_()  # a factor of magnitudes alone
    bench = for_saebench(sae)
    shift = bench.b_dec if sae.config.apply_b_dec_to_input else 0
    pre, features = (x - shift) @ bench.W_enc + bench.b_enc, bench.encode(x)
    assert close(torch.where(features != 0, pre, 0), features)
    assert torch.equal(bench.b_mag, bench.b_enc)


@pytest.mark.parametrize("transform", ROW_WISE)
def test_rows_that_are_normalized_come_back_in_their_own_units(transform: str) -> None:
    sae, x = make(standard(), transform=transform), rows(4, 6, D) * torch.logspace(-1, 1, 6)[:, None]
    bench = for_saebench(sae)
    assert close(bench(x), sae(x))
    first, second = bench.encode(x), bench.encode(2 * x.flip(0))
    assert close(bench.decode(first), sae(x)), "features are decoded by the rows that they were made of"
    changed = second * (second > second.mean())
    with torch.no_grad():
        expected = sae.decode(changed / bench.norms, like=2 * x.flip(0))
    assert close(bench.decode(changed), expected), "changed ones by those of the last encode"
    with pytest.raises(ConfigError, match=r"features are \[3, 40\], and the last that was encoded is \[4, 6, 12\]"):
        bench.decode(changed[0, :3].clone())
    with pytest.raises(ConfigError, match="nothing was encoded yet"):
        for_saebench(sae).decode(changed)


def test_a_scaling_factor_goes_into_the_features() -> None:
    sae, x = make(standard()), rows(8, D)
    sae.add_scaling_factor()
    assert sae.scaling_factor is not None
    sae.scaling_factor.data.copy_(torch.rand(F, generator=torch.Generator().manual_seed(3)) + 0.5)
    bench = for_saebench(sae)
    assert close(bench(x), sae(x))
    assert close(bench.encode(x) @ bench.W_dec + bench.b_dec, sae(x))
    assert bench.cfg.finetuning_scaling_factor is True  # type: ignore[attr-defined]


def test_dead_rows_stay_zero() -> None:
    sae, x = make(standard(normalize_sae_decoder=False)), rows(8, D)
    sae.W_dec[3] = 0
    bench = for_saebench(sae)
    assert torch.equal(bench.W_dec[3], torch.zeros(D))
    assert close(bench(x), sae(x))
    assert bool(bench.encode(x).isfinite().all())


def test_other_types_and_the_sae_stays_what_it_is() -> None:
    sae = make(standard())
    bench = for_saebench(sae)
    assert (bench.cfg.dtype, bench.device, bench.dtype) == ("float32", torch.device("cpu"), torch.float32)  # type: ignore[attr-defined]
    assert bench.to(device=torch.device("cpu"), dtype=torch.bfloat16) is bench
    assert (bench.cfg.dtype, bench.dtype, bench.cfg.device) == ("bfloat16", torch.bfloat16, "cpu")  # type: ignore[attr-defined]
    x = rows(8, D)
    assert bench(x.bfloat16()).dtype == torch.bfloat16
    assert (bench(x.bfloat16()).float() - sae(x)).abs().max() < 0.05 * sae(x).abs().max()
    assert sae.dtype == torch.float32


def test_the_configuration() -> None:
    bench = for_saebench(make(standard()))
    cfg: Any = bench.cfg
    known = cfg.to_dict()
    assert json.loads(json.dumps(known)) == known
    expected = {
        "model_name": "gpt2-small", "d_in": D, "d_sae": F, "hook_name": "blocks.3.hook_resid_post", "hook_layer": 3,
        "context_size": 64, "hook_head_index": None, "architecture": "standard", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "prepend_bos": False, "normalize_activations": "none", "dtype": "float32", "device": "cpu",
        "model_from_pretrained_kwargs": {}, "dataset_path": "", "dataset_trust_remote_code": False,
        "seqpos_slice": [1, None], "training_tokens": -100_000, "sae_lens_training_version": None,
        "neuronpedia_id": None, "exclude_special_tokens": None,
    }  # fmt: skip
    assert known == expected
    assert cfg.seqpos_slice == (1, None)
    cfg.architecture_str, cfg.metadata = "standard", object()  # as SAEBench does
    assert cfg.to_dict() == expected | {"architecture_str": "standard"}, "what is no JSON is left out"


def test_heads_are_flattened_and_given_back() -> None:
    sae, z = make(standard(), hook="blocks.3.attn.hook_z"), rows(2, 5, 3, 4)
    bench = for_saebench(sae)
    assert bench.hook_z_reshaping_mode
    assert bench(z).shape == z.shape
    assert close(bench(z), sae(z))
    bench.turn_off_forward_pass_hook_z_reshaping()
    assert not bench.hook_z_reshaping_mode
    assert close(bench(z.flatten(-2)), sae(z).flatten(-2))
    assert bench(z).shape == (2, 5, D)
    bench.turn_on_forward_pass_hook_z_reshaping()
    assert bench(z).shape == z.shape


def test_what_is_no_sae_of_one_site_is_refused() -> None:
    def config(name: str, **options: Any) -> Any:
        return attrs.evolve(saekit.default_manager().get(SAE_ARCHITECTURES, f"saekit:{name}").entry.config(), **options)

    two = Ports({"blocks.1.hook_mlp_in": D}, {"blocks.1.hook_mlp_out": D})
    with pytest.raises(ConfigError, match=r"this transcoder reads blocks.1.hook_mlp_in and writes blocks.1"):
        for_saebench(make(config("transcoder"), two))
    with pytest.raises(ConfigError, match=r"this crosscoder has 2 sites \(a, b\), and SAEBench reads and replaces one"):
        for_saebench(make(config("crosscoder"), Ports({"a": D, "b": D})))
    with pytest.raises(ConfigError, match="the features of this temporal depend on the positions before theirs"):
        for_saebench(make(config("temporal", n_heads=2, bottleneck_factor=2)))
    with pytest.raises(ConfigError, match="a skip connection adds to it"):
        for_saebench(make(config("transcoder", skip_connection=True, apply_b_dec_to_input=False)))


def test_what_is_not_known_is_asked_for() -> None:
    sae = make(standard())
    known = sae.info
    sae.info = attrs.evolve(known, metadata={})
    with pytest.raises(ConfigError, match="does not say which model it is for"):
        for_saebench(sae)
    assert for_saebench(sae, model_name="pythia-70m").cfg.to_dict()["model_name"] == "pythia-70m"
    sae.info = attrs.evolve(known, sites=None)
    with pytest.raises(ConfigError, match="does not say which hook it is for"):
        for_saebench(sae)
    assert for_saebench(sae, hook_name="blocks.5.hook_mlp_out").cfg.to_dict()["hook_layer"] == 5
    with pytest.raises(ConfigError, match="there is no block's number in the hook's name 'hook_embed'"):
        for_saebench(sae, hook_name="hook_embed")
    assert for_saebench(sae, hook_name="hook_embed", hook_layer=0).cfg.to_dict()["hook_layer"] == 0
    sae.info = attrs.evolve(known, metadata={"model_name": "a", "normalize_activations": "expected_average_only_in"})
    with pytest.raises(ConfigError, match="multiplied by a factor, and nobody knows which"):
        for_saebench(sae)


def test_a_decoder_of_another_kind_is_refused() -> None:
    class Squared(type(make(standard()))):  # type: ignore[misc]
        def reconstruction(self, features: torch.Tensor) -> torch.Tensor:
            return super().reconstruction(features).pow(2)  # type: ignore[no-any-return]

    sae = make(standard())
    sae.__class__ = Squared
    with pytest.raises(ConfigError, match="does not decode features as f W_dec"):
        for_saebench(sae)


@pytest.mark.slow
def test_its_core_eval_finds_what_the_sae_does() -> None:
    """`saebench_run.py` with a Python that has SAEBench: seven architectures in a model, and the same without it."""
    python = os.environ.get("SAEKIT_SAE_BENCH_PYTHON")
    if not python:
        pytest.skip("name a Python that has sae-bench and saekit in SAEKIT_SAE_BENCH_PYTHON")
    script = Path(__file__).with_name("saebench_run.py")
    done = subprocess.run([python, "-W", "ignore", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7
    for name, one in found.items():
        for metric, value in one["itself"].items():
            assert one["saebench"][metric] == pytest.approx(value, rel=1e-5), (name, metric)
