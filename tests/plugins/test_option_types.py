"""Options of any type that files can hold survive in plugins, and others are refused when they are registered."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import attrs
import pytest

import saekit
from saekit.errors import PluginError
from saekit.plugins.registry import Entry
from saekit.testing import isolated_manager, plugin_of


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = 1
    """How deep."""


@attrs.frozen(kw_only=True)
class Rich:
    root: Path = Path("here")
    color: Color = Color.RED
    inner: Inner = Inner()
    either: int | list[int] | None = None
    many: list[str] = attrs.field(factory=list)
    table: dict[str, float] = attrs.field(factory=dict)
    kinds: tuple[Inner, ...] = ()


def test_rich_options_survive(tmp_path: Path) -> None:
    manager = isolated_manager(plugin_of("lr_schedules", Entry("rich", Rich, print)), builtins=True)
    chosen = Rich(
        root=Path("a/b"), color=Color.BLUE, inner=Inner(depth=3), either=[1, 2], many=["x"], table={"a": 0.5},
        kinds=(Inner(depth=2), Inner()),
    )  # fmt: skip
    config = saekit.load_config({"lr_schedule": chosen}, plugins=manager)
    for form in ("toml", "yaml", "json"):
        text = saekit.dump_config(config, form, plugins=manager)
        path = tmp_path / f"run.{form}"
        path.write_text(text)
        assert saekit.load_config(path, plugins=manager) == config


@pytest.mark.parametrize(
    ("kind", "default"), [(complex, 1j), ("list[complex]", ()), ("object | bytes", b""), (int, 0.5), (int, "x")]
)
def test_options_that_no_file_can_hold_are_refused_by_name(kind: Any, default: Any) -> None:
    body = {"__annotations__": {"odd": kind}, "odd": default, "__module__": __name__}
    config = attrs.frozen(kw_only=True)(type("Config", (), body))
    with pytest.raises(PluginError, match="entry 'x': option 'odd' of Config "):
        isolated_manager(plugin_of("lr_schedules", Entry("x", config, print)))
