"""What can be together in a sweep, and under what names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import Changes, changed, fake, kept, manager, train

import saekit
from saekit.errors import ConfigError
from saekit.runs.folder import check_run_folder
from saekit.runs.sweep import changed_options, member_names, short_names

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"model": {"dtype": "bfloat16"}}, {}, {"model.dtype"}),
        ({"model": {"name": "x", "autocast": True}}, {}, {"model.name", "model.autocast"}),
        ({"model": {"backend": "test:fake"}}, {"model": {"backend": "HookedTransformer"}}, {"model.backend"}),
        ({"dataset": {"path": "x"}}, {}, {"dataset.path"}),
        ({"dataset": {"context_size": 8}}, {}, {"dataset.context_size"}),
        ({"evals": {"split": "heldout"}}, {}, {"evals.split"}),
        ({"evals": {"held_out_every": 5}}, {}, {"evals.held_out_every"}),
        ({"checkpoints": {"n_checkpoints": 3}}, {}, {"checkpoints.n_checkpoints"}),
        ({"checkpoints": {"folder": "elsewhere"}}, {}, {"checkpoints.folder"}),
    ],
    ids=lambda value: str(sorted(value)),  # sets have no order of their own
)
def test_what_cannot_be_together_is_refused_by_name(
    tmp_path: Path, one: Changes, other: Changes, named: set[str]
) -> None:
    base = fake(tmp_path / "runs")
    with pytest.raises(ConfigError, match="differs between SAEs that are to be trained together") as caught:
        train([base, changed(base, one), changed(base, other), changed(base, one)])
    options_of_another_backend = ("model.backend.",)
    assert {path for path, _ in caught.value.problems if not path.startswith(options_of_another_backend)} == named
    assert not list(tmp_path.iterdir())


def test_a_plugin_by_its_key_is_the_plugin_with_its_defaults(tmp_path: Path) -> None:
    one = fake(tmp_path, lr_schedule={"name": "constant"})
    other = changed(one, {"model": {"backend": {"name": "test:fake"}}}) | {"lr_schedule": "constant"}
    found = [saekit.load_config(config, plugins=manager()) for config in (one, other)]
    assert found[0] != found[1]
    assert changed_options(found, manager()) == [{}, {}]
    result = train(found)
    assert [row["name"] for row in result.summary] == ["0", "1"]
    assert kept(result.results["0"].folder) == kept(result.results["1"].folder)


def test_a_list_without_configurations() -> None:
    for empty in ([], ()):
        with pytest.raises(ConfigError, match="there is no configuration to train: the list is empty"):
            saekit.train(empty)


def test_a_list_of_one_is_a_sweep_of_one(tmp_path: Path) -> None:
    result = train([fake(tmp_path, checkpoints={"name": "only"})])
    assert result.folder == tmp_path / "only"
    assert list(result.results) == ["0"]
    assert (tmp_path / "only/0/sae/cfg.json").is_file()
    assert not result.diverged


def names(*changes: Changes, base: Mapping[str, Any] | None = None) -> tuple[str | None, list[str]]:
    plugins = saekit.default_manager()
    configs = [saekit.load_config(changed(base or {}, one), plugins=plugins) for one in changes]
    return member_names(configs, plugins)


def test_folders_are_named_after_what_differs() -> None:
    sae = {"name": "standard"}
    assert names({"sae": sae | {"l1_coefficient": 1}}, {"sae": sae | {"l1_coefficient": 0.5, "d_sae": 64}}) == (
        None, ["0_d_sae=None_l1_coefficient=1", "1_d_sae=64_l1_coefficient=0.5"]
    )  # fmt: skip
    assert names({}, {}, {}) == (None, ["0", "1", "2"]), "the same again"
    assert names(*[{}] * 11)[1][:2] == ["00", "01"], "in order in any listing"
    assert names({}, {"lr_schedule": {"name": "cosine", "end": 1e-5}})[1] == [
        "0_lr_schedule=saekit-constant", "1_lr_schedule=saekit-cosine_end=1e-05"
    ]  # fmt: skip
    assert names({"evals": {"run": []}}, {})[1] == ["0_run=", "1_run=-saekit-reconstruction-saekit-downstream"]


def test_of_another_architecture_only_what_was_chosen_names_the_folder() -> None:
    kinds = ("standard", "topk", "batchtopk", "jumprelu")
    assert names(*({"sae": {"name": kind, "d_sae": 64}} for kind in kinds))[1] == [
        f"{number}_sae=saekit-{kind}" for number, kind in enumerate(kinds)
    ]
    chosen = names({"sae": {"name": "topk", "k": 8}}, {"sae": {"name": "jumprelu", "l0_coefficient": 2}})[1]
    assert chosen == ["0_sae=saekit-topk_k=8", "1_sae=saekit-jumprelu_l0_coefficient=2"]
    alike = names({"sae": {"name": "topk", "k": 8}}, {"sae": {"name": "topk"}})[1]
    assert alike == ["0_k=8", "1_k=32"], "a default is told where the plugin is the same"


def test_of_another_architecture_only_what_was_chosen_is_told() -> None:
    plugins = saekit.default_manager()

    def told(*saes: Mapping[str, Any]) -> list[dict[str, Any]]:
        return changed_options([saekit.load_config({"sae": dict(sae)}, plugins=plugins) for sae in saes], plugins)

    kinds = ("topk", "batchtopk", "jumprelu")
    assert told(*({"name": kind} for kind in kinds)) == [{"sae": f"saekit:{kind}"} for kind in kinds]
    assert told({"name": "topk", "k": 8}, {"name": "batchtopk"}, {"name": "jumprelu"}) == [
        {"sae": "saekit:topk", "sae.k": 8}, {"sae": "saekit:batchtopk", "sae.k": 32},
        {"sae": "saekit:jumprelu", "sae.k": None},
    ], "a default beside what is none"  # fmt: skip


def test_no_option_is_cut_in_the_middle() -> None:
    many = {"l1_coefficient": 1.25, "l1_warm_up_steps": 12345, "noise_scale": 0.125, "decoder_orthogonal_init": True,
            "expansion_factor": 16, "apply_b_dec_to_input": False}  # fmt: skip
    first = names({"sae": {"name": "standard", **many}}, {"sae": {"name": "standard"}})[1][0]
    assert len(first) <= 100
    told = [f"{name}={value}" for name, value in many.items()]
    assert sum(option in first for option in told) >= 3
    left = first.removeprefix("0")
    for option in told:
        left = left.replace(f"_{option}", "")
    assert not left, "whole options and nothing else"


def test_options_of_one_name_are_told_apart() -> None:
    source = {"activations": {"source": {"name": "live", "dtype": "float16"}}}
    assert names({"sae": {"name": "standard", "dtype": "float64"}}, source)[1] == [
        "0_source.dtype=None_sae.dtype=float64", "1_source.dtype=float16_sae.dtype=float32"
    ]  # fmt: skip
    assert short_names(["a.b.c", "x.b.c", "d", "e.d", "f"]) == {
        "a.b.c": "a.b.c", "x.b.c": "x.b.c", "d": "d", "e.d": "e.d", "f": "f"
    }  # fmt: skip


@given(
    paths=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150),
                   min_size=2, max_size=3),
)  # fmt: skip
@settings(max_examples=40)
def test_names_that_every_file_system_takes(paths: list[str]) -> None:
    found = names(*({"training": {"from_pretrained_path": path}} for path in paths))[1]
    assert len({name.casefold() for name in found}) == len(paths)
    for name in found:
        assert name.isascii()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=+-")
        assert len(name) <= 100
        assert not name.endswith((".", "-"))


def test_given_names_name_the_saes(tmp_path: Path) -> None:
    checkpoints = [{"checkpoints": {"name": name}} for name in ("small", "läuft=1.5")]
    assert names(*checkpoints) == (None, ["small", "läuft=1.5"])
    assert names(*[{"checkpoints": {"name": "all"}}] * 2) == ("all", ["0", "1"])
    result = train([changed(fake(tmp_path), one) for one in checkpoints])
    assert sorted(path.name for path in result.folder.iterdir() if path.is_dir()) == [
        "checkpoints",
        "läuft=1.5",
        "small",
    ]
    assert result.folder.parent == tmp_path
    assert "checkpoints.name" not in result.summary[0]
    with pytest.raises(ConfigError, match="all exists already"):
        (tmp_path / "all").mkdir()
        train([fake(tmp_path, checkpoints={"name": "all"})] * 2)


@pytest.mark.parametrize(
    "name", ["checkpoints", "run.json", "summary.csv", "summary.png", "a/b", "..", ".x", "a b", "x" * 250]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="checkpoints.name: names a folder in that of the sweep, which .* cannot"):
        names({"checkpoints": {"name": "fine"}}, {"checkpoints": {"name": name}})


@pytest.mark.parametrize("given_names", [("a", None), ("a", "b", "a"), (None, "a", "b")])
def test_names_that_are_neither_one_nor_all_different(given_names: tuple[str | None, ...]) -> None:
    with pytest.raises(ConfigError, match="must be the same for all, to name the sweep, or different for all"):
        names(*({"checkpoints": {"name": name}} for name in given_names))


def test_what_is_in_the_place_of_a_run_folder_is_said(tmp_path: Path) -> None:
    for name in ("empty", "notes", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, told in (
        ("empty", f"the folder {tmp_path}/empty exists already. It is empty, and a run makes its own, so that no other "
                  "takes it; choose another name, or remove it"),
        ("notes", f"the folder {tmp_path}/notes exists already, and is no run's: it holds a.txt; choose another"),
        ("run", f"the run folder {tmp_path}/run exists already; choose another name, or remove it"),
        ("file", f"{tmp_path}/file exists already, and is a file, not a folder; choose"),
        ("link", f"{tmp_path}/link exists already, and is a link, not a folder; choose"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"checkpoints.name: {re.escape(told)}"):
            check_run_folder(saekit.load_config({"checkpoints": {"folder": str(tmp_path)}}), name)
