"""Runs whose text or model came from memory: what goes by their configuration says so, and takes no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import cli
from support.sweeps import DOCUMENTS, manager
from support.tiny import run_config
from support.written import write_run, write_sweep

import saekit
from saekit.commands.pushing import _card
from saekit.commands.terminal.arguments import run_config as run_config_of
from saekit.commands.terminal.arguments import run_configs
from saekit.errors import ConfigError, PlaceError
from saekit.reports.folder import read_run
from saekit.runs.from_memory import from_memory
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

SITE = "blocks.0.hook_resid_post"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*wrong site, scale or model"),  # they were hardly trained
    pytest.mark.filterwarnings("ignore:.*hardly better than guessing"),  # a fake model does
]


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return run_config(
        folder,
        model={"backend": "fake"},
        site={"hook_name": SITE},
        training={"training_tokens": 256},
        evals={"split": None, "held_out_every": 3, "n_contexts": 4, "run": []},
        checkpoints={"folder": str(folder), "name": name, "keep_last": 0},
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mem``, and the sweep ``many``, on the fake model and texts from memory."""
    folder = tmp_path_factory.mktemp("runs")
    saekit.train(config(folder, "mem"), plugins=manager(), dataset=DOCUMENTS)
    many = saekit.grid(config(folder, "many"), {"training.lr": [1e-3, 2e-3]}, plugins=manager())
    saekit.train(many, plugins=manager(), dataset=DOCUMENTS)
    saekit.train(config(folder, "own"), plugins=taking(), dataset=DOCUMENTS, model=FakeBackend(OWN))
    return folder


OWN = 5  # the seed of a model whose name is that of another


def taking() -> saekit.PluginManager:
    """Plugins of which the fake backend takes a model from memory, and loads another by the name."""
    build = lambda config, *, loaded=None, **services: loaded or FakeBackend()  # noqa: E731
    return isolated_manager(fake_plugin("model_backends", build=build), builtins=True)


def evaluated(what: Any, **options: Any) -> Any:
    quick: dict[str, Any] = {"n_bootstrap": 2, "n_contexts": 4, "verbose": False, "save": False}
    return saekit.evaluate(what, plugins=manager(), **(quick | options))


def collected(what: Any, **options: Any) -> Any:
    return saekit.collect_features(what, plugins=manager(), n_contexts=4, verbose=False, **options)


def paged(what: Any, **options: Any) -> Any:
    return saekit.dashboard(what, plugins=manager(), n_contexts=4, verbose=False, **options)


def compared(what: Any, **options: Any) -> Any:
    both = {"a": what, "b": what}
    return saekit.compare(both, plugins=manager(), n_contexts=4, n_bootstrap=2, verbose=False, **options)


def looked_at(what: Any, **options: Any) -> Any:
    how: dict[str, Any] = {"plugins": manager(), "tokens": 64, "features": [0, 1, 2], "verbose": False}
    return saekit.top_texts(what, **(how | options))


def missing(kind: str, run: Path) -> str:
    told = f"{kind}: is missing: the run in {run} was trained with a {kind} from memory"
    if kind == "model":
        told += (
            "; its files call it 'fake': if it is that, give model='fake' (--model fake), or else model=... from Python"
        )
        return re.escape(told)
    return rf"{re.escape(told)}, which none of its files names. Give it: {kind}=\.\.\. from Python, or --{kind} "


@pytest.mark.parametrize("function", [evaluated, collected, paged, compared, looked_at])
def test_a_text_from_memory_is_asked_for(runs: Path, function: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match=missing("dataset", runs / "mem")):
        function(runs / "mem")
    assert sorted(path.name for path in (runs / "mem").iterdir() if path.name != ".lock") == [
        "config.toml", "metrics.jsonl", "run.json", "sae"
    ]  # fmt: skip


def test_it_is_asked_for_wherever_the_sae_is_read_from(runs: Path, tmp_path: Path) -> None:
    one = next(path for path in sorted((runs / "many").iterdir()) if (path / "sae").is_dir())
    for what, run in ((runs / "mem" / "sae", runs / "mem"), (one, one), (runs / "many", one)):
        with pytest.raises(ConfigError, match=missing("dataset", run)):
            evaluated(what)
    with pytest.raises(ConfigError, match=missing("dataset", one)):
        collected(saekit.SAE.load(one, plugins=manager()), folder=tmp_path / "features")
    shutil.copytree(one, tmp_path / "alone")  # without the record of its run, but it says so itself
    with pytest.raises(ConfigError, match=missing("dataset", tmp_path / "alone")):
        evaluated(tmp_path / "alone")
    shutil.copytree(one / "sae", tmp_path / "copy")
    with pytest.raises(ConfigError, match="dataset: is missing: the SAE does not say which text"):
        evaluated(tmp_path / "copy")


def test_given_anew_it_is_measured_on(runs: Path) -> None:
    found = evaluated(runs / "mem", dataset=DOCUMENTS)
    assert found.about["dataset"] == "a dataset from memory"
    assert not found.about["held_out"], "nobody knows that it is the same"
    contexts = [[0, *range(1, 12)]] * 4
    assert evaluated(runs / "mem", contexts=contexts).about["dataset"] == "contexts that were given"


def test_a_model_from_memory_is_asked_for(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mem", tmp_path / "memm")
    record = tmp_path / "memm" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"in_memory": ["model"]}))
    with pytest.raises(ConfigError, match=missing("model", tmp_path / "memm")):
        evaluated(tmp_path / "memm", dataset=DOCUMENTS)
    with pytest.raises(ConfigError, match=missing("model", tmp_path / "memm")):
        evaluated(tmp_path / "memm", dataset=DOCUMENTS, backend="fake")
    assert evaluated(tmp_path / "memm", dataset=DOCUMENTS, model=FakeBackend()).about["model"] == "fake"
    record.write_text(json.dumps({"format": 1, "saes": {"memm": "."}}))
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded: .*run.json cannot be read: KeyError 'in_memory'"):
        evaluated(tmp_path / "memm", dataset=DOCUMENTS)


def test_texts_are_of_the_model_that_the_run_had(runs: Path) -> None:
    run = runs / "own"
    for what in (run, run / "sae", saekit.SAE.load(run), [run]):
        with pytest.raises(ConfigError, match=missing("model", run)):
            looked_at(what, dataset=DOCUMENTS)
        with pytest.raises(ConfigError, match=missing("dataset", run)):
            looked_at(what, model=FakeBackend(OWN))
    by_its_own, by_another = (repr(looked_at(run, model=FakeBackend(seed), dataset=DOCUMENTS)) for seed in (OWN, 0))
    assert by_its_own != by_another
    named = looked_at(run, model="fake", plugins=taking(), dataset=DOCUMENTS)
    assert repr(named) == by_another, "where somebody says so"


def test_texts_are_of_the_model_of_its_configuration(runs: Path) -> None:
    asked: list[Any] = []

    def build(config: Any, *, model: Any, **services: Any) -> Any:
        asked.append(model)
        return FakeBackend()

    plugins = isolated_manager(fake_plugin("model_backends", build=build), builtins=True)
    file = runs / "mem" / "config.toml"
    before = file.read_text()
    file.write_text(
        before.replace('"saekit/tiny-python"', '"/models/mine"').replace("autocast = false", "autocast = true")
    )
    try:
        looked_at(runs / "mem", plugins=plugins, dataset=DOCUMENTS)
    finally:
        file.write_text(before)
    assert [(model.name, model.autocast) for model in asked] == [("/models/mine", True)]


def test_a_result_in_a_list_keeps_its_model_and_text(tmp_path: Path) -> None:
    own = config(tmp_path, "x")
    result = saekit.train(own, plugins=taking(), dataset=DOCUMENTS, model=FakeBackend(OWN))
    assert repr(looked_at([result])) == repr(looked_at(result)) == repr(looked_at({"x": result}))


def test_its_configuration_is_not_trained_by(runs: Path) -> None:
    file = runs / "mem" / "config.toml"
    assert file.read_text().startswith("# The dataset of this run came from memory, and is not dataset.path.\n")
    told = "dataset.path: is not what this run was trained with: its dataset came from memory"
    for function in (saekit.train, saekit.cache_activations):
        with pytest.raises(ConfigError, match=told):
            function(file, plugins=manager())
    found = saekit.plan(str(file), plugins=manager(), load=False)
    assert told in found.problems[0]
    assert found.verdict.startswith("It cannot run: ")
    given = saekit.plan(file, plugins=manager(), load=False, dataset=DOCUMENTS)
    assert not any(told in problem for problem in given.problems)


@pytest.mark.parametrize("command", ["plan", "train", "cache"])
def test_nor_by_a_command(tmp_path: Path, command: str) -> None:
    run = in_memory(write_run(tmp_path / "run"), "dataset", "model")
    found = cli(command, run / "config.toml", "model.name=gpt2", check=2)
    assert "dataset.path: is not what this run was trained with: its dataset came from memory" in found.stderr
    assert "dataset.path=... (a file or a name) after the configuration" in found.stderr
    assert "model.name: is not" not in found.stderr, "that is given"


CACHED = ["activations.source.name=cached", "activations.source.folder=CACHE"]


def test_only_what_is_read_is_asked_for(tmp_path: Path) -> None:
    file = in_memory(write_run(tmp_path / "run"), "dataset", "model") / "config.toml"
    model = ["model.name=gpt2"]
    run_config_of(str(file), [*model, *CACHED, "evals.run=[]"])
    run_configs(str(file), ["dataset.path=x"], ["model.name=gpt2,pythia-70m"])
    run_configs(str(file), ["evals.run=[]", *model, *CACHED], ["training.lr=1e-3,2e-3"])
    none = ["model.backend=none", "activations.source=toy", "evals.run=[]"]
    run_config_of(str(file), none)
    dataset, named = "dataset.path: is not what", "model.name: is not what"
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: run_config_of(str(file), [*model, *CACHED]), dataset),  # evals read it
        (lambda: run_config_of(str(file), [*model, *CACHED, "evals.run=[]"], writes_cache=True), dataset),
        (lambda: run_config_of(str(file), [*CACHED, "evals.run=[]"]), named),
        (lambda: run_configs(str(file), ["dataset.path=x"], ["training.lr=1e-3,2e-3"]), named),
    ]
    for call, told in refused:
        with pytest.raises(ConfigError, match=told):
            call()
    cached = [*model, *CACHED, "evals.run=[]"]
    found = saekit.plan(file, overrides=cached, load=False)
    assert found.problems
    assert not any("from memory" in problem for problem in found.problems)
    with pytest.raises(saekit.SaekitError, match="CACHE"):
        saekit.train(file, cached)


def in_memory(run: Path, *kinds: str) -> Path:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"in_memory": [*kinds]}))
    return run


def test_a_card_names_no_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for kinds, data in (((), "saekit/python-stdlib"), (("dataset",), None)):
        card = _card(read_run(in_memory(run, *kinds)).alone, "", {})
        assert card.facts.get("data") == card.options.get("dataset.path") == data


def test_whose_record_says_it(tmp_path: Path) -> None:
    sweep = in_memory(write_sweep(tmp_path / "sweep", {"a": {}, "b": {}}), "dataset")
    assert from_memory(sweep / "a") == ("dataset",)
    (sweep / "c").mkdir()
    assert from_memory(sweep / "c") == from_memory(tmp_path) == (), "not of that run"


@pytest.mark.parametrize(
    "text", ['{"command": "python x.py"}', '{"format": "mine"}', "[1]", '{"saes": {}, "format": 2}']
)
def test_what_only_has_the_name_of_a_record_says_nothing(tmp_path: Path, text: str) -> None:
    home = tmp_path / "mine" / "run"
    home.mkdir(parents=True)
    (tmp_path / "mine" / "run.json").write_text(text)
    assert from_memory(home) == ()
    if "saes" not in text:
        (home / "run.json").write_text(text)
        assert from_memory(home) == ()
    else:  # a record without what came from memory
        (tmp_path / "mine" / "run.json").write_text(text.replace("{}", '{"a": "run"}'))
        with pytest.raises(PlaceError, match="mine/run.json cannot be read: KeyError 'in_memory'"):
            from_memory(home)
    (tmp_path / "mine" / "run.json").write_text("{")
    assert from_memory(home) == ()
    (home / "run.json").write_text("{")
    with pytest.raises(PlaceError, match="run/run.json cannot be read: JSONDecodeError"):
        from_memory(home)
