"""Recipes: whole files, found by name, that load strictly and say what they take."""

from __future__ import annotations

import json
import sys
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType

import attrs
import pytest
import yaml
from support.command import cli

import saekit
from saekit.config import OptimizerConfig, SAEConfig, TrainConfig
from saekit.config.files import load_config
from saekit.config.formats import read_toml
from saekit.config.recipes import find_recipe, listed, printed, recipe_text, recipes
from saekit.errors import AmbiguousKeyError, ConfigError, UnknownKeyError
from saekit.plugins.choice import Choice
from saekit.testing import isolated_manager, plugin_of

NAMES = [found.name for found in recipes()]


def test_those_that_there_are() -> None:
    assert NAMES == [
        "gemma-2-2b-topk", "gpt2-small-residual", "laptop", "mamba-130m-residual", "pythia-160m-attention",
        "pythia-160m-skip-transcoder",
    ]  # fmt: skip
    listed = printed(None)
    for found in recipes():
        assert f"  {found.name} " in listed
        assert found.summary in listed
    assert cli("config", "--recipes", watch=True).stdout == listed


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_strictly_and_is_what_is_printed(name: str) -> None:
    found = find_recipe(name)
    assert find_recipe(f"saekit:{name}") == found
    config = saekit.recipe(name)
    assert isinstance(config, TrainConfig)
    assert recipe_text(name) == found.text
    assert load_config(read_toml(found.text)) == config
    assert load_config(load_config(config)) == config
    for part in ("Text:", "Source:", "Sizes:", "Time:", "Change first:"):
        assert sum(line.startswith(f"# {part}") for line in found.comment) == 1, part
    assert all(len(line) <= 120 for line in found.text.splitlines())
    for word in ("hour", "minute"):
        assert word not in found.text, "nobody measured that on the reader's machine"


@pytest.mark.parametrize("name", NAMES)
def test_what_to_change_first_can_be_changed(name: str) -> None:
    """Each option that is named is one, and each whole change that is shown can be made."""
    lines = find_recipe(name).comment
    shown = [line[4:].split()[0] for line in lines[lines.index("# Change first:") + 1 :]]
    assert len(shown) >= 3
    for option in shown:
        value: object = saekit.recipe(name)
        for key in option.split("."):
            value = value.key if key == "name" and isinstance(value, Choice) else _option(value, key)
        assert isinstance(value, (str, int, float)), option
    changes = [word.strip(" ;,()") for line in lines for word in line.split() if "=" in word]
    for change in changes:
        if change.partition("=")[0].count("."):
            saekit.recipe(name, [change])


def _option(config: object, name: str) -> object:
    return getattr(config.options if isinstance(config, Choice) else config, name)


def test_overrides_are_applied_and_told() -> None:
    text = cli("config", "--recipe", "gemma-2-2b-topk", "sae.k=64", "training.lr=1e-4", watch=True).stdout
    config = load_config(tomllib.loads(text))
    assert config == saekit.recipe("gemma-2-2b-topk", ["sae.k=64", "training.lr=1e-4"])
    assert (config.sae.options.k, config.training.lr) == (64, 1e-4)
    assert "# Changed:  sae.k=64\n# Changed:  training.lr=1e-4\n" in text
    assert "`saekit plan` counts anew" in text
    assert set(find_recipe("gemma-2-2b-topk").comment) < set(text.splitlines())


def test_other_forms() -> None:
    expected = saekit.recipe("laptop", ["sae.k=8"])
    text = recipe_text("laptop", ["sae.k=8"], "yaml")
    assert text.startswith("# ")
    assert load_config(yaml.safe_load(text)) == expected
    assert load_config(json.loads(recipe_text("laptop", ["sae.k=8"], "json"))) == expected
    assert load_config(yaml.safe_load(recipe_text("laptop", [], "yaml"))) == saekit.recipe("laptop")


def test_an_unknown_name_lists_them() -> None:
    with pytest.raises(UnknownKeyError, match=r"^there is no recipe 'gpt2-smal-residual'. Did you mean") as caught:
        saekit.recipe("gpt2-smal-residual")
    assert all(f"\n  {name} " in str(caught.value) for name in NAMES)
    said = cli("config", "--recipe", "nothing", check=2, watch=True).stderr
    assert said.startswith("error: there is no recipe 'nothing'. The recipes are:\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "laptop", "run.toml"], "laptop is a whole configuration, and 'run.toml' would be another"),
        (["--recipe", "laptop", "sae.kk=3"], "sae.kk: is not an option. Did you mean 'k'?"),
        (["--recipe", "laptop", "--of", "pretokenize"], "--of: is 'pretokenize', and recipes are configurations of"),
        (["--recipe", "laptop", "--recipes"], "--recipes: lists all, and --recipe prints one; give one of them"),
        (["--recipes", "sae.k=3"], "--recipes lists the recipes; 'sae.k=3' goes with --recipe NAME"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], message: str) -> None:
    assert message in cli("config", *arguments, check=2, watch=True).stderr


def plugin(folder: Path, name: str, text: str, recipe: str = "laptop") -> ModuleType:
    """A package with a plugin and a recipe, imported."""
    home = folder / name
    (home / "recipes").mkdir(parents=True)
    (home / "recipes" / f"{recipe}.toml").write_text(text)
    (home / "__init__.py").write_text(
        textwrap.dedent(
            """
            import attrs, saekit

            @attrs.frozen(kw_only=True)
            class Options:
                pass

            @saekit.hookimpl
            def saekit_register_trackers():
                yield saekit.Entry("quiet", Options, lambda config, *, run: None)
            """
        )
    )
    module: ModuleType = __import__(name)
    return module


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("recipes_of_one", "recipes_of_two"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_any_plugin_may_have_some(place: Path) -> None:
    module = plugin(place, "recipes_of_one", "# Of mine\n\n[training]\nlr = 0.5\n", "mine")
    manager = isolated_manager(module, builtins=True)
    found = find_recipe("mine", manager)
    assert (found.summary, found.comment) == ("Of mine", ["# Of mine"])
    assert saekit.recipe("mine", plugins=manager).training.lr == 0.5
    assert "mine" in [one.name for one in recipes(manager)]
    assert "mine" not in NAMES


def test_two_of_one_name_are_told_apart(place: Path) -> None:
    module = plugin(place, "recipes_of_two", "")
    manager = isolated_manager(module, builtins=True)
    (own,) = {item.distribution for item in manager.registry("trackers").items} - {"saekit"}
    with pytest.raises(AmbiguousKeyError, match=f"'laptop' is there more than once; write one of .*{own}:laptop"):
        saekit.recipe("laptop", plugins=manager)
    assert saekit.recipe(f"{own}:laptop", plugins=manager) == TrainConfig()
    assert saekit.recipe("saekit:laptop", plugins=manager) == saekit.recipe("laptop")


def test_those_of_one_name_are_listed_by_their_keys() -> None:
    one = find_recipe("laptop")
    other = attrs.evolve(one, distribution="mine")
    assert [line.split()[0] for line in listed([one, other, find_recipe("gemma-2-2b-topk")])] == [
        "saekit:laptop", "mine:laptop", "gemma-2-2b-topk",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_those_of_saekit_mean_its_own_plugins_whatever_else_is_installed(name: str) -> None:
    manager = isolated_manager(builtins=True)
    needed = {"sae_architectures": SAEConfig, "optimizers": OptimizerConfig}
    for kind, registry in list(manager.registries.items()):
        bases = (needed.get(kind, object),)
        entries = [
            saekit.Entry(
                item.entry.name, attrs.make_class(f"Their{number}", {}, bases, frozen=True, kw_only=True), print
            )
            for number, item in enumerate(registry.items)
        ]
        manager.register(plugin_of(kind, *entries), name=kind, distribution="theirs")
    assert saekit.recipe(name, plugins=manager) == saekit.recipe(name)


def test_one_that_is_wrong_says_which(place: Path) -> None:
    module = plugin(place, "recipes_of_two", "[training]\nlrr = 1\n", "wrong")
    with pytest.raises(ConfigError, match=r"training.lrr: is not an option[^\n]*\nIn the recipe .*:wrong\.$"):
        saekit.recipe("wrong", plugins=isolated_manager(module, builtins=True))
    (place / "recipes_of_two/recipes/wrong.toml").write_text("lr = \n")
    with pytest.raises(ConfigError, match=r"the recipe .*:wrong \(.*wrong.toml\) is not valid TOML"):
        saekit.recipe("wrong", plugins=isolated_manager(module, builtins=True))
    (place / "recipes_of_two/recipes/wrong.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"the recipe .*:wrong cannot be read: 'utf-8'"):
        saekit.recipe("wrong", plugins=isolated_manager(module, builtins=True))


def test_a_recipe_can_be_changed_in_code() -> None:
    config = saekit.recipe("laptop", ["training.training_tokens=2_000_000"])
    assert attrs.evolve(config).training.training_tokens == 2_000_000
