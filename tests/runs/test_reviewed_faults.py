"""What a review found: each of these went wrong once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import run_config

import saekit
from saekit import SAE
from saekit.config.formats import READERS
from saekit.data.contexts import ContextStream
from saekit.errors import ConfigError, DataError, PluginFailedError, SAEFormatError, StorageError
from saekit.evals.variance import variance_metrics
from saekit.files.storage import tidy
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
    (victim / ".step-1.0a000000.tmp").mkdir(parents=True)
    folder.mkdir()
    (folder / ".checkpoints.0a000000.old").symlink_to(victim)
    tidy(folder, "checkpoints".__eq__)
    assert not list(folder.iterdir())
    assert (victim / ".step-1.0a000000.tmp").is_dir()


def test_an_option_that_an_older_saekit_did_not_have_must_be_allowed(tmp_path: Path) -> None:
    run = trained(tmp_path, sae={"name": "standard", "d_sae": 64}).folder
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    facts = json.loads((newest / "checkpoint.json").read_text())
    del facts["saes"]["sae"]["config"]["training"]["log_frequency"]
    from saekit.runs.checkpoints import _seal

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
        with pytest.raises(StorageError, match="does not fit the run as it is now: DataError: timed out"):
            longer(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    longer(run)


def test_what_a_killed_save_left_comes_back_with_the_next(tmp_path: Path) -> None:
    sae = trained(tmp_path).sae
    sae.save(tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / ".mine.0a000000.old")  # killed between the two renames
    (tmp_path / ".mine.1b111111.tmp").mkdir()
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
    from saekit_plugins.architectures.standard import StandardConfig

    from saekit.sae.build import build_module

    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", StandardConfig()), StandardConfig(d_sae=8), 4, plugins)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[:] = -1e6
    assert variance_metrics(sae, [x])["never_fired"] == 8
    sae.log_sparsity = torch.tensor([-1.0, -2.0, -3.0] + [-10.0] * 5)
    assert variance_metrics(sae, [x])["never_fired"] == 5


@pytest.mark.parametrize("name", [".bk.20261126.old", ".bk.20261126.tmp"])
def test_a_backup_with_a_date_is_not_half_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    trained(tmp_path / "runs").sae.save(tmp_path / "bk")
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_merged_yaml_does_not_grow_without_bounds() -> None:
    levels = ["a0: &a0 {k: v}"]
    levels += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    tracemalloc.start()
    try:
        found = READERS[".yaml"]("\n".join(levels) + "\n")
    except ValueError as error:
        found = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # PyYAML before 6.0.4 repeats what is merged again.
    assert found == {f"a{n}": {"k": "v"} for n in range(9)} or "merges (<<) make a table too large" in found
    assert peak < 1 << 25


def test_yaml_merged_from_many_keys_is_refused() -> None:
    text = "".join(f"{name}: &{name}\n" + "".join(f"  {name}{n}: 1\n" for n in range(6_000)) for name in "ab")
    with pytest.raises(ValueError, match=r"merges \(<<\) make a table too large"):
        READERS[".yaml"](text + "c: {<<: [*a, *b]}\n")


def with_eval(measure: Any, folder: Path, **sections: Any) -> Any:
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    plugins = isolated_manager(backend, fake_plugin("evals", "mine", lambda config, run: measure), builtins=True)
    options = config(folder, **sections) | {"evals": {"run": ["mine"], "every_n_steps": 2, "n_contexts": 4}}
    return saekit.train(options, plugins=plugins, dataset=TEXTS)


def test_an_eval_changes_nothing_and_its_numbers_are_plain(tmp_path: Path) -> None:
    import numpy as np

    def rude(sae: Any, **services: Any) -> dict[str, Any]:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(True)
        sae(torch.ones(3, 8)).square().sum().backward()
        return {"rude": np.float32(1), "tensor": torch.tensor(2.0)}

    def polite(sae: Any, **services: Any) -> dict[str, Any]:
        return {"rude": 1.0, "tensor": 2.0}

    sae = {"name": "standard", "d_sae": 64, "l1_coefficient": 1.0, "use_ghost_grads": True}
    one, other = (with_eval(eval_, tmp_path / eval_.__name__, sae=sae) for eval_ in (rude, polite))
    assert torch.equal(one.sae.W_dec, other.sae.W_dec)
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["evals/rude"] for line in lines if "evals/rude" in line]
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(PluginFailedError, match=r"the eval 'test:mine' returned rude = 'x', expected a number"):
        with_eval(lambda *arguments, **services: {"rude": "x"}, tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk"])
def test_saving_and_loading_again_and_again_changes_nothing(tmp_path: Path, kind: str) -> None:
    options = {"name": kind, "d_sae": 64} | ({} if kind == "standard" else {"k": 4})
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    table = run_config(tmp_path, evals={"run": []}) | {"sae": options, "site": {"hook_name": "hook_embed"}}
    table |= {"model": {"backend": "test:fake"}}
    sae = saekit.train(table, plugins=isolated_manager(backend, builtins=True), dataset=TEXTS).sae
    found = []
    for number in range(4):
        sae.save(tmp_path / str(number))
        found.append((tmp_path / str(number) / "sae_weights.safetensors").read_bytes())
        sae = SAE.load(tmp_path / str(number))
    assert found[1] == found[2] == found[3]


def test_the_folder_of_checkpoints_takes_no_sae(tmp_path: Path) -> None:
    result = trained(tmp_path)
    with pytest.raises(StorageError, match="it is a run's folder of checkpoints; choose another folder"):
        result.sae.save(result.folder / "checkpoints")
