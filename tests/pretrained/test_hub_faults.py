"""What can go wrong on the Hub: each is said with what to do, and nothing of it is kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from saekit_plugins.architectures.standard import StandardConfig
from support.fake_hub import FakeHub, Fault, fake_hub
from support.kernels import built

import saekit
from saekit.errors import SAEFormatError

SAES = "models/somebody/saes"
WEIGHTS = "GET /somebody/saes/resolve/.*/layer2/sae_weights.safetensors"
LISTING = "GET /api/models/somebody/saes"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one repository of two SAEs and much else, an empty cache, and a clock that nobody waits for."""
    root = tmp_path / "hub"
    for seed, name in enumerate(("layer2", "layer3")):
        sae = built(StandardConfig(d_sae=24))
        with torch.no_grad():
            sae.W_enc.normal_(generator=torch.Generator().manual_seed(seed))
        sae.log_sparsity = torch.zeros(24)
        sae.save(root / SAES / name)
    (root / SAES / "layer2/huge.bin").write_bytes(bytes(1000))
    with fake_hub(root) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that somebody waited."""
    seconds: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda wait: seconds.append(wait) if wait >= 0.5 else sleep(wait))
    return seconds


def load(folder: str = "layer2", **options: object) -> saekit.SAE:
    return saekit.SAE.from_hub("somebody/saes", folder, **options)


def half_written(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and "incomplete" in p.name]


def test_one_listing_and_the_files_that_are_needed(hub: FakeHub) -> None:
    hub.faults = [Fault("GET .*resolve", math.inf, seconds=0.2)]
    sae = load(token="hf_mine")
    asked = [request for request in hub.requests if "somebody" in request]  # and not what the library asks for itself
    assert sum("/api/" in request for request in asked) == 1
    fetched = sorted(
        request.rpartition("/")[2] for request in asked if request.startswith("GET") and "resolve" in request
    )
    assert fetched == ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert hub.most_at_once > 1, "the weights and the sparsity are downloaded side by side"
    assert {token for token, request in zip(hub.tokens, hub.requests, strict=True) if request in asked} == {
        "Bearer hf_mine"
    }
    assert sae.info.provenance["repo"] == "somebody/saes"
    hub.requests.clear()
    assert torch.equal(load().W_enc, sae.W_enc)
    assert [request.partition("?")[0] for request in hub.requests] == [LISTING], "the cache has the rest"


def test_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.keep("models", "somebody/saes", tmp_path / "hub" / SAES)
    first = load()
    with torch.no_grad():
        built(StandardConfig(d_sae=24)).save(tmp_path / "hub" / SAES / "layer2")
    assert not torch.equal(load().W_enc, first.W_enc)
    sae = load(revision=old)
    assert torch.equal(sae.W_enc, first.W_enc)
    assert sae.info.provenance["revision"] == old
    with pytest.raises(SAEFormatError, match=f"has no revision 'nope'; its branches and commits are at {hub.url}/some"):
        load(revision="nope")


REFUSED: dict[str, tuple[Fault, str]] = {
    "401": (Fault("GET", 9, 401, {"X-Error-Code": "RepoNotFound"}),
            r"no such repository \(401\), or it is private: log in with `hf auth login`, or set HF_TOKEN"),
    "token": (Fault("GET", 9, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
              r"the Hub does not know the token \(401\): log in with `hf auth login`, or set HF_TOKEN anew"),
    "gated": (Fault("GET", 9, 403, {"X-Error-Code": "GatedRepo"}),
              r"it is gated: ask for access at http.*/somebody/saes, and log in"),
    "403": (Fault("GET", 9, 403, {"X-Error-Message": "not in this country"}),
            r"forbids it \(403\): not in this country"),
    "404": (Fault("GET", 9, 404, {"X-Error-Code": "RepoNotFound"}), r"there is no such repository \(404\), or it is"),
    "503": (Fault("GET", 9, 503), r"the Hub has trouble \(503\): try again later, or take what is in the cache with "),
    "429": (Fault("GET", 99, 429, {"Retry-After": "7"}),
            r"too many requests \(429\): try again in 7 seconds; or log in"),
    "429, no word": (Fault("GET", 99, 429), r"the Hub has had too many requests \(429\): try again later"),
    "429, an hour": (Fault("GET", 99, 429, {"Retry-After": "3600"}), r"try again in 3600 seconds"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_listing_that_is_refused(hub: FakeHub, tmp_path: Path, what: str, waited: list[float]) -> None:
    fault, message = REFUSED[what]
    hub.faults = [fault]
    with pytest.raises(SAEFormatError, match=f"cannot list the Hub repository 'somebody/saes': .*{message}"):
        load()
    assert waited == ([7, 7] if what == "429" else [])
    hub.faults.clear()
    assert load().d_sae == 24


def test_what_the_hub_asks_to_wait_is_waited(hub: FakeHub, waited: list[float]) -> None:
    hub.faults = [Fault(LISTING, 1, 429, {"Retry-After": "5"}), Fault(WEIGHTS, 1, 429, {"Retry-After": "3"})]
    assert load().d_sae == 24
    assert waited[0] == 5
    assert 3 <= waited[1] <= 4


BROKEN: dict[str, tuple[Fault, str]] = {
    "gated": (Fault("(GET|HEAD) .*/sae_weights", 9, 403, {"X-Error-Code": "GatedRepo"}),
              "it is gated: ask for access at"),
    "404": (Fault("(GET|HEAD) .*/sae_weights", 9, 404, {"X-Error-Code": "EntryNotFound"}),
            "there is no such file in revision 'main'"),
    "429": (Fault("(GET|HEAD) .*/sae_weights", math.inf, 429, {"Retry-After": "2"}),
            r"requests \(429\): try again in 2"),
    "cut off": (Fault(WEIGHTS, math.inf, cut=100), "clos|cut off|peer|incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_download_that_fails(hub: FakeHub, tmp_path: Path, what: str) -> None:
    fault, message = BROKEN[what]
    hub.faults = [fault]
    with pytest.raises(SAEFormatError, match=f"cannot download layer2/sae_weights.safetensors of .*({message})"):
        load()
    assert half_written(tmp_path) == []
    hub.faults.clear()
    assert load().d_sae == 24


def test_an_interrupted_download_goes_on(hub: FakeHub) -> None:
    hub.faults = [Fault(WEIGHTS, 1, cut=100)]
    assert load().d_sae == 24


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_what_is_not_the_file_that_the_hub_has(hub: FakeHub, tmp_path: Path, name: str) -> None:
    whole = (tmp_path / "hub" / SAES / "layer2" / name).read_bytes()
    wrong = whole.replace(b"24", b"25") if name == "cfg.json" else whole[:-4] + b"abcd"
    hub.faults = [Fault(f"GET .*/{name}", 1, body=wrong)]
    message = f"{name} of 'somebody/saes' is not the file that the Hub has: its checksum is .*, expected .*"
    with pytest.raises(SAEFormatError, match=message + r"\. It was removed from the cache: load the SAE again"):
        load()
    assert load().d_sae == 24


def test_what_the_cache_has_does_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(load().W_enc, sae.W_enc)
    assert load().info.provenance == sae.info.provenance
    with pytest.raises(SAEFormatError, match="has no folder 'layer3'; it has layer2"):
        load("layer3")
    with pytest.raises(SAEFormatError, match="offline mode.*does not hold revision 'main' of it"):
        saekit.SAE.from_hub("somebody/else")
    assert hub.requests == []


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load()
    monkeypatch.setattr(saekit.hub, "_reached", set())
    monkeypatch.setattr(saekit.hub, "_no_connection", lambda url: OSError("no route to host"))
    assert torch.equal(load().W_enc, first.W_enc)
    with pytest.raises(SAEFormatError, match="cannot list the Hub repository 'somebody/else'") as caught:
        saekit.SAE.from_hub("somebody/else")
    assert "no route to host" in caught.value.__notes__[0]


def test_a_folder_that_sae_lens_wrote(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / SAES / "layer2"
    config = json.loads((folder / "cfg.json").read_text())
    del config["saekit"]
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": "blocks.1.hook_resid_post"}}))
    assert load().info.provenance["loader"] == "saekit:sae_lens"
    assert not [request for request in hub.requests if "huge" in request or "layer3" in request]
