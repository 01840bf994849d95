"""What is held out is not trained on, and what is wrong with the text is said with numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.tiny import TOKENIZER, hooked_transformer, run_config

import saekit
from saekit.config import DatasetConfig, EvalsConfig
from saekit.data import Corpus
from saekit.data.packed import held_documents
from saekit.errors import DataError
from saekit.testing import FakeBackend

pytestmark = pytest.mark.usefixtures("short_rehearsals")

TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * (n % 7) for n in range(300)]
RECORDS = [{"text": text} for text in TEXTS]


def contexts(folder: Path, records: Any = RECORDS, /, **more: Any) -> Path:
    config = {"tokenizer": str(TOKENIZER), "folder": str(folder), "verbose": False, "dataset": {"context_size": 24}}
    saekit.pretokenize(config | more, dataset=records)
    return folder


def corpus(folder: Path, **evals: Any) -> Corpus:
    return Corpus.of(DatasetConfig(path=str(folder), on_exhausted="stop"), EvalsConfig(**evals))


def backend() -> Any:
    from saekit.config import ModelConfig

    return saekit.default_manager().build(
        "model_backends", "HookedTransformer", model=ModelConfig(), loaded=hooked_transformer()
    )


def noted(folder: Path) -> dict[tuple[int, ...], set[int]]:
    """The documents of each context."""
    rows = datasets.load_from_disk(str(folder))
    return {tuple(row["input_ids"]): set(row["document_ids"]) for row in rows}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_pretokenized_contexts_say_which_documents_they_are_from(tmp_path: Path, num_proc: int) -> None:
    folder = contexts(tmp_path / "c", num_proc=num_proc, shuffle=False)
    rows = datasets.load_from_disk(str(folder))["document_ids"]
    assert json.loads((folder / "saekit.json").read_text())["documents"] == max(map(max, rows)) + 1 <= 300
    flat = [number for row in rows for number in row]
    assert flat == sorted(flat), "in the text's order"
    # Every seventh text is empty, and so is no document; the last ones may not fill a context.
    assert set(range(295)) - set(flat) == set(range(0, 295, 7))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contexts as most tests want them, which only read them."""
    return contexts(tmp_path_factory.mktemp("shuffled") / "c")


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contexts(tmp_path_factory.mktemp("in_order") / "c", shuffle=False)


@pytest.mark.parametrize("every", [2, 5, 20])
@pytest.mark.parametrize("made", ["in_order", "shuffled"])
def test_whole_documents_are_held_out_of_contexts(request: pytest.FixtureRequest, every: int, made: str) -> None:
    folder = request.getfixturevalue(made)
    documents, model = noted(folder), backend()
    held_rows = corpus(folder, held_out_every=every, n_contexts=10_000).held_out(model, seed=0).tolist()
    trained_rows = corpus(folder, held_out_every=every).contexts(model).take(10_000).tokens.tolist()
    held, trained = (set().union(*(documents[tuple(row)] for row in rows)) for rows in (held_rows, trained_rows))
    assert not held & trained
    assert 0.4 / every < len(held_rows) / len(documents) < 2 / every
    lost = len(documents) - len(held_rows) - len(trained_rows)
    assert 0 < lost <= 2 * 64
    assert lost / len(documents) < 0.25 / every + 0.03, "few are for neither side"


def test_the_part_that_is_held_out() -> None:
    """It is near what was asked for, whatever the number of documents and contexts."""

    class Made:
        documents, contexts = 0, 0

    for documents in (20, 27, 39, 45, 300, 10_000):
        for number in (10, 1000, 100_000):
            for every in (2, 5, 20):
                Made.documents, Made.contexts = documents, number
                held = held_documents(Made, every)  # type: ignore[arg-type]
                chosen = {n for n in range(documents) if held(n)}
                assert 1 / every <= len(chosen) / documents < 2 / every, (documents, number, every)
                runs = sum(n - 1 not in chosen for n in chosen)
                assert runs <= max(number // (8 * every), 1), "few of them, for contexts are lost at their ends"


def test_a_run_on_contexts_and_its_cache_hold_out_documents(tmp_path: Path, shuffled: Path) -> None:
    folder, documents = shuffled, noted(shuffled)
    config = run_config(tmp_path / "runs", evals={"split": None, "n_contexts": 4})
    config["dataset"] = {"path": str(folder), "on_exhausted": "stop"}
    config["training"] |= {"training_tokens": 4000}
    config["activations"]["cache"] = {"folder": str(tmp_path / "cache"), "tokens": 4000}
    result = saekit.train(config, model=hooked_transformer())
    assert result.held_out is not None
    held = set().union(*(documents[tuple(row)] for row in result.held_out.tolist()))
    manifest = saekit.cache_activations(config, model=hooked_transformer())
    assert "whole documents" in manifest.identity["evals.held_out_every"]
    cached = set()
    for shard in (tmp_path / "cache").rglob("tokens.safetensors"):
        from safetensors.torch import load_file

        for row in load_file(shard)["token_ids"].tolist():
            cached |= documents[tuple(row)]
    assert held
    assert cached
    assert not held & cached


def test_contexts_that_are_packed_again_keep_their_documents(tmp_path: Path, shuffled: Path) -> None:
    first = shuffled
    again = {"folder": str(tmp_path / "b"), "tokenizer": str(TOKENIZER), "verbose": False, "seed": 7}
    saekit.pretokenize(again | {"dataset": {"path": str(first)}})
    assert noted(tmp_path / "b") == noted(first)
    one, two = (json.loads((folder / "saekit.json").read_text()) for folder in (first, tmp_path / "b"))
    assert one["documents"] == two["documents"]


def without_documents(whole: Path, folder: Path) -> Path:
    """As an older version wrote it."""
    datasets.load_from_disk(str(whole)).remove_columns("document_ids").save_to_disk(folder)
    made = json.loads((whole / "saekit.json").read_text())
    (folder / "saekit.json").write_text(json.dumps({k: v for k, v in made.items() if k != "documents"}))
    return folder


def test_contexts_whose_documents_nobody_noted_are_a_warning_with_the_numbers(tmp_path: Path, shuffled: Path) -> None:
    config = run_config(tmp_path / "runs", evals={"split": None, "n_contexts": 4})
    config["dataset"] = {"path": str(without_documents(shuffled, tmp_path / "c"))}
    said = "the 4 held-out contexts are single ones of '.*/c', one in 20, and saekit.json does not say which documents"
    with pytest.warns(RuntimeWarning, match=said):
        result = saekit.train(config, model=hooked_transformer())
    rows = datasets.load_from_disk(str(tmp_path / "c"))["input_ids"]
    assert all(row in [list(row) for row in rows][19::20] for row in result.held_out.tolist())
    found = saekit.plan(config, model=hooked_transformer())
    assert sum("the 4 held-out contexts are single ones" in text for text in found.warnings) == 1
    again = {"folder": str(tmp_path / "b"), "tokenizer": str(TOKENIZER), "verbose": False}
    saekit.pretokenize(again | {"dataset": {"path": str(tmp_path / "c")}})
    assert "document_ids" not in datasets.load_from_disk(str(tmp_path / "b")).column_names, "nothing is invented"


def test_too_few_documents_to_hold_out_whole_ones(tmp_path: Path) -> None:
    folder = contexts(tmp_path / "c", [{"text": text * 50} for text in TEXTS[1:7]])
    config = run_config(tmp_path / "runs", evals={"split": None, "n_contexts": 4})
    config["dataset"] = {"path": str(folder)}
    said = "the 4 held-out contexts are single ones .* they are from 6 documents in all, too few to hold out one in"
    with pytest.warns(RuntimeWarning, match=said):
        saekit.train(config, model=hooked_transformer())
    config["evals"]["held_out_every"] = 3
    assert len(saekit.train(config, model=hooked_transformer()).held_out) == 4


def test_a_column_of_documents_that_is_gone_or_damaged(tmp_path: Path, shuffled: Path) -> None:
    rows = datasets.load_from_disk(str(shuffled))
    made = (shuffled / "saekit.json").read_text()
    rows.remove_columns("document_ids").save_to_disk(tmp_path / "gone")
    (tmp_path / "gone/saekit.json").write_text(made)
    with pytest.raises(DataError, match="has no column 'document_ids', which is said to have the documents"):
        corpus(tmp_path / "gone").contexts(backend())
    rows.remove_columns("document_ids").add_column("document_ids", ["x"] * len(rows)).save_to_disk(tmp_path / "bad")
    (tmp_path / "bad/saekit.json").write_text(made)
    with pytest.raises(
        DataError, match="document 0 of .* has .*'x'.* in column 'document_ids', expected a list of doc"
    ):
        corpus(tmp_path / "bad").contexts(backend()).take(1)


def small_run(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    base = {"evals": {"split": None, "n_contexts": 4}, "training": {"training_tokens": 600}}
    return run_config(tmp_path / "runs", **base | sections)


def planned(config: dict[str, Any], dataset: object, words: str) -> list[str]:
    """What a plan says with these words among its warnings."""
    found = saekit.plan(config, model=hooked_transformer(), dataset=dataset)
    return [text for text in found.warnings if words in text]


def test_fewer_eval_contexts_than_asked_for(tmp_path: Path) -> None:
    config = small_run(tmp_path, evals={"split": None, "n_contexts": 64})
    records = [{"text": text} for text in TEXTS[:80]]
    with pytest.warns(RuntimeWarning, match="evals.n_contexts") as caught:
        result = saekit.train(config, model=hooked_transformer(), dataset=records)
    said = f"the held-out text fills {len(result.held_out)} contexts of 32 tokens, and 64 were asked for"
    assert len(result.held_out) < 20
    assert str(caught[0].message).startswith(said)
    assert planned(config, records, said) == [str(caught[0].message)]


def test_a_text_that_is_read_very_often(tmp_path: Path) -> None:
    """By a run, which counts, and by a plan; not when few readings are enough, whatever the buffer reads ahead."""
    config = small_run(tmp_path, evals={"run": []}, training={"training_tokens": 4000})
    records = [{"text": "def f(x):\n    return x\n" * 5}] * 3
    with pytest.warns(RuntimeWarning, match=r"the text has \d+ tokens, and training takes 4,000 .*is read \d+ times"):
        result = saekit.train(config, model=hooked_transformer(), dataset=records)
    assert result.metrics["details/n_training_tokens"] == 4000
    assert len(planned(config, records, " times. Train on fewer")) == 1
    enough = [{"text": "def f(x):\n    return x\n" * 50}] * 3
    saekit.train(config, model=hooked_transformer(), dataset=enough)
    assert not planned(config, enough, " times. Train on fewer")
    stops = config | {"dataset": {"context_size": 32, "on_exhausted": "stop"}}
    saekit.train(stops, model=hooked_transformer(), dataset=records)
    assert not planned(stops, records, " times. Train on fewer")


def test_a_cache_that_is_read_very_often(tmp_path: Path) -> None:
    config = small_run(tmp_path, evals={"run": []}, training={"training_tokens": 6400})
    config["activations"]["cache"] = {"folder": str(tmp_path / "cache"), "tokens": 320}
    saekit.cache_activations(config, model=hooked_transformer())
    config["activations"]["source"] = {"name": "cached", "folder": str(tmp_path / "cache")}
    said = "the activations are of 320 tokens, and training takes 6,400 .training.training_tokens., so each is read 20"
    with pytest.warns(RuntimeWarning, match=said):
        saekit.train(config, model=hooked_transformer())
    assert len(planned(config, None, " times. Train on fewer")) == 1
    saekit.train(config | {"training": config["training"] | {"training_tokens": 640}}, model=hooked_transformer())


def test_a_plan_estimates_a_long_text_by_its_beginning(tmp_path: Path) -> None:
    from saekit.planning.text import text_length

    def length(config: DatasetConfig, dataset: Any = None) -> Any:
        return text_length(Corpus.of(config, EvalsConfig(), dataset), FakeBackend())

    long = [{"text": "x" * 1000}] * 4000
    tokens, exact = length(DatasetConfig(), long)
    assert (abs(tokens / (4_000_000 * 0.95) - 1) < 0.06, exact) == (True, False)
    assert length(DatasetConfig(), long[:100]) == (95_000, True)
    (tmp_path / "a.txt").write_text("a line of text\n" * 100_000)
    tokens, exact = length(DatasetConfig(path=str(tmp_path / "a.txt")))
    assert (abs(tokens / (1_500_000 * 0.95) - 1) < 0.06, exact) == (True, False)
    stream = datasets.IterableDataset.from_generator(lambda: iter(long))
    assert length(DatasetConfig(), stream) is None


def test_the_loss_line_and_nothing_else_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An untrained model guesses, and a run says so before anything; the bytes are those of a silent run."""

    def run(name: str, *, verbose: bool, **sections: Any) -> Any:
        config = small_run(tmp_path, training={"training_tokens": 600, "verbose": verbose}, **sections)
        config["checkpoints"]["name"] = name
        torch.manual_seed(3)
        model = hooked_transformer()
        torch.manual_seed(4)
        before = torch.get_rng_state()
        result = saekit.train(config, model=model)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    for evals in ({"split": "heldout", "n_contexts": 2}, {"run": []}):
        silent = run(f"silent-{len(evals)}", verbose=False, evals=evals)
        assert capfd.readouterr().err == ""
        told = run(f"told-{len(evals)}", verbose=True, evals=evals)
        line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("model loss: "))
        assert "no better than guessing among 2,048 tokens (7.62)" in line
        for name in ("sae/sae_weights.safetensors", "sae/sparsity.safetensors"):
            assert (told.folder / name).read_bytes() == (silent.folder / name).read_bytes()
        step = next((told.folder / "checkpoints").glob("step-*")).name
        for file in (told.folder / "checkpoints" / step).rglob("*.safetensors"):
            other = silent.folder / "checkpoints" / step / file.relative_to(told.folder / "checkpoints" / step)
            assert file.read_bytes() == other.read_bytes(), file.name


def test_a_plan_has_the_loss_line_and_a_trained_model_has_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_run(
        tmp_path, evals={"split": "heldout", "n_contexts": 2}, training={"training_tokens": 600, "verbose": True}
    )
    found = saekit.plan(config, model=hooked_transformer())
    assert "no better than guessing among 2,048 tokens (7.62)" in found.facts["model loss"]
    assert not any("guessing" in text for text in found.warnings)
    assert "model loss" not in saekit.plan(config).facts
    capfd.readouterr()
    saekit.train(config)
    assert "model loss" not in capfd.readouterr().err
