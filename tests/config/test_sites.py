"""The sites that a configuration names."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

import saekit
from saekit import Site, Sites
from saekit.config.files import commented_toml
from saekit.errors import ConfigError

A, B, HEAD = Site(hook_name="a"), Site(hook_name="b"), Site(hook_name="a", hook_head_index=2)
TABLES = {"a": {"hook_name": "a"}, "b": {"hook_name": "b"}, "head": {"hook_name": "a", "hook_head_index": 2}}


def test_one_site_is_both() -> None:
    config = saekit.load_config({"site": TABLES["a"]})
    assert config.sites == Sites.one(A)
    assert (config.sites.inputs, config.sites.targets) == ((A,), (A,))
    assert config.sites.same
    assert config.sites.name == "a"


def test_several_are_named_in_order() -> None:
    config = saekit.load_config({"inputs": [TABLES["b"], TABLES["a"]]})
    assert config.sites == Sites((B, A), (B, A))
    assert config.sites.name == "b+a"
    other = saekit.load_config({"inputs": [TABLES["b"], TABLES["head"]], "targets": [TABLES["a"], TABLES["b"]]})
    assert not other.sites.same
    assert other.sites.all == (B, HEAD, A)
    assert other.sites.name == "b+a.head2-to-a+b"
    for written in (config, other):
        assert saekit.load_config(tomllib.loads(saekit.dump_config(written))) == written
    given = saekit.load_config({}, ["inputs=[{hook_name='b'}]", "targets=[{hook_name='a'}]"])
    assert given.sites == Sites((B,), (A,))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"targets": [TABLES["b"]]}, "targets: names what is to be given, b, and nothing names what is read"),
        ({"site": TABLES["a"], "inputs": [TABLES["b"]]}, "site: is a, beside inputs = b, which are all that is read"),
        ({"site": {}, "inputs": [TABLES["b"]]}, "^site: is given beside inputs, which takes its place; leave out one"),
        ({"site": Site(), "inputs": [B]}, "^site: is given beside inputs, which takes its place; leave out one of the"),
        ({"inputs": [TABLES["b"], TABLES["b"]]}, "inputs: names b twice"),
        ({"inputs": [TABLES["b"]], "targets": [TABLES["a"], TABLES["a"]]}, "targets: names a twice"),
        ({"inputs": [TABLES["a"], TABLES["head"]]}, "inputs: has a.head2, which is a part of a, a target, too"),
        (
            {"inputs": [TABLES["b"]], "targets": [TABLES["head"], TABLES["a"]]},
            "targets: has a.head2, which is a part of a, a target, too: leave out one of them",
        ),
        ({"inputs": [TABLES["head"]], "targets": [{"hook_name": "a.head2"}]}, "targets: names a.head2 twice"),
        ({"inputs": TABLES["a"]}, "inputs: expected a list"),
        ({"inputs": [{"hook_nam": "a"}]}, r"inputs\[0\].hook_nam"),
    ],
)
def test_mistakes(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        saekit.load_config(table)


def test_what_is_only_read_may_overlap() -> None:
    config = saekit.load_config({"inputs": [TABLES["a"], TABLES["head"]], "targets": [TABLES["b"]]})
    assert config.sites == Sites((A, HEAD), (B,))


def test_sites_are_an_axis() -> None:
    configs = saekit.grid({}, {"inputs": [[TABLES["a"]], [TABLES["b"], TABLES["head"]]], "training.lr": [1e-3]})
    assert [config.sites.name for config in configs] == ["a", "b+a.head2"]


def test_inputs_take_the_place_of_a_site_that_nobody_chose() -> None:
    """The default of a file that has all options, or of a configuration that was loaded, is no choice."""
    for base in (tomllib.loads(commented_toml()), saekit.load_config({})):
        assert saekit.load_config(base, ["inputs=[{hook_name='b'}]"]).sites == Sites.one(B)
        assert saekit.grid(base, {"inputs": [[TABLES["b"]]]})[0].sites == Sites.one(B)
    for chosen in ({"site": TABLES["a"]}, saekit.load_config({"site": TABLES["a"]})):
        with pytest.raises(ConfigError, match="site: is a, beside inputs = b, which are all that is read"):
            saekit.load_config(chosen, ["inputs=[{hook_name='b'}]"])
    for changes in (["inputs=[{hook_name='b'}]", f"site.hook_name={Site().hook_name}"], ["site.hook_name=a"]):
        with pytest.raises(ConfigError, match="^site: .* inputs"):
            saekit.load_config({"inputs": [TABLES["b"]]}, changes)


def test_a_configuration_with_inputs_can_be_changed() -> None:
    config = saekit.load_config({"inputs": [TABLES["b"]]})
    assert saekit.load_config(config, ["training.seed=3"]).sites == Sites.one(B)
    assert saekit.load_config(config) == config
    (one, other) = saekit.grid(config, {"inputs": [[TABLES["a"]], []]})
    assert (one.sites, other.sites) == (Sites.one(A), Sites.one(Site()))


def test_no_site_is_written_beside_inputs() -> None:
    config = saekit.load_config({"inputs": [TABLES["b"]]})
    for form in ("toml", "yaml", "json"):
        assert "site" not in saekit.dump_config(config, form).replace("sites", "")
    assert "[site]" in saekit.dump_config(saekit.load_config({}))


@pytest.mark.parametrize(
    ("site", "shape"), [(Site(), (2, 3, 4)), (Site(hook_head_index=1), (2, 3, 2, 4)), (Site(), (2, 3, 2, 2))]
)
def test_positions_that_are_left_out_stay_bit_for_bit(site: Site, shape: tuple[int, ...]) -> None:
    import torch

    held = torch.randn(shape)
    held[0, 0] = float("nan")  # arithmetic with it would show
    kept = torch.tensor([[False, True, True], [True, False, True]])
    given = torch.full_like(site.extract(held), 7)
    replaced = site.extract(site.replace(held, given, kept))
    bits = [values[~kept].contiguous().view(torch.int32) for values in (replaced, site.extract(held))]
    assert torch.equal(*bits)
    assert (replaced[kept] == 7).all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"inputs": ["a", TABLES["b"]]},
            "inputs[0]: expected a table of options such as {hook_name = \"a\"}, found 'a'",
        ),
        ({"site": "a"}, "site: expected a table of options such as {hook_name = \"a\"}, found 'a'"),
        (
            {"activations": {"cache": {"sites": ["a"]}}},
            'sites[0]: expected a table of options such as {hook_name = "a"}',
        ),
        ({"site": 5}, "site: expected a table of options, found 5"),
        ({"training": "fast"}, "training: expected a table of options, found 'fast'"),
    ],
)
def test_a_bare_name_is_shown_as_a_table(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        saekit.load_config(table)
    assert message in str(error.value)
