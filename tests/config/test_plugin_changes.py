"""Another plugin by its name, on top of a configuration: what was chosen stays, the defaults of the old one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from saekit_plugins.activations.tanh_relu import TanhReluConfig
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.optimizers.signum import SignumConfig
from saekit_plugins.schedules.cosine import CosineConfig
from saekit_plugins.sources.cached import CachedConfig
from support.every_config import having

import saekit
from saekit.config.files import commented_toml, dump_config, load_config
from saekit.errors import ConfigError


def written(folder: Path, config: Any) -> Path:
    """With every option of every plugin, as a file."""
    path = folder / "full.toml"
    path.write_text(config if isinstance(config, str) else dump_config(config))
    return path


def test_the_full_default_with_another_architecture(tmp_path: Path) -> None:
    full = written(tmp_path, commented_toml())
    assert load_config(full, ["sae.name=topk"]).sae == TopKConfig()
    assert load_config(full, ["sae.name=saekit:jumprelu"]).sae == JumpReLUConfig()
    assert load_config(full, ["optimizer.name=signum"]).optimizer == SignumConfig()
    changed = load_config(full, ["activations.source.name=cached", "activations.source.folder=there"])
    assert changed.activations.source == CachedConfig(folder="there")
    assert load_config(full, ["lr_schedule.name=cosine", "lr_schedule.end=0.5"]).lr_schedule == CosineConfig(end=0.5)
    backend = load_config(full, ["model.backend.name=AutoModelForCausalLM"]).model.backend
    assert backend.options == type(backend.options)()
    same = load_config(full, ["sae.name=standard"])
    assert same == load_config(full), "and nothing goes where it is the plugin that was there"


@pytest.mark.parametrize("base", ["file", "loaded", "code"])
def test_what_was_chosen_stays(tmp_path: Path, base: str) -> None:
    options = {"d_sae": 512, "dtype": "float64", "decoder_heuristic_init": False, "k": 8}
    loaded = load_config({"sae": {"name": "topk", **options}})
    given: dict[str, Any] = {
        "file": written(tmp_path, loaded), "loaded": loaded, "code": {"sae": TopKConfig(**options)}
    }  # fmt: skip
    (one, other) = saekit.grid(given[base], {"sae.name": ["batchtopk", "topk"]})
    assert one.sae == BatchTopKConfig(**options)
    assert one.sae.options.aux_loss_coefficient is None, "and not the 1/32 that topk has"
    assert other.sae == TopKConfig(**options)


def test_what_the_new_plugin_has_not_is_named(tmp_path: Path) -> None:
    full = written(tmp_path, load_config({"sae": {"name": "topk", "k": 8, "d_sae": 512}}))
    with pytest.raises(ConfigError) as caught:
        load_config(full, ["sae.name=jumprelu"])
    assert caught.value.problems == [
        ("sae.k", f"is not an option of saekit:jumprelu (sae.name), but of {having('k')}. Choose one of these "
         "(sae.name=topk), or delete it")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="^sae: Unknown SAE architecture 'topkk'. Did you mean 'topk'"):
        load_config(full, ["sae.name=topkk"])


@pytest.mark.parametrize("order", [1, -1])
def test_a_plugin_comes_before_its_options_in_whatever_order(order: int) -> None:
    """What is said beside the name was chosen, also where the old plugin has it so by default."""
    base = load_config({"sae": {"name": "topk", "d_sae": 64}})
    for option in ("sae.aux_loss_coefficient=0.03125", "sae={aux_loss_coefficient=0.03125}"):
        changed = load_config(base, [option, "sae.name=batchtopk"][::order])
        assert changed.sae == BatchTopKConfig(d_sae=64, aux_loss_coefficient=1 / 32)
    axes = [("sae.aux_loss_coefficient", [1 / 32]), ("sae.name", ["batchtopk"])]
    assert saekit.grid(base, dict(axes[::order]))[0].sae == BatchTopKConfig(d_sae=64, aux_loss_coefficient=1 / 32)
    assert load_config(base, ["sae.k=4", "sae=topk"][::order]).sae == TopKConfig(k=4), "nothing of the file's SAE"


def test_plugins_inside_options() -> None:
    base = load_config({"sae": {"name": "standard", "activation": {"name": "tanh-relu"}, "d_sae": 64}})
    assert base.sae.options.activation == TanhReluConfig()
    changed = load_config(base, ["sae.activation.name=relu"])
    assert changed.sae.options.activation.key == "saekit:relu"
    relu = load_config({"sae": {"name": "standard", "activation": {"name": "relu"}, "d_sae": 64}}, ["sae.name=topk"])
    assert relu.sae == TopKConfig(d_sae=64), "a choice with all its options is the default by its key"
    assert load_config({"sae": StandardConfig(d_sae=8)}, ["sae.name=topk"]).sae == TopKConfig(d_sae=8)


def test_a_plugin_that_is_not_there_changes_nothing_else() -> None:
    with pytest.raises(ConfigError, match="^lr_schedule: Unknown LR schedule 'nobody:old'"):
        load_config({"lr_schedule": {"name": "nobody:old", "end": 3}}, ["training.lr=1"])
    with pytest.raises(ConfigError, match=r"lr_schedule.end: .* or delete it"):
        load_config({"lr_schedule": {"name": "nobody:old", "end": 3}}, ["lr_schedule.name=constant"])
