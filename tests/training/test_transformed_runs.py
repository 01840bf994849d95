"""Runs whose activations go through something before the SAE reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.transforms.rms import RMSConfig
from support.training import fake_run, fakes, lines, train

import saekit
from saekit.config.files import dump_config, load_config
from saekit.data.normalize import activation_scale
from saekit.errors import ConfigError, PluginFailedError, UnknownKeyError
from saekit.evals import variance_metrics
from saekit.testing import FakeBackend, fake_plugin

SITE = "blocks.0.hook_resid_post"
FREE: dict[str, Any] = {"normalize_sae_decoder": False, "dtype": "float64"}


def run(folder: Path, transform: Any, **sections: Any) -> dict[str, Any]:
    return fake_run(folder, activations={"normalize_activations": transform}, sae=FREE, **sections)


def activations() -> torch.Tensor:
    tokens = (7 * torch.arange(20)[:, None] + torch.arange(24)) % 120 + 1  # as those of the documents
    return FakeBackend().run(tokens, read=[SITE]).held[SITE].reshape(-1, FakeBackend().d_model).double()


@pytest.mark.parametrize("transform", ["layer_norm", "constant_norm", {"name": "rms", "eps": 0.1}])
def test_a_run_of_normalized_rows(tmp_path: Path, transform: Any) -> None:
    """It trains an SAE of normalized rows, starts as one and is saved as one; what is logged is of activations."""
    table = run(tmp_path, transform, training={"lr": 1e-9})
    table["sae"]["b_dec_init_method"] = "mean"
    result = train(table)
    sae, x = saekit.SAE.load(result.folder), activations()
    key = transform if isinstance(transform, str) else transform["name"]
    assert key in str(sae.info.input_transform)
    assert sae.info.metadata["activation_scale"] == 1
    size = sae.transformed(x).norm(dim=1).mean()
    assert float(size) == pytest.approx((x.shape[1] - (key == "layer_norm")) ** 0.5, rel=0.1 if key == "rms" else 1e-3)
    assert float((sae.b_dec.detach() - sae.transformed(x).mean(0)).norm() / size) < 0.1, "the mean of what it reads"
    first = lines(result.folder)[0]
    with torch.no_grad():
        z = sae.transformed(x)
        expected = float((sae.reconstruction(sae.encode(x)) - z).square().sum(1).mean())
        explained = variance_metrics(sae, [x])["explained_variance"]
    assert first["losses/mse_loss"] == pytest.approx(expected, rel=0.2), "in the units of normalized rows"
    assert first["metrics/explained_variance"] == pytest.approx(explained, rel=0.1), "in those of activations"


def test_fast_and_plain_steps_learn_the_same(tmp_path: Path) -> None:
    found = []
    for kernels in ("fast", "reference"):
        table = run(tmp_path / kernels, "layer_norm", training={"kernels": kernels, "training_tokens": 800})
        found.append(train(table).sae)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk", "jumprelu"])
def test_a_whitened_run_leaves_an_sae_of_raw_activations(tmp_path: Path, name: str) -> None:
    table = run(tmp_path, "whitening")
    table["sae"] = {"name": name, "d_sae": 64, "dtype": "float64"}
    result = train(table)
    saved = json.loads((result.folder / "sae/cfg.json").read_text())
    assert (saved["normalize_activations"], saved["saekit"]["format"]) == ("none", 1)
    sae = saekit.SAE.load(result.folder)
    assert sae.input_transform is None
    name = "metrics/explained_variance"
    logged = [line[name] for line in lines(result.folder) if name in line]
    explained = variance_metrics(sae, [activations()])["explained_variance"]
    assert logged[-1] == pytest.approx(explained, rel=0.15, abs=0.1), "of activations, not of what they are mapped to"


def test_whitening_is_folded_into_the_weights(tmp_path: Path) -> None:
    """Of a run that does not move: as if its map had been put around a plain SAE."""
    still = {"lr": 1e-30}
    seen: list[Any] = []

    class Seen:
        row_wise = False

        def estimated(self, rows: torch.Tensor) -> Any:
            seen.append(saekit.default_manager().build("input_transforms", "whitening").estimated(rows))
            return seen[-1]

    folded = train(
        run(tmp_path / "a", "test:seen", training=still), fake_plugin("input_transforms", "seen", lambda config: Seen())
    ).sae
    plain = train(run(tmp_path / "b", None, training=still)).sae
    x, found = activations(), seen[0]
    with torch.no_grad():
        z = (x - found.mean) @ found.matrix
        torch.testing.assert_close(folded.encode(x), plain.encode(z), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(folded(x), plain(z) @ found.inverse + found.mean, rtol=1e-9, atol=1e-9)


def test_a_scale_of_ones_own(tmp_path: Path) -> None:
    class Tenth:
        row_wise = False

        def estimated(self, rows: torch.Tensor) -> float:
            return 0.1

    own = fake_plugin("input_transforms", "tenth", lambda config: Tenth())
    assert train(run(tmp_path, "tenth"), own).sae.info.metadata["activation_scale"] == 0.1
    built: Any = saekit.default_manager().build("input_transforms", "expected_average_only_in")
    assert built.estimated(activations()) == activation_scale(activations())


def test_from_an_sae_of_normalized_rows(tmp_path: Path) -> None:
    first = train(run(tmp_path / "first", "layer_norm"))
    start = {"from_pretrained_path": str(first.folder), "lr": 1e-30}
    second = train(run(tmp_path / "second", "layer_norm", training=start))
    torch.testing.assert_close(second.sae(activations()), first.sae(activations()))
    for transform, shown in (
        (None, "'none'"),
        ("rms", "'saekit:rms'"),
        ("expected_average_only_in", "'saekit:expected"),
    ):
        with pytest.raises(
            ConfigError, match=rf"normalize_activations: is {shown}.*, but the SAE in .* has .*layer_norm"
        ):
            train(run(tmp_path / "third", transform, training=start))
    plain = train(run(tmp_path / "plain", None))
    start["from_pretrained_path"] = str(plain.folder)
    with pytest.raises(
        ConfigError, match="normalize_activations: is 'saekit:rms', but the SAE in .* normalizes no rows"
    ):
        train(run(tmp_path / "third", "rms", training=start))
    with pytest.raises(
        ConfigError, match="is 'saekit:whitening', a map that changes the norms of decoder rows, by which"
    ):
        train(run(tmp_path / "third", "whitening", training=start))


def test_a_transcoder_of_normalized_rows_is_refused(tmp_path: Path) -> None:
    table = run(tmp_path, "layer_norm") | {"sae": {"name": "transcoder", "d_sae": 32}}
    del table["site"]
    table |= {"inputs": [{"hook_name": SITE}], "targets": [{"hook_name": "blocks.1.hook_resid_post"}]}
    with pytest.raises(
        ConfigError, match="normalize_activations: is 'saekit:layer_norm': LayerNorm normalizes each row"
    ):
        train(table)
    table["activations"]["normalize_activations"] = "whitening"
    assert train(table).sae.info.input_transform is None, "each site has a map of its own"


def test_how_it_is_written() -> None:
    config = load_config({"activations": {"normalize_activations": "none"}})
    assert config.activations.normalize_activations is None
    assert saekit.config.ActivationsConfig(normalize_activations="none") == saekit.config.ActivationsConfig()
    for chosen in (None, "layer_norm", RMSConfig(eps=0.5), {"name": "whitening", "eps": 0.1}):
        config = load_config({"activations": {"normalize_activations": chosen}})
        for kind in ("toml", "yaml", "json"):
            assert load_config_text(dump_config(config, kind), kind) == config
    with pytest.raises((ConfigError, UnknownKeyError), match=r"Did you mean 'layer_norm'"):
        load_config({"activations": {"normalize_activations": "layernorm"}})
    with pytest.raises(ConfigError, match=r"normalize_activations.eps: must be above 0, found 0"):
        load_config({"activations": {"normalize_activations": {"name": "rms", "eps": 0}}})


def load_config_text(text: str, kind: str) -> Any:
    from saekit.config.formats import READERS

    return load_config(READERS[f".{kind}"](text))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda rows: 0.0, "estimated returned 0.0, expected a number above 0, or an Affine"),
        (lambda rows: None, "estimated returned None, expected a number above 0"),
        (lambda rows: 1 / 0, "failed in estimated: ZeroDivisionError"),
        (lambda rows: affine(rows, 3), r"returned the matrix \[3, 3\], and activations are"),
        (lambda rows: affine(rows, rows.shape[1], 2.0), "an inverse that is not that of its matrix: off by 1"),
    ],
)
def test_a_transform_that_returns_rubbish(tmp_path: Path, found: Any, message: str) -> None:
    class Rubbish:
        row_wise = False

        def estimated(self, rows: torch.Tensor) -> Any:
            return found(rows)

    own = fake_plugin("input_transforms", "rubbish", lambda config: Rubbish())
    with pytest.raises(PluginFailedError, match=message):
        train(run(tmp_path, "rubbish"), own)


def affine(rows: torch.Tensor, d: int, factor: float = 1.0) -> saekit.transforms.Affine:
    eye = torch.eye(d, dtype=torch.float64)
    return saekit.transforms.Affine(torch.zeros(rows.shape[1]), eye, eye * factor)


def test_one_that_fails_at_work_is_named(tmp_path: Path) -> None:
    class Failing:
        row_wise = True

        def read(self, x: torch.Tensor) -> torch.Tensor:
            return x / (1 // (len(x) < 0))

        def written(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return y

    own = fake_plugin("input_transforms", "failing", lambda config: Failing())
    with pytest.raises(
        PluginFailedError, match=r"input transform 'test:failing' \(test 0\) failed in read: ZeroDivision"
    ):
        train(run(tmp_path, "failing"), own)


def test_neither_of_the_two(tmp_path: Path) -> None:
    own = fake_plugin("input_transforms", "neither", lambda config: attrs.make_class("Neither", [], repr=False)())
    with pytest.raises(PluginFailedError, match="lacks row_wise"):
        saekit.train(run(tmp_path, "neither"), plugins=fakes(own), dataset=[{"tokens": [1, 2, 3]}])
