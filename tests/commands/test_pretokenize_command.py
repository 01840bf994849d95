"""``saekit pretokenize`` as a process: what it prints, Ctrl-C, and the Hub, from the push to the training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from support import warm
from support.fake_hub import FakeHub, Refusal, fake_hub
from support.tiny import TOKENIZER, run_config

import saekit
from saekit.errors import StorageError

RECORDS = [{"text": f"def f{n}(x):\n    return x + {n}\n" * 9} for n in range(40)]
TO_PUSH = {"tokenizer": str(TOKENIZER), "hub_repo_id": "somebody/contexts", "verbose": False}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """An empty Hub."""
    with fake_hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path / "text.jsonl"


def cli(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if env is not None:
        return with_hub("-m", "saekit.cli", *arguments, cwd=cwd, env=env)
    return warm.python("-m", "saekit.cli", *arguments, cwd=cwd)


def with_hub(*arguments: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Python with the variables of a Hub, which are read while its library is imported."""
    return warm.python(*arguments, cwd=cwd, env=env, imports=warm.NOT_OF_THE_HUB)


@pytest.mark.slow
def test_the_command_and_training_on_what_it_wrote(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:the SAE at")  # is worse than the mean, after a few steps
    limits = ("max_contexts=150", "dataset.context_size=20", "verbose=false")
    found = cli("pretokenize", "dataset.path=text.jsonl", "folder=new/contexts", *limits, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "150 contexts of 20 tokens in new/contexts\ntrain on them with: dataset.path=new/contexts\n"
    few = ("training.training_tokens=8192", "checkpoints.name=x", "training.verbose=false", "evals.n_contexts=4")
    trained = cli("train", "dataset.path=new/contexts", *few, cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert saekit.SAE.load(tmp_path / "runs/x/sae").info.metadata["context_size"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "runs", "text.jsonl"]


SLOW_TEXT = """
import sys, time
from pathlib import Path
import saekit.cli, saekit.commands.jobs as module

class Slow:
    def __iter__(self):
        yield from [{"text": "def f(x): return x"}] * 1000
        Path("tmp/waiting").touch()
        time.sleep(100)

pretokenize = module.pretokenize
module.pretokenize = lambda config: pretokenize(config, dataset=Slow())
saekit.cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "num_proc"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: int, code: int, num_proc: int) -> None:
    """On text that comes so slowly that every process waits."""
    (tmp_path / "tmp").mkdir()
    options = [f"tokenizer={TOKENIZER}", f"num_proc={num_proc}", "folder=some/new/contexts", "verbose=false"]
    places = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = warm.Popen("-c", SLOW_TEXT, "pretokenize", *options, cwd=tmp_path, env=places)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (tmp_path / "tmp/waiting").exists():
        time.sleep(0.05)
    assert list(tmp_path.glob("some/new/.saekit-*"))
    time.sleep(0.5)
    os.killpg(process.pid, number)  # as Ctrl-C reaches a whole group
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "interrupted; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert not list(tmp_path.glob("tmp/*saekit*"))


PUSH_AND_TRAIN = """
import json
import attrs
import saekit
from datasets import load_dataset
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus

def push(**more):
    made = saekit.pretokenize(push_config | more)
    assert made.hub_repo_id == "somebody/contexts"
    return made.contexts

def train(**dataset):
    result = saekit.train(train_config | {"dataset": {"path": "somebody/contexts"} | dataset})
    everything = attrs.evolve(result.corpus, evals=EvalsConfig(run=(), held_out_every=0))
    sample = everything.contexts(result.backend).take(5).tokens.tolist()
    return [result.corpus.context_size, result.corpus.config.begin_sequence_token, result.held_out.shape[1], sample]

push_config, train_config = json.load(open("configs.json"))
found = [push(), push(hub_revision="other", shuffle=False, dataset=push_config["dataset"] | {"context_size": 12})]
found += [train(), train(streaming=False), train(revision="other"), train(revision="other", streaming=False)]
found += [train(path=folder) for folder in ("hub/datasets/somebody/contexts", "hub/datasets/somebody/contexts@other")]
found += [load_dataset("somebody/contexts", split="train", revision=r)["input_ids"][:5] for r in ("main", "other")]
json.dump(found, open("result.json", "w"))
"""


@pytest.mark.slow
def test_the_hub_from_push_to_training(hub: FakeHub, tmp_path: Path, text: Path) -> None:
    push = TO_PUSH | {"dataset": {"path": str(text), "context_size": 20, "begin_sequence_token": 7}}
    train = run_config(tmp_path / "runs", training={"training_tokens": 256}, evals={"split": None})
    (tmp_path / "configs.json").write_text(json.dumps([push, train]))
    done = with_hub("-c", PUSH_AND_TRAIN, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    pushed, pushed_other, *trained, main, other = json.loads((tmp_path / "result.json").read_text())
    assert pushed_other > pushed > 100
    assert {len(row) for row in main} == {20}
    assert {len(row) for row in other} == {12}
    ours, theirs = [20, 7, 20, main], [12, 7, 12, other]
    assert trained == [ours, ours, theirs, theirs, ours, theirs]
    repository = tmp_path / "hub/datasets/somebody/contexts"
    for folder, size, shuffled in ((repository, 20, True), (repository.with_name("contexts@other"), 12, False)):
        said = json.loads((folder / "saekit.json").read_text())
        assert (said["context_size"], said["shuffle"]) == (size, shuffled)
    assert hub.private == {"datasets/somebody/contexts"}, "a new one is private, unless asked otherwise"


@pytest.mark.slow
def test_without_a_token(hub: FakeHub, tmp_path: Path, text: Path) -> None:
    environment = hub.environment(tmp_path / "home", token=None)
    options = [f"tokenizer={TOKENIZER}", f"dataset.path={text}", "hub_repo_id=somebody/new", "verbose=false"]
    found = cli("pretokenize", *options, "folder=kept", cwd=tmp_path, env=environment)
    advice = "Pushing needs a token that may write there (`hf auth login`, or HF_TOKEN)\n"
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("error: cannot push to the dataset repository 'somebody/new': Client error '401")
    assert found.stderr.endswith(f"; the contexts are in 'kept'. {advice}")
    assert len(datasets.load_from_disk(str(tmp_path / "kept"))) > 10
    assert (tmp_path / "kept/saekit.json").is_file()
    asked = len(hub.requests)
    at_once = cli("pretokenize", *options, cwd=tmp_path, env=environment)
    assert at_once.stderr == f"error: cannot push to the dataset repository 'somebody/new': {advice}"
    assert (at_once.returncode, len(hub.requests)) == (2, asked), "nothing is done that would be lost"
    assert not list((tmp_path / "hub").glob("datasets/*/*"))


LOOK = """
import json
from saekit import DataError
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus

def look(path):
    try:
        return Corpus.of(DatasetConfig(path=path), EvalsConfig()).context_size
    except DataError as error:
        return str(error)

json.dump([look(f"somebody/{name}") for name in ("text", "lens", "contexts", "nothing", "down")], open("x.json", "w"))
"""


@pytest.mark.slow
def test_metadata_on_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file, size in (("lens", "sae_lens.json", 77), ("contexts", "saekit.json", 99), ("text", "x.json", 3)):
        (repository := tmp_path / "hub/datasets/somebody" / name).mkdir(parents=True)
        (repository / file).write_text(f'{{"context_size": {size}}}')
    (tmp_path / "hub/datasets/somebody/down").mkdir()
    revision = FakeHub.revision

    def answer(self: FakeHub, kind: str, name: str, branch: str) -> Path:
        if name.endswith("down"):
            raise Refusal(501, "Not now")
        return revision(self, kind, name, branch)

    monkeypatch.setattr(FakeHub, "revision", answer)
    done = with_hub("-c", LOOK, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    *sizes, down = json.loads((tmp_path / "x.json").read_text())
    assert sizes == [128, 77, 99, 128], "of text, the default; whether there is a repository, opening it says"
    assert down.startswith(
        "whether 'somebody/down' holds pretokenized contexts cannot be found out: asked for saekit.json"
    )
    assert down.endswith(". Try again")


def test_a_push_that_fails_or_is_interrupted_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(StorageError, match="cannot push to .* 'somebody/contexts': .*offline mode.*; the contexts are"):
        saekit.pretokenize(TO_PUSH | {"folder": str(tmp_path / "a")}, dataset=RECORDS)
    assert (tmp_path / "a/saekit.json").is_file()

    for method in ("create_repo", "upload_file"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{method}", lambda *args, **more: None)

    def push(error: BaseException) -> Any:
        def raise_it(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(datasets.Dataset, "push_to_hub", raise_it)
        return saekit.pretokenize(TO_PUSH | {"folder": str(tmp_path / "b")}, dataset=RECORDS)

    with pytest.raises(KeyboardInterrupt, match="while pushing to 'somebody/contexts'; the contexts are in '.*/b'$"):
        push(KeyboardInterrupt())
    assert (tmp_path / "b/saekit.json").is_file()
    with pytest.raises(StorageError, match=r"'somebody/contexts': no route to it\. Pushing needs a token"):
        monkeypatch.setattr(
            datasets.Dataset, "push_to_hub", lambda *args, **more: exec("raise LookupError('no route to it')")
        )
        saekit.pretokenize(TO_PUSH, dataset=RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "tmp"]
    assert not list((tmp_path / "tmp").iterdir())
