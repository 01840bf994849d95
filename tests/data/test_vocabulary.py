"""Contexts of another tokenizer are refused, whatever its size and name; the same one is accepted by any name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from support.tiny import TOKENIZER, hooked_transformer, run_config, tokenizer

import saekit
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus
from saekit.data.vocabulary import Vocabulary
from saekit.errors import DataError
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

TEXTS = [f"def f{n}(x):\n    return x + {n}  # and more\n" * 9 for n in range(60)]
RECORDS = [{"text": text} for text in TEXTS]


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The embedded model's tokenizer, changed."""
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "hooked*"))
    table = json.loads((folder / "tokenizer.json").read_text())
    change(table)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


def permuted(table: dict[str, Any]) -> None:
    """The same number of tokens, and the same special one."""
    vocabulary = table["model"]["vocab"]
    special = {token["content"] for token in table["added_tokens"]}
    names = [name for name in vocabulary if name not in special]
    ids = [vocabulary[name] for name in names]
    random.Random(0).shuffle(ids)
    vocabulary.update(zip(names, ids, strict=True))


def without_merges(table: dict[str, Any]) -> None:
    """The same vocabulary, of which it uses less."""
    table["model"]["merges"] = table["model"]["merges"][:100]


def contexts(folder: Path, tokenizer_folder: Path) -> Path:
    config = {"tokenizer": str(tokenizer_folder), "folder": str(folder), "verbose": False}
    saekit.pretokenize(config | {"dataset": {"context_size": 32}}, dataset=RECORDS)
    return folder


def run(tmp_path: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    sections = {"training": {"training_tokens": 600}, "evals": {"split": None, "n_contexts": 2}} | sections
    return run_config(tmp_path / "runs", **sections) | {"dataset": {"path": str(folder)}}


def metadata(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "saekit.json").read_text())
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (permuted, "has another: the tokens of their vocabularies are not the same. Pretokenize for this model"),
        (without_merges, "has another: the same text has other token ids. Pretokenize for this model"),
    ],
)
def test_another_tokenizer_of_equal_size_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = contexts(tmp_path / "c", changed(tmp_path / "t", change))
    assert metadata(folder)["vocab_size"] == tokenizer().vocab_size
    with pytest.raises(DataError, match=message):
        saekit.train(run(tmp_path, folder), model=hooked_transformer())
    found = saekit.plan(run(tmp_path, folder), model=hooked_transformer())
    assert sum(message in problem for problem in found.problems) == 1
    assert len(found.problems) == 1
    with pytest.raises(DataError, match=message):
        saekit.cache_activations(run(tmp_path, folder), model=hooked_transformer())
    with pytest.raises(DataError, match=message):  # to shuffle them anew, say
        again = {"folder": str(tmp_path / "again"), "tokenizer": str(TOKENIZER), "verbose": False}
        saekit.pretokenize(again | {"dataset": {"path": str(folder)}})
    assert not (tmp_path / "runs").exists()


def test_the_same_vocabulary_under_another_name_is_accepted(tmp_path: Path) -> None:
    folder = contexts(tmp_path / "c", changed(tmp_path / "elsewhere", lambda table: None))
    shutil.rmtree(tmp_path / "elsewhere")
    assert metadata(folder)["tokenizer"] == str(tmp_path / "elsewhere")
    config = run(tmp_path, folder)
    found = saekit.plan(config, model=hooked_transformer())
    assert (found.problems, [text for text in found.warnings if "tokenizer" in text]) == ([], [])
    assert saekit.train(config, model=hooked_transformer()).metrics["evals/mse"] > 0


def test_added_tokens(tmp_path: Path) -> None:
    """More of them are no other vocabulary; one with another id, or an id with another one, is."""
    own = Vocabulary.of_tokenizer(tokenizer())
    assert own.differs_from(own) is None

    def added(*names: str) -> Vocabulary:
        made = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        made.add_tokens(list(names))
        return Vocabulary.of_tokenizer(made)

    more, other, more_yet = added("<a>", "<b>"), added("<b>", "<a>"), added("<a>", "<b>", "<c>")
    for one, two in ((own, more), (more, own), (more, more_yet), (more_yet, own)):
        assert one.differs_from(two) is None
    for one, two in ((more, other), (more_yet, other), (other, added("<c>"))):
        assert "the special token '<" in str(one.differs_from(two))


def plugins(backend: FakeBackend) -> saekit.PluginManager:
    return isolated_manager(fake_plugin("model_backends", build=lambda config, **more: backend), builtins=True)


def packed_by_characters(folder: Path, **more: Any) -> Path:
    """What a stranger's backend, of which only ``tokenize`` is known, reads."""
    rows = [[0, *(97 + (n + k) % 26 for k in range(15))] for n in range(200)]
    ids = [[n] for n in range(200)]
    datasets.Dataset.from_dict({"input_ids": rows, "document_ids": ids}).save_to_disk(folder)
    known = Vocabulary.of_backend(FakeBackend()).metadata()
    assert known["vocabulary"] is None
    assert known["probe"] is not None
    made = {"context_size": 16, "documents": 200, "contexts": 200}
    (folder / "saekit.json").write_text(json.dumps(made | known | more))
    return folder


def test_a_backend_without_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    backend = FakeBackend()
    sections = {"model": {"backend": "test:fake"}, "site": {"hook_name": "hook_embed"}}
    config = run(tmp_path, packed_by_characters(tmp_path / "c"), **sections)
    assert saekit.train(config, plugins=plugins(backend)).metrics["evals/mse"] > 0
    backend.tokenize = lambda text: [126 - ord(c) % 100 for c in text]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the model 'fake' has another: the same text has other token ids"):
        saekit.train(config, plugins=plugins(backend))


SAE_LENS = {
    "context_size": 32, "begin_batch_token": "bos", "begin_sequence_token": None, "sequence_separator_token": "bos",
}  # fmt: skip


def of_sae_lens(tmp_path: Path, name: str | None, **made: Any) -> Path:
    folder = contexts(tmp_path / "c", TOKENIZER)
    (folder / "saekit.json").unlink()
    (folder / "sae_lens.json").write_text(json.dumps(SAE_LENS | {"tokenizer_name": name} | made))
    return folder


def test_a_foreign_tokenizer_is_looked_up_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}
    load = transformers.AutoTokenizer.from_pretrained

    def recorded(name: Any, **more: Any) -> Any:
        asked[Path(name).name] = more
        return load(name, **more)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", recorded)
    changed(tmp_path / "same", lambda table: None)
    changed(tmp_path / "other", permuted)
    folder = of_sae_lens(tmp_path, str(tmp_path / "same"))
    model = hooked_transformer()
    config = run(tmp_path, folder, evals={"run": []})
    assert not saekit.plan(config, model=model).problems
    saekit.train(config, model=model)  # warnings are errors here
    (folder / "sae_lens.json").write_text(json.dumps(SAE_LENS | {"tokenizer_name": str(tmp_path / "other")}))
    with pytest.raises(DataError, match="tokenizer '.*/other', and the model 'custom' has another: the tokens of"):
        saekit.train(config, model=model)
    assert asked["same"] == asked["other"] == {"local_files_only": True, "trust_remote_code": False}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("somebody/unknown", "sae_lens.json says 'somebody/unknown', and no such tokenizer is on this machine"),
        (None, "sae_lens.json does not say which one that was"),
    ],
)
def test_a_foreign_tokenizer_that_cannot_be_looked_up_is_a_warning(tmp_path: Path, name: str | None, why: str) -> None:
    config = run(tmp_path, of_sae_lens(tmp_path, name), evals={"run": []})
    found = saekit.plan(config, model=hooked_transformer())
    assert found.problems == []
    assert sum(why in text for text in found.warnings) == 1
    with pytest.warns(RuntimeWarning, match=f"with the tokenizer of the model 'custom' cannot be found out: {why}"):
        saekit.train(config, model=hooked_transformer())
    with pytest.warns(RuntimeWarning, match="cannot be found out"):
        saekit.cache_activations(
            config | {"activations": {"cache": {"folder": str(tmp_path / "a")}}}, model=hooked_transformer()
        )


def test_the_models_own_name_is_enough(tmp_path: Path) -> None:
    """As in metadata that an older version wrote."""
    config = run(tmp_path, of_sae_lens(tmp_path, "saekit/tiny-python"), evals={"run": []})
    saekit.train(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "saekit.json of the dataset .* cannot be read: it is nested too deeply"),
        ('{"context_size": ' + "[" * 100_000, "cannot be read: it is nested too deeply"),
        ('{"prepend_bos": "false"}', "cannot be read: prepend_bos is 'false', expected true or false"),
        ('{"context_size": 12.5}', "cannot be read: context_size is 12.5"),
        ('{"context_size": true}', "cannot be read: context_size: must be 2 or more, found True"),
        ('{"begin_sequence_token": 1.5}', "cannot be read: begin_sequence_token is 1.5"),
        ('{"vocab_size": "2048"}', "cannot be read: vocab_size is '2048', expected a whole number"),
        ('{"documents": -3}', "cannot be read: documents is -3, expected a whole number"),
        ('{"vocabulary": 7}', "cannot be read: vocabulary is 7, expected a hash"),
        ('{"added_tokens": {"a": "b"}}', "cannot be read: added_tokens is {'a': 'b'}, expected a table of token ids"),
        ('{"token_ids": [1]}', "cannot be read: token_ids is .1., expected a table"),
        (b"\xff\xfe{}", "cannot be read: 'utf-8' codec"),
    ],
)  # fmt: skip
def test_damaged_metadata(tmp_path: Path, text: str | bytes, message: str) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1] * 12] * 60}).save_to_disk(tmp_path)
    (tmp_path / "saekit.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        Corpus.of(DatasetConfig(path=str(tmp_path)), EvalsConfig())
