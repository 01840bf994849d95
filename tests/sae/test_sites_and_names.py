"""Where an SAE belongs, as it is told; names that it has not: settings without effect, and those of other libraries."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.stores import HOOK
from torch import nn

import saekit
from saekit.config.sae_lens_names import FACTORIES, OF_CONFIGS, OF_SAES
from saekit.errors import ConfigError
from saekit.testing import FakeBackend

SAE = saekit.SAE
TOPK: dict[str, Any] = {"name": "topk", "d_in": 8, "d_sae": 16, "k": 4}
CROSSCODER: dict[str, Any] = {"name": "crosscoder", "d_sae": 16, "ports": {"inputs": {"a": 8, "b": 4}}}
TOKENS = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(0))


def site(name: str, head: int | None = None) -> saekit.Site:
    return saekit.Site(hook_name=name, hook_head_index=head)


BOTH = saekit.Sites((site("early"), site("late")))


# ---- where it belongs


@pytest.mark.parametrize("place", [HOOK, site(HOOK), saekit.Sites.one(site(HOOK))], ids=repr)
def test_a_site_that_is_set_is_used_and_saved(place: Any, tmp_path: Path) -> None:
    sae = SAE.from_dict(TOPK)
    sae.site = place
    assert (sae.site, sae.sites, sae.info.site) == (site(HOOK), saekit.Sites.one(site(HOOK)), site(HOOK))
    assert dict(sae.ports.inputs) == {HOOK: 8}
    with saekit.splice(FakeBackend(), sae) as spliced:
        assert f"{HOOK}.hook_sae_acts_post" in spliced.names
        spliced.run(TOKENS, want="loss")
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.info == sae.info
    assert again.ports == sae.ports
    assert HOOK in repr(again)


def test_a_site_where_an_sae_is_made() -> None:
    assert SAE.from_dict(TOPK, site=site("hook_z", 3)).site == site("hook_z", 3)
    assert SAE.from_dict(TOPK).info.site is None


def test_several_sites_name_the_ports_and_their_factors(tmp_path: Path) -> None:
    sae = SAE.from_dict(CROSSCODER)
    sae.info = saekit.SAEInfo(
        architecture=sae.info.architecture,
        options=sae.info.options,
        metadata={"activation_scale": {"a": 2.0, "b": 3.0}},
    )
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    before = sae(x)
    sae.sites = BOTH
    assert sae.info.metadata["activation_scale"] == {"early": 2.0, "late": 3.0}
    assert sae.site == site("early")
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.sites == BOTH
    assert dict(again.ports.inputs) == {"early": 8, "late": 4}
    assert torch.equal(again(x), before)
    assert sae.get_name() == "sae_early+late_16"


def test_a_transcoder_is_told_what_it_reads_and_writes(tmp_path: Path) -> None:
    sae = SAE.from_dict({"name": "transcoder", "d_sae": 16, "ports": {"inputs": {"x": 8}, "targets": {"y": 8}}})
    sae.site = saekit.Sites((site("in"),), (site("out"),))
    assert sae.get_name() == "sae_in-to-out_16"
    assert SAE.load(sae.save(tmp_path / "sae")).sites == sae.sites
    with pytest.raises(ConfigError, match=r"targets: are the inputs \(in\), and it is a transcoder"):
        sae.site = "in"


def test_a_site_of_a_file_of_another_library_takes_the_place_of_its_own(tmp_path: Path) -> None:
    sae = SAE.load(Path(__file__).parents[1] / "fixtures" / "sae_lens_6.54.12_standard")
    before = sae.site
    sae.site = "blocks.7.hook_resid_pre"
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.site == site("blocks.7.hook_resid_pre") != before


EIGHTH = "blocks.8.hook_resid_pre"
FED = {"model_name": "gpt2", "context_size": 128}
PLACES: dict[str, Any] = {
    "hook_name": EIGHTH, "hook_head_index": None, "hook_layer": 8, "neuronpedia_id": "gpt2-small/8-res-jb",
    "hf_hook_name": "layers.8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "place", "kept"),
    [
        (EIGHTH, EIGHTH, PLACES),
        (EIGHTH, "blocks.7.hook_resid_pre", {"hook_head_index": None}),
        (EIGHTH, site(EIGHTH, 3), {"hook_name": EIGHTH}),
        (EIGHTH, None, {}),
        (None, EIGHTH, PLACES),
        (None, "blocks.8.hook_mlp_out", {"hook_head_index": None}),
        (None, None, PLACES),
    ],
)
def test_a_site_leaves_nothing_in_metadata_that_says_another(before: Any, place: Any, kept: dict[str, Any]) -> None:
    sae = SAE.from_dict(TOPK, site=before)
    sae.info = attrs.evolve(sae.info, metadata=FED | PLACES)
    sae.site = place
    assert sae.info.metadata == FED | kept


@pytest.mark.parametrize(("name", "value"), [("neuronpedia_id", "gpt2-small/8-res-jb"), ("hook_layer", 8)])
def test_another_layer_in_metadata_goes_where_no_site_was_known(name: str, value: object) -> None:
    for place, kept in ((EIGHTH, {name: value}), ("hook_embed", {name: value}), ("blocks.18.hook_resid_pre", {})):
        sae = SAE.from_dict(TOPK)
        sae.info = attrs.evolve(sae.info, metadata=FED | {name: value})
        sae.site = place
        assert sae.info.metadata == FED | kept


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (3, "site: must be a hook's name, a saekit.Site or saekit.Sites, found 3"),
        ("", "site: must be a hook's name, a saekit.Site or saekit.Sites, found ''"),
        (BOTH, r"inputs: are 2 \(early, late\), and the SAE has 1"),
        (saekit.Sites((site("a"),), (site("b"),)), r"targets: are others \(b\) than the inputs"),
    ],
)
def test_a_site_that_it_cannot_have(place: Any, message: str) -> None:
    sae = SAE.from_dict(TOPK, site="here")
    with pytest.raises(ConfigError, match=message):
        sae.site = place
    assert sae.site == site("here"), "it stays"


def test_a_site_that_is_not_known_is_asked_for() -> None:
    sae = SAE.from_dict(TOPK, site="here")
    sae.site = None
    assert sae.sites is None
    with pytest.raises(ConfigError, match="site: is missing: the SAE does not say .* say it: sae.site = HOOK"):
        _ = sae.site


@pytest.mark.parametrize("options", [TOPK, CROSSCODER], ids=lambda options: options["name"])
def test_what_asks_for_every_attribute_passes_over_a_site_that_is_not_known(options: dict[str, Any]) -> None:
    sae = SAE.from_dict(options)
    assert not hasattr(sae, "site")
    assert getattr(sae, "site", None) is None
    assert {"encode", "info", "sites"} <= {name for name, _ in inspect.getmembers(sae)}
    with pytest.raises(AttributeError, match="site: is missing: .* say it: sae.site = HOOK"):
        _ = sae.site
    x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are compared, and that tracing is old
        traced = torch.jit.trace(sae, x)
    assert torch.equal(traced(x), sae(x))


class WithAProperty(type(SAE.from_dict(TOPK))):  # type: ignore[misc]
    @property
    def mine(self) -> Any:
        return self.not_there


def test_a_property_says_itself_what_is_missing() -> None:
    made = SAE.from_dict(TOPK)
    sae = WithAProperty(made.config, ports=made.ports, activation=made.activation)
    with pytest.raises(AttributeError, match="'WithAProperty' object has no attribute 'not_there'"):
        _ = sae.mine


# ---- settings without effect


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("k", r"it is an option that the SAE was made with \(sae.config.k\)"),
        ("metadata", r"it is a part of sae.info: sae.info = attrs.evolve\(sae.info, metadata=...\)"),
        ("hook_name", "it is a name of other libraries, and here it is sae.site.hook_name"),
        ("use_error_terms", "did you mean 'use_error_term'?"),
    ],
)
def test_what_looks_like_a_setting_is_refused(name: str, message: str) -> None:
    sae = SAE.from_dict(TOPK)
    with pytest.raises(AttributeError, match=f"to set '{name}' of TopKSAE would do nothing: {message}"):
        setattr(sae, name, 3)
    assert name not in vars(sae)


def test_other_attributes_are_everybodys_own() -> None:
    sae = SAE.from_dict(TOPK)
    sae.label, sae.use_error_term, sae.probe = "mine", True, nn.Linear(2, 2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(sae)))
    assert copied.label == "mine"
    assert copied.use_error_term


class WithAnOption(type(SAE.from_dict(TOPK))):  # type: ignore[misc]
    def __init__(self, config: Any, **how: Any) -> None:
        super().__init__(config, **how)
        self.k = config.k


def test_an_architecture_may_have_an_attribute_of_its_options_name() -> None:
    made = SAE.from_dict(TOPK)
    assert WithAnOption(made.config, ports=made.ports, activation=made.activation).k == 4


def of_the_same_plugin(sae: Any) -> None:
    sae.sitess = ["here"]


class SettingLater(type(SAE.from_dict(TOPK))):  # type: ignore[misc]
    def training_step(self, x: Any, step: Any) -> Any:
        self.k = self.config.k
        made = super().training_step(x, step)
        self.hook_name = "mine"
        for name in ("use_error_terms",):
            (lambda: setattr(self, name, True))()
        return made

    def losses(self, x: Any, step: Any) -> Any:
        of_the_same_plugin(self)
        return super().losses(x, step)


def test_an_architecture_sets_what_it_likes_in_its_methods() -> None:
    made = SAE.from_dict(TOPK)
    sae = SettingLater(made.config, ports=made.ports, activation=made.activation)
    sae.info, sae.kernels = made.info, "reference"
    with pytest.raises(AttributeError, match="to set 'k' of SettingLater would do nothing"):
        sae.k = 3
    with pytest.raises(AttributeError, match="to set 'sitess' of SettingLater would do nothing: did you mean 'sites'"):
        of_the_same_plugin(sae)
    step = saekit.StepInput(step=3, generator=torch.Generator(), dead=None)
    sae.training_step(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)), step)
    assert (sae.k, sae.sitess, sae.hook_name, sae.use_error_terms) == (4, ["here"], "mine", True)
    sae.k = 5
    assert sae.k == 5, "it is there now"


# ---- names of other libraries


def test_names_of_other_libraries_are_told_what_they_are_here() -> None:
    sae = SAE.from_dict(TOPK)
    for name, here in OF_SAES.items():
        with pytest.raises(AttributeError) as found:
            getattr(sae, name)
        assert str(found.value) == f"TopKSAE has no {name!r}, as other libraries have it: here it is {here}"
        assert not hasattr(sae, name)
    for name, here in FACTORIES.items():
        with pytest.raises(AttributeError) as found:
            getattr(SAE, name)
        assert str(found.value) == f"SAE has no {name!r}, as other libraries have it: here it is {here}"
    for name, here in OF_CONFIGS.items():
        with pytest.raises(AttributeError, match="as that of sae-lens has: here it is ") as found:
            getattr(sae.cfg, name)
        assert str(found.value).endswith(here)
    with pytest.raises(AttributeError, match="'TopKSAE' object has no attribute 'nothing'"):
        _ = sae.nothing
    with pytest.raises(AttributeError, match="'TopKConfig' object has no attribute 'nothing'$"):
        _ = sae.cfg.nothing  # type: ignore[attr-defined]
    assert copy.copy(sae.cfg) == pickle.loads(pickle.dumps(sae.cfg)) == sae.cfg


def test_what_names_say_is_there() -> None:
    sae: Any = SAE.from_dict(TOPK, site="here")
    for here in {*OF_SAES.values(), *OF_CONFIGS.values()}:
        for name in [word.partition("(")[0].partition("[")[0].strip(",;.") for word in here.split()]:
            first, *rest = name.split(".")
            thing = {"sae": sae, "SAE": SAE, "saekit": saekit}.get(first)
            for part in rest if thing is not None else ():
                thing = getattr(thing, part)


# ---- what is shown


def test_completion_shows_what_people_use() -> None:
    shown = {*dir(SAE.from_dict(TOPK))}
    assert {"encode", "decode", "site", "save", "W_dec", "hook_sae_acts_post", "to", "state_dict"} <= shown
    assert not {"spreads_over", "served_by", "undone_share", "why_not_split", "load_from_disk"} & shown
    assert "decoder_norms_by_site" in dir(SAE.from_dict(CROSSCODER)), "what an architecture adds"


class Undocumented(type(SAE.from_dict(TOPK))):  # type: ignore[misc]
    factor = 3

    def __init__(self, config: Any, **how: Any) -> None:
        super().__init__(config, **how)
        self.seen, self._hidden = 0, 1

    def largest(self, x: Any) -> Any:
        return self.encode(x).amax(-1)


def test_completion_shows_what_others_add() -> None:
    made = SAE.from_dict(TOPK)
    sae = Undocumented(made.config, ports=made.ports, activation=made.activation)
    sae.label = "mine"
    assert {"factor", "seen", "largest", "label", "encode"} <= {*dir(sae)}
    assert "_hidden" not in dir(sae)
    assert not {"spreads_over", "served_by", "table", "memory"} & {*dir(sae)}
    matryoshka = SAE.from_dict({"name": "matryoshka", "d_in": 8, "d_sae": 16, "k": 4, "widths": [0.5]})
    assert {"ends", "factors"} <= {*dir(matryoshka)}


def test_its_documentation_says_what_to_do_with_it() -> None:
    assert SAE.__doc__ is not None
    for name in ("from_pretrained", "encode", "[..., d_in]", "saekit.splice", "saekit.top_texts", "save"):
        assert name in SAE.__doc__
