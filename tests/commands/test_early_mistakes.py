"""Mistakes that need no torch are found before it is imported, all of them at once, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.installed import project, written
from support.tiny import run_config

import saekit
from saekit import ConfigError, DataError, ModelError, SaekitError
from saekit.commands import preflight
from saekit.errors import MissingPackageError, PlaceError, PluginError, PluginFailedError, SAEFormatError
from saekit.plugins.manager import PluginManager

HEAVY = ("torch", "datasets", "transformers", "transformer_lens", "mamba_lens", "wandb", "matplotlib")
RUN_ALL = """
import contextlib, functools, io, json, sys, typer.main
from saekit.cli import main

typer.main.get_command = functools.cache(typer.main.get_command)  # which is the same for all of them

def run(arguments):
    sys.argv = ["saekit", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return [code, out.getvalue() + err.getvalue(), sorted(set(HEAVY) & set(sys.modules))]

HEAVY = json.loads(sys.argv[1])
print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
"""
NOT_THERE = "'./nowhere'"
CACHED = """'activations.source={name="cached", folder="nowhere"}'"""
NEEDED = """'trackers=["needy"]'"""
TWICE = """'trackers=["jsonl", "jsonl"]'"""
NO_TEXT = f"there is no file or folder {NOT_THERE} (dataset.path)"
NO_MODEL = f"there is no model folder {NOT_THERE} (model.name)"
NO_CACHE = "the activation cache 'nowhere' is not there. `saekit cache run.toml` writes one"
NO_FOLDER = "Not a directory: "
TAKEN = (
    "checkpoints.name: the folder runs/taken exists already. It is empty, and a run makes its own, so that no other "
    "takes it; choose another name, or remove it"
)

# The command, its exit code, and what it must say.
MISTAKES: list[tuple[str, int, str]] = [
    ("train nowhere.toml", 2, "there is no configuration file nowhere.toml"),
    ("train --resume nowhere", 2, "there is no folder nowhere; a run prints the name of its folder when it ends"),
    ("train --resume runs", 2, "runs is not a run folder: there is no run.json in it. It holds the runs done"),
    ("train --resume file", 2, "file is not a run folder: there is no run.json in it"),
    ("train --resume torn", 2, "torn/run.json cannot be read"),
    ("train --resume runs/done", 2, "the run in runs/done is finished. To train it longer, raise"),
    ("train --resume runs/done x=y", 2, "x: is not an option"),
    ("train --resume runs/done training.lr=1", 2, "To change it all the same: --allow training.lr"),
    ("train --resume runs/done --allow training.lr", 2, "allowed to change, but the same as before: training.lr"),
    ("train --allow training.lr", 2, "a configuration file is missing"),
    ("train run.toml --allow training.lr", 2, "--allow goes with --resume"),
    ("train run.toml dataset.path=./nowhere", 2, NO_TEXT),
    ("train run.toml dataset.path=data/books/nowhere", 2, "no file or folder 'data/books/nowhere' (dataset.path)"),
    ("train run.toml dataset.path=nowhere.jsonl", 2, "no file or folder 'nowhere.jsonl' (dataset.path)"),
    ("train run.toml dataset.path=run.toml", 2, "run.toml is not a dataset: the name must end in"),
    ("train run.toml dataset.split=tset", 2, "saekit/python-stdlib has no split 'tset'"),
    ("train run.toml evals.split=tset", 2, "saekit/python-stdlib has no split 'tset'"),
    ("train run.toml model.name=./nowhere", 2, NO_MODEL),
    ("train run.toml model.name=runs", 2, "runs is not a model folder: it has neither config.json nor"),
    ("train run.toml model.backend=HookedMamba model.name=./nowhere", 2, NO_MODEL),
    ("train run.toml checkpoints.name=taken", 2, TAKEN),
    ("train run.toml checkpoints.name=taken --grid sae.l1_coefficient=1,2", 2, TAKEN),
    ("train run.toml checkpoints.folder=file", 2, "cannot make a run folder in file: "),
    ("train run.toml checkpoints.folder=file/runs", 2, NO_FOLDER),
    ("train run.toml checkpoints.name=../x", 2, "'../x' is a path, not the name of one folder"),
    ("train run.toml --grid training.lr", 2, "'training.lr' is not an axis of a grid"),
    ("train run.toml --resume runs --grid training.lr=1,2", 2, "--grid starts a new run, and --resume goes on with"),
    ("train --bogus", 2, "No such option: --bogus"),
    ("train torn", 2, "there is no configuration file torn"),
    ("train binary.toml", 2, "binary.toml is not valid TOML"),
    (f"train run.toml {CACHED}", 2, NO_CACHE),
    (f"train run.toml {CACHED.replace('nowhere', 'runs')}", 2, "'runs' has no manifest.json"),
    ("train run.toml training.from_pretrained_path=nowhere", 2, "nowhere is not there (training.from_pretrained_path)"),
    ("train run.toml training.from_pretrained_path=file", 2, "is a file, not a folder (training.from_pretrained_path)"),
    (f"train run.toml {NEEDED}", 2, "tracker 'needy:needy' needs surely_missing, not installed here. Install"),
    (f"train run.toml {TWICE}", 2, "trackers: names a plugin twice: saekit:jsonl, saekit:jsonl"),
    ("train run.toml model.name=./nowhere --grid training.lr=1,2", 2, NO_MODEL),
    ("demo model.name=./nowhere", 2, NO_MODEL),
    ("demo --folder file", 2, NO_FOLDER),
    ("demo evals.run=[]", 2, "evals.run: the demo shows what saekit:downstream and saekit:reconstruction finds"),
    ("plan nowhere.toml", 2, "there is no configuration file nowhere.toml"),
    ("plan run.toml dataset.path=./nowhere", 2, f"problem: {NO_TEXT}"),
    ("plan run.toml dataset.path=./nowhere --json", 2, f'"{NO_TEXT}"'),
    ("plan run.toml model.name=./nowhere", 2, f"problem: {NO_MODEL}"),
    ("plan run.toml checkpoints.folder", 2, "'checkpoints.folder' is not an override"),
    ("cache nowhere.toml", 2, "there is no configuration file nowhere.toml"),
    ("cache run.toml dataset.path=./nowhere", 2, NO_TEXT),
    ("cache run.toml model.name=./nowhere", 2, NO_MODEL),
    ("cache run.toml activations.cache.folder=runs", 2, "'runs' is no activation cache and holds done, taken"),
    ("cache run.toml activations.cache.folder=file", 2, "cannot write the activation cache 'file': "),
    ("cache run.toml activations.cache.folder=torn", 2, "torn/manifest.json cannot be read"),
    ("cache verify nowhere", 2, NO_CACHE),
    ("cache verify file", 2, "the activation cache 'file' is not there"),
    ("cache verify torn", 2, "torn/manifest.json cannot be read"),
    ("cache verify", 2, "Missing argument"),
    ("pretokenize folder=runs", 2, "folder: 'runs' exists already; choose another, or remove it"),
    ("pretokenize folder=file/new", 2, "cannot write the contexts to 'file/new': "),
    ("pretokenize folder=new dataset.path=./nowhere", 2, NO_TEXT),
    ("pretokenize folder=new model.name=./nowhere", 2, NO_MODEL),
    ("pretokenize folder=new tokenizer=./nowhere", 2, f"the tokenizer {NOT_THERE} cannot be loaded: there is no such"),
    ("pretokenize hub_repo_id=bad", 2, "hub_repo_id: must be owner/name, found 'bad'"),
    ("pretokenize run.toml", 2, "checkpoints: is not an option"),
    ("export neuronpedia nowhere", 2, "there is no folder 'nowhere'. Name a feature store, or a run"),
    ("export delphi runs/done", 2, "there are no features of 'runs/done' yet: collect them first"),
    ("export list gpt2-small --features 1", 2, "neuronpedia_id: must be MODEL/LAYER-SET, such as gpt2-small/8-res-jb"),
    ("dashboard runs/nowhere", 2, "there is no file or folder runs/nowhere, and no release of that name"),
    ("dashboard runs/nowhere --serve", 2, "there is no file or folder runs/nowhere, and no release of that name"),
    ("features runs/nowhere", 2, "there is no file or folder runs/nowhere, and no release of that name"),
    ("features runs/done --dataset ./nowhere", 2, NO_TEXT),
    ("dashboard runs/done --dataset ./nowhere", 2, NO_TEXT),
    ("statistics runs/nowhere", 2, "there is no file or folder runs/nowhere, and no release of that name"),
    ("statistics runs/done --out foo.xlsx", 2, "a table is written as .csv or .parquet, found 'foo.xlsx'"),
    ("tsea runs/nowhere", 2, "there is no file or folder runs/nowhere, and no release of that name"),
    ("tsea runs/done --sets nope", 2, "'nope' is neither a file nor one of first_letter"),
    ("tsea runs/done --regex 'a=('", 2, "'a' is no regular expression"),
    ("config nowhere.toml", 2, "there is no configuration file nowhere.toml"),
    ("config --of nowhere", 2, "--of: must be train or pretokenize, found 'nowhere'"),
    ("config --format nowhere", 2, "--format: must be toml, yaml or json, found 'nowhere'"),
    ("plugins nowhere", 2, "there is no plugin 'nowhere'"),
    ("plugins nowhere:relu", 2, "there is no kind of plugin 'nowhere'"),
    ("plugins activation_functions:nowhere", 2, "Unknown activation function 'nowhere'"),
    ("nowhere", 2, "No such command 'nowhere'"),
]
if Path("/proc/self").exists():  # where not even root may make a folder, whatever its permissions say
    MISTAKES += [
        ("train run.toml checkpoints.folder=/proc/x", 2, "cannot make a run folder in /proc/x: "),
        ("cache run.toml activations.cache.folder=/proc/x", 2, "cannot write the activation cache '/proc/x': "),
        ("pretokenize folder=/proc/x", 2, "cannot write the contexts to '/proc/x': "),
    ]
SEVERAL = (
    f"train run.toml dataset.path=./nowhere model.name=./nowhere checkpoints.name=taken {CACHED} "
    f"training.from_pretrained_path=nowhere {NEEDED}"
)
NEEDY = """
import attrs, saekit

@attrs.frozen(kw_only=True)
class Needy:
    pass

def build(config, *, run):
    raise AssertionError

@saekit.hookimpl
def saekit_register_trackers():
    yield saekit.Entry("needy", Needy, build, requires=["surely_missing"])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """What each command exits with and says, and what is imported by then, in one process for all of them."""
    home = tmp_path_factory.mktemp("mistakes")
    written(project(home / "source", "needy", {"needy.py": NEEDY}, needy="needy"), home / "installed")
    work = home / "work"
    (work / "runs/taken").mkdir(parents=True)
    (work / "torn").mkdir()
    for name in ("manifest.json", "run.json"):
        (work / "torn" / name).write_text("{")
    (work / "binary.toml").write_bytes(b"\xff\xfe")
    (work / "file").write_text("")
    saekit.train(run_config(work / "runs", checkpoints={"name": "done"}, evals={"run": []}))
    (work / "run.toml").write_text("[checkpoints]\nfolder = 'runs'\n")
    before = _contents(work)
    commands = [command for command, _, _ in MISTAKES] + [SEVERAL]
    ran = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(HEAVY)],
        input=json.dumps([shlex.split(command) for command in commands]),
        capture_output=True, text=True, cwd=work, env=_environment(home / "installed"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert _contents(work) == before, "nothing is written"
    return dict(zip(commands, map(tuple, json.loads(ran.stdout)), strict=True))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _environment(*folders: Path) -> dict[str, str]:
    """With the distributions in ``folders`` installed."""
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.mark.parametrize(("command", "code", "words"), MISTAKES)
def test_a_mistake_is_found_without_torch(
    found: dict[str, tuple[int, str, list[str]]], command: str, code: int, words: str
) -> None:
    exit_code, said, imported = found[command]
    assert words in said
    assert exit_code == code, said
    assert imported == []
    assert "Traceback" not in said
    assert said.count(words) == 1, "once"


def test_several_are_reported_together(found: dict[str, tuple[int, str, list[str]]]) -> None:
    code, said, imported = found[SEVERAL]
    assert said.splitlines() == [
        "error: the run has 6 problems:",
        f"  - {NO_TEXT}",
        f"  - {NO_MODEL}",
        f"  - {TAKEN}",
        f"  - {NO_CACHE}",
        "  - tracker 'needy:needy' needs surely_missing, not installed here. "
        "Install it with: pip install surely_missing",
        "  - the SAE folder nowhere is not there (training.from_pretrained_path)",
    ]
    assert (code, imported) == (2, [])


def test_that_nothing_is_there_is_seen_without_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PluginManager, "__init__", lambda self: pytest.fail("plugins are looked for"))
    with pytest.raises(ConfigError, match="there is no configuration file"):
        saekit.load_config(tmp_path / "nowhere.toml")
    code = "import sys; from saekit.cli import main; sys.argv[1:] = ['train', '--resume', 'nowhere']\ntry: main()\n"
    code += "finally: print(sorted({'saekit.config', 'saekit.plugins.manager', 'attrs'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "[]\n"), ran.stderr


FROM_CODE = """
import json, sys
import saekit

def fails(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except saekit.SaekitError as error:
        return f"{type(error).__name__}: {error}"

no_text = {"dataset": {"path": "./nowhere"}}
found = [
    fails(saekit.train, no_text),
    fails(saekit.train, [no_text, no_text]),
    fails(saekit.train, []),
    fails(saekit.train, [{}, {"model": {"dtype": "float64"}}]),
    fails(saekit.resume, "nowhere"),
    fails(saekit.cache_activations, no_text),
    fails(saekit.pretokenize, no_text | {"folder": "new"}),
    f"Plan: {saekit.plan(no_text).problems}",
]
json.dump([found, sorted({"torch", "datasets", "transformers", "transformer_lens"} & set(sys.modules))], sys.stdout)
"""


def test_from_code_too(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", FROM_CODE], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found, imported = json.loads(ran.stdout)
    assert found == [
        f"DataError: {NO_TEXT}",
        f"DataError: {NO_TEXT}",
        "ConfigError: there is no configuration to train: the list is empty",
        "ConfigError: model.dtype: differs between SAEs that are to be trained together ('float32' and 'float64'); "
        "train them in runs of their own",
        "PlaceError: there is no folder nowhere; a run prints the name of its folder when it ends",
        f"DataError: {NO_TEXT}",
        f"DataError: {NO_TEXT}",
        f'Plan: ["{NO_TEXT}"]',
    ]
    assert imported == []


def test_a_plan_says_early_faults_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    config = run_config(tmp_path, checkpoints={"name": "taken"}, sae={"d_in": 5}, evals={"split": "tset"})
    problems = saekit.plan(config).problems
    assert [problem.partition(":")[0] for problem in problems] == [
        "checkpoints.name", "saekit/python-stdlib has no split 'tset'; it has 'train', 'heldout' and 'all'", "sae.d_in",
    ]  # fmt: skip


# ---- plugins


@attrs.frozen(kw_only=True)
class Options:
    folder: str = "nowhere"


def manager(precheck: Callable[[Any, Any], object], kind: str = "trackers", **more: Any) -> PluginManager:
    """The installed plugins, and one that is never built."""

    class Plugin:
        pass

    def entries() -> list[saekit.Entry]:
        return [saekit.Entry("strange", Options, lambda *_, **__: pytest.fail("built"), precheck=precheck, **more)]

    hook = f"saekit_register_{kind}"
    entries.__name__ = hook
    setattr(Plugin, hook, staticmethod(saekit.hookimpl(entries)))
    plugins = PluginManager()
    plugins.register(Plugin, name="strange", distribution="stranger")
    return plugins


def test_a_plugin_takes_part(tmp_path: Path) -> None:
    seen: list[Any] = []

    def precheck(options: Options, whole: saekit.TrainConfig) -> None:
        seen.append((options, whole.checkpoints.name))
        raise DataError(f"there is no {options.folder}")

    plugins = manager(precheck)
    config = run_config(tmp_path, checkpoints={"name": "run"}) | {"trackers": [{"name": "strange", "folder": "here"}]}
    with pytest.raises(DataError, match=r"^there is no here\nIn precheck of the tracker 'stranger:strange'"):
        saekit.train(config, plugins=plugins)
    assert seen == [(Options(folder="here"), "run")]
    assert saekit.plan(config, plugins=plugins).problems == ["there is no here"]


def test_a_precheck_that_fails_names_its_plugin(tmp_path: Path) -> None:
    plugins = manager(lambda options, whole: 1 / 0)
    with pytest.raises(
        PluginError, match=r"^tracker 'stranger:strange' .*failed in precheck: ZeroDivisionError: division"
    ):
        saekit.train(run_config(tmp_path) | {"trackers": ["strange"]}, plugins=plugins)
    with pytest.raises(PluginError, match="entry 'strange': precheck is 'no', expected a callable"):
        manager("no")  # type: ignore[arg-type]


def test_a_model_from_code_needs_no_folder(tmp_path: Path) -> None:
    def refuse(options: Options, whole: Any) -> None:
        raise ModelError(f"no {whole.model.name}")

    plugins = manager(refuse, "model_backends")
    chosen = {"model": {"backend": "strange", "name": "x"}}
    with pytest.raises(ModelError, match="^no x\nIn precheck of the model backend"):
        saekit.train(run_config(tmp_path, **chosen), plugins=plugins)
    with pytest.raises(ModelError, match="^no x\nIn precheck of the model backend"):
        saekit.pretokenize({**chosen, "folder": str(tmp_path / "new")}, plugins=plugins)
    with pytest.raises(PluginFailedError, match="failed in build: .*built"):
        saekit.train(run_config(tmp_path, **chosen), plugins=plugins, model=object())


def test_a_run_from_a_cache_needs_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = {"folder": str(tmp_path / "cache"), "tokens": 2000}
    text = tmp_path / "text.txt"
    text.write_text("A sentence is a line of words.\n" * 3000)
    config = run_config(tmp_path / "runs", dataset={"path": "text.txt"}, activations={"cache": cache})
    config |= {"evals": {"run": []}}
    saekit.cache_activations(config)
    text.unlink()
    with pytest.raises(DataError, match="there is no file or folder"):
        saekit.train(config)
    config["activations"]["source"] = {"name": "cached", "folder": cache["folder"]}
    assert saekit.plan(config).problems == []
    assert saekit.train(config).metrics["details/n_training_tokens"] == 2000
    with pytest.raises(DataError, match="there is no file or folder"):
        saekit.train(config | {"evals": {"n_contexts": 4}})


def test_a_missing_package_is_said_before_a_plugin_is_asked(tmp_path: Path) -> None:
    plugins = manager(lambda options, whole: pytest.fail("asked"), requires=["surely_missing"], extra="more")
    with pytest.raises(MissingPackageError, match=r"Install it with: pip install 'stranger\[more\]'$"):
        saekit.train(run_config(tmp_path) | {"trackers": ["strange"]}, plugins=plugins)


def test_one_fault_keeps_its_type(tmp_path: Path) -> None:
    def error(**sections: dict[str, Any]) -> type[SaekitError]:
        with pytest.raises(SaekitError) as caught:
            saekit.train(run_config(tmp_path, **sections))
        return caught.type

    file = tmp_path / "file"
    file.touch()
    start = {"from_pretrained_path": str(tmp_path / "nowhere")}
    assert error(checkpoints={"folder": str(file)}) is PlaceError
    assert error(training=start) is SAEFormatError
    assert error(training=start, checkpoints={"folder": str(file)}) is ConfigError


@pytest.mark.parametrize(
    ("sae", "told"),
    [
        ({"name": "topk", "k": 600, "d_sae": 512}, "sae.k: is 600, but there are only 512 features"),
        ({"name": "batchtopk", "k": 600, "d_sae": 512}, "sae.k: is 600, but there are only 512 features"),
        (
            {"name": "topk", "k": 8, "k_start": 600, "k_warm_up_steps": 9, "d_sae": 512},
            "sae.k_start: is 600, but there",
        ),
        ({"name": "topk", "k": 600, "d_in": 8, "expansion_factor": 4}, "sae.k: is 600, but there are only 32 features"),
        ({"name": "groupmax", "k": 7, "d_sae": 512}, "sae.k: is 7, and 512 features are not so many groups"),
        ({"name": "matryoshka", "k": 8, "widths": [600], "d_sae": 512}, r"sae.widths: are \[600\], so that levels end"),
        (
            {"name": "matryoshka", "k": 8, "widths": [64], "level_weights": [1.0], "d_sae": 512},
            "sae.level_weights: are 1",
        ),
        ({"name": "topk", "k": 600}, None),
    ],
)
def test_what_so_many_features_cannot_be_asked_for(sae: dict[str, Any], told: str | None, tmp_path: Path) -> None:
    config = saekit.load_config({"sae": sae, "checkpoints": {"folder": str(tmp_path)}})
    found = "\n".join(preflight.of_training([config], saekit.default_manager()).texts)
    assert found == "" if told is None else re.search(told, found)
