"""What may not change between a run's start and its resumption, and what cannot be resumed."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import caches
from support.runs import contents, fake_config, manager, pressing, resume, stopped, train
from support.tiny import hooked_transformer

import saekit
from saekit.errors import ConfigError, StorageError, TrainingInterrupted
from saekit.files import storage
from saekit.runs.saving import Saving
from saekit.testing import FakeBackend, fake_plugin

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what may not change


def test_what_changed_is_named_and_refused(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    run, before = tmp_path / "run", contents(tmp_path / "run")
    changes = ["training.lr=1e-3", "sae.l1_coefficient=2.5", "trackers=[]", "training.finetuning_method=scale"]
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides=changes)
    assert caught.value.problems == [
        (path, f"was {old!r} when the run was saved, and is {new!r} now; a run that goes on as it was cannot change "
         f"it. To change it all the same: --allow {path} (or allow=[{path!r}])")
        for path, old, new in [
            ("sae.l1_coefficient", 1.0, 2.5),
            ("training.finetuning_method", "unrotated_decoder", "scale"),
            ("training.lr", 4e-4, 1e-3),
        ]
    ]  # fmt: skip
    assert str(caught.value).startswith("the resumed run has 3 problems:\n  - sae.l1_coefficient: was 1.0")
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides=changes, allow=["training.lr", "sae.l1_coefficient"])
    assert [path for path, _ in caught.value.problems] == ["training.finetuning_method"]
    for allow in (["training.lr"], ["training.lr", "dataset.contents"], ["model.weights"], ["nonsense"]):
        unneeded = [path for path in allow if path != "training.lr"] or ["training.lr"]
        given = changes[:1] if len(allow) > 1 else []
        with pytest.raises(ConfigError, match=f"allowed to change, but the same as before: {unneeded[0]}"):
            resume(run, overrides=given, allow=allow)
    assert contents(run) == before, "a refusal changes nothing"
    every = ["training.lr", "sae.l1_coefficient", "training.finetuning_method"]
    result = resume(run, overrides=changes, allow=every)
    assert result.metrics["details/current_l1_coefficient"] == 2.5
    config = saekit.load_config(run / "config.toml", plugins=manager())
    assert (config.training.lr, config.training.finetuning_method) == (1e-3, "scale")


@pytest.mark.parametrize("changes", [["optimizer.beta1=0.5"], ["optimizer.name=signum", "optimizer.clip_grad_norm=2"]])
def test_what_the_advice_says_can_be_done(tmp_path: Path, changes: list[str]) -> None:
    """One line for what was changed, and none for what follows from it; a section allows all that lies in it."""
    stopped(fake_config(tmp_path), 3)
    run = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides=changes)
    ((path, message),) = caught.value.problems
    assert path == ("optimizer.beta1" if "beta1" in changes[0] else "optimizer")
    assert f"--allow {path} (or allow=['{path}'])" in message
    for allow in ([path], ["optimizer"]):
        with pytest.raises(ConfigError, match="^training.lr: was 0.0004 when the run was saved"):
            resume(run, overrides=[*changes, "training.lr=1"], allow=allow)
        with pytest.raises(ConfigError, match="allowed to change, but the same as before: sae, training$"):
            resume(run, overrides=changes, allow=[*allow, "training", "sae"])
    if "beta1" in path:
        resume(run, overrides=changes, allow=["optimizer"])
        assert saekit.load_config(run / "config.toml", plugins=manager()).optimizer.options.beta1 == 0.5


def test_a_section_allows_what_is_found_out_later(tmp_path: Path) -> None:
    """Here what tokens mean, which no option says."""
    stopped(fake_config(tmp_path), 3)
    other = FakeBackend()
    other.special_tokens = {"bos": 1, "eos": None, "sep": None}
    with pytest.raises(ConfigError, match="the same as before: model"):
        resume(tmp_path / "run", plugins=manager(other), allow=["dataset", "model"])
    resume(tmp_path / "run", plugins=manager(other), allow=["dataset"])


def test_resumed_with_a_configuration_file(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    file = tmp_path / "run.toml"
    file.write_text((tmp_path / "run/config.toml").read_text().replace("test:fake", "fake"))
    with pressing(2), pytest.raises(TrainingInterrupted, match="after 5 steps"):
        resume(tmp_path / "run", cfg=file)
    file.write_text(re.sub(r"(?m)^seed = 5$", "seed = 6", file.read_text()))
    with pytest.raises(ConfigError, match="training.seed: was 5 when the run was saved, and is 6 now"):
        resume(tmp_path / "run", cfg=file)
    with pytest.raises(ConfigError, match="seed: was 5 .* and is 7 now"):
        resume(tmp_path / "run", cfg=file, overrides=["training.seed=7"])
    assert resume(tmp_path / "run", cfg=file, overrides=["training.seed=5"]).metrics["evals/l0"] > 0


def test_one_configuration_cannot_replace_those_of_a_sweep(tmp_path: Path) -> None:
    configs = saekit.grid(fake_config(tmp_path), {"training.seed": [1, 2]}, plugins=manager())
    stopped(configs, 5)
    with pytest.raises(ConfigError, match="run is a sweep of 2 SAEs, so one configuration cannot take the place"):
        resume(tmp_path / "run", cfg=fake_config(tmp_path))
    with pytest.raises(ConfigError, match="training.lr: was 0.0004 when the run was saved, and is 0.001 now"):
        resume(tmp_path / "run", overrides=["training.lr=1e-3"])
    result = resume(tmp_path / "run", overrides=["training.lr=1e-3"], allow=["training.lr"])
    assert {row["training.seed"] for row in result.summary} == {1, 2}


def test_another_text_is_noticed(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    for other in (caches.DOCUMENTS[:-1], [{"text": "import this " * 40}, *caches.DOCUMENTS[1:]]):
        with pytest.raises(ConfigError, match=r"^dataset.contents: was '60 documents, beginning \w+' when the run was"):
            resume(tmp_path / "run", dataset=other)
        with pytest.raises(ConfigError, match="the same as before: dataset.path"):
            resume(tmp_path / "run", dataset=other, allow=["dataset.contents", "dataset.path"])
    resume(tmp_path / "run", dataset=other, allow=["dataset.contents"])


def test_another_model_is_noticed(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evals={"run": []})
    del config["model"]
    options = {"plugins": saekit.default_manager()}
    stopped(config, 3, model=hooked_transformer(), **options)
    other = hooked_transformer(seed=1)
    with pytest.raises(ConfigError, match="^model.weights: was '.*' when the run was saved, and is '.*' now"):
        resume(tmp_path / "run", model=other, **options)
    with pytest.raises(ConfigError, match="allowed to change, but the same as before: model.weights"):
        resume(tmp_path / "run", model=hooked_transformer(), allow=["model.weights"], **options)
    resume(tmp_path / "run", model=other, allow=["model.weights"], **options)


def test_a_tokenizer_that_changed_can_be_allowed(tmp_path: Path) -> None:
    """Not the configuration, but what it means, is another."""
    stopped(fake_config(tmp_path), 3)
    other = FakeBackend()
    other.special_tokens = {"bos": 1, "eos": None, "sep": None}
    for path, allow in (("begin_batch_token", []), ("sequence_separator_token", ["begin_batch_token"])):
        with pytest.raises(ConfigError, match=rf"dataset.{path}: was 0 when the run was saved, and is 1 now"):
            resume(tmp_path / "run", plugins=manager(other), allow=[f"dataset.{name}" for name in allow])
    allow = ["dataset.begin_batch_token", "dataset.sequence_separator_token"]
    resume(tmp_path / "run", plugins=manager(other), allow=allow)


def test_what_came_from_memory_has_to_come_again(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evals={"run": []})
    del config["model"]
    model, options = hooked_transformer(), {"plugins": saekit.default_manager()}
    stopped(config, 3, model=model, **options)
    run = tmp_path / "run"
    missing = {"model": model, "dataset": caches.DOCUMENTS}
    for given, told in (
        ({}, "a model and a dataset from memory; pass model=... and dataset=... to saekit.resume again"),
        ({"model": model}, "a dataset from memory; pass dataset=... to"),
        ({"dataset": caches.DOCUMENTS}, "a model from memory; pass model=... to"),
    ):
        with pytest.raises(ConfigError, match=f"run was started with {re.escape(told)}"):
            resume(run, **({"model": None, "dataset": None} | given), **options)
    assert resume(run, **missing, **options).metrics["details/n_training_tokens"] == 2700


# ---- what cannot be resumed


def test_what_is_not_a_run_folder(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/runner_cfg.json").write_text("{}")
    for folder, told in (
        (tmp_path / "nowhere", r"there is no folder .*nowhere; a run prints the name of its folder when it ends$"),
        (tmp_path, r"is not a run folder: there is no run.json in it. It holds the runs run\."),
        (tmp_path / "run/checkpoints/step-3", r"step-3 is not a run folder"),
        (tmp_path / "theirs", r"checkpoint of sae-lens, with its runner_cfg.json.*training\.from_pretrained_path"),
    ):
        with pytest.raises(StorageError, match=told):
            resume(folder)
    record = tmp_path / "run/run.json"
    for text, told in (
        ("{", "run.json cannot be read: JSONDecodeError"),
        ("[]", "cannot be read: TypeError"),
        ("{}", "cannot be read: KeyError 'format'"),
        ('{"format": 1, "saes": 3, "in_memory": []}', "cannot be read: AttributeError"),
        ('{"format": 2}', "run.json has format 2, expected 1: update saekit to go on"),
    ):
        record.write_text(text)
        with pytest.raises(StorageError, match=told):
            resume(tmp_path / "run")


def test_stopped_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins anew and says so, as a job that is always started with --resume needs; the metrics begin anew too."""
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        train(fake_config(Path("runs")))
    with contextlib.chdir(tmp_path / "part"):
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "save", lambda *arguments, **options: None)  # as good as killed
            with pytest.raises(TrainingInterrupted):
                stopped(fake_config(Path("runs")), 4)
                raise TrainingInterrupted(0, 0, None, Path())
        assert len(Path("runs/run/metrics.jsonl").read_text().splitlines()) == 4
        with pytest.raises(ConfigError, match="training.lr: was"):
            resume(Path("runs/run"), overrides=["training.lr=1"])
        with pytest.warns(RuntimeWarning) as caught:
            resume(Path("runs/run"))
        assert [str(w.message) for w in caught if "worse than the mean" not in str(w.message)] == [
            "the run in runs/run was stopped before its first checkpoint; it begins anew"
        ]
    assert contents(tmp_path / "part/runs/run") == contents(tmp_path / "whole/runs/run")


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    """A run that may not keep checkpoints, and one whose checkpoints were removed, are not begun anew unasked."""
    error = stopped(fake_config(tmp_path, checkpoints={"keep_last": 0, "name": "run"}), 4)
    assert error.checkpoint == tmp_path / "run/checkpoints/step-4"
    assert str(error) == (
        f"interrupted after 4 steps (1,024 tokens); the SAEs are saved in {error.checkpoint}, without what training "
        "needs; there is none to go on from"
    )
    assert saekit.SAE.load(error.checkpoint, plugins=manager()).d_sae == 64
    message = "there is no checkpoint to go on from in .*: the run was stopped before its first one, or had checkpoints"
    with pytest.raises(StorageError, match=message):
        resume(tmp_path / "run")
    done = train(fake_config(tmp_path, checkpoints={"keep_last": 0, "name": "done"}))
    assert not (done.folder / "checkpoints").exists()
    with pytest.raises(StorageError, match=message):
        resume(done.folder)
    other = train(fake_config(tmp_path, checkpoints={"name": "other"})).folder
    storage.remove_folder(other / "checkpoints")
    with pytest.raises(StorageError, match=message):
        resume(other)


def test_two_at_once(tmp_path: Path) -> None:
    stopped(fake_config(tmp_path), 3)
    code = "import sys, time\nfrom pathlib import Path\nfrom saekit.files.storage import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match=r"another process is still training in .*run; end it first"):
        resume(tmp_path / "run")
    other.kill()
    other.communicate()
    resume(tmp_path / "run")


def test_a_run_folder_that_is_trained_in_is_locked(tmp_path: Path) -> None:
    tried = []

    def build(config: object, *, run: object) -> object:
        def measure(sae: object, **services: object) -> dict[str, float]:
            with pytest.raises(ConfigError, match="another process is still training in"):
                resume(tmp_path / "run")
            tried.append(True)
            return {}

        return measure

    plugins = manager(None, fake_plugin("evals", "nosy", build=build))
    train(fake_config(tmp_path, evals={"run": ["nosy"], "every_n_steps": 0}), plugins=plugins)
    assert tried


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    stopped(fake_config(tmp_path), 3)
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: exec("raise OSError(9, 'Bad file descriptor')"))
    resume(tmp_path / "run")
