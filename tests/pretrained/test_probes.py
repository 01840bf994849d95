"""Folders that say what their SAE computes: what does not fit is named, and what fits says nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.formats import FIXTURES
from support.saved import make
from support.tiny import run_config

import saekit
from saekit import SAE
from saekit.errors import SAEFormatError
from saekit.files.names import SAE_PROBE
from saekit.pretrained import verify
from saekit.sae.probe import as_it_is, explained, probe_of

KINDS = ("standard", "topk", "jumprelu")
OTHERS = ("batchtopk", "transcoder", "skip_transcoder", "abstopk", "matching_pursuit", "temporal")
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    home = tmp_path_factory.mktemp("saved")
    for kind in (*KINDS, *OTHERS):
        SAE.load(FIXTURES / f"sae_lens_6.54.12_{kind}").save(home / kind)
    return home


def changed(
    saved: Path, tmp_path: Path, kind: str, weights: Change | None = None, config: Callable[[Any], object] | None = None
) -> list[str]:
    """What is said of a copy in which something is another, and of which nobody has the checksums any more."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in (saved / kind).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    table, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    table["saekit"].pop("seal")
    table["saekit"].pop("sha256")
    if weights is not None:
        weights(tensors)
    if config is not None:
        config(table["saekit"])
    (folder / "cfg.json").write_text(json.dumps(table))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    found = verify(folder)
    if found:
        with pytest.raises(SAEFormatError, match="the SAE in .*changed is not as it was saved:\n  - "):
            SAE.load(folder, verify=True)
    return found


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_nothing_is_said_of_what_was_saved(saved: Path, tmp_path: Path, kind: str) -> None:
    assert verify(saved / kind) == []
    assert SAE.load(saved / kind, verify=True).d_sae == 64
    assert changed(saved, tmp_path, kind) == [], "nor of one without checksums"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_verified_as_it_lies_whatever_type_is_asked_for(saved: Path, kind: str, dtype: str) -> None:
    found, expected = SAE.load(saved / kind, dtype=dtype, verify=True), SAE.load(saved / kind, dtype=dtype)
    assert (found.cfg.dtype, expected.cfg.dtype) == (dtype, dtype)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == value.dtype


def test_what_is_in_it(saved: Path) -> None:
    """Closed form: the values are those of the formula."""
    with safe_open(saved / "standard" / SAE_PROBE, "pt") as file:
        facts, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    t, x = load_file(saved / "standard/sae_weights.safetensors"), found["x"].float()
    features = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    output = features @ t["W_dec"] + t["b_dec"]
    assert (found["output"] - output).abs().max() < 1e-5 * output.abs().max()
    assert (found["values"] - features.gather(1, found["features"].long())).abs().max() < 1e-4
    assert torch.equal(found["l0"], (features > 0).sum(1).int())
    assert float(facts["l0"]) == pytest.approx((features > 0).sum(1).float().mean().item())
    variance = 1 - (x - output).square().sum() / (x - x.mean(0)).square().sum()
    assert float(facts["explained_variance"]) == pytest.approx(variance.item(), abs=1e-4)
    assert (facts["dtype"], facts["saekit"]) == ("float32", saekit.__version__)
    assert json.loads(facts["norms"])["W_dec"] == pytest.approx(t["W_dec"].norm().item(), rel=1e-5)
    assert (features > 0).any(1).all(), "its rows make features active"


def test_the_same_sae_has_the_same_probe(saved: Path, tmp_path: Path) -> None:
    sae = SAE.load(saved / "topk")
    before = (sae.save(tmp_path / "a") / SAE_PROBE).read_bytes()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    handle = sae.hook_sae_acts_post.add_hook(lambda features, hook: features * 0)
    sae.use_error_term = True
    assert (sae.save(tmp_path / "b") / SAE_PROBE).read_bytes() == before, "hooks are of the moment"
    assert torch.equal(torch.get_rng_state(), state)
    assert sae.use_error_term
    handle.remove()


@pytest.mark.parametrize("d_in", [40, 6000, 60_000])
def test_a_wide_one_is_small(tmp_path: Path, d_in: int) -> None:
    assert (make(d_in=d_in).save(tmp_path / "sae") / SAE_PROBE).stat().st_size < 1 << 20


# ---- what does not fit


def each(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: change(value) for name, value in tensors.items() if not names or name in names})

    return apply


def folded(tensors: dict[str, torch.Tensor]) -> None:
    norms = tensors["W_dec"].norm(dim=1)
    tensors["W_dec"] /= norms[:, None]
    tensors["W_enc"] *= norms
    tensors["b_enc"] *= norms
    if "threshold" in tensors:
        tensors["threshold"] *= norms


def scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors["W_enc"] *= 1.7
    tensors["W_dec"] /= 1.7
    tensors["b_dec"] /= 1.7


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights(saved: Path, tmp_path: Path, kind: str) -> None:
    types = "the weights are bfloat16, and were float32 when they were saved"
    said = "the weights were rounded to bfloat16: half of the rows differ by "
    for number, (change, number_of) in enumerate(((lambda v: v.bfloat16(), 2), (lambda v: v.bfloat16().float(), 1))):
        home = tmp_path / str(number)
        home.mkdir()
        *first, last = changed(saved, home, kind, each(change))
        assert first == [types] * (number_of - 1)
        assert last.startswith(said)
        part = float(last.removeprefix(said).split()[0])
        assert 0.01 < part < 3, "per cent: of the size of 8 bits"


def test_a_folded_factor_is_named(saved: Path, tmp_path: Path) -> None:
    (told,) = changed(saved, tmp_path, "standard", scaled)
    assert told.startswith(
        "the weights do on x what they did on 1.7 x: the factor by which activations are scaled was f"
    )


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_folded_norms(saved: Path, tmp_path: Path, kind: str) -> None:
    (told,) = changed(saved, tmp_path, kind, folded)
    assert told.startswith(
        "the norms of decoder rows were folded into the encoder: rows have norm 1, features are larg"
    )


def test_norms_that_are_1_may_be_folded(saved: Path, tmp_path: Path) -> None:
    assert changed(saved, tmp_path, "topk", folded) == []


def test_a_constant_factor_is_named(saved: Path, tmp_path: Path) -> None:
    (told,) = changed(saved, tmp_path, "transcoder", each(lambda v: 3 * v, "W_dec", "b_dec"))
    assert told == "outputs are 3 times as large as they were, and features are the same: a constant factor"
    (tmp_path / "other").mkdir()
    (told,) = changed(saved, tmp_path / "other", "standard", each(lambda v: v / 4, "W_dec"))
    assert told.startswith("outputs less b_dec are 0.25 times as large as they were, and features are the ")


@pytest.mark.parametrize("kind", KINDS)
def test_whether_b_dec_is_subtracted(saved: Path, tmp_path: Path, kind: str) -> None:
    (told,) = changed(saved, tmp_path, kind, config=lambda own: own["options"].update(apply_b_dec_to_input=False))
    assert told == "b_dec is not subtracted from inputs (apply_b_dec_to_input), and was when the SAE was saved"


def test_whether_b_dec_is_added(saved: Path, tmp_path: Path) -> None:
    (told,) = changed(saved, tmp_path, "transcoder", each(torch.zeros_like, "b_dec"))
    assert told.startswith("all outputs are off by the same vector, of norm ")
    assert told.endswith("b_dec is another, or is not added")


def test_thresholds_that_are_left_out(saved: Path, tmp_path: Path) -> None:
    (told,) = changed(saved, tmp_path, "jumprelu", each(torch.zeros_like, "threshold"))
    assert told.startswith("features are active that were not, ")
    assert told.endswith(": a threshold, or k, is left out")


@pytest.mark.parametrize("kind", KINDS)
def test_damage(saved: Path, tmp_path: Path, kind: str) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["W_dec"][:8, 3] = 40.0

    found = changed(saved, tmp_path, kind, damage)
    assert "rows come out otherwise, outputs off by up to " in found[0]
    assert found[0].endswith("weights are damaged, or of another SAE")
    assert "the norm of W_dec is 1" in found[1]


def test_a_bit_of_a_file(saved: Path, tmp_path: Path) -> None:
    """By the checksum, and where it matters by what is computed, too."""
    folder = SAE.load(saved / "standard").save(tmp_path / "sae")
    data = bytearray((folder / "sae_weights.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "sae_weights.safetensors").write_bytes(data)
    found = verify(folder)
    assert found[0].startswith("sae_weights.safetensors in ")
    assert "is damaged or was changed after it was saved: its sha256 is" in found[0]
    data[-1] ^= 66  # a number that is another
    (folder / "sae_weights.safetensors").write_bytes(data)
    assert len(verify(folder)) > 1
    (folder / "sae_weights.safetensors").write_bytes(data[:100])
    assert "is not a readable safetensors file" in verify(folder)[-1]


def test_a_folder_that_another_library_has_written_again(saved: Path, tmp_path: Path) -> None:
    """sae-lens knows nothing of saekit's part; the probe still says what was computed."""
    folder = SAE.load(saved / "standard").save(tmp_path / "sae")
    table = json.loads((folder / "cfg.json").read_text())
    del table["saekit"]
    (folder / "cfg.json").write_text(json.dumps(table))
    assert verify(folder) == []
    (folder / "cfg.json").write_text(json.dumps(table | {"apply_b_dec_to_input": False}))
    assert verify(folder) == [
        "b_dec is not subtracted from inputs (apply_b_dec_to_input), and was when the SAE was saved"
    ]


# ---- the probe itself


def test_without_a_probe_there_is_nothing_to_verify(saved: Path, tmp_path: Path) -> None:
    folder = SAE.load(saved / "standard").save(tmp_path / "sae")
    (folder / SAE_PROBE).unlink()
    assert SAE.load(folder).d_sae == 64
    for call in (lambda: verify(folder), lambda: SAE.load(folder, verify=True)):
        with pytest.raises(SAEFormatError, match="sae has no probe.safetensors, so that there is nothing to compare"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.pop("l0"), "lacks l0"),
        (
            lambda t, f: t.update(x=t["x"][:, :3].clone()),
            r"x of probe.safetensors in .* has shape \[16, 3\], and of this S",
        ),
        (lambda t, f: t["features"].fill_(99), "names features that this SAE, of 64, does not have"),
        (lambda t, f: t.update(l0=t["l0"].float()), "names features that this SAE"),
        (lambda t, f: t["output"].fill_(float("nan")), "output of probe.safetensors in .* holds 256 NaN"),
        (
            lambda t, f: f.pop("off"),
            "the header of probe.safetensors in .* is not as saekit writes it: KeyError: 'off'",
        ),
        (lambda t, f: f.update(off="nan"), "the header of probe.safetensors in .* is not as saekit writes it: nan"),
        (lambda t, f: f.update(norms="[" * 9999), "probe.safetensors in .* is nested too deeply"),
        (
            lambda t, f: f.update(norms='{"W_enc": "x"}'),
            "the header of probe.safetensors in .* is not as saekit writes it",
        ),
    ],
)
def test_a_probe_that_is_none(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = SAE.load(saved / "standard").save(tmp_path / "sae")
    table = json.loads((folder / "cfg.json").read_text())
    del table["saekit"]["sha256"], table["saekit"]["seal"]
    (folder / "cfg.json").write_text(json.dumps(table))
    with safe_open(folder / SAE_PROBE, "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, facts)
    save_file(tensors, folder / SAE_PROBE, facts)
    with pytest.raises(SAEFormatError, match=message):
        verify(folder)
    (folder / SAE_PROBE).write_bytes(b"junk")
    with pytest.raises(SAEFormatError, match="probe.safetensors in .* is not a readable safetensors file"):
        verify(folder)


def test_a_probe_that_was_changed_is_no_witness(saved: Path, tmp_path: Path) -> None:
    folder = SAE.load(saved / "standard").save(tmp_path / "sae")
    (folder / SAE_PROBE).write_bytes((saved / "topk" / SAE_PROBE).read_bytes())
    (told,) = verify(folder)
    assert "probe.safetensors in " in told
    assert "is damaged or was changed, so that nothing can be compared with it" in told
    assert SAE.load(folder).d_sae == 64, "nobody reads it who does not ask for it"


def test_parameters_may_have_other_names() -> None:
    """Which is the decoder says the table: rows are made of its directions."""
    sae = make(d_in=6)
    before = probe_of(sae, {})
    sae.directions = decoder = sae.W_dec
    del sae.W_dec
    vars(sae)["W_dec"] = decoder  # no parameter of that name any more
    names = {"W_dec": "directions"}
    entries = tuple(attrs.evolve(entry, name=names.get(entry.name, entry.name)) for entry in sae.table)
    vars(sae)["table"] = attrs.evolve(sae.table, entries=entries)
    after = probe_of(sae, {})
    assert before is not None
    assert after is not None
    assert torch.equal(after.tensors["x"], before.tensors["x"])
    assert sae.table.of_dims("d_sae", "d_out") == "directions"
    assert (sae.table.of_dims("d_sae"), sae.table.of_dims("d_out", "d_out")) == (None, None), "several, and none"


def test_numbers_without_end_are_no_probe(tmp_path: Path) -> None:
    sae = make()
    with torch.no_grad():
        sae.W_enc.fill_(3e38)
        sae.W_dec.fill_(3e38)
    with pytest.warns(UserWarning, match=r"without probe.safetensors, .*: what the SAE computes is not finite"):
        assert not (sae.save(tmp_path / "sae") / SAE_PROBE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_verified_as_what_it_becomes(saved: Path, tmp_path: Path, kind: str) -> None:
    sae = SAE.load(saved / kind).half()
    assert verify(sae.save(tmp_path / "half")) == []
    assert (sae.dtype, SAE.load(tmp_path / "half", verify=True).dtype) == (torch.float16, torch.float32)


def test_coarse_products_of_the_machine_that_verifies_are_no_difference(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.pretrained import differences

    def off(tensors: dict[str, torch.Tensor]) -> None:
        tensors["W_dec"] *= 1 + 2e-3 * torch.randn(tensors["W_dec"].shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(differences, "off_here", lambda sae: 5e-3)
    (tmp_path / "coarse").mkdir()
    assert changed(saved, tmp_path / "coarse", "standard", off) == []
    monkeypatch.undo()
    assert changed(saved, tmp_path, "standard", off)


class Failing(saekit.SAE):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def test_an_sae_that_cannot_tell_is_saved_all_the_same(tmp_path: Path) -> None:
    sae = make()
    sae.__class__ = type("Failing", (type(sae),), {"encode": Failing.encode, "public_config": type(sae).public_config})
    said = r"is saved without probe.safetensors, so that nobody can verify it: .* fails with ZeroDivisionError"
    with pytest.warns(UserWarning, match=said):
        folder = sae.save(tmp_path / "sae")
    assert not (folder / SAE_PROBE).exists()
    make().save(folder)
    assert (folder / SAE_PROBE).exists()
    with pytest.warns(UserWarning, match=said):
        sae.save(folder)
    assert not (folder / SAE_PROBE).exists(), "none of another SAE stays"


# ---- runs


def test_a_run_leaves_rows_of_its_own(tmp_path: Path) -> None:
    """Of the last batch, as the activations are: the SAE explains some of them; stopped and gone on with, the same."""
    config = run_config(tmp_path, checkpoints={"name": "whole"})
    config["training"] |= {"training_tokens": 2048, "lr": 1e-2}
    config["activations"] = {"normalize_activations": "expected_average_only_in"}
    result = saekit.train(config)
    folder = result.folder / "sae"
    assert verify(folder) == []
    with safe_open(folder / SAE_PROBE, "pt") as file:
        facts, x = file.metadata(), file.get_tensor("x").float()
    assert facts["rows"] == "activations"
    with torch.no_grad():
        expected = explained(x, result.sae(x))
    assert float(facts["explained_variance"]) == pytest.approx(expected, abs=1e-4)
    assert expected > 0.1
    last = sorted((result.folder / "checkpoints").iterdir())[-1]
    assert (last / "sae" / SAE_PROBE).read_bytes() == (folder / SAE_PROBE).read_bytes()
    told = changed_run(folder, tmp_path / "edited")
    assert any(text.startswith("of the variance of the probe's rows ") for text in told)


def changed_run(folder: Path, to: Path) -> list[str]:
    sae = SAE.load(folder)
    sae.save(to)
    (to / SAE_PROBE).write_bytes((folder / SAE_PROBE).read_bytes())
    table, tensors = json.loads((to / "cfg.json").read_text()), load_file(to / "sae_weights.safetensors")
    del table["saekit"]["seal"], table["saekit"]["sha256"]
    tensors["W_enc"] = tensors["W_enc"].flip(1)
    (to / "cfg.json").write_text(json.dumps(table))
    save_file({name: value.contiguous() for name, value in tensors.items()}, to / "sae_weights.safetensors")
    return verify(to)


def test_making_one_leaves_random_numbers_as_they_are(tmp_path: Path) -> None:
    """What a plugin draws while an SAE is saved changes nothing that a run draws after it."""

    def states() -> tuple[Any, Any, Any]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    sae, before = SAE.load(FIXTURES / "sae_lens_6.54.12_topk"), states()
    drawn = []
    with as_it_is(sae):
        drawn += [random.random(), np.random.rand(), torch.rand(()).item()]
    assert states() == before
    with as_it_is(sae):
        assert drawn == [random.random(), np.random.rand(), torch.rand(()).item()]
