"""Sets of tokens: by what they look like, by part of speech, from files; and the commands that take them."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pandas as pd
import pytest
import torch

import saekit
from saekit.analysis import tsea
from saekit.analysis.token_sets import vocabulary_of
from saekit.commands import analyzing
from saekit.commands.asked import feature_numbers, lines_of, named_patterns
from saekit.testing import FakeBackend

TEXTS = [
    "<|end|>",
    " the",
    "The",
    " THE",
    "12",
    " 7",
    "!",
    " ...",
    " Mary",
    "mary",
    "Xaver",
    " ",
    "\n",
    "don't",
    "\ufffd",
    "é",
    "Élan",
    "runs",
]


def named(ids: Any) -> list[str]:
    return [TEXTS[number] for number in ids]


def test_sets_by_what_tokens_look_like() -> None:
    sets = tsea.token_sets(TEXTS)
    assert named(sets["letter_t"]) == [" the", "The", " THE"]
    assert named(sets["letter_d"]) == [], "of letters alone"
    assert [name for name in sets if name.startswith("letter_")] == [
        f"letter_{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    assert named(sets["capitalized"]) == ["The", " Mary", "Xaver", "Élan"]
    assert named(sets["all_caps"]) == [" THE"]
    assert named(sets["digits"]) == ["12", " 7"]
    assert named(sets["punctuation"]) == ["!", " ..."]
    assert named(sets["starts_with_space"]) == [" the", " THE", " 7", " ...", " Mary"]
    assert named(sets["names"]) == [" Mary"]
    assert named(tsea.token_sets(TEXTS, "names", names=["XAVER", "mary"])["names"]) == [" Mary", "Xaver"]


def test_sets_by_regular_expressions() -> None:
    sets = tsea.token_sets(TEXTS, (), regex={"spaced": r" \w", "s": r".*s$"})
    assert list(sets) == ["spaced", "s"]
    assert list(tsea.token_sets(TEXTS, regex={"spaced": r" \w"})) == [*tsea.token_sets(TEXTS), "spaced"]
    assert named(sets["spaced"]) == [" the", " THE", " 7", " Mary"]
    assert named(sets["s"]) == ["runs"]
    with pytest.raises(saekit.ConfigError, match="regex: 'bad' is no regular expression: '\\['"):
        tsea.token_sets(TEXTS, regex={"bad": "["})
    with pytest.raises(saekit.ConfigError, match="knows no kind 'nouns'; there are first_letter, capitals"):
        tsea.token_sets(TEXTS, ["nouns"])


def test_the_vocabulary_is_the_models() -> None:
    assert vocabulary_of(FakeBackend())[65] == "A"
    assert len(vocabulary_of(FakeBackend())) == 128
    with pytest.raises(saekit.ConfigError, match="must be the texts of a vocabulary"):
        vocabulary_of("gpt2")


# ---- parts of speech


def test_parts_of_speech_by_a_tagger_that_was_trained_here() -> None:
    perceptron = pytest.importorskip("nltk.tag.perceptron")
    tagger = perceptron.PerceptronTagger(load=False)
    words = [("the", "DT"), ("runs", "VBZ"), ("12", "CD"), ("Mary", "NNP"), ("don't", "VB"), ("sits", "VBZ")]
    tagger.train([[word] for word in words] * 4, nr_iter=5)
    sets = tsea.token_sets(TEXTS, "part_of_speech", tagger=tagger)
    assert " the" in named(sets["pos_DT"])
    assert " Mary" in named(sets["pos_NNP"])
    tagged = sorted(text for name in sets for text in named(sets[name]))
    assert tagged == sorted(text for text in TEXTS if any(letter.isalpha() for letter in text)), "each once"


def test_a_tagger_without_its_data_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(saekit.ConfigError, match=r"python -m nltk\.downloader averaged_perceptron_tagger_eng"):
        tsea.token_sets(TEXTS, "part_of_speech")


def test_without_nltk_it_is_said_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "nltk":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "nltk", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(saekit.ConfigError, match=r"pip install 'saekit\[tagger\]'"):
        tsea.token_sets(TEXTS, "part_of_speech")


# ---- files


def test_sets_from_files(tmp_path: Path) -> None:
    given = {"words": [" the", "runs"], "ids": [4, 5, 5], "spaced": {"regex": r" \w"}}
    (tmp_path / "sets.json").write_text(json.dumps(given), encoding="utf-8")
    (tmp_path / "sets.toml").write_text(
        'words = [" the", "runs"]\nids = [4, 5, 5]\nspaced.regex = " \\\\w"\n', encoding="utf-8"
    )
    (tmp_path / "mine.txt").write_text(" the\n\nÉlan\n", encoding="utf-8")
    for name in ("sets.json", "sets.toml"):
        sets = tsea.read_token_sets(tmp_path / name, TEXTS)
        assert {one: named(ids) for one, ids in sets.items()} == {
            "words": [" the", "runs"], "ids": ["12", " 7"], "spaced": [" the", " THE", " 7", " Mary"]
        }  # fmt: skip
    assert {one: named(ids) for one, ids in tsea.read_token_sets(tmp_path / "mine.txt", TEXTS).items()} == {
        "mine": [" the", "Élan"]
    }


def test_texts_that_are_no_token_are_told(tmp_path: Path) -> None:
    place = tmp_path / "mine.txt"
    place.write_text(" the\ndog\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"mine\.txt: 1 of the 2 texts of 'mine' are no token of the model: 'dog'"):
        assert named(tsea.read_token_sets(place, TEXTS)["mine"]) == [" the"]
    place.write_text("dog\ncat\n", encoding="utf-8")
    with pytest.raises(saekit.ConfigError, match="2 of the 2 texts .* No other is left"):
        tsea.read_token_sets(place, TEXTS)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("a.json", "{", "is no JSON"), ("a.toml", "= 1", "is no TOML"), ("a.json", "[1]", "must have names of sets"),
     ("a.json", '{"a": 3}', "'a' must be a list of texts"), ("a.json", '{"a": [99]}', "has the id 99"),
     ("a.json", '{"a": [true]}', "'a' must be a list of texts"),
     ("a.json", '{"a": {"regex": "["}}', "no regular expression")],
)  # fmt: skip
def test_bad_files_are_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(saekit.ConfigError, match=told):
        tsea.read_token_sets(tmp_path / name, TEXTS)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(saekit.ConfigError, match="cannot be read: No such file"):
        tsea.read_token_sets(tmp_path / "none.txt", TEXTS)


# ---- commands


@pytest.mark.parametrize(("text", "numbers"), [("1,2,5-8", [1, 2, 5, 6, 7, 8]), ("all", "all"), (" 3 - 3 , 1", [3, 1])])
def test_numbers_of_features(text: str, numbers: object) -> None:
    assert feature_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "1,,2", "5-2", "-3", "x", "1.5"])
def test_bad_numbers_of_features_are_told(text: str) -> None:
    with pytest.raises(saekit.ConfigError, match="must be numbers such as 1,2,5-20"):
        feature_numbers(text)


def test_named_patterns_and_lines(tmp_path: Path) -> None:
    assert named_patterns(["a=b=c", "x= y"]) == {"a": "b=c", "x": " y"}
    assert named_patterns([]) is None
    with pytest.raises(saekit.ConfigError, match="NAME=PATTERN, found 'ing'"):
        named_patterns(["ing"])
    (tmp_path / "names").write_text("A\n\n B \n", encoding="utf-8")
    assert lines_of(str(tmp_path / "names")) == ["A", "B"]
    with pytest.raises(saekit.ConfigError, match="cannot be read"):
        lines_of(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the embedded model, as it is saved."""
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 128, "d_sae": 30})
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(30, 128, generator=torch.Generator().manual_seed(0)))
    sae.log_sparsity = torch.full((30,), -2.0)
    site = saekit.Site(hook_name="blocks.1.hook_resid_post")
    about = {"model_name": "saekit/tiny-python", "hook_name": site.hook_name}
    sae.info = attrs.evolve(sae.info, sites=saekit.Sites.one(site), metadata=about)
    place = tmp_path_factory.mktemp("saved") / "sae"
    sae.save(place)
    return place


def test_the_command_writes_a_page_and_tables(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from saekit.cli import app

    (tmp_path / "mine.txt").write_text("self\n return\n", encoding="utf-8")
    out = tmp_path / "out"
    command = ["tsea", str(folder), "--sets", "digits", "--sets", str(tmp_path / "mine.txt"), "--regex", "under=_",
               "--features", "3,7-9", "--permutations", "19", "--out", str(out)]  # fmt: skip
    assert not app(command, standalone_mode=False)
    table = pd.read_csv(out / "tsea.csv")
    assert sorted(set(table["set"])) == ["digits", "mine", "under"]
    assert sorted(set(table["feature"])) == [3, 7, 8, 9]
    told = capsys.readouterr().out
    assert "signed_score" in told
    assert str(out / "tsea.html") in told
    with pytest.raises(saekit.ConfigError, match="each say which features"):
        app([*command, "--random", "3"], standalone_mode=False)
    with pytest.raises(saekit.ConfigError, match="'nouns' is neither a file nor one of first_letter"):
        app(["tsea", str(folder), "--sets", "nouns"], standalone_mode=False)


def test_the_command_for_statistics(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from saekit.cli import app

    assert not app(["statistics", str(folder), "--out", str(tmp_path / "it.parquet")], standalone_mode=False)
    assert len(pd.read_parquet(tmp_path / "it.parquet")) == 30
    assert "30 features are in" in capsys.readouterr().out
    assert not app(["statistics", str(folder), "--no-logits"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "encoder_decoder_cosine" in told
    assert "no logit_mean, logit_std, logit_skewness, logit_kurtosis: not asked for" in told
    with pytest.raises(saekit.SaekitError, match=r"written as \.csv or \.parquet"):
        analyzing.write_table(pd.DataFrame(), tmp_path / "it.xlsx")


def test_sets_of_ones_own_from_python(folder: Path) -> None:
    given = {"mine": [5, 9]}
    found = saekit.token_set_enrichment(
        folder, given, regex={"under": "_"}, features=[1], permutations=0, verbose=False
    )
    assert list(found.sets) == ["mine", "under"]
    assert given == {"mine": [5, 9]}
    with pytest.raises(saekit.ConfigError, match="must be one SAE, found 2"):
        saekit.token_set_enrichment([folder, folder], verbose=False)
