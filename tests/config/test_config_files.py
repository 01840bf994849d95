"""Files as people write them: YAML 1.2, whole floats, keys twice, nesting, bombs, half characters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import saekit
from saekit.commands.terminal.arguments import source_of
from saekit.config.files import dump_config, load_config, parse_grid
from saekit.errors import ConfigError


def problem(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value), "it names the file"
    return str(caught.value)


def read(tmp_path: Path, name: str, text: str) -> saekit.TrainConfig:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_config(tmp_path / name)


def test_yaml_has_the_numbers_and_words_of_1_2(tmp_path: Path) -> None:
    config = read(
        tmp_path, "run.yaml",
        "training: {lr: 1e-4, seed: 0o17, training_tokens: 1e6, verbose: True, log_frequency: 0x10}\n"
        "model: {name: on}\ndataset: {path: yes, name: 2024-01-01, split: 1_000, revision: 12:30:45, column: ~}\n"
        "lr_schedule: {name: cosine, end: .5}\n",
    )  # fmt: skip
    training = config.training
    assert (training.lr, training.seed, training.training_tokens, training.log_frequency) == (1e-4, 15, 10**6, 16)
    assert (config.model.name, config.dataset.path, config.dataset.name) == ("on", "yes", "2024-01-01")
    assert (config.dataset.split, config.dataset.revision, config.dataset.column) == ("1_000", "12:30:45", None)
    assert read(tmp_path, "again.yaml", dump_config(config, "yaml")) == config
    assert read(tmp_path, "zero.yaml", "training: {seed: 010}").training.seed == 10
    found = problem(tmp_path, "bad.yaml", "training: {verbose: yes}")
    assert "training.verbose: expected true or false, found 'yes'" in found


def test_yaml_merges_and_aliases(tmp_path: Path) -> None:
    text = "model: &m {device: cpu}\ntraining:\n  <<: *m\n  lr: 1\nsae: {name: topk}\n"
    assert read(tmp_path, "run.yaml", text).training.device == "cpu"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '{"training": {"lr": 1, "lr": 2}, "model": {}, "model": {}}', "model, training.lr are there twice"),
        ("b.json", '{"trackers": [{"name": "wandb", "name": "jsonl"}]}', "trackers.0.name is there twice"),
        ("a.yaml", "training:\n  lr: 1\n  seed: 3\n  lr: 2\n", r"'lr' is there twice"),
        ("a.toml", "[training]\nlr = 1\nlr = 2\n", "Cannot overwrite a value (at line 3"),
    ],
)
def test_no_key_twice(tmp_path: Path, name: str, text: str, told: str) -> None:
    found = problem(tmp_path, name, text)
    assert told in found
    assert name != "a.yaml" or "line 4, column 3" in found


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", "[" * 9000 + "]" * 9000, "nested too deeply"),
        ("b.json", '{"model":' * 200 + "1" + "}" * 200, "nested more than 50 levels deep"),
        ("a.yaml", "[" * 5000, "nested too deeply"),
        ("b.yaml", '{"model": ' * 80 + "1" + "}" * 80, "nested more than 50 levels deep"),
        ("a.toml", "model = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("b.toml", ".".join(["model"] * 5000) + " = 1", "nested"),
        ("c.toml", ".".join(["model"] * 90) + " = 1", "nested more than 50 levels deep"),
        ("bomb.yaml", BOMB, "holds more than 1,000,000 values"),
        ("self.yaml", "model: &a\n  name: *a\n", "nested more than 50 levels deep"),
        ("half.json", '{"model": {"name": "\\ud800"}}', r"found half of a surrogate pair in '\ud800'"),
        ("key.json", '{"\\ud800": 1}', r"\ud800: is not an option"),
        ("digits.json", '{"training": {"seed": ' + "9" * 5000 + "}}", "is not valid JSON"),
        ("digits.toml", "training = {seed = " + "9" * 5000 + "}", "is not valid TOML"),
    ],
)
def test_hostile_texts(tmp_path: Path, name: str, text: str, told: str) -> None:
    found = problem(tmp_path, name, text)
    assert told in found
    assert len(found) < 1500
    found.encode()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sae=" + "[" * 9000, "^sae: "),
        (".".join(["model"] * 5000) + "=1", "is not an override: no option lies 5000 levels deep"),
        ("training.seed=" + "9" * 5000, "^training.seed: expected a whole number"),
        ("model.name=\ud800", "^model.name: expected a text, found half of a surrogate pair"),
        ("model.name=[[1]]", "^model.name: expected a text"),
        ("training.lr=1\nseed = 3", r"^training.lr: expected a number, found '1\\nseed = 3'"),
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_hostile_overrides(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load_config({}, [override])
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("training.lr", "^'training.lr' is not an override; write section.option=value"),
        ("training.lr = 1e-4", "write it without spaces: training.lr=1e-4$"),
        ("training.lr =1e-4", "write it without spaces: training.lr=1e-4$"),
        ("training.lr= 1e-4", "'1e-4' is not an override; write it without spaces: training.lr=1e-4$"),
        ("training.seed=3 training.lr = 1e-4 sae.d_sae=8", "write it without spaces: training.lr=1e-4$"),
        ("training.lr =", "write it without spaces: training.lr=value$"),
        ("training.lr sae.k=3", "^'training.lr' is not an override; write section.option=value"),
    ],
)
def test_overrides_with_spaces(words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config({}, words.split())


def test_overrides_with_spaces_where_there_is_no_file() -> None:
    assert source_of("training.lr", ["=", "1e-4"]) == ({}, ["training.lr", "=", "1e-4"])
    assert source_of("run.toml", ["training.lr", "=", "1e-4"])[0] == "run.toml"


def test_a_section_that_is_begun_twice(tmp_path: Path) -> None:
    found = problem(tmp_path, "run.toml", 'checkpoints.buffer = "recipe"\n[checkpoints]\nname = "x"\n')
    assert found.endswith("A section is begun once: write all its options below one [section]")


def test_hostile_objects() -> None:
    table: dict[str, Any] = {}
    table["model"] = table
    for overrides in ([], ["training.lr=1"]):
        with pytest.raises(ConfigError, match="is nested more than 50 levels deep"):
            load_config(table, overrides)
    with pytest.raises(ConfigError, match="is nested more than 50 levels deep"):
        saekit.grid(table, {"training.lr": [1]})
    with pytest.raises(ConfigError, match=r"^model.name: expected a text, found b'"):
        load_config({"model": {"name": b"x" * 10**6}})
    assert parse_grid(["a.b=" + "[" * 5000]) == {"a.b": ["[" * 5000]}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".toml", "a\0b.toml", "/" + "y/" * 3000 + "z.toml"):
        with pytest.raises(ConfigError, match="there is no configuration file"):
            load_config(name)
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin.toml is not valid TOML: 'utf-8' codec"):
        load_config(tmp_path / "latin.toml")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"training": {"lr": 1}}')
    assert load_config(tmp_path / "bom.json").training.lr == 1.0
    secret = tmp_path / "secret.toml"
    secret.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *a, **k: exec("raise PermissionError(13, 'Permission denied')"))
        with pytest.raises(ConfigError, match=r"secret.toml cannot be read: Permission denied"):
            load_config(secret)


def test_one_problem_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("training.lr = 'fast'")
    with pytest.raises(ConfigError, match=rf"^training.lr: expected a number, found 'fast' \(in {path}\)$"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"^training.lr: expected a number, found 'fast'$"):
        load_config({"training": {"lr": "fast"}})
    path.write_text("training.lr = 1")
    with pytest.raises(ConfigError, match=rf"\(in {path}, with the changes that were given\)$"):
        load_config(path, ["training.seed=x"])


@pytest.mark.skipif(sys.platform == "win32", reason="home is said by another variable")
def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every option that holds a path, and in every call that takes one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('model.name = "~/model"\ncheckpoints.folder = "~/runs"')
    table = {
        "dataset": {"path": "~/text.txt", "data_files": ["~/a", "b~"]},
        "training": {"from_pretrained_path": Path("~/sae")},
        "activations": {"cache": {"folder": "~"}, "source": {"name": "cached", "folder": "~/cache"}},
        "model": {"backend": {"name": "HookedMamba", "tokenizer": "~/tok"}},
    }
    config = load_config(table)
    assert config.dataset.path == f"{tmp_path}/text.txt"
    assert config.dataset.data_files == (f"{tmp_path}/a", "b~")
    assert config.training.from_pretrained_path == f"{tmp_path}/sae"
    assert config.activations.cache.folder == str(tmp_path)
    assert config.activations.source.options.folder == f"{tmp_path}/cache"
    assert config.model.backend.options.tokenizer == f"{tmp_path}/tok"
    config = load_config("~/run.toml")
    assert (config.model.name, config.checkpoints.folder) == (f"{tmp_path}/model", f"{tmp_path}/runs")
    assert saekit.grid("~/run.toml", {"training.lr": [1.0]})[0].model.name == f"{tmp_path}/model"
    made = saekit.config.PretokenizeConfig(folder="~/contexts", tokenizer="~nobody-there/x")
    assert (made.folder, made.tokenizer) == (f"{tmp_path}/contexts", "~nobody-there/x")
    with pytest.raises(ConfigError, match=r"^dataset.path: must be a path, which holds no null characters"):
        load_config({"dataset": {"path": "a\0b"}})
    for call in (saekit.SAE.load, saekit.resume):
        with pytest.raises(saekit.SaekitError, match=rf"{tmp_path}/nothing"):
            call("~/nothing")
