"""SAEs on the Hub: what is put there, what the card says, and what is left alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.fake_hub import FakeHub, Fault, fake_hub
from support.kernels import built
from support.training import fake_run, fakes

import saekit
from saekit import Site, Sites
from saekit.cli import app
from saekit.errors import ConfigError, PlaceError, SAEFormatError, StorageError
from saekit.pretrained import copying
from saekit.pretrained.card import CardSAE, model_card
from saekit.values import SAEInfo


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with nothing on it, and somebody who has logged in."""
    with fake_hub(tmp_path / "hub") as hub:
        hub.use(monkeypatch, tmp_path / "cache", "hf_fake")
        yield hub


def an_sae(seed: int = 0, config: saekit.SAEConfig | None = None) -> saekit.SAE:
    sae = built(config or StandardConfig(d_sae=24))
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(seed))
    metadata = {"model_name": "somebody/model", "context_size": 128}
    info = sae.info
    sae.info = SAEInfo(
        architecture=info.architecture, options=info.options, metadata=metadata,
        sites=Sites.one(Site(hook_name="blocks.1.hook_resid_post")),
    )  # fmt: skip
    return sae


@pytest.mark.parametrize("probe", [True, False])
def test_a_preview_is_what_a_new_repository_has(tmp_path: Path, hub: FakeHub, probe: bool) -> None:
    sae = an_sae()
    sae.push_to_hub("somebody/sae", folder="a", probe=probe)
    found = sae.push_to_hub("somebody/sae", folder="a", probe=probe, preview=tmp_path / "new/look")
    assert found == str(tmp_path / "new/look")
    files = {path.relative_to(found).as_posix(): path for path in Path(found).rglob("*") if path.is_file()}
    assert sorted(files) == there(tmp_path)
    assert all(path.read_bytes() == (hub_folder(tmp_path) / name).read_bytes() for name, path in files.items())
    with pytest.raises(PlaceError, match="there is something at .*look already: a preview needs a new folder"):
        saekit.push_to_hub(sae.save(tmp_path / "sae"), "somebody/sae", preview=found)


def test_a_preview_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("it asked the Hub"))
    folder = an_sae().save(tmp_path / "sae")
    app(["push", str(folder), "a/b", "--preview", str(tmp_path / "look")], standalone_mode=False)
    assert "a/b" in (tmp_path / "look/README.md").read_text(encoding="utf-8")


def hub_folder(tmp_path: Path, name: str = "somebody/sae") -> Path:
    return tmp_path / "hub/models" / name


def there(tmp_path: Path, name: str = "somebody/sae") -> list[str]:
    folder = tmp_path / "hub/models" / name
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".gitattributes"
    )


def card(tmp_path: Path, name: str = "somebody/sae", path: str = "README.md") -> str:
    return (tmp_path / "hub/models" / name / path).read_text()


def test_an_sae_and_its_card(hub: FakeHub, tmp_path: Path) -> None:
    sae = an_sae()
    address = sae.push_to_hub(
        "somebody/sae", private=True, metrics={"evals/l0": 12.5, "metrics/l0": 9.0, "evals/explained_variance": 0.75},
        commit_message="the first",
    )  # fmt: skip
    assert address.startswith(f"{hub.url}/somebody/sae/commit/")
    assert there(tmp_path) == ["README.md", "cfg.json", "probe.safetensors", "sae_weights.safetensors"]
    assert hub.private == {"models/somebody/sae"}
    assert sum("/commit/" in request for request in hub.requests) == 1
    text = card(tmp_path)
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "saekit", "tags": ["sparse-autoencoder", "saekit"], "base_model": "somebody/model"}
    for line in ("| site | blocks.1.hook_resid_post |", "| L0 | 12.5 |", "| explained variance | 0.75 |",
                 "| architecture | standard |", "| features | 24 |",
                 'saekit.SAE.from_pretrained(repo_id="somebody/sae")',
                 'SAE.load_from_disk(snapshot_download("somebody/sae"))'):  # fmt: skip
        assert line in text
    assert "CE recovered" not in text, "what is not known is not there"
    configuration = text.partition("## Configuration")[2]
    assert "sae.activation = 'saekit:relu'" in configuration
    assert "sae.d_sae = 24" in configuration
    again = saekit.SAE.from_hub("somebody/sae")
    assert torch.equal(again.W_enc, sae.W_enc)


def test_a_folder_a_branch_and_a_card_of_somebody_elses(hub: FakeHub, tmp_path: Path) -> None:
    an_sae(1).push_to_hub("somebody/sae", folder="layer_1")
    an_sae(2).push_to_hub("somebody/sae", folder="layer_2")
    files = ("README.md", "cfg.json", "probe.safetensors", "sae_weights.safetensors")
    assert there(tmp_path) == ["README.md", *(f"layer_{n}/{name}" for n in (1, 2) for name in files)]
    assert 'saekit.SAE.from_pretrained(repo_id="somebody/sae", folder="layer_1")' in card(tmp_path), (
        "the second leaves the repository's own card"
    )
    assert 'SAE.from_pretrained("somebody/sae", "layer_2")' in card(tmp_path, path="layer_2/README.md")
    (tmp_path / "hub/models/somebody/sae/layer_2/README.md").write_text("mine")
    with pytest.warns(UserWarning, match="layer_2/README.md of somebody/sae was not made by saekit"):
        an_sae(3).push_to_hub("somebody/sae", folder="layer_2", revision="draft")
    assert card(tmp_path, "somebody/sae@draft", "layer_2/README.md") == "mine"
    assert torch.equal(saekit.SAE.from_hub("somebody/sae", "layer_2").W_enc, an_sae(2).W_enc)
    assert torch.equal(saekit.SAE.from_hub("somebody/sae", "layer_2", revision="draft").W_enc, an_sae(3).W_enc)


def test_what_an_sae_has_no_more_goes(hub: FakeHub, tmp_path: Path) -> None:
    sae = an_sae()
    sae.log_sparsity = torch.zeros(24)
    sae.push_to_hub("somebody/sae")
    assert "sparsity.safetensors" in there(tmp_path)
    an_sae(1).push_to_hub("somebody/sae")
    assert "sparsity.safetensors" not in there(tmp_path), "it is of other weights"


def test_without_the_rows_of_the_probe(hub: FakeHub, tmp_path: Path) -> None:
    sae = an_sae()
    sae.probe_rows = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(1))
    sae.push_to_hub("somebody/sae")
    assert saekit.SAE.from_hub("somebody/sae", verify=True).d_sae == 24
    before = there(tmp_path)
    sae.push_to_hub("somebody/sae", probe=False)
    assert there(tmp_path) == [name for name in before if name != "probe.safetensors"], "what was there goes, too"
    assert "probe" not in (tmp_path / "hub/models/somebody/sae/cfg.json").read_text()
    assert torch.equal(saekit.SAE.from_hub("somebody/sae").W_enc, sae.W_enc)
    with pytest.raises(SAEFormatError, match="has no probe.safetensors"):
        saekit.SAE.from_hub("somebody/sae", verify=True)


def test_a_sweep_in_one_repository(hub: FakeHub, tmp_path: Path) -> None:
    configs = [
        fake_run(tmp_path, sae={"l1_coefficient": l1}, evals={"run": []}, checkpoints={"name": "sweep"})
        for l1 in (0.5, 2.0)
    ]
    result = saekit.train(configs, plugins=fakes(), dataset=[{"text": "x = 1\n" * 400}])
    hub.requests.clear()
    saekit.push_to_hub(result.folder, "somebody/sweep", folder="all")
    assert sum("/commit/" in request for request in hub.requests) == 1
    names = list(result.results)
    assert [path for path in there(tmp_path, "somebody/sweep") if path.endswith("cfg.json")] == [
        f"all/{name}/cfg.json" for name in sorted(names)
    ]
    text = card(tmp_path, "somebody/sweep")
    assert "2 sparse autoencoders" in text
    for name, l1 in zip(names, (0.5, 2.0), strict=True):
        assert f"| `all/{name}` | {l1} |" in text
    assert "training.training_tokens = " in text
    assert str(tmp_path) not in text, "no path of this machine"
    sae = saekit.SAE.from_hub("somebody/sweep", f"all/{names[1]}")
    assert torch.equal(sae.W_enc, result.results[names[1]].sae.W_enc)
    saekit.push_to_hub(result.results[names[0]].folder / "sae", "somebody/one")
    assert "| L0 | " in card(tmp_path, "somebody/one"), "what the run has measured is found"


REFUSED: dict[str, tuple[Fault, str]] = {
    "no token": (Fault("POST /api/repos/create", 1, 401), r"nobody may write there who asks like this \(401\): log in"),
    "no right": (Fault("POST .*/commit/", 1, 403, {"X-Error-Message": "read only"}),
                 r", and no file of it was changed: the Hub forbids it \(403\): read only"),
    "busy": (Fault("POST .*/commit/", math.inf, 429, {"Retry-After": "900"}), r"\(429\): try again in 900 seconds"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_push_that_is_refused(hub: FakeHub, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fault, message = REFUSED[what]
    hub.faults = [fault]
    with pytest.raises(StorageError, match=f"cannot push to the Hub repository 'somebody/sae'.*{message}"):
        an_sae().push_to_hub("somebody/sae")
    assert there(tmp_path) == []


def test_every_number_that_is_given_is_shown(hub: FakeHub, tmp_path: Path) -> None:
    metrics = {"l0": 32, "explained_variance": 0.9, "ce_recovered": np.float32(0.5), "evals/mse": 1e-6, "a|b": 7,
               "site": 3.0, "unknown": math.nan}  # fmt: skip
    an_sae().push_to_hub("somebody/sae", metrics=metrics)
    lines = card(tmp_path).splitlines()
    for line in ("| L0 | 32 |", "| explained variance | 0.9 |", "| CE recovered | 0.5 |", "| evals/mse | 1e-06 |",
                 "| a\\|b | 7 |", "| site | blocks.1.hook_resid_post |", "| site (measured) | 3 |"):  # fmt: skip
        assert line in lines
    assert "unknown" not in card(tmp_path)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"l0": "32", "x": True}, r"metrics.l0: must be a number, found '32' \(str\)(.|\n)*metrics.x: .*True \(bool\)"),
        ({1: 2.0}, "must be numbers by their names, and 1 is no name"),
        ([32], r"metrics: must be numbers by their names, such as {'l0': 32}, found \[32\]"),
    ],
)
def test_metrics_that_are_no_numbers(hub: FakeHub, metrics: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        an_sae().push_to_hub("somebody/sae", metrics=metrics)
    assert hub.requests == []


def test_what_was_pushed_in_between_stays(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_sae().push_to_hub("somebody/sae")
    push = HfApi.create_commit

    def somebody_is_first(api: HfApi, *args: Any, **options: Any) -> Any:
        (tmp_path / "hub/models/somebody/sae/README.md").write_text("mine")
        return push(api, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", somebody_is_first)
        message = r"no file of it was changed: somebody else has changed it meanwhile \(412\): push again"
        with pytest.raises(StorageError, match=message):
            an_sae(1).push_to_hub("somebody/sae")
    assert card(tmp_path) == "mine"
    assert torch.equal(saekit.SAE.from_hub("somebody/sae").W_enc, an_sae().W_enc)
    with pytest.warns(UserWarning, match="it stays"):
        an_sae(1).push_to_hub("somebody/sae")
    assert torch.equal(saekit.SAE.from_hub("somebody/sae").W_enc, an_sae(1).W_enc)


def test_what_cannot_be_pushed(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repo_id: must be owner/name, found 'name': it has no owner"):
        an_sae().push_to_hub("name")
    with pytest.raises(ConfigError, match="folder: must be a path in the repository, .*found '../x'"):
        an_sae().push_to_hub("somebody/sae", folder="../x")
    with pytest.raises(PlaceError, match="is no saved SAE: it has no cfg.json and no sae_weights.safetensors"):
        saekit.push_to_hub(tmp_path, "somebody/sae")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json", "sparsity.safetensors"])
def test_a_damaged_folder_is_not_pushed(hub: FakeHub, tmp_path: Path, name: str) -> None:
    sae = an_sae()
    sae.log_sparsity = torch.zeros(24)
    file = sae.save(tmp_path / "sae") / name
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"128", b"129") if name == "cfg.json" else whole[:-1] + b"\x01")
    with pytest.raises(SAEFormatError, match=f"{name} in .*sae is damaged or was changed.* Nothing was pushed"):
        saekit.push_to_hub(tmp_path / "sae", "somebody/sae")
    if name == "sparsity.safetensors":
        file.unlink()
        with pytest.raises(SAEFormatError, match=f"{name} is missing in .*sae, and its cfg.json says that it was sav"):
            saekit.push_to_hub(tmp_path / "sae", "somebody/sae")
    assert hub.requests == []


@pytest.mark.parametrize("when", [0, 1])
def test_an_sae_that_is_saved_again_meanwhile_is_pushed_whole(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Before it was copied, between two of its files, and after that, when it is uploaded."""
    an_sae().save(tmp_path / "sae")
    copy, push, copied = shutil.copyfile, HfApi.create_commit, list[Path]()

    def copy_and_save(source: Path, target: Path) -> None:
        if len(copied) == when:
            an_sae(1).save(tmp_path / "sae")
        copied.append(target)
        copy(source, target)

    def save_and_push(api: HfApi, *args: Any, **options: Any) -> Any:
        an_sae(2).save(tmp_path / "sae")
        return push(api, *args, **options)

    monkeypatch.setattr(copying, "copyfile", copy_and_save)
    monkeypatch.setattr(HfApi, "create_commit", save_and_push)
    saekit.push_to_hub(tmp_path / "sae", "somebody/sae")
    assert torch.equal(saekit.SAE.from_hub("somebody/sae").W_enc, an_sae(1).W_enc)


def test_what_sae_lens_does_not_read_is_not_said_to_be(tmp_path: Path) -> None:
    sae = an_sae(config=StandardConfig(d_sae=24, activation="saekit:tanh-relu"))
    config = json.loads((sae.save(tmp_path / "sae") / "cfg.json").read_text())
    text = model_card("a/b", [CardSAE(folder="", config=config)])
    assert "sae_lens" not in text
    config = json.loads((an_sae(config=TopKConfig(d_sae=24, k=3)).save(tmp_path / "k") / "cfg.json").read_text())
    assert 'SAE.from_pretrained("a/b", "x")' in model_card("a/b", [CardSAE(folder="x", config=config)])


def test_a_card_shows_no_more_than_it_is_given() -> None:
    config = {"architecture": "standard", "d_sae": 8, "metadata": {"model_name": "/home/me/model", "x": "<script>"}}
    text = model_card(
        "a/b", [CardSAE(folder="", config=config, options={"dataset.path": "~/texts", "sae.x": "a|b\n```"})]
    )
    assert "/home/me" not in text
    assert "texts" not in text
    assert "base_model" not in text
    assert text.count("```") % 2 == 0


def test_a_card_has_the_levels_of_a_matryoshka() -> None:
    options = {"sae.widths": [2, 4, 8], "sae.level_weights": None, "inputs": [{"hook_name": "a"}]}
    text = model_card("a/b", [CardSAE(folder="", config={"d_sae": 8}, options=options)])
    assert "sae.widths = [2, 4, 8]" in text
    assert "level_weights" not in text


def test_from_the_command_line(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_sae().save(tmp_path / "sae")
    options = ["--folder", "a/b", "--private", "-m", "mine", "--no-probe"]
    app(["push", str(tmp_path / "sae"), "somebody/sae", *options], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{hub.url}/somebody/sae/commit/")
    assert there(tmp_path) == ["README.md", "a/b/README.md", "a/b/cfg.json", "a/b/sae_weights.safetensors"]
    assert hub.private == {"models/somebody/sae"}
