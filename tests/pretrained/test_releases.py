"""The registry of releases: what it knows, what users and plugins add, and what it says to names that are none."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import attrs
import pytest

import saekit
from saekit.errors import AmbiguousKeyError, ConfigError, PluginWarning, UnknownKeyError
from saekit.pretrained import read_releases
from saekit.pretrained.catalog import Catalog, find_sae, nearest
from saekit.pretrained.hooks_of import hook_of
from saekit.pretrained.releases import releases_of
from saekit.released import ReleasedSAE
from saekit.testing import fake_plugin, isolated_manager

OF_3 = {"gpt2-small-res-jb": 13, "gpt2-small-hook-z-kk": 12, "gpt2-small-mlp-tm": 12, "gemma-2b-res-jb": 5}
BY_LOADER = {
    "gemma_3": (75, 8784), "sae_lens": (28, 292), "gemma_2": (16, 2833), "dictionary_learning_1": (16, 838),
    "qwen_scope": (14, 544), "llama_scope": (6, 192), "mwhanna_transcoder": (6, 208), "goodfire": (2, 2),
    "temporal": (2, 3), "connor_rob_hook_z": (1, 12), "llama_scope_r1_distill": (1, 96), "gemma_2_transcoder": (1, 26),
    "mntss_clt_layer_transcoder": (1, 26), "deepseek_r1": (1, 1),
}  # fmt: skip
"""Releases and SAEs of sae-lens 6.54.12."""


@pytest.fixture(autouse=True)
def nobodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No releases of whoever runs the tests."""
    monkeypatch.delenv("SAEKIT_RELEASES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_every_release_and_id_of_sae_lens_is_there() -> None:
    releases = Catalog().releases
    found = {
        loader: (len(some), sum(len(one.saes) for one in some))
        for loader in {one.loader for one in releases}
        if (some := [one for one in releases if one.loader == loader])
    }
    assert found == BY_LOADER
    assert {name: len(Catalog().find(name).ids) for name in OF_3} == OF_3
    saes = [sae for one in releases for sae in one.saes.values()]
    known = Counter(
        name for sae in saes for name in ("l0", "neuronpedia", "norm_scaling_factor", "explained_variance")
        if getattr(sae, name) is not None
    )  # fmt: skip
    assert known == {"l0": 12147, "neuronpedia": 2441, "norm_scaling_factor": 304, "explained_variance": 78}
    assert sum(bool(one.overrides) for one in releases) == 15


def test_what_nobody_stated_is_not_known() -> None:
    embedding = find_sae(Catalog().find("gemma-scope-2b-pt-res"), "embedding/width_4k/average_l0_6")
    assert (embedding.l0, embedding.explained_variance, embedding.neuronpedia) == (None, None, None)
    assert embedding.path == embedding.id
    first = find_sae(Catalog().find("gpt2-small-mlp-tm"), "blocks.0.hook_mlp_out")
    assert (first.l0, first.explained_variance, first.norm_scaling_factor) == (15.0, 0.999, 1.049317316132615)
    assert first.path == "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"


def test_every_id_says_what_it_reads() -> None:
    unknown = [(one.name, sae.id) for one in Catalog().releases for sae in one.saes.values() if not hook_of(one, sae)]
    assert unknown == []
    for name, sae_id, hook in (
        ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_768", "blocks.8.hook_resid_pre"),
        ("gemma-scope-9b-pt-att-canonical", "layer_3/width_16k/canonical", "blocks.3.attn.hook_z"),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "hook_embed"),
        ("llama_scope_lxa_8x", "l7a_8x", "blocks.7.hook_attn_out"),
    ):
        release = Catalog().find(name)
        assert hook_of(release, find_sae(release, sae_id)) == hook


HOOKS = """
[scopes]
repo = "me/scopes-mlp"
loader = "gemma_2"
saes = { first = "layer_3/width_16k/average_l0_9" }

[numbered]
repo = "me/numbered"
loader = "theirs"
hooks = [['/(\\w+)-(\\d+)$', "blocks.{1}.hook_{0}"]]
saes = { first = "mlp_out-4", second = "4" }

[also]
repo = "me/also"
loader = "theirs"
saes = { first = "resid_pre-5" }
"""


def test_a_release_says_how_its_paths_name_hooks(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HOOKS)
    catalog = Catalog([tmp_path / "mine.toml"])

    def read_by(name: str, sae_id: str = "first") -> str | None:
        return hook_of(catalog.find(name), catalog.find(name).saes[sae_id])

    assert read_by("scopes") == "blocks.3.hook_mlp_out", "as saekit's own of that loader"
    assert (read_by("numbered"), read_by("numbered", "second")) == ("blocks.4.hook_mlp_out", None)
    assert read_by("also") == "blocks.5.hook_resid_pre", "as another of that loader and source"


def test_hooks_of_a_release_say_nothing_of_saekits_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HOOKS.replace('"theirs"', '"sae_lens"'))
    plain, with_mine = (Catalog(files).find("gpt2-small-res-jb") for files in ((), [tmp_path / "mine.toml"]))
    assert plain.hooks == with_mine.hooks == ()


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ('"x"', "hooks: expected a list of pairs, found 'x'"),
        ('[["x"]]', r"hooks: expected pairs of a regular expression and a hook, found \['x'\]"),
        ('[["(", "x"]]', r"hooks: '\(' is no regular expression"),
        ('[["a", "hook_{0}"]]', r"hooks: 'hook_\{0\}' has a \{number\} that is no group of 'a'"),
    ],
)
def test_hooks_that_say_nothing(hooks: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'[mine]\nrepo = "me/mine"\nhooks = {hooks}\nsaes = {{ a = "b" }}\n')
    with pytest.raises(ConfigError, match=message):
        Catalog([tmp_path / "mine.toml"])


MINE = """
[mine]
repo = "me/mine"
model = "gpt2-small"
loader = "sae_lens"
revision = "v1"
saes = { first = "a/path", second = { path = "b", l0 = 12, norm_scaling_factor = 0.5 }, third = {} }
"""


def test_users_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "env", "other"):
        (tmp_path / f"{name}.toml").write_text(MINE.replace("[mine]", f"[{name}]"))
    home = tmp_path / "config/saekit/releases.toml"
    home.parent.mkdir(parents=True)
    home.write_text(MINE.replace("[mine]", "[home]"))
    monkeypatch.setenv("SAEKIT_RELEASES", os.pathsep.join([str(tmp_path / "env.toml"), str(tmp_path / "other.toml")]))
    catalog = Catalog([tmp_path / "here.toml"])
    assert [one.name for one in catalog.releases if one.source == "user"] == ["env", "other", "home", "here"]
    found = catalog.find("user:home")
    assert (found.repo, found.model, found.loader, found.revision) == ("me/mine", "gpt2-small", "sae_lens", "v1")
    assert [sae.path for sae in found.saes.values()] == ["a/path", "b", "third"]
    assert found.about(found.saes["second"]) == {"norm_scaling_factor": 0.5}
    monkeypatch.setenv("SAEKIT_RELEASES", str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="the releases in .*gone.toml cannot be read: No such file"):
        Catalog()


def test_json_and_short_rows(tmp_path: Path) -> None:
    rows = {
        "schema": 1,
        "columns": ["id", "path", "l0"],
        "releases": {"a": {"repo": "b/c", "saes": [["x"], ["y", "z", 3]]}},
    }
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (release,) = read_releases(tmp_path / "a.json.gz").releases()
    assert [(sae.id, sae.path, sae.l0) for sae in release.saes.values()] == [("x", "x", None), ("y", "z", 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nsaes = {x = 'y'}", "a: needs repo, the repository of the Hub, or folder, and not both"),
        ("[a]\nrepo = 'b/c'", "a.saes: expected a table with the path of each SAE by its id, found None"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = 3}", "a.saes.x: expected the SAE's path, or a table of facts; found 3"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = {l0 = 'many'}}", "a.saes.x.l0: expected a number, found 'many'"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = {norm_scaling_factor = 0}}", "norm_scaling_factor: expected a number above 0"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = '../y'}", "a.saes.x.path: '../y' leads out of the repository or folder: no"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = {path = 'y/../../z'}}", "a.saes.x.path: 'y/../../z' leads out of"),
        ("[a]\nfolder = 'rel'\nsaes = {x = '/etc'}", "a.saes.x.path: '/etc' leads out of the repository or folder"),
        ("[a]\nfolder = 'rel'\nsaes = {'../x' = {}}", "a.saes.../x.path: '../x' leads out of the repository"),
        ("[a]\nfolder = 'rel'\nsaes = {x = 'C:/y'}", "a.saes.x.path: 'C:/y' leads out of the repository or folder"),
        ("[a]\nfolder = 'rel'\nsaes = {x = '..\\y'}", "a.saes.x.path: '..\\\\y' leads out of the repository"),
        ("[a]\nrepo = 'b/c'\nsaes = {x = {lo = 3}}", "a.saes.x.lo: is not a fact; there are path, neuronpedia, l0"),
        ("[a]\nrepo = 3\nsaes = {x = 'y'}", "a.repo: expected a text, found 3"),
        ("[a]\nrepo = 'b/c'\nkind = 3\nsaes = {x = 'y'}", "a.kind: is not a field of a release; there are repo, "),
        (
            "[a]\nrepo = 'b/c'\noverrides = {lr = 3}\nsaes = {x = 'y'}",
            "a.overrides.lr: cannot be overridden; there are",
        ),
        (
            "[a]\nrepo = 'b/c'\noverrides = {context_size = '3'}\nsaes = {x = 'y'}",
            "context_size: expected a whole number, found",
        ),
        ("['a:b']\nrepo = 'b/c'\nsaes = {x = 'y'}", "a:b: is no name for a release"),
        ("a = 3", "a: expected a table with repo and saes, found 3"),
        ("[a", "is no table of releases"),
    ],
)
def test_a_wrong_file_is_said_to_be(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        for release in read_releases(path).releases():
            assert release.saes
    assert message in str(caught.value)
    assert "wrong.toml" in str(caught.value)


def test_nobody_makes_one_that_leads_elsewhere() -> None:
    with pytest.raises(ConfigError, match="path: 'a/../../b' leads out of the repository or folder"):
        ReleasedSAE(id="a", path="a/../../b")
    assert ReleasedSAE(id="a", path="a..b/..c").path == "a..b/..c"


def test_names_that_are_none() -> None:
    catalog = Catalog()
    with pytest.raises(UnknownKeyError, match=r"there is no release 'x'. `saekit saes list` lists all 170"):
        catalog.find("x")
    with pytest.raises(UnknownKeyError, match="Did you mean 'gemma-scope-2b-pt-res'"):
        catalog.find("gemma_scope_2b_pt_res")
    release = catalog.find("saekit:gpt2-small-res-jb")
    with pytest.raises(
        UnknownKeyError, match="no SAE 'gpt2-small/8-res-jb'. Did you mean 'blocks.8.hook_resid_pre'\\?"
    ):
        find_sae(release, "gpt2-small/8-res-jb")
    assert nearest("abce", ["abcd", "xyz", "abcd-and-so-on"]) == ["abcd"]
    assert nearest("abcd", ["abcd-and-so-on", "abce"]) == ["abce", "abcd-and-so-on"], "what begins so is near, too"


# ---- plugins


@attrs.frozen(kw_only=True)
class Config:
    """No options."""


def plugin_with(name: str, *releases: str, wrong: object = None) -> object:
    table = {release: {"repo": "b/c", "saes": {"x": "y"}} for release in releases}

    class Wrong:
        def releases(self) -> object:
            return [wrong]

    def build(config: Config) -> object:
        return Wrong() if wrong is not None else releases_of(table, name, name)

    return fake_plugin("releases", name=name, config=attrs.make_class(f"Of{name}", {}, frozen=True), build=build)


def test_plugins_bring_releases() -> None:
    manager = isolated_manager(plugin_with("lab", "ours", "theirs"), plugin_with("lab2", "more"))
    catalog = Catalog(plugins=manager)
    assert catalog.find("test:ours").saes["x"].path == "y"
    assert [one.name for one in catalog.releases if one.source == "test"] == ["ours", "theirs", "more"]
    assert len(catalog.releases) == 173


def test_a_name_that_two_have_is_an_error_that_names_both(tmp_path: Path) -> None:
    (path := tmp_path / "mine.toml").write_text(MINE.replace("[mine]", "[gpt2-small-res-jb]"))
    catalog = Catalog([path])
    with pytest.raises(AmbiguousKeyError, match="write one of saekit:gpt2-small-res-jb, user:gpt2-small-res-jb"):
        catalog.find("gpt2-small-res-jb")
    assert catalog.find("user:gpt2-small-res-jb").repo == "me/mine"
    (other := tmp_path / "other.toml").write_text(path.read_text())
    with pytest.raises(AmbiguousKeyError, match=r"from .*mine.toml and .*other.toml: rename one"):
        Catalog([path, other]).find("user:gpt2-small-res-jb")


def test_a_plugin_that_fails_stops_nobody() -> None:
    manager = isolated_manager(plugin_with("bad", wrong=3), plugin_with("lab", "ours"))
    with pytest.warns(
        PluginWarning, match="the releases of test:bad were left out: .*gave 3, expected a saekit.pretrai"
    ):
        catalog = Catalog(plugins=manager)
    assert catalog.find("ours").repo == "b/c"
    assert catalog.find("gpt2-small-res-jb").source == "saekit"


LIGHT = """
import sys, warnings
from saekit.pretrained.catalog import Catalog
try:
    Catalog().find("gpt2-small-res-jbb")
except Exception as error:
    assert "Did you mean 'gpt2-small-res-jb'" in str(error), error
else:
    raise AssertionError
heavy = {"torch", "huggingface_hub", "numpy", "saekit_plugins"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_name_that_is_none_needs_neither_torch_nor_plugins() -> None:
    from saekit.plugins.loading import installed_points

    code = LIGHT
    if any(point.distribution != "saekit" for point in installed_points()):  # whose releases are asked for
        code = code.replace('"saekit_plugins"', '"transformers"')
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saekits_own_plugins_bring_none() -> None:
    """Which is why they need not be loaded to look a release up."""
    items = saekit.default_manager().registry("releases").items
    assert [item.key for item in items if item.distribution == "saekit"] == []


def test_a_release_is_found_from_python_without_torch() -> None:
    program = """
import sys
import saekit.pretrained
release = saekit.pretrained.find_release("gpt2-small-res-jb")
print(release.repo, release.saes["blocks.8.hook_resid_pre"].id)
try:
    saekit.pretrained.find_release("gpt2-small-res-jp")
except saekit.errors.UnknownKeyError as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "jbloom/GPT2-Small-SAEs-Reformatted blocks.8.hook_resid_pre"
    assert "Did you mean 'gpt2-small-res-jb'" in second
