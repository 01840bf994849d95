"""The command line: what it prints, how it fails, and what it does not import."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import warm
from support.command import cli
from support.tiny import RUN

import saekit
from saekit.config.files import dump_config
from saekit.dashboards.place import is_dashboard


@pytest.mark.parametrize(
    "command",
    ["", "train", "demo", "config", "plugins", "plan", "pretokenize", "cache", "cache verify"],
)
def test_help(command: str) -> None:
    assert "Usage: " in cli(*command.split(), "--help", watch=True).stdout


PARAMETERS = """
import json, typer
from saekit.cli import app

def commands(command, path):
    inner = getattr(command, "commands", {})
    texts = {parameter.name: getattr(parameter, "help", None) for parameter in command.params}
    yield path, texts, command.help, list(inner)
    for name, below in inner.items():
        yield from commands(below, [*path, name])

print(json.dumps(list(commands(typer.main.get_command(app), []))))
"""


def test_help_explains_every_command_argument_and_option() -> None:
    listed = warm.python("-c", PARAMETERS, watch=True)
    assert listed.returncode == 0, listed.stderr
    commands = json.loads(listed.stdout)
    assert ["cache", "write"] in [path for path, *_ in commands]
    assert {"config", "overrides", "axes", "run", "allow"} <= set(commands[1][1]), commands[1]
    for path, parameters, about, inner in commands:
        shown = cli(*path, "--help", watch=True).stdout
        words = " ".join(shown.split())
        assert " ".join(about.split()) in words, path
        assert set(inner) <= set(shown.split()), path
        for name, text in parameters.items():
            assert text, f"{path}: {name} has no help"
            assert " ".join(text.split()) in words, f"{path}: the help of {name} is not shown:\n{shown}"


def test_a_suggestion_is_made_once() -> None:
    said = cli("trian", check=2, watch=True).stderr
    assert said.count("Did you mean") + said.count("(Possible") == 1, said


def test_version() -> None:
    assert cli("--version", watch=True, cold=True).stdout == f"saekit {saekit.__version__}\n"


def test_config_prints_what_train_reads(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(cli("config", watch=True).stdout)
    full = cli("config", tmp_path / "run.toml", "sae.l1_coefficient=3", "--format", "json", watch=True).stdout
    assert json.loads(full)["sae"]["l1_coefficient"] == 3.0


def test_train(tmp_path: Path) -> None:
    config = saekit.load_config({name: dict(section) for name, section in RUN.items()})
    (tmp_path / "run.yaml").write_text(dump_config(config, "yaml"))
    options = ["sae.l1_coefficient=2", "checkpoints.name=x", "training.verbose=true"]
    found = cli("train", "run.yaml", *options, cwd=tmp_path, cold=True)  # which says what it imports
    assert "run folder: runs/x" in found.stdout
    assert "CE recovered" in found.stdout
    assert re.search(r"^see it again +saekit show runs/x$", found.stdout, re.M)
    assert "importing torch ..." in found.stderr
    assert saekit.SAE.load(tmp_path / "runs/x/sae").config.l1_coefficient == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "error: there is no configuration file nowhere.toml"),
        (["train", "bad.toml"], "training.lr: expected a number, found 'x'"),
        (["train", "bad.toml"], "error: bad.toml has 2 problems:"),
        (["train", "good.toml", "training.lr"], "is not an override"),
        (["train", "good.toml", "sae=gatd"], "Unknown SAE architecture 'gatd'"),
        (["config", "--format", "ini"], "must be toml, yaml or json, found 'ini'"),
        (["plugins", "cosin"], "there is no plugin 'cosin'. Did you mean 'cosine'"),
        (["plugins", "schedules:cosine"], "there is no kind of plugin 'schedules'. Did you mean 'lr_schedules'?"),
        (["plugins", "lr_schedules:cosin"], "Did you mean 'cosine'?"),
        (["trian"], "No such command 'trian'"),
        (["train"], "a configuration file is missing: saekit train run.toml, or saekit train --resume RUN"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.toml").write_text('[training]\nlr = "x"\nlrr = 1\n')
    (tmp_path / "good.toml").write_text('[sae]\nname = "standard"\n')
    found = cli(*arguments, cwd=tmp_path, check=2, watch=True)
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not found.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"bad.toml", "good.toml"}


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1/run.toml").write_text("[training]\nlr = 'x'\n")
    assert "training.lr: expected a number" in cli("plan", "lr=1/run.toml", cwd=tmp_path, check=2, watch=True).stderr
    found = cli("plan", "training.lr=fast", cwd=tmp_path, check=2, watch=True)
    assert "training.lr: expected a number, found 'fast'" in found.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    found = cli("--debug", "train", "nowhere.toml", cwd=tmp_path, check=1)
    assert "Traceback" in found.stderr
    assert "ConfigError" in found.stderr


def test_plugins() -> None:
    data = json.loads(cli("plugins", "--json", watch=True).stdout)
    by_key = {item["key"]: item for item in data["plugins"]}
    assert by_key["saekit:cosine"]["options"] == [
        {"name": "end", "type": "float or none", "required": False, "default": None,
         "doc": "The last rate.  None: a tenth of the peak."}
    ]  # fmt: skip
    builtin = {
        "relu", "tanh-relu", "constant", "cosineannealing", "cosine", "cosineannealingwarmrestarts", "cosine-restarts",
        "standard", "HookedTransformer", "HookedMamba", "live", "jsonl", "wandb", "sae_lens", "connor_rob_hook_z",
        "reconstruction",
    }  # fmt: skip
    assert {key.removeprefix("saekit:") for key in by_key} >= builtin
    assert data["failed"] == []
    text = cli("plugins", watch=True).stdout
    assert all(key in text for key in by_key)
    shown = cli("plugins", "sae_architecture:standard", watch=True).stdout
    assert "l1_coefficient: float (default 5.0)\n      λ, the weight of the sparsity penalty." in shown


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    short = ("training.training_tokens=20480", "training.train_batch_size_tokens=512", "training.lr_decay_steps=0")
    source = ("sae.l1_warm_up_steps=10", "activations.source.refill=needed", "dataset.context_size=64")
    found = cli("demo", *short, *source, "evals.n_contexts=8", "--folder", "out", cwd=tmp_path, cold=True)
    for words in ("explained variance", "L0", "CE recovered", "dead features", "promotes ", "«", "training curves "):
        assert words in found.stdout
    assert found.stdout.count("Feature ") == 5
    assert "tokens/s" in found.stderr
    for what in ("importing torch", "loading the model saekit/tiny-python", "measuring on held-out text",
                 "looking for features that are easy to read", "writing a dashboard of them"):  # fmt: skip
        assert f"{what} ...\n" in found.stderr
    (picture,) = tmp_path.glob("out/*/curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = cli("show", picture.parent).stdout
    (features,) = tmp_path.glob("out/*/features.txt")
    assert features.read_text().splitlines()[0] in shown
    wanted, printed = (
        [line.rstrip() for line in text.splitlines() if line] for text in (features.read_text(), found.stdout)
    )
    assert [line for line in printed if line in wanted] == wanted
    (folder,) = tmp_path.glob("out/*/sae")
    assert saekit.SAE.load(folder).d_sae == 1024
    (dashboard,) = tmp_path.glob("out/*/dashboard.html")
    assert re.search(rf"^open it in a browser +{re.escape(dashboard.as_uri())}$", found.stdout, re.MULTILINE)
    assert is_dashboard(dashboard)
