"""What rows go through before an SAE reads them: each by its own numbers, or a map that is folded into the weights."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import TranscoderConfig
from saekit_plugins.transforms.layer_norm import LayerNormConfig
from saekit_plugins.transforms.rms import RMSConfig
from safetensors.torch import load_file, save_file
from support.saved import READER, sae_lens_python

import saekit
from saekit.errors import ConfigError, DataError
from saekit.kinds import INPUT_TRANSFORMS, SAE_ARCHITECTURES
from saekit.sae.build import build_module
from saekit.sae.module import SAEModule
from saekit.transforms import Affine
from saekit.values import Ports

GOLDEN = Path(__file__).parents[1] / "golden_transforms"
D, F = 12, 40
ROW_WISE = ("layer_norm", "constant_norm", "rms")


def rows(n: int = 30, d: int = D, seed: int = 1) -> torch.Tensor:
    """Of very different sizes, with a mean and correlations."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(d, d, dtype=torch.float64, generator=generator)
    return x * torch.logspace(-2, 2, n, dtype=torch.float64)[:, None] + torch.arange(d) / 2


def made(config: Any, ports: Ports | int = D, transform: Any = None, seed: int = 4) -> SAEModule:
    plugins = saekit.default_manager()
    config = attrs.evolve(config, d_sae=F, dtype="float64")
    sae = build_module(plugins.find(SAE_ARCHITECTURES, config), config, ports, plugins, transform)
    generator = torch.Generator().manual_seed(seed)
    for value in sae.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.6)
        value.requires_grad_(False)
    if hasattr(sae, "threshold_average"):  # of batchtopk
        sae.threshold_average.fill_(0.4)
        sae.threshold_updates.fill_(torch.inf)
    sae.after_update()
    return sae


def test_the_formulas() -> None:
    x, y = rows(), rows(seed=2)
    build = saekit.default_manager().build
    mean, n = x.mean(1, keepdim=True), D
    deviation = ((x - mean) ** 2).sum(1, keepdim=True).div(n - 1).sqrt()
    norm, root = (x**2).sum(1, keepdim=True).sqrt(), ((x**2).mean(1, keepdim=True) + 1e-6).sqrt()
    expected = {
        "layer_norm": ((x - mean) / (deviation + 1e-5), y * deviation + mean),
        "constant_norm": (x * n**0.5 / norm, y * norm / n**0.5),
        "rms": (x / root, y * root),
    }
    for name, (read, written) in expected.items():
        transform: Any = build(INPUT_TRANSFORMS, name)
        torch.testing.assert_close(transform.read(x), read, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(transform.written(y, x), written, rtol=1e-12, atol=1e-12)
    other: Any = build(INPUT_TRANSFORMS, LayerNormConfig(eps=0.5))
    torch.testing.assert_close(other.read(x), (x - mean) / (deviation + 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ROW_WISE)
def test_rows_without_a_size_stay_finite(name: str) -> None:
    transform: Any = saekit.default_manager().build(INPUT_TRANSFORMS, name)
    for value in (0.0, 3.0, 1e-30):
        x = torch.full((2, D), value)
        for found in (transform.read(x), transform.written(transform.read(x), x)):
            assert found.isfinite().all()
    assert torch.equal(transform.read(torch.zeros(1, D)), torch.zeros(1, D))


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
def test_what_sae_lens_computes(tmp_path: Path, kind: str, normalize: str) -> None:
    folder = GOLDEN / f"{kind}_{normalize}"
    expected = load_file(folder / "expected.safetensors")
    loaded = saekit.SAE.load(folder)
    assert loaded.info.architecture == f"saekit:{kind}"
    x = expected["x"]
    for sae in (loaded, saekit.SAE.load(loaded.save(tmp_path / "again"))):
        for sae.kernels in ("auto", "reference"):
            with torch.no_grad():
                found = {
                    "encode": sae.encode(x), "decode": sae.decode(expected["encode"], like=x), "forward": sae(x),
                }  # fmt: skip
                sparse = sae.encode_sparse(x).dense()
            for name, value in found.items():
                assert (value - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
            assert (sparse - expected["encode"]).abs().max() <= 1e-6 * expected["encode"].abs().max()


KINDS: dict[str, Any] = {
    "standard": StandardConfig(apply_b_dec_to_input=False),
    "topk": TopKConfig(k=5, rescale_acts_by_decoder_norm=False),
    "jumprelu": JumpReLUConfig(),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_whitening_folded_as_sae_lens_folds_it(kind: str) -> None:
    golden = load_file(GOLDEN / "whitening.safetensors")
    own = {name.removeprefix(f"{kind}.before."): value for name, value in golden.items() if f"{kind}.before." in name}
    plugins = saekit.default_manager()
    config = attrs.evolve(KINDS[kind], d_sae=30, normalize_sae_decoder=False)
    sae = build_module(plugins.find(SAE_ARCHITECTURES, config), config, 12, plugins)
    sae.load_public_tensors(own)
    sae.fold_affine(Affine(golden["map.mean"], golden["map.matrix"], golden["map.inverse"]))
    with torch.no_grad():
        found = {"encode": sae.encode(golden["x"]), "forward": sae(golden["x"])}
    for name, value in found.items():
        expected = golden[f"{kind}.{name}"]
        assert (value - expected).abs().max() <= 2e-6 * expected.abs().max(), name


def affine(d: int, seed: int = 3) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(d, d, dtype=torch.float64, generator=generator) + 2 * torch.eye(d, dtype=torch.float64)
    return Affine(torch.randn(d, dtype=torch.float64, generator=generator) * 3, matrix, torch.linalg.inv(matrix))


def every_architecture() -> list[Any]:
    """Those that are installed, each with b_dec taken from inputs and not, and with rescaling and not."""
    found = []
    for item in saekit.default_manager().registry(SAE_ARCHITECTURES).items:
        config = item.entry.config()
        options: list[dict[str, Any]] = [{"apply_b_dec_to_input": False}]
        options += [{}] if config.apply_b_dec_to_input else []
        if hasattr(config, "rescale_acts_by_decoder_norm"):
            options += [{"rescale_acts_by_decoder_norm": False}]
        if hasattr(config, "skip_connection"):
            options += [{"skip_connection": not config.skip_connection}]
        for chosen in options:
            small = {"k": 5, "n_heads": 2, "bottleneck_factor": 2}
            made = attrs.evolve(config, **{name: one for name, one in small.items() if hasattr(config, name)}, **chosen)
            found.append(pytest.param(made, id=f"{item.entry.name} {chosen}"))
    return found


@pytest.mark.parametrize("config", every_architecture())
def test_folded_is_unfolded(config: Any) -> None:
    """What an SAE for mapped rows does with the map around it, it does when the map is in its weights."""
    for ports in (Ports.one(D), Ports({"in": D}, {"out": 7})):
        try:
            sae = made(config, ports)
        except ConfigError:  # one that reads what it writes
            assert not ports.same
            continue
        x = rows().reshape(3, 10, D) if sae.reads_sequences else rows()
        read = affine(D)
        written = read if ports.same else affine(7, seed=8)
        z = (x - read.mean) @ read.matrix
        features = sae.encode(z)
        output = sae(z) @ written.inverse + written.mean
        assert 0 < int((features != 0).sum()) < features.numel()
        if sae.info.architecture in ("saekit:matching_pursuit", "saekit:temporal"):  # which do not train
            with pytest.raises(
                ConfigError, match=r"no matrix can be folded into W_dec \[d_sae, d_out\], which does not"
            ):
                sae.fold_affine(read)
            continue
        sae.fold_affine(read, None if ports.same else written)
        torch.testing.assert_close(sae.encode(x), features, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(sae(x), output, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(sae.encode_sparse(x).dense(), features, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("config", every_architecture())
def test_a_scale_folded_is_unfolded(config: Any) -> None:
    for ports, written in ((Ports.one(D), 1.7), (Ports({"in": D}, {"out": 7}), 0.4)):
        try:
            other = made(config, ports)
        except ConfigError:
            continue
        x = rows().reshape(3, 10, D) if other.reads_sequences else rows()
        expected = other.encode(1.7 * x), other(1.7 * x) / written
        other.fold_activation_scale(1.7, None if ports.same else written)
        torch.testing.assert_close(other(x), expected[1], rtol=1e-8, atol=1e-8)
        # Features that are multiplied by norms, or found by the decoder alone, shrink with the decoder.
        by_norms = getattr(other, "feature_norms", lambda: None)() is not None
        shrunk = by_norms or other.info.architecture == "saekit:matching_pursuit"
        torch.testing.assert_close(other.encode(x) * (written if shrunk else 1), expected[0], rtol=1e-8, atol=1e-8)


def test_whitening_is_what_it_says() -> None:
    x = rows(4000) / rows(4000).norm(dim=1, keepdim=True) + 5
    transform: Any = saekit.default_manager().build(INPUT_TRANSFORMS, "whitening")
    found = transform.estimated(x)
    covariance = torch.cov(x.T)
    variances = torch.linalg.eigvalsh(covariance)
    expected = variances / (variances + 1e-3 * variances.mean())
    z = (x - found.mean) @ found.matrix
    torch.testing.assert_close(z.mean(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(z.T)), expected.sort().values)
    torch.testing.assert_close(z @ found.inverse + found.mean, x)
    assert torch.equal(found.matrix, found.matrix.T) or torch.allclose(found.matrix, found.matrix.T, atol=1e-9)
    for wrong in (torch.ones(5, D), rows(1)):
        with pytest.raises(DataError, match=r"cannot be whitened: \d of them have a mean variance of 0 .* Look at the"):
            transform.estimated(wrong)


@pytest.mark.parametrize("name", ROW_WISE)
@pytest.mark.parametrize("config", [StandardConfig(), TopKConfig(k=5), JumpReLUConfig()])
def test_an_sae_of_normalized_rows(name: str, config: Any) -> None:
    x, plain, sae = rows(), made(config), made(config, transform=name)
    transform: Any = sae.input_transform
    z = transform.read(x)
    features = plain.encode(z)
    for sae.kernels in ("auto", "reference"):
        torch.testing.assert_close(sae.encode(x), features)
        torch.testing.assert_close(sae.encode_sparse(x).dense(), features)
        torch.testing.assert_close(sae(x), transform.written(plain(z), x))
        torch.testing.assert_close(sae.decode(features, like=x), transform.written(plain(z), x))
    values, found = sae.encode_topk(x.reshape(5, 6, D), 2)
    torch.testing.assert_close(values, plain.encode_topk(z.reshape(5, 6, D), 2)[0])
    assert found.shape == (5, 6, 2)
    assert torch.equal(sae(x.float()).double(), sae(x.float().double()).float().double()), "in the type of its input"


def test_decoding_needs_the_rows() -> None:
    sae, x = made(StandardConfig(), transform="layer_norm"), rows()
    with pytest.raises(
        ConfigError, match=r"normalizes each row .*\(LayerNorm\).* give the rows too, decode\(features, l"
    ):
        sae.decode(sae.encode(x))
    plain = made(StandardConfig())
    assert torch.equal(sae.reconstruction(sae.encode(x)), plain.reconstruction(sae.encode(x)))


def test_hooks_stand_around_it() -> None:
    """The input and what comes out are raw; what lies between has the units of normalized rows."""
    x, plain, sae = rows(), made(StandardConfig()), made(StandardConfig(), transform="constant_norm")
    transform: Any = sae.input_transform
    seen: dict[str, torch.Tensor] = {}

    def look(value: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = value

    for name in ("input", "acts_pre", "acts_post", "recons", "output"):
        sae._point(name).add_hook(look)
    output = sae(x)
    z = transform.read(x)
    assert torch.equal(seen["hook_sae_input"], x)
    torch.testing.assert_close(seen["hook_sae_acts_pre"], plain.pre_activations(z))
    torch.testing.assert_close(seen["hook_sae_recons"], plain(z))
    assert torch.equal(seen["hook_sae_output"], output)
    sae._point("input").add_hook(lambda value, hook: value * 3)
    torch.testing.assert_close(sae(x), transform.written(plain(z), 3 * x)), "statistics of what the hook leaves"
    clean = made(StandardConfig(), transform="constant_norm")
    clean.use_error_term = True
    torch.testing.assert_close(clean(x), x)
    clean._point("acts_post").add_hook(lambda value, hook: value * 0)
    assert (clean(x) - x).abs().max() > 0.1


def test_heads_and_several_sites() -> None:
    """Heads are one row; of several sites, each has numbers of its own."""
    x, sae = rows(), made(StandardConfig(), transform="layer_norm")
    heads = x.reshape(10, 3, 3, 4)
    assert torch.equal(sae(heads), sae(x).reshape(10, 3, 3, 4))
    ports = Ports({"a": 5, "b": 7})
    both, plain = made(StandardConfig(), ports, "layer_norm"), made(StandardConfig(), ports)
    transform: Any = both.input_transform
    z = torch.cat([transform.read(x[:, :5]), transform.read(x[:, 5:])], 1)
    torch.testing.assert_close(both.encode(x), plain.encode(z))
    parts = transform.written(plain(z)[:, :5], x[:, :5]), transform.written(plain(z)[:, 5:], x[:, 5:])
    torch.testing.assert_close(both(x), torch.cat(parts, 1))


def test_what_cannot_be() -> None:
    two = Ports({"blocks.0.hook_mlp_in": D}, {"blocks.0.hook_mlp_out": D})
    with pytest.raises(
        ConfigError, match="reads blocks.0.hook_mlp_in and writes blocks.0.hook_mlp_out, whose rows have"
    ):
        made(TranscoderConfig(), two, "layer_norm")
    with pytest.raises(ConfigError, match="saekit:whitening is estimated from data and folded into weights"):
        made(StandardConfig(), D, "whitening")
    sae = made(StandardConfig(), D, "rms")
    with pytest.raises(ConfigError, match="a factor cannot be folded into this SAE: it normalizes each row by itself"):
        sae.fold_activation_scale(2.0)
    with pytest.raises(ConfigError, match="an affine map cannot be folded into this SAE"):
        sae.fold_affine(affine(D))
    with pytest.raises(ConfigError, match=r"matrix of an affine map must be \[12, 12\].* found \[7, 7\]"):
        made(TopKConfig(k=5)).fold_affine(attrs_with(affine(7), affine(D).mean))
    odd = made(StandardConfig(apply_b_dec_to_input=False))
    odd.b_enc = None  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match="no mean can be folded into a StandardSAE, which has no b_enc and does not say"
    ):
        odd.fold_affine(affine(D))
    with pytest.raises(
        ConfigError, match="inputs and targets are other sites: each has a map of its own, so give both"
    ):
        made(TranscoderConfig(), two).fold_affine(affine(D))


def attrs_with(found: Affine, mean: torch.Tensor) -> Affine:
    return found._replace(mean=mean)


@pytest.mark.parametrize("config", [StandardConfig(), TopKConfig(k=5), JumpReLUConfig()])
def test_a_step_is_one_on_normalized_rows(way: Any, config: Any) -> None:
    x = rows()
    generator = torch.Generator().manual_seed(0)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:4] = True
    plain, sae = made(config), made(config, transform="layer_norm")
    found = []
    for one, given in ((plain, sae.transformed(x)), (sae, x)):
        one.kernels = way
        one.requires_grad_(True)
        assert (one.why_reference() is None) == (way == "fast")
        found.append(one.training_step(given, saekit.StepInput(step=3, generator=generator, dead=dead)))
    assert torch.equal(found[0].loss, found[1].loss)
    for (name, one), other in zip(plain.named_parameters(), sae.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    torch.testing.assert_close(found[1].output, sae.undone(found[0].output, x))
    with pytest.raises(ConfigError, match="rows are normalized each by itself, so they are their own targets"):
        sae.training_step(x, saekit.StepInput(step=3, generator=generator, target=x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_norm", "constant_norm"])
def test_sae_lens_6_reads_what_is_saved(tmp_path: Path, name: str) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    for number, config in enumerate((StandardConfig(), TopKConfig(k=5), JumpReLUConfig())):
        sae, x = made(config, transform=name), rows()
        sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(saekit.Site()))
        folder = sae.save(tmp_path / str(number))  # type: ignore[attr-defined]
        save_file({"x": x}, tmp_path / "x.safetensors")
        command = [
            python,
            "-c",
            READER,
            str(folder),
            str(tmp_path / "x.safetensors"),
            str(tmp_path / "found.safetensors"),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / "found.safetensors")
        torch.testing.assert_close(found["features"], sae.encode(x))
        torch.testing.assert_close(found["out"], sae(x))


def test_saved_with_all_its_options(tmp_path: Path) -> None:
    for transform, named, architecture in (
        ("layer_norm", "layer_norm", "standard"),
        ("constant_norm", "constant_norm_rescale", "standard"),
        (LayerNormConfig(eps=0.25), "saekit:layer_norm", "saekit:standard"),
        (RMSConfig(eps=0.5), "saekit:rms", "saekit:standard"),
    ):
        sae = made(StandardConfig(), transform=transform)
        again = saekit.SAE.load(sae.save(tmp_path / "sae"))  # type: ignore[attr-defined]
        table = json.loads((tmp_path / "sae/cfg.json").read_text())
        assert (table["normalize_activations"], table["architecture"]) == (named, architecture)
        assert table["saekit"]["format"] == 2, "which a saekit that has no transforms refuses"
        assert again.input_transform == sae.input_transform or transform == "constant_norm"
        copies = (again, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)))
        with torch.no_grad():
            assert all(torch.equal(one(rows()), sae(rows())) for one in copies)
        assert again.info.input_transform == sae.info.input_transform
    plain = made(StandardConfig())
    plain.save(tmp_path / "plain")  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "plain/cfg.json").read_text())["saekit"]["format"] == 1
