"""What a review found: each of these went wrong once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_config

import saekit
from saekit.config.formats import READERS
from saekit.data.contexts import ContextStream
from saekit.errors import ConfigError, DataError, SAEFormatError, StorageError
from saekit.evals.variance import variance_metrics
from saekit.sae import SAE
from saekit.storage import tidy
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


def manager() -> saekit.PluginManager:
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    return isolated_manager(backend, builtins=True)


def config(folder: Path, **sections: Any) -> dict[str, Any]:
    checkpoints = {"name": "run", "n_checkpoints": 2}
    base = run_config(folder, evals={"run": []}, checkpoints=checkpoints, **sections)
    return base | {"site": {"hook_name": "hook_embed"}, "model": {"backend": "test:fake"}}


def trained(folder: Path, **sections: Any) -> Any:
    return saekit.train(config(folder, **sections), plugins=manager(), dataset=TEXTS)


def longer(run: Path) -> Any:
    options = ["training.training_tokens=2600"]
    allow = ["training.training_tokens"]
    return saekit.resume(run, overrides=options, allow=allow, plugins=manager(), dataset=TEXTS)


def test_a_hidden_link_is_neither_followed_nor_brought_back(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    (victim / ".step-1.00000000.tmp").mkdir(parents=True)
    folder.mkdir()
    (folder / ".checkpoints.00000000.old").symlink_to(victim)
    tidy(folder, "checkpoints".__eq__)
    assert not list(folder.iterdir())
    assert (victim / ".step-1.00000000.tmp").is_dir()


def test_an_option_that_an_older_saekit_did_not_have_must_be_allowed(tmp_path: Path) -> None:
    run = trained(tmp_path, sae={"name": "standard", "d_sae": 64}).folder
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    facts = json.loads((newest / "checkpoint.json").read_text())
    del facts["saes"]["sae"]["config"]["training"]["log_frequency"]
    from saekit.training.checkpoints import _seal

    (newest / "checkpoint.json").write_text(json.dumps(facts | {"sha256": _seal(facts)}))
    with pytest.raises(ConfigError, match=r"training.log_frequency: was 'not an option' when the run was saved"):
        longer(run)


def test_a_passing_error_of_the_text_does_not_cost_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path).folder
    before = sorted(path.name for path in (run / "checkpoints").iterdir())

    def fail(self: Any, state: Any) -> None:
        raise DataError("timed out")

    with monkeypatch.context() as patched:
        patched.setattr(ContextStream, "load_state_dict", fail)
        with pytest.raises(StorageError, match="cannot go on from .*step-8: timed out"):
            longer(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    longer(run)


def test_what_a_killed_save_left_comes_back_with_the_next(tmp_path: Path) -> None:
    sae = trained(tmp_path).sae
    sae.save(tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / ".mine.00000000.old")  # killed between the two renames
    (tmp_path / ".mine.11111111.tmp").mkdir()
    sae.save(tmp_path / "mine")
    assert [path.name for path in tmp_path.glob("*mine*")] == ["mine"]
    SAE.load(tmp_path / "mine")


def test_a_folder_with_weights_alone_is_not_another_sae(tmp_path: Path) -> None:
    """Saving into it was interrupted; the SAE below it is not meant."""
    sae = trained(tmp_path).sae
    sae.save(tmp_path / "mine")
    sae.save(tmp_path / "mine" / "sae")
    (tmp_path / "mine" / "cfg.json").unlink()
    with pytest.raises(SAEFormatError):
        SAE.load(tmp_path / "mine")


@pytest.mark.parametrize("text", ["? {a: 1}\n: 2\n", "a: !!bool maybe\n", "a: !!timestamp x\n"])
def test_strange_yaml_is_told(text: str) -> None:
    with pytest.raises(ValueError):
        READERS[".yaml"](text)


def test_features_that_fired_in_training_are_not_dead() -> None:
    from saekit_plugins.standard import StandardConfig

    from saekit.pretrained.load import build_module

    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", StandardConfig()), StandardConfig(d_sae=8), 4, plugins)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[:] = -1e6
    assert variance_metrics(sae, [x])["dead_features"] == 8
    sae.log_sparsity = torch.tensor([-1.0, -2.0, -3.0] + [-10.0] * 5)
    assert variance_metrics(sae, [x])["dead_features"] == 5
