"""What somebody types first: help with examples, configurations without a file, plugins by their keys, the TAB key."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml
from support import warm
from support.command import cli
from support.every_config import config_of, manager

import saekit
from saekit.config import PretokenizeConfig, TrainConfig
from saekit.config.files import commented_toml, dump_config, load_config
from saekit.plugins.listing import found
from saekit.runs.sweep import spelled_out
from saekit.testing import fake_plugin, isolated_manager

COMMANDS = ["", "train", "demo", "config", "plugins", "plan", "pretokenize", "cache", "cache write", "cache verify"]


@pytest.mark.parametrize("command", COMMANDS)
def test_h_is_help_and_help_has_examples(command: str) -> None:
    shown = cli(*command.split(), "-h", watch=True).stdout
    assert shown == cli(*command.split(), "--help", watch=True).stdout
    examples = [shlex.split(line, comments=True) for line in re.findall(r"^ +(saekit .*)$", shown, re.M)]
    assert examples, shown
    for words in examples:
        name = command.split()[0] if command else words[1]
        assert words[:2] == ["saekit", name] or command == "pretokenize", "of this command, or what it is for"
        options = [word for word in words[2:] if "=" in word and not word.startswith("-")]
        if words[1] in ("train", "demo", "plan", "cache", "config") and "--grid" not in words:
            load_config({}, options)
        elif words[1] == "pretokenize":
            load_config({}, options, kind=PretokenizeConfig)


FORMS = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["train", "pretokenize"])
def test_config_of_every_job_in_every_format(tmp_path: Path, of: str, form: str) -> None:
    kind: Any = TrainConfig if of == "train" else PretokenizeConfig
    option = ["sae.name=topk"] if of == "train" else ["tokenizer=gpt2"]
    for given in ([], option, ["dataset.context_size=64", *option]):
        shown = cli("config", *given, "--of", of, "--format", form, watch=True).stdout
        table = FORMS[form](shown)
        expected = load_config({"folder": "contexts"} if of == "pretokenize" else {}, given, kind=kind)
        (tmp_path / f"x.{form}").write_text(shown)
        again = load_config(tmp_path / f"x.{form}", kind=kind)
        assert dump_config(again, "json", full=True) == dump_config(expected, "json", full=True)
        assert table["model"]["backend"]["forward_kwargs"] == {}, "all of it, plugins' options too"
    if of == "train":
        assert table["sae"]["name"] == "saekit:topk"
        assert "k" in table["sae"]


def test_config_explains_the_options_of_what_was_chosen() -> None:
    shown = cli("config", "sae.name=topk", "sae.k=7", "lr_schedule=cosine", watch=True).stdout
    assert 'name = "saekit:topk"\n' in shown
    assert re.search(r"^# .+\nk = 7$", shown, re.M), "with its explanation"
    assert '[lr_schedule]\nname = "saekit:cosine"\n' in shown
    assert "\n# end =\n" in shown, "an option that is not set"
    assert "l1_coefficient" not in shown, "which topk has not"


def test_config_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[sae]\nname = 'topk'\n")
    shown = cli("config", "run.toml", "sae.k=9", cwd=tmp_path, watch=True).stdout
    assert tomllib.loads(shown)["sae"]["k"] == 9
    where = cli("config", "hub_repo_id=a/b", "--of", "pretokenize", "--format", "json", watch=True).stdout
    assert json.loads(where)["folder"] is None, "nothing is written that nobody asked for"


@pytest.mark.parametrize("seed", range(30))
def test_commented_toml_means_the_configuration(tmp_path: Path, seed: int) -> None:
    """Whatever is set, by whatever plugin."""
    import random

    plugins = manager()
    config = load_config(config_of(TrainConfig, random.Random(seed)), plugins=plugins)
    (tmp_path / "x.toml").write_text(commented_toml(config, plugins=plugins), encoding="utf-8")
    again = load_config(tmp_path / "x.toml", plugins=plugins)
    assert spelled_out(again, plugins) == spelled_out(config, plugins)


@attrs.frozen(kw_only=True)
class Sometimes:
    """Options of a schedule."""

    size: int | None = 3
    """None is another thing than the default."""
    where: str | None = None
    """Here it is the default."""


def test_commented_toml_says_none_where_that_is_not_the_default(tmp_path: Path) -> None:
    plugins = isolated_manager(fake_plugin("lr_schedules", config=Sometimes), builtins=True)
    config = load_config({"lr_schedule": {"name": "fake", "size": None}}, plugins=plugins)
    text = commented_toml(config, plugins=plugins)
    assert "size = {none = true}\n" in text
    assert "# where =\n" in text
    (tmp_path / "x.toml").write_text(text)
    assert load_config(tmp_path / "x.toml", plugins=plugins).lr_schedule.options == Sometimes(size=None)


def test_plugins_by_their_keys() -> None:
    bare = cli("plugins", "topk", watch=True).stdout
    assert bare.startswith("saekit:topk: ")
    assert bare == cli("plugins", "saekit:topk", watch=True).stdout
    assert bare == cli("plugins", "sae_architectures:topk", watch=True).stdout
    assert json.loads(cli("plugins", "topk", "--json", watch=True).stdout)["key"] == "saekit:topk"
    of_a_kind = cli("plugins", "lr-schedule", watch=True).stdout
    assert of_a_kind.startswith("lr_schedules\n")
    assert "saekit:cosine " in of_a_kind
    assert "topk" not in of_a_kind


def test_a_key_of_several_plugins() -> None:
    plugins = isolated_manager(
        fake_plugin("lr_schedules", "both"), fake_plugin("trackers", "both"), fake_plugin("evals", "one")
    )
    assert found(plugins, "one").kind.name == "evals"
    with pytest.raises(
        saekit.SaekitError, match="several plugins have the key 'both'; name one: lr_schedules:both, tr"
    ):
        found(plugins, "both")
    assert found(plugins, "trackers:both").kind.name == found(plugins, "tracker:test:both").kind.name == "trackers"
    plugins.register(fake_plugin("evals", "one"), name="other", distribution="other")
    with pytest.raises(saekit.SaekitError, match="several .* name one: evals:test:one, evals:other:one"):
        found(plugins, "one")
    assert found(plugins, "other:one").distribution == "other"
    with pytest.raises(saekit.SaekitError, match="there is no plugin 'oen'. Did you mean 'one'"):
        found(plugins, "oen")


def test_train_without_anything_says_what_to_type(tmp_path: Path) -> None:
    said = cli("train", cwd=tmp_path, check=2, watch=True).stderr
    typed = re.findall(r"^  (saekit .*?)(?:  |;|$)", said, re.M)
    assert [words.split()[1] for words in typed] == ["demo", "config", "train"]
    assert not list(tmp_path.iterdir()), "nothing is trained that nobody described"


# ---- the TAB key


COMPLETE = """
import os, sys
from saekit.cli import main

sys.argv[0] = "saekit"
for shell in ("zsh", "fish"):
    os.environ["_SAEKIT_COMPLETE"] = f"complete_{shell}"
    try:
        main()
    except SystemExit:
        print("\\0", end="")
"""


def completed(words: str, cwd: Path) -> tuple[list[str], list[str]]:
    """What zsh and fish are given to complete ``words``, which the cursor is behind."""
    environment = os.environ | {"_TYPER_COMPLETE_ARGS": f"saekit {words}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    zsh, fish, rest = warm.python("-c", COMPLETE, env=environment, cwd=cwd, watch=True).stdout.split("\0")
    assert not rest
    quoted = re.findall(r'^(?:_arguments \'\*: :\(\()?"(.*?)"', zsh.replace(r"\\:", ":"), re.M)
    return quoted, [line.partition("\t")[0] for line in fish.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tr", ["train"]),
        ("train sae.d_s", ["sae.d_sae=", "sae.d_sae=none"]),
        ("train training.lr_", ["training.lr_warm_up_steps=", "training.lr_decay_steps="]),
        ("train training.seed", ["training.seed=", "training.seed=42"]),
        ("train training.kernels=", [f"training.kernels={way}" for way in ("auto", "fast", "int8", "reference")]),
        ("train model.compile=t", ["model.compile=true"]),
        ("train optimizer=", ["optimizer=adam", "optimizer=signum"]),
        ("train sae.name=top", ["sae.name=topk", "sae.name=topk_transcoder"]),
        ("train sae.name=topk sae.k", ["sae.k=", "sae.k_start=", "sae.k_warm_up_steps="]),
        ("train a", ["a.toml", "activations.source=", "activations.source.name="]),
        ("train a.toml lr_schedule.e", ["lr_schedule.end=", "lr_schedule.end=0.5"]),
        ("train bad.toml training.see", ["training.seed=", "training.seed=42"]),
        ("pretokenize tok", ["tokenizer=", "tokenizer=none"]),
        ("config --of pretokenize --format y", ["yaml"]),
        ("plugins cosine-", ["cosine-restarts"]),
        ("plugins optimizers:", ["optimizers:adam", "optimizers:signum"]),
        ("train nothing.of_this", []),
    ],
)
def test_completion(tmp_path: Path, words: str, expected: list[str]) -> None:
    (tmp_path / "a.toml").write_text("lr_schedule = {name = 'cosine', end = 0.5}")
    (tmp_path / "bad.toml").write_text("nonsense = 1")
    for offered in completed(words, tmp_path):
        assert offered[: len(expected) or None] == expected


def test_bash_completes_by_the_script_that_is_shown(tmp_path: Path) -> None:
    """It takes the ``=`` for a word of its own, and ends no word behind it."""
    program = tmp_path / "saekit"
    code = f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'saekit'\nfrom saekit.cli import main\nmain()\n"
    program.write_text(code)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(
        [program, "--show-completion", "bash"], capture_output=True, text=True, check=True,
        env=environment | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    ).stdout  # fmt: skip

    def typed(*words: str) -> list[str]:
        line = " ".join(map(shlex.quote, words))
        script = f"{shown}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n_saekit_completion saekit\n"
        script += 'printf "%s\\n" "${COMPREPLY[@]}"'
        return subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        ).stdout.split()

    assert typed("saekit", "pl") == ["plugins", "plan"]
    assert typed("saekit", "train", "sae.d_s") == ["sae.d_sae=", "sae.d_sae=none"]
    assert typed("saekit", "train", "sae.name", "=", "topk", "sae.k_") == [
        "sae.k_start=",
        "sae.k_warm_up_steps=",
        "sae.k_aux=",
    ]
    architectures = typed("saekit", "train", "sae", "=")
    assert typed("saekit", "train", "sae.name", "=") == architectures
    assert "topk" in architectures
    assert typed("saekit", "train", "optimizer", "=", "s") == ["signum"]


def test_the_names_of_saekit_are_the_public_ones() -> None:
    names = dir(saekit)
    assert {"train", "load_model", "top_texts", "SAE"} <= set(names)
    assert [name for name in names if name.startswith("_")] == ["__version__"]
    modules = {name: found.__name__ for name in names if type(found := getattr(saekit, name)).__name__ == "module"}
    assert modules == {name: f"saekit.{name}" for name in modules}, "its own packages alone"
    assert {"pretrained", "toy"} <= modules.keys()
    assert not modules.keys() & {"commands", "cli", "garbage"}


def test_a_configuration_is_shown_by_what_is_changed() -> None:
    assert repr(TrainConfig()) == "TrainConfig()"
    config = load_config({"sae": "topk", "training": {"lr": 0.1}, "evals": {"run": []}, "inputs": [{"hook_name": "x"}]})
    assert repr(config) == (
        "TrainConfig(inputs=(Site(hook_name='x'),), sae='saekit:topk', training=TrainingConfig(lr=0.1), "
        "evals=EvalsConfig(run=()))"
    )
    assert repr(PretokenizeConfig(folder="x")) == "PretokenizeConfig(folder='x')"
    for field in attrs.fields(TrainConfig):
        assert len(repr(getattr(TrainConfig(), field.name))) < 70, field.name
