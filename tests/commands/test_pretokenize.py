"""``saekit pretokenize``: the contexts that training would make, on disk, and training that reads them as they are."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import TOKENIZER, hooked_transformer, run_config, tokenizer

import saekit
from saekit.data import Contexts, ContextStream, TokenPolicy
from saekit.errors import ConfigError, DataError, ModelError, StorageError
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

TEXTS = [
    f"def f{n}(x):\n    return x + {n}\n" * (n % 7) for n in range(210)
]  # some empty; more than one process takes at once
RECORDS = [{"text": text, "note": text.upper(), "n": n} for n, text in enumerate(TEXTS)]
BOS = 0


def ids(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


TOKENIZED = [{"tokens": ids(text)} for text in TEXTS]


def options(folder: Path, /, **more: Any) -> dict[str, Any]:
    """A configuration; ``dataset`` is a section of it, everything else an option of its own."""
    config = {"tokenizer": str(TOKENIZER), "folder": str(folder), "verbose": False}
    return config | more | {"dataset": {"context_size": 24} | more.get("dataset", {})}


def rows(folder: Path) -> list[list[int]]:
    return [list(row) for row in datasets.load_from_disk(str(folder))["input_ids"]]


def made(tmp_path: Path, records: object = RECORDS, /, **more: Any) -> list[list[int]]:
    """The contexts that a configuration makes."""
    folder = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
    result = saekit.pretokenize(options(folder, **more), dataset=records)
    found = rows(folder)
    assert (result.contexts, result.folder, result.hub_repo_id) == (len(found), str(folder), None)
    assert {len(row) for row in found} == {result.context_size}
    return found


def packed(texts: list[Any] = TEXTS, **policy: Any) -> list[list[int]]:
    """The contexts that training packs, by its own classes."""
    settled = TokenPolicy(**{"context_size": 24, "begin_batch": BOS, "separator": BOS} | policy)
    contexts: Contexts = ContextStream(texts, ids, settled, d_vocab=2048, repeat=False).take(10_000)
    return contexts.tokens.tolist()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library copies of files that are not streamed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


POLICIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"context_size": 130}, {"context_size": 130}),
    ({"prepend_bos": False}, {"begin_batch": None}),
    ({"prepend_bos": False, "begin_batch_token": 5}, {"begin_batch": 5}),
    ({"sequence_separator_token": "none"}, {"separator": None}),
    ({"sequence_separator_token": 9, "begin_sequence_token": "eos"}, {"separator": 9, "begin_sequence": 0}),
]


@pytest.mark.parametrize(
    ("stated", "policy", "num_proc"),
    [(*one, 1) for one in POLICIES] + [(*one, 2) for one in POLICIES[::5]],  # processes tokenize, and pack nothing
    ids=lambda value: None if isinstance(value, int) else " ".join(value) or "defaults",
)
def test_contexts_are_those_of_training(tmp_path: Path, stated: dict, policy: dict, num_proc: int) -> None:
    whole = packed(**policy)
    assert len(whole) > 10
    for records in (RECORDS, datasets.Dataset.from_list(RECORDS).to_iterable_dataset(num_shards=3)):
        assert made(tmp_path, records, dataset=stated, num_proc=num_proc, shuffle=False) == whole


special = st.sampled_from(["none", 0, 1, 2])


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=25), min_size=1, max_size=12),
    stated=st.fixed_dictionaries(
        {"context_size": st.integers(2, 9), "begin_batch_token": special, "begin_sequence_token": special,
         "sequence_separator_token": special}
    ),
    seed=st.none() | st.integers(0, 9),
)  # fmt: skip
def test_any_documents_by_any_policy(documents: list, stated: dict, seed: int | None) -> None:
    policy = {
        name.removesuffix("_token").removeprefix("sequence_"): None if token == "none" else token
        for name, token in stated.items()
    }
    whole = packed(documents, **policy)
    records = [{"tokens": document} for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        run = {"dataset": {"prepend_bos": False} | stated, "shuffle": seed is not None, "seed": seed or 0}
        if not whole:
            with pytest.raises(DataError, match="does not fill one context"):
                made(Path(folder), records, **run)
        elif seed is None:
            assert made(Path(folder), records, **run) == whole
        else:
            assert sorted(made(Path(folder), records, **run)) == sorted(whole)


def test_sources_and_columns(tmp_path: Path) -> None:
    """Files and folders, streamed or not, and every column, are the same text."""
    whole = packed()
    hf = datasets.Dataset.from_list(RECORDS)
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        hf.shard(3, part, contiguous=True).to_parquet(tmp_path / f"parquet/train-{part}.parquet", batch_size=7)
    hf.save_to_disk(tmp_path / "disk")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    for name in ("parquet", "parquet/train-0.parquet", "disk", "d.jsonl"):
        for streaming in (True, False):
            dataset = {"path": str(tmp_path / name), "streaming": streaming}
            found = made(tmp_path, None, dataset=dataset, shuffle=False)
            assert found == (packed(TEXTS[:70]) if name.endswith("0.parquet") else whole)
    tokenized = [record | other for record, other in zip(RECORDS, TOKENIZED, strict=True)]
    for records in (tokenized, datasets.Dataset.from_list(tokenized), datasets.Dataset.from_list(TOKENIZED)):
        for num_proc in (1, 2):
            assert made(tmp_path, records, shuffle=False, num_proc=num_proc) == whole, "tokens come before text"
    notes = packed([record["note"] for record in RECORDS])
    assert made(tmp_path, tokenized, dataset={"column": "note"}, shuffle=False) == notes
    assert made(tmp_path, datasets.DatasetDict(a=hf), dataset={"split": "a", "column": "note"}, shuffle=False) == notes


def test_shuffling(tmp_path: Path) -> None:
    plain = made(tmp_path, shuffle=False)
    one, again, other = (made(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert plain != one != other
    assert Counter(map(tuple, plain)) == Counter(map(tuple, one)) == Counter(map(tuple, other))
    assert made(tmp_path, seed=1, num_proc=2) == one


def test_max_contexts(tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield from RECORDS

    plain = packed()
    for num_proc in (1, 2):
        stream = datasets.IterableDataset.from_generator(endless)
        limit = {"max_contexts": 7, "num_proc": num_proc}
        assert made(tmp_path, stream, shuffle=False, **limit) == plain[:7], "no more is read than is needed"
        assert sorted(made(tmp_path, stream, **limit)) == sorted(plain[:7])
    assert made(tmp_path, max_contexts=10**6, shuffle=False) == plain


def test_metadata(tmp_path: Path) -> None:
    import transformers

    policy = {"prepend_bos": False, "begin_batch_token": "eos", "begin_sequence_token": 7}
    (tmp_path / "book.txt").write_text("".join(TEXTS))
    dataset = {"path": str(tmp_path / "book.txt"), "context_size": 16} | policy
    result = saekit.pretokenize(options(tmp_path / "made", dataset=dataset, seed=3))
    said = json.loads((tmp_path / "made/saekit.json").read_text())
    from saekit.data.vocabulary import Vocabulary

    rows = datasets.load_from_disk(str(tmp_path / "made"))["document_ids"]
    assert said == Vocabulary.of_tokenizer(tokenizer()).metadata() | {
        "documents": max(map(max, rows)) + 1,
        "saekit_version": saekit.__version__, "datasets_version": datasets.__version__,
        "transformers_version": transformers.__version__, "tokenizer": str(TOKENIZER), "vocab_size": 2048,
        "token_ids": {"begin_batch": 0, "begin_sequence": 7, "separator": 0}, "data_files": [],
        "dataset": str(tmp_path / "book.txt"), "dataset_name": None, "split": "train", "revision": None,
        "column": "text", "context_size": 16, "sequence_separator_token": "bos", "shuffle": True, "seed": 3,
        "contexts": result.contexts, "disable_concat_sequences": False, "chat_template": False,
    } | policy  # fmt: skip
    made(tmp_path, shuffle=False)
    said = json.loads(next(tmp_path.glob("made-*/saekit.json")).read_text())
    assert (said["dataset"], said["shuffle"], said["seed"]) == (None, False, None)


def recorded(model: Any) -> list[Any]:
    """The tokens of every forward of a model from now on."""
    seen: list[Any] = []
    run = model.run_with_hooks

    def heard(given: Any, **more: Any) -> Any:
        seen.append(more.get("tokens", given))  # those of a forward that begins inside
        return run(given, **more)

    model.run_with_hooks = heard
    return seen


def training(tmp_path: Path, folder: object, **sections: Any) -> dict[str, Any]:
    """A run on the contexts in ``folder`` whose data is set by nothing else."""
    config = run_config(tmp_path / "runs", evals={"split": None}, training={"training_tokens": 1000}, **sections)
    return config | {"dataset": {"path": str(folder)} | sections.get("dataset", {})}


def test_training_needs_nothing_else(tmp_path: Path) -> None:
    """Context size and policies come from the data, and every context is used as it is."""
    policy = {"prepend_bos": False, "begin_batch_token": 5, "begin_sequence_token": 7, "sequence_separator_token": 9}
    saekit.pretokenize(options(tmp_path / "c", dataset={"context_size": 17} | policy), dataset=RECORDS)
    contexts, owners = rows(tmp_path / "c"), datasets.load_from_disk(str(tmp_path / "c"))["document_ids"]
    assert len(contexts) > 40
    model = hooked_transformer()
    seen = recorded(model)
    result = saekit.train(training(tmp_path, tmp_path / "c", dataset={"on_exhausted": "stop"}), model=model)
    held_owners = {n for row, ids in zip(contexts, owners, strict=True) if row in result.held_out.tolist() for n in ids}
    assert result.corpus.context_size == 17
    assert result.held_out is not None
    assert len(result.held_out) == 4
    forwards = [tuple(row) for tokens in seen if tokens.shape == (8, 17) for row in tokens.tolist()]
    known = {tuple(row): set(ids) for row, ids in zip(contexts, owners, strict=True)}
    assert len(forwards) > 20
    assert not held_owners & set().union(*(known[row] for row in forwards)), "whole contexts, of other documents"
    order = [tuple(row) for row in contexts if tuple(row) in set(forwards)]
    assert forwards[:20] == order[:20]
    assert result.sae.info.metadata.items() >= {"context_size": 17, **policy}.items()


def test_contexts_are_packed_once(tmp_path: Path) -> None:
    """Pretokenizing contexts, to shuffle them anew or to push them, changes none of them."""
    policy = {"sequence_separator_token": 9, "begin_sequence_token": 7}
    saekit.pretokenize(options(tmp_path / "a", dataset=policy), dataset=RECORDS)
    again = options(tmp_path / "b", dataset={"path": str(tmp_path / "a"), "context_size": None}, shuffle=False)
    saekit.pretokenize(again)
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    assert json.loads((tmp_path / "b/saekit.json").read_text()).items() >= ({"context_size": 24} | policy).items()


@pytest.mark.parametrize("evals", [[], ["reconstruction"]])
def test_a_foreign_vocabulary_is_found_before_the_model_runs(tmp_path: Path, evals: list[str]) -> None:
    made(tmp_path)
    (folder,) = tmp_path.iterdir()
    backend = FakeBackend()  # which knows 128 tokens
    plugins = isolated_manager(fake_plugin("model_backends", build=lambda config, **more: backend), builtins=True)

    def refused(message: str, records: object = None, **stated: Any) -> None:
        config = training(tmp_path, folder, model={"backend": "test:fake"}, site={"hook_name": "hook_embed"})
        config["dataset"] |= stated
        config["evals"]["run"] = evals
        with pytest.raises(DataError, match=message):
            saekit.train(config, plugins=plugins, dataset=records)
        assert backend.forwards == []
        assert not (tmp_path / "runs").exists()

    refused("were made with a tokenizer of 2048 tokens, but the model 'fake' knows 128: pretokenize for this model")
    (folder / "saekit.json").write_text('{"context_size": 24}')
    largest = max(rows(folder)[0])
    assert largest > 127
    refused(f"document 0 holds the token id {largest}, but the vocabulary of the model 'fake' ends at 127")
    refused("document 0 holds the token id -1, but", [{"tokens": [5, -1]}] * 100, context_size=24)
    refused(
        "puts in the token id 300, but the vocabulary .* ends at 127",
        RECORDS,
        context_size=24,
        begin_sequence_token=300,
    )


def test_a_tokenizer_of_another_model_is_found_before_the_model_runs(tmp_path: Path) -> None:
    model = hooked_transformer()
    model.cfg.d_vocab = 1000
    seen = recorded(model)
    for run in (
        lambda: saekit.train(run_config(tmp_path / "runs"), model=model),
        lambda: saekit.pretokenize(options(tmp_path / "c", tokenizer=None), model=model, dataset=RECORDS),
    ):
        with pytest.raises(
            ModelError, match="tokenizer of 'custom' has 2048 tokens, but the model knows 1000: they do"
        ):
            run()
    assert seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"path": "./nowhere"}, "there is no file or folder './nowhere' .dataset.path."),
        ({"path": "somebody/nothing"}, "'somebody/nothing' .split 'train'. cannot be opened"),
        ({"path": "FOLDER", "split": "test"}, "has no split 'test'; it has 'dev'"),
        ({"path": "FOLDER", "split": "dev", "column": "body"}, "has no column 'body'; it has 'text', 'note', 'n'"),
        ({"path": "FOLDER", "split": "dev", "column": "n"}, "column 'n' of the dataset .* holds int"),
    ],
)
def test_wrong_data_is_found_before_the_model_runs(tmp_path: Path, dataset: dict, message: str) -> None:
    datasets.DatasetDict(dev=datasets.Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "d")
    dataset = {"context_size": 24} | {k: str(tmp_path / "d") if v == "FOLDER" else v for k, v in dataset.items()}
    model = hooked_transformer()
    seen = recorded(model)
    for evals in ([], ["reconstruction"]):
        with pytest.raises(DataError, match=message):
            saekit.train(run_config(tmp_path / "r", dataset=dataset, evals={"split": None, "run": evals}), model=model)
    with pytest.raises(DataError, match=message):
        saekit.pretokenize(options(tmp_path / "c/c", dataset=dataset))
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("changes", "dataset", "error", "message"),
    [
        ({"tokenizer": "./nowhere"}, RECORDS, ModelError, "the tokenizer './nowhere' cannot be loaded: "),
        ({}, [{"text": ""}] * 9, DataError, "the data does not fill one context of 24 tokens"),
        ({}, [{"text": None}] * 9, DataError, "the data does not fill one context of 24 tokens"),
        ({}, [{"text": "short"}], DataError, "the data does not fill one context of 24 tokens"),
        ({}, [], DataError, "the dataset has no documents"),
        ({"dataset": {"begin_sequence_token": "sep"}}, RECORDS, DataError, "tokenizer's sep token, and it has none"),
        ({"dataset": {"begin_sequence_token": 5000}}, RECORDS, DataError, "puts in the token id 5000, .*ends at 2047"),
        ({"num_proc": 2}, [*RECORDS, {"text": None}, {"text": 7}], DataError, "document 211 has int 7 in column"),
        ({"num_proc": 2}, [*TOKENIZED, {"tokens": None}, {"tokens": [9999]}], DataError, "document 211 holds .*9999"),
        ({"dataset": {"context_size": 129}, "tokenizer": None}, RECORDS, ConfigError, "takes at most 128 tokens"),
        ({"folder": None}, RECORDS, ConfigError, "folder: is missing: name a folder to write, a hub_repo_id"),
        ({"hub_revision": "x"}, RECORDS, ConfigError, "hub_revision: says where to push, but there is no hub_repo_id"),
        ({"hub_repo_id": "contexts"}, RECORDS, ConfigError, "must be owner/name, found 'contexts': it has no owner"),
        ({"hub_repo_id": "a/b/c"}, RECORDS, ConfigError, "hub_repo_id: must be owner/name, found 'a/b/c': Repo id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_leaves_nothing(
    tmp_path: Path, changes: dict, dataset: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        saekit.pretokenize(options(tmp_path / "new/er/c", **changes), dataset=dataset)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(ConfigError, match=r"folder: '.*/c' exists already; choose another, or remove it"):
        saekit.pretokenize(options(tmp_path / "c", tokenizer="./nowhere"), dataset=RECORDS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the contexts to '.*/file/c': (Not a directory|File exists)"):
        saekit.pretokenize(options(tmp_path / "file/c"), dataset=RECORDS)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = hooked_transformer()
    model.tokenizer = None
    with pytest.raises(ModelError, match="the model 'custom' has no Hugging Face tokenizer; name one"):
        saekit.pretokenize(options(tmp_path / "c", tokenizer=None), model=model, dataset=RECORDS)
    assert saekit.pretokenize(options(tmp_path / "c", tokenizer=None), model=hooked_transformer(), dataset=RECORDS)
    assert json.loads((tmp_path / "c/saekit.json").read_text())["vocab_size"] == 2048


def test_the_tokenizer_of_a_model_that_ships_with_a_plugin(tmp_path: Path) -> None:
    saekit.pretokenize(options(tmp_path / "c", tokenizer="saekit/tiny-python", max_contexts=5), dataset=RECORDS)
    saekit.pretokenize(options(tmp_path / "d", max_contexts=5), dataset=RECORDS)
    made, same = (json.loads((tmp_path / name / "saekit.json").read_text()) for name in "cd")
    assert made == same | {"tokenizer": "saekit/tiny-python"}


def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saekit.pretokenize(options(tmp_path / "a", verbose=True, max_contexts=5), dataset=RECORDS)
    shown = capfd.readouterr()
    assert "5/5 contexts" in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1), "and nothing by the libraries"
    saekit.pretokenize(options(tmp_path / "b", num_proc=2), dataset=RECORDS)
    assert capfd.readouterr() == ("", ""), "verbose off is silent"


def test_contexts_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Its BOS has another id, so every context would be cut anew."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(97 + n): n for n in range(26)} | {"<s>": 26}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), bos_token="<s>"
    )
    tokenizer.save_pretrained(tmp_path / "other")
    folder = tmp_path / "contexts"
    saekit.pretokenize(
        {
            "tokenizer": str(tmp_path / "other"),
            "folder": str(folder),
            "dataset": {"context_size": 16},
            "verbose": False,
        },
        dataset=[{"text": "b"}] * 900,
    )
    said = r"were made with the tokenizer '.*other', and the tokens that were put in are \{'begin_batch': 26.*they are "
    with pytest.raises(DataError, match=said):
        saekit.train(training(tmp_path, folder))
    made = json.loads((folder / "saekit.json").read_text())
    del made["token_ids"]  # as in what others have written
    (folder / "saekit.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match=r"begins with the token 26, but for the model .* contexts begin with 0"):
        saekit.train(training(tmp_path, folder))
