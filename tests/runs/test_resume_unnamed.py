"""Runs as users make them: without a name, in folders of every spelling, resumed by the command that is printed."""

from __future__ import annotations

import re
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support import caches, warm
from support.runs import LIVE, contents, fake_config, manager, pressing, resume, train, without

import saekit
from saekit.errors import ConfigError, TrainingInterrupted
from saekit.testing import fake_plugin

COMMAND = re.compile(r"saekit train --resume (.*)$")


def unnamed(folder: str, source: dict[str, Any] = LIVE, **sections: dict[str, Any]) -> dict[str, Any]:
    config = fake_config(Path("runs"), source, **sections)
    config["checkpoints"] = {"folder": folder} | sections.get("checkpoints", {})
    return config


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(unnamed(str(tmp_path_factory.mktemp("whole"))))


@pytest.mark.parametrize("folder", ["runs", "./a/../runs", "~/runs", "my runs", "~", "{here}/runs"])
def test_by_the_printed_command(tmp_path: Path, folder: str, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pressing(4), pytest.raises(TrainingInterrupted) as caught:
        train(unnamed(folder.format(here=tmp_path)))
    found = COMMAND.search(str(caught.value))
    assert found
    (run,) = shlex.split(found[1])
    assert not Path("~").exists(), "a folder of that name"
    resumed = resume(Path(run))
    assert resumed.folder == Path(run)
    assert resumed.metrics == whole.metrics
    own = ("checkpoints/step-4/", "config.toml")  # which says where the run is
    assert without(contents(Path(run)), *own) == without(contents(whole.folder), *own)
    assert "name" not in (Path(run) / "config.toml").read_text().partition("[checkpoints]")[2]


def test_a_run_that_is_moved_is_resumed_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pressing(2), pytest.raises(TrainingInterrupted) as caught:
        train(unnamed("runs"))
    caught.value.run.rename(tmp_path / "moved here")
    assert resume("~/moved here").folder == tmp_path / "moved here"  # type: ignore[arg-type]


def test_a_sweep_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = saekit.grid(unnamed("runs"), {"sae.l1_coefficient": [1.0, 2.0]}, plugins=manager())
    whole = train(configs)
    with pressing(7), pytest.raises(TrainingInterrupted) as caught:
        train(configs)
    found = COMMAND.search(str(caught.value))
    assert found
    resumed = resume(Path(found[1]))
    assert {name: result.metrics for name, result in resumed.results.items()} == {
        name: result.metrics for name, result in whole.results.items()
    }


SCHEDULES = ["constant", "cosine", {"name": "cosine-restarts", "n_restart_cycles": 2}]


@pytest.mark.parametrize("decay", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_finished_run_trains_longer(tmp_path: Path, schedule: Any, decay: int) -> None:
    """Its last batch was not full, so it makes more steps than there are batches in its tokens."""
    sections = {
        "lr_schedule": {"name": schedule} if isinstance(schedule, str) else schedule,
        "training": {
            "training_tokens": 2000,
            "finetuning_tokens": 0,
            "finetuning_method": None,
            "lr_decay_steps": decay,
        },
        "evals": {"run": [], "every_n_steps": 0},
    }
    done = train(unnamed(str(tmp_path), **sections))
    assert done.metrics["details/n_training_tokens"] == 2000
    for tokens in (2560, 2561, 5000):
        longer = [f"training.training_tokens={tokens}"]
        done = resume(done.folder, overrides=longer, allow=["training.training_tokens"])
        assert done.metrics["details/n_training_tokens"] == tokens
        assert done.metrics["details/current_learning_rate"] > 0


@attrs.define
class Halves:
    """Batches of half the size."""

    stream: Any
    served: int = 0

    def __iter__(self) -> Iterator[saekit.Batch]:
        return self

    def _rows(self, n: int, seed: int) -> dict[Any, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {site: torch.randn(n, self.stream.widths[site], generator=generator) for site in self.stream.sites}

    def __next__(self) -> saekit.Batch:
        self.served += 1
        return saekit.Batch(self._rows(self.stream.batch_size // 2, self.served))

    def peek(self) -> Mapping[Any, torch.Tensor]:
        return self._rows(64, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.served = state["served"]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("decay", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_source_with_short_batches(tmp_path: Path, schedule: Any, decay: int) -> None:
    plugins = manager(None, fake_plugin("activation_sources", "halves", build=lambda config, stream: Halves(stream)))
    config = unnamed(
        str(tmp_path), {"name": "halves"}, lr_schedule={"name": schedule} if isinstance(schedule, str) else schedule,
        training={"finetuning_tokens": 0, "finetuning_method": None, "lr_decay_steps": decay}, evals={"run": []},
    )  # fmt: skip
    done = saekit.train(config, plugins=plugins, dataset=caches.DOCUMENTS)
    assert done.metrics["details/n_training_tokens"] == 2000
    with pressing(13), pytest.raises(TrainingInterrupted) as caught:
        saekit.train(config, plugins=plugins, dataset=caches.DOCUMENTS)
    again = saekit.resume(caught.value.run, plugins=plugins, dataset=caches.DOCUMENTS)
    assert again.metrics == done.metrics


def test_one_none_among_the_options(tmp_path: Path) -> None:
    """An option that is None and is not by default, and None inside an option, in a run that is resumed."""

    @attrs.frozen(kw_only=True)
    class Options:
        limit: int | None = 3
        title: str | None = "untitled"
        more: dict[str, Any] = attrs.field(factory=dict)

    told = []

    class Measure:
        def __init__(self, config: Options, *, run: object) -> None:
            self.config = config

        def __call__(self, sae: object, **services: object) -> dict[str, float]:
            told.append(self.config)
            return {}

    plugins = manager(None, fake_plugin("evals", "odd", build=Measure, config=Options))
    options = Options(limit=None, title=None, more={"none": None, "list": [None, {"none": True}]})
    config = unnamed(str(tmp_path), evals={"run": [options], "every_n_steps": 0})
    with pressing(3), pytest.raises(TrainingInterrupted) as caught:
        saekit.train(config, plugins=plugins, dataset=caches.DOCUMENTS)
    saekit.resume(caught.value.run, plugins=plugins, dataset=caches.DOCUMENTS)
    assert told == [options]


# ---- the command


TINY = [
    "training.training_tokens=12000", "training.train_batch_size_tokens=128", "dataset.context_size=32",
    "activations.source.store_batch_size_prompts=4", "activations.source.n_batches_in_buffer=8", "sae.d_sae=64",
    "evals.n_contexts=4", "training.verbose=false", "training.log_frequency=1", "checkpoints.every_minutes=0.002",
]  # fmt: skip


def _started(arguments: list[str]) -> warm.Popen:
    return warm.Popen("-m", "saekit.cli", *arguments)


def _stopped(process: warm.Popen, number: int, steps: int) -> str:
    """What it says when it is stopped after so many more steps."""
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if sum(file.read_text().count("\n") for file in Path().glob("runs/*/metrics.jsonl")) >= steps:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return process.communicate()[1]


@pytest.mark.slow
def test_a_default_run_by_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminated, killed, and resumed each time with nothing but what was printed."""
    monkeypatch.chdir(tmp_path)
    said = _stopped(_started(["train", *TINY]), signal.SIGTERM, 5)
    found = COMMAND.search(said.strip())
    assert found, said
    command = ["train", "--resume", *shlex.split(found[1])]
    assert _stopped(_started(command), signal.SIGKILL, 30) == ""
    process = _started(command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"run folder: {found[1]}" in out


@pytest.mark.filterwarnings("ignore:.*wrong site, scale or model")
def test_files_of_the_folder_where_a_run_was_started_are_told_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, other = tmp_path / "start", tmp_path / "other"
    for folder in (start, other):
        folder.mkdir()
    monkeypatch.chdir(start)
    Path("texts.jsonl").write_text("".join(f'{{"text": "{number} abc def"}}\n' * 40 for number in range(5)))
    config = unnamed("runs", checkpoints={"folder": "runs", "name": "run"})
    config["dataset"] |= {"path": "texts.jsonl"}
    with pressing(4), pytest.raises(TrainingInterrupted):
        train(config, dataset=None)
    whole = train(config | {"checkpoints": {"folder": "runs", "name": "whole"}}, dataset=None)
    monkeypatch.chdir(other)
    told = re.escape(f"dataset.path: is 'texts.jsonl', in the folder '{start}' in which the run was started, and there")
    with pytest.raises(ConfigError, match=f"{told} .*: dataset.path=... --allow dataset.path"):
        resume(start / "runs/run", dataset=None)
    with pytest.raises(ConfigError, match=rf"{told} .*, or say dataset=\.\.\. \(--dataset\)"):
        saekit.evaluate(whole.folder if whole.folder.is_absolute() else start / whole.folder, plugins=manager())
    named: dict[str, Any] = {"dataset": start / "texts.jsonl", "n_contexts": 4, "save": False, "verbose": False}
    found = saekit.evaluate(start / "runs/whole", plugins=manager(), evals=["reconstruction"], **named)
    assert found.about["held_out"], "of the same text, what was held out"
    monkeypatch.chdir(start)
    assert resume(Path("runs/run"), dataset=None).metrics == whole.metrics
