"""SAEs on the Hub: what is put there, what the card says, and what is left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.fake_hub import FakeHub, Fault, fake_hub
from support.kernels import built
from support.training import fake_run, fakes

import saekit
from saekit import Site, Sites
from saekit.cli import app
from saekit.errors import ConfigError, PlaceError, StorageError
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
                 "| architecture | standard |", "| features | 24 |", 'saekit.SAE.from_hub("somebody/sae")',
                 'SAE.load_from_disk(snapshot_download("somebody/sae"))'):  # fmt: skip
        assert line in text
    assert "CE recovered" not in text, "what is not known is not there"
    again = saekit.SAE.from_hub("somebody/sae")
    assert torch.equal(again.W_enc, sae.W_enc)


def test_a_folder_a_branch_and_a_card_of_somebody_elses(hub: FakeHub, tmp_path: Path) -> None:
    an_sae(1).push_to_hub("somebody/sae", folder="layer_1")
    an_sae(2).push_to_hub("somebody/sae", folder="layer_2")
    files = ("README.md", "cfg.json", "probe.safetensors", "sae_weights.safetensors")
    assert there(tmp_path) == ["README.md", *(f"layer_{n}/{name}" for n in (1, 2) for name in files)]
    assert 'from_hub("somebody/sae", "layer_1")' in card(tmp_path), "the second leaves the repository's own card"
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


def test_a_sweep_in_one_repository(hub: FakeHub, tmp_path: Path) -> None:
    configs = [
        fake_run(tmp_path, sae={"l1_coefficient": l1}, evals={"run": []}, checkpoints={"name": "sweep"})
        for l1 in (0.5, 2.0)
    ]
    result = saekit.train(configs, plugins=fakes(), dataset=[{"text": "x = 1\n" * 400}])
    hub.requests.clear()
    saekit.push_to_hub(result.folder, "somebody/sweep", into="all")
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


def test_what_cannot_be_pushed(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repo_id: must be owner/name, found 'name': it has no owner"):
        an_sae().push_to_hub("name")
    with pytest.raises(ConfigError, match="folder: must be a path in the repository, .*found '../x'"):
        an_sae().push_to_hub("somebody/sae", folder="../x")
    with pytest.raises(PlaceError, match="is no saved SAE: it has no cfg.json and no sae_weights.safetensors"):
        saekit.push_to_hub(tmp_path, "somebody/sae")
    assert hub.requests == []


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
    options = ["--into", "a/b", "--private", "-m", "mine"]
    app(["push", str(tmp_path / "sae"), "somebody/sae", *options], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{hub.url}/somebody/sae/commit/")
    assert "a/b/cfg.json" in there(tmp_path)
    assert hub.private == {"models/somebody/sae"}
