"""Texts that processes tokenize ahead: the same contexts and states, whatever they do, and nobody is left behind."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import pressing
from support.tiny import hooked_transformer, run_config
from support.tokenizers_elsewhere import ElsewhereBackend, codes, ended_at_x, refusing_x

import saekit
from saekit.data import ContextStream, TokenPolicy
from saekit.data.chats import DocumentIds
from saekit.data.reader import DocumentReader
from saekit.data.text import Documents
from saekit.data.tokenizing import TokenizingProcesses
from saekit.errors import ConfigError, DataError, TrainingInterrupted
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

OPTION = "activations.source.tokenize_processes"
_draws = random.Random(1)
TEXTS = ["".join(map(chr, _draws.choices(range(97, 119), k=_draws.choice([0, 3, 40, 700])))) for _ in range(260)]
TEXTS[0] = "begin"


def contexts(texts: Any = TEXTS, ids: Callable[[str], Any] = codes, *, repeat: bool = True) -> ContextStream:
    return ContextStream(
        Documents(texts, first=texts[0]),
        DocumentIds(ids, elsewhere=True),
        TokenPolicy(context_size=16, begin_batch=0, separator=1),
        d_vocab=128,
        repeat=repeat,
    )


@pytest.fixture
def ahead() -> Iterator[Callable[..., ContextStream]]:
    opened: list[ContextStream] = []

    def make(processes: int = 1, **given: Any) -> ContextStream:
        stream = contexts(**given)
        opened.append(stream)
        stream.tokenize_ahead(processes, OPTION)
        return stream

    yield make
    for stream in opened:
        stream.close()


def pids(stream: ContextStream) -> list[int]:
    assert stream._processes is not None
    return [worker._process.pid for worker in stream._processes._workers]


@pytest.mark.parametrize("processes", [1, 3])
def test_contexts_and_states_are_the_same(processes: int, ahead: Callable[..., ContextStream]) -> None:
    """Over more than one reading of the text; each goes on where the other was."""
    here, there = contexts(), ahead(processes)
    for n in (1, 0, 7, 900, 3, 1500, 4000, 1):
        one, two = here.take(n), there.take(n)
        assert (one.tokens == two.tokens).all()
        assert (one.documents == two.documents).all()
        assert here.state_dict() == there.state_dict()
    assert here.readings
    other = contexts()
    other.load_state_dict(there.state_dict())
    there.load_state_dict(contexts().state_dict())
    assert (there.take(500).tokens == contexts().take(500).tokens).all()
    there.load_state_dict(here.state_dict())
    wanted = here.take(600).tokens
    assert (other.take(600).tokens == wanted).all()
    assert (there.take(600).tokens == wanted).all()


def test_an_end_is_an_end(ahead: Callable[..., ContextStream]) -> None:
    here, there = contexts(repeat=False), ahead(repeat=False)
    wanted = here.take(10**6)
    assert len(wanted) > 1000
    assert (there.take(10**6).tokens == wanted.tokens).all()
    assert not len(there.take(1))
    assert here.state_dict() == there.state_dict()


def test_no_more_is_read_than_is_sent_ahead(ahead: Callable[..., ContextStream]) -> None:
    """However fast the processes are: a text may be endless, and is not to fill the memory."""
    read = []

    class Texts(list[str]):
        def __getitem__(self, at: Any) -> Any:
            read.append(at)
            return super().__getitem__(at)

    stream = ahead(2, texts=Texts(["begin", *["abc"] * 5000]))
    for _ in range(60):
        stream.take(1)
        time.sleep(0.002)
    handed_out = stream.state_dict()["reader"]["next"]
    assert max(at for at in read if isinstance(at, int)) < handed_out + 6 * 64


def test_what_tokenizing_raises_is_raised_where_it_would_be(ahead: Callable[..., ContextStream]) -> None:
    texts = [*TEXTS[:90], "an x", *TEXTS[90:]]
    here, there = contexts(texts, refusing_x), ahead(texts=texts, ids=refusing_x)
    states = []
    for stream in (here, there):
        with pytest.raises(DataError, match=r"^document 90: there is an x in it$"):
            stream.take(10**6)
        states.append(stream.state_dict())
    assert states[0] == states[1]


def test_a_process_that_is_ended_is_told_of(ahead: Callable[..., ContextStream]) -> None:
    stream = ahead(texts=["nothing", "an x"], ids=ended_at_x)
    with pytest.raises(DataError) as raised:
        stream.take(100)
    assert str(raised.value) == (
        f"process {pids(stream)[0]}, which tokenized the text, has ended (signal 9, Killed; a system that is out of "
        "memory ends processes so). Go on from the last checkpoint with fewer of them or none: saekit train --resume "
        f"FOLDER {OPTION}=0 --allow {OPTION}"
    )


def test_a_tokenizer_that_cannot_be_read_elsewhere_is_told_of(
    ahead: Callable[..., ContextStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a module that is there in this process alone, and of a script."""
    for name, why in (("made_in_a_notebook", "No module named"), ("__main__", "get attribute 'ids'")):
        module = types.ModuleType(name)
        exec("def ids(text):\n    return [1]", module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        stream = ahead(ids=module.__dict__["ids"])
        for _ in range(2):  # as often as it is asked
            with pytest.raises(DataError) as raised:
                stream.take(1)
            assert str(raised.value).startswith("the tokenizer cannot be read in another process: ")
            assert why in str(raised.value)
            assert str(raised.value).endswith(f". Set {OPTION} to 0")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there")
def test_what_ends_a_job_does_not_end_them_first(ahead: Callable[..., ContextStream]) -> None:
    """A system signals all processes of a job; the run then makes its last steps and checkpoint."""
    here, there = contexts(), ahead(2)
    for wait in (False, True):  # while they start, and when they work
        if wait:
            assert (there.take(3).tokens == here.take(3).tokens).all()
        for pid in pids(there):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        assert (there.take(900).tokens == here.take(900).tokens).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_skips_nothing(
    error: type[BaseException], ahead: Callable[..., ContextStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes at once, and what was read before it is read again."""
    raised: list[bool] = []
    read = DocumentReader.__next__

    def interrupted(reader: DocumentReader) -> Any:
        number, document = read(reader)
        if number == 70 and not raised:
            raised.append(True)
            raise error
        return number, document

    monkeypatch.setattr(DocumentReader, "__next__", interrupted)
    here, there = contexts(), ahead()
    with pytest.raises(error):
        there.take(1)
    for n in (2, 900):
        assert (there.take(n).tokens == here.take(n).tokens).all()
        assert here.state_dict() == there.state_dict()


def test_processes_start_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **named: Any) -> None:
            if len(started) == 2:
                raise OSError("no more processes")
            super().__init__(*given, **named)
            started.append(self)

    monkeypatch.setattr("saekit.data.tokenizing.subprocess.Popen", Popen)
    with pytest.raises(ConfigError) as raised:
        TokenizingProcesses(codes, 4, OPTION)
    assert str(raised.value) == (
        f"{OPTION}: is 4, but process 3 of them could not be started: no more processes. Lower it, or set it to 0"
    )
    assert [process.returncode for process in started] == [-9, -9]


def test_the_working_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    processes = TokenizingProcesses(codes, 1, OPTION)
    (good, found), *_ = processes.send(["abc"]).result()
    processes.close()
    assert good, found
    assert list(found) == [97, 98, 99]


@pytest.mark.parametrize(
    ("texts", "ids", "words"),
    [
        ([[1, 2, 3]], DocumentIds(codes, elsewhere=True), "the dataset holds token ids: nothing is to be tokenized"),
        (["a"], DocumentIds(FakeBackend().tokenize), "the model's backend does not say that its tokenizer can work in"),
        (["a"], DocumentIds(lambda text: [1], elsewhere=True), "the tokenizer cannot be sent to another process: "),
    ],
    ids=["token ids", "bound", "not to be pickled"],
)
def test_what_cannot_be_is_refused(texts: Any, ids: Any, words: str) -> None:
    stream = ContextStream(Documents(texts, first=texts[0]), ids, TokenPolicy(context_size=4), d_vocab=128, repeat=True)
    with pytest.raises(ConfigError) as raised:
        stream.tokenize_ahead(2, OPTION)
    assert str(raised.value).startswith(f"{OPTION}: is 2, but {words}")
    assert str(raised.value).endswith("Set it to 0")


def _is_there(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # nobody may be there to wait for it


SCRIPT = """
import time
from support.tokenizers_elsewhere import codes
from saekit.data.tokenizing import TokenizingProcesses

processes = TokenizingProcesses(codes, 2, "option")
print([each.result() for each in [processes.send(["abc"]) for _ in range(9)]])
print(*[worker._process.pid for worker in processes._workers], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_they_end_with_whoever_started_them_however_that_ends(tmp_path: Path) -> None:
    """Of a script that does its work at its top, and is not imported by them."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().count(b"array([97, 98, 99])") == 9
        found = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(found) == 2
        assert all(map(_is_there, found))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(_is_there, found)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_there, found))


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    plugins = isolated_manager(
        fake_plugin("model_backends", build=lambda config, **_: ElsewhereBackend()), builtins=True
    )
    weights: list[torch.Tensor] = []
    for processes, stop in ((0, False), (2, False), (2, True)):
        config = run_config(
            tmp_path, evals={"run": []}, checkpoints={"folder": str(tmp_path), "name": f"{len(weights)}"}
        )
        config |= {"model": {"backend": "test:fake"}, "site": {"hook_name": "blocks.0.hook_resid_post"}}
        config["activations"]["source"]["tokenize_processes"] = processes
        if stop:  # and gone on with without any, as is advised where one has ended
            with pressing(4), pytest.raises(TrainingInterrupted):
                saekit.train(config, plugins=plugins)
            found: Any = saekit.resume(tmp_path / "2", overrides=[f"{OPTION}=0"], allow=[OPTION], plugins=plugins)
        else:
            found = saekit.train(config, plugins=plugins)
        weights.append(found.sae.W_enc.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_model_with_a_tokenizer_of_hugging_face_can_send_it() -> None:
    model = hooked_transformer()
    backend = saekit.default_manager().build(
        "model_backends", "HookedTransformer", model=saekit.config.ModelConfig(), loaded=model
    )
    there = pickle.loads(pickle.dumps(backend.tokenizing()))
    text = "def f(x):\n    return [x]  # ü\n"
    assert there(text) == backend.tokenize(text)
    assert len(pickle.dumps(backend.tokenizing())) < 200_000, "the tokenizer alone"
