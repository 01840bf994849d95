"""What messages say is to be written is taken as it stands."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import saekit_plugins

import saekit
from saekit.commands import jobs
from saekit.commands.terminal.plan import plan
from saekit.config.files import in_a_file, load_config
from saekit.errors import ConfigError
from saekit.planning.plan import Plan
from saekit.plugins.listing import detail_text
from saekit.reasons import alike

PLACES = [Path(module.__file__ or "").parent for module in (saekit, saekit_plugins)]
SPACED = re.compile(r"\b[a-z_]+(\.[a-z_]+)+ = (\"|'|true|false|\[|\{|\d)")


def _messages(path: Path) -> list[str]:
    """The texts in a file that are no docstrings, those that are joined as one."""
    if not SPACED.search(text := path.read_text(encoding="utf-8")):  # most: to parse them all takes seconds
        return []
    nodes = list(ast.walk(ast.parse(text)))
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = []
    for node in nodes:
        if not isinstance(node, (ast.Constant, ast.JoinedStr)) or id(node) in docs:
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in parts))
    return texts


def test_options_in_messages_have_no_spaces() -> None:
    """A shell would make three words of ``a.b = c``."""
    assert SPACED.search('write activations.source.refill = "needed"')
    wrong = {
        f"{path.name}: {text}"
        for place in PLACES
        for path in place.rglob("*.py")
        for text in _messages(path)
        if SPACED.search(text)
    }
    assert not wrong


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("activations.source.refill=needed", 'refill = "needed" below [activations.source]'),
        ("model.backend.fused=true", "fused = true below [model.backend]"),
        ("evals.run=[]", "run = [] below [evals]"),
    ],
)
def test_where_an_option_goes_in_a_file(tmp_path: Path, override: str, told: str) -> None:
    assert in_a_file(override) == told
    line, _, section = told.partition(" below ")
    (tmp_path / "run.toml").write_text(f"{section}\n{line}\n")
    assert load_config(tmp_path / "run.toml") == load_config({}, [override]) != load_config({})


def test_a_plan_says_where_its_advice_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from saekit.commands import preflight

    advised = Plan({"forwards": "12; Without the others: write activations.source.refill=needed; the last"}, {}, [], [])
    monkeypatch.setattr(jobs, "plan_after", lambda *given, **options: advised)
    monkeypatch.setattr(preflight, "of_training", lambda *given: SimpleNamespace(texts=[]))
    plan("training.seed=1", as_json=False, load=True, measure=False)
    assert 'in a file it is refill = "needed" below [activations.source])' in capsys.readouterr().out


def test_every_command_has_a_word_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that say nothing themselves."""
    from saekit import cli

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saekit.config.files.load_config", interrupted)
    assert cli.app(["plan", "run.toml"], standalone_mode=False) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_plugin_without_a_summary_is_told_by_its_key() -> None:
    facts = {"kind": "evals", "distribution": "mine", "version": "1", "plugin": "mine", "config": "mine.Config"}
    data = {"key": "mine:mean-l1", "missing": [], "problem": None, "options": [], **facts}
    assert detail_text({**data, "summary": ""}).splitlines()[0] == "mine:mean-l1"
    assert detail_text({**data, "summary": "the mean"}).splitlines()[0] == "mine:mean-l1: the mean"


@pytest.mark.parametrize(("tokens", "told"), [(100, "100 (less than a batch of 512)"), (512, "512"), (1000, "512")])
def test_training_of_less_than_a_batch_says_so(tokens: int, told: str) -> None:
    training = {"training_tokens": tokens, "train_batch_size_tokens": 512}
    assert load_config({"training": training}).training.batch_text == told


def test_calls_take_overrides_as_commands_do() -> None:
    for call in (saekit.train, saekit.plan, saekit.cache_activations, saekit.pretokenize):
        with pytest.raises(ConfigError, match=r"dataset\.context_siz: is not an option. Did you mean 'context_size'"):
            call({}, ["dataset.context_siz=3"])
        with pytest.raises(
            ConfigError, match=r"overrides must be a list of texts such as 'training.lr=1e-4', found 'a="
        ):
            call({}, "a=3")
    with pytest.raises(ConfigError, match="an option. Did you mean 'lr'"):
        saekit.train([{}, {}], overrides=["training.lrr=1"])


def test_hooks_of_other_blocks_are_told() -> None:
    known = [f"blocks.{n}.{hook}" for n in (0, 1, 2, 10) for hook in ("hook_resid_pre", "mlp.hook_post")]
    assert alike("blocks.11.hook_resid_pre", known) == (
        ". There are 4 of that kind: 'blocks.0.hook_resid_pre' to 'blocks.10.hook_resid_pre'"
    )
    assert alike("blocks.7.mlp.hook_post", known[3:4]) == ". There is 1 of that kind: 'blocks.1.mlp.hook_post'"
    assert alike("blocks.7.mlp.hook_pos", known).startswith(". Did you mean 'blocks.")
    assert alike("transformer.h.1", known) == ""
