"""Kinds of plugin.  Nothing here imports torch."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import saekit
from saekit.errors import UnknownKeyError
from saekit.kinds import KINDS, LR_SCHEDULES, MODEL_BACKENDS, kind_of
from saekit.testing import fake_plugin, isolated_manager

ROOT = Path(saekit.__file__).parent.parent


def test_hook_label_and_promises_follow_from_a_kind() -> None:
    assert LR_SCHEDULES.hook == "saekit_register_lr_schedules"
    assert (LR_SCHEDULES.one, LR_SCHEDULES.labels) == ("an LR schedule", "LR schedules")
    assert (LR_SCHEDULES.methods, LR_SCHEDULES.values) == (("__call__",), ("end",))
    assert {"hook_names", "tokenize"} <= set(MODEL_BACKENDS.methods)
    assert {"name", "special_tokens"} <= set(MODEL_BACKENDS.values)
    assert {kind.one for kind in KINDS.values()} == {
        "a model backend", "an activation function", "a pretrained loader", "an LR schedule", "an SAE architecture",
        "an activation source", "a tracker", "an eval", "an optimizer", "an input transform", "a release list",
        "a step kernel",
    }  # fmt: skip
    for kind in KINDS.values():
        assert kind.methods or kind.values, "it promises something"
        assert not [name for name in kind.methods if name.startswith("_") and not name.endswith("__")]


def test_a_kind_or_its_name() -> None:
    manager = isolated_manager(fake_plugin(LR_SCHEDULES))
    assert manager.get(LR_SCHEDULES, "fake") is manager.get("lr_schedules", "fake")
    assert kind_of("lr_schedules") is kind_of(LR_SCHEDULES) is LR_SCHEDULES
    with pytest.raises(UnknownKeyError, match="there is no kind of plugin 'schedules'; the kinds are model_backends, "):
        kind_of("schedules")


def test_what_a_type_checker_sees_is_among_what_mypy_reads() -> None:
    """Each line of that file fails ``make lint`` when a type is another one."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["modules"]
    assert read == ["tests.plugins.seen_by_type_checkers"]
    assert Path(__file__).with_name("seen_by_type_checkers.py").read_text().count("assert_type(") == 13
