"""What strangers' modules do while they are loaded: held back, told, and without harm to anybody.  No torch here."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

import saekit
from saekit.errors import PluginError
from saekit.plugins import loading as plugin_loading
from saekit.plugins.loading import watched
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Entry
from saekit.plugins.text import printable, short
from saekit.reasons import error_text, last_line
from saekit.testing import fake_plugin, isolated_manager, plugin_of

KIND = "lr_schedules"


def installed(monkeypatch: pytest.MonkeyPatch, **loads: Callable[[], object]) -> None:
    """Pretend that there is an entry point of each name, of the distribution ``dist``, that loads so."""
    owner = SimpleNamespace(metadata={"Name": "dist", "Version": "1"})
    points = [SimpleNamespace(name=name, value="x", dist=owner, load=load) for name, load in loads.items()]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)


def raising(error: BaseException) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


def good(name: str) -> object:
    return fake_plugin(KIND, name, config=attrs.make_class("Config", [], frozen=True))


class Skipped(BaseException):
    """As test libraries skip."""


@pytest.mark.parametrize("error", [Skipped("here"), SystemExit(3), GeneratorExit(), Warning("old")])
def test_whatever_a_module_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    installed(monkeypatch, a=raising(error), b=lambda: good("b"))
    with pytest.warns(saekit.errors.PluginWarning, match=f"plugin dist:a 1 was left out: {type(error).__name__}"):
        manager = PluginManager()
    assert manager.get(KIND, "b").key == "dist:b"
    (failure,) = manager.failures
    assert failure.reason.startswith(type(error).__name__)


def test_an_interruption_stops_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, a=raising(KeyboardInterrupt()))
    out = sys.stdout
    with pytest.raises(KeyboardInterrupt):
        PluginManager()
    assert sys.stdout is out
    with pytest.raises(KeyboardInterrupt):
        isolated_manager(SimpleNamespace(saekit_register_evals=saekit.hookimpl(raising(KeyboardInterrupt()))))


def test_a_left_out_plugin_stops_nobody_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, a=raising(ValueError("bad")), b=lambda: good("b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = PluginManager()
    assert manager.get(KIND, "b").key == "dist:b"
    assert capsys.readouterr().err == "warning: plugin dist:a 1 was left out: ValueError: bad\n"


@pytest.mark.parametrize("error", [Skipped("here"), SystemExit(3), ValueError("bad\x1b[2J"), KeyError("k")])
def test_what_is_injected_goes_the_same_way(error: BaseException) -> None:
    plugin = SimpleNamespace(__name__="mine", saekit_register_lr_schedules=saekit.hookimpl(raising(error)))
    said = f"^plugin test:mine 0: saekit_register_lr_schedules raised {type(error).__name__}"
    with pytest.raises(PluginError, match=said) as caught:
        isolated_manager(plugin)
    assert "\x1b" not in str(caught.value)
    assert isinstance(caught.value.__cause__, PluginError)


def test_what_an_injected_plugin_prints_and_warns_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    def hook() -> list[Entry]:
        print("hello")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return []

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = isolated_manager(SimpleNamespace(__name__="mine", saekit_register_evals=saekit.hookimpl(hook)))
    assert [(note.plugin, note.version, note.text) for note in manager.notes] == [
        ("test:mine", "0", "warned while it was loaded: DeprecationWarning: 'old'"),
        ("test:mine", "0", "printed while it was loaded, which was held back: 'hello'"),
        ("test:mine", "0", "offers nothing: no hook of its returns an entry"),
    ]
    assert capsys.readouterr().out == ""


def test_a_logger_made_meanwhile_goes_on_writing(capsys: pytest.CaptureFixture[str]) -> None:
    with watched() as notes:
        handler = logging.StreamHandler(sys.stdout)
        handler.emit(logging.makeLogRecord({"msg": "first"}))
        assert sys.stdout.encoding.lower() == "utf-8"
        assert not sys.stdout.isatty()
        sys.stdout.writelines(["a", "b"])
    assert notes == [r"printed while it was loaded, which was held back: 'first\nab'"]
    handler.emit(logging.makeLogRecord({"msg": "second"}))
    assert capsys.readouterr().out == "second\n"


def test_other_threads_print_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with watched() as notes:
        thread = threading.Thread(target=print, args=("elsewhere",))
        thread.start()
        thread.join()
    assert notes == []
    assert capsys.readouterr().out == "elsewhere\n"


def test_no_console_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with watched() as notes:
        print("nowhere")
    assert notes == []


def test_warnings_are_shown_where_they_are_shown_and_noted_once() -> None:
    def minds() -> list[str]:
        with watched() as notes:
            for _ in range(3):
                warnings.warn("mind", UserWarning, stacklevel=1)
        return notes

    with pytest.warns(UserWarning, match="^mind$") as shown:
        notes = minds()
    assert len(shown) == 1
    assert notes == ["warned while it was loaded: UserWarning: 'mind'"]


def test_filters_that_a_module_sets_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watched():
            warnings.filterwarnings("ignore", message="harmless")
        warnings.warn("harmless", stacklevel=1)
        with pytest.raises(UserWarning, match="other"):
            warnings.warn("other", stacklevel=1)
        before = list(warnings.filters)
        with watched():
            pass
        assert list(warnings.filters) == before


def test_time_and_torch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_loading, "_SLOW", -1.0)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with watched() as notes:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert notes[0] == "imports torch at discovery, which slows every command: import it inside build"
    assert notes[1].startswith("took 0.0 s to import, in every command")


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError


def test_text_that_is_safe_to_show() -> None:
    assert printable("äß 水 ok") == "äß 水 ok"
    assert printable("水\u3000a\xa0b\ud800") == "水\u3000a\xa0b\\ud800", "spaces of any width harm nobody"
    assert printable("a\x1b[31m\r\n\u202e\x00", keep="\n") == "a\\x1b[31m\\r\n\\u202e\\x00"
    assert short(Rude()) == "an object of Rude whose repr fails"
    assert short("x" * 100, 20) == "'xxxxxxxxxxxxxxxx..."
    assert error_text(ValueError("one\ntwo\x07")) == "ValueError: one\ntwo\\x07"
    assert last_line(ValueError("one\ntwo")) == "two"
    assert error_text(PluginError("plain")) == "plain"
    assert error_text(ValueError()) == "ValueError"
    assert len(error_text(ValueError("x" * 5000))) == 400


def frozen(title: str, /, **annotations: Any) -> type:
    """A frozen options class, as a module would define it; a value of an annotation is ``(type, default)``."""
    body = {"__annotations__": {key: kind for key, (kind, _) in annotations.items()}, "__module__": __name__}
    return attrs.frozen(kw_only=True)(
        type(title, (), body | {key: default for key, (_, default) in annotations.items()})
    )


def test_ordinary_options_need_no_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "saekit.config.converter", None)
    kinds = {
        "a": (int, 1), "b": ("float", 2), "c": ("str | None", None), "d": (bool, False), "e": ("int", None),
        "f": ("tuple[int, ...]", ()), "g": ("dict[str, Any]", attrs.Factory(dict)), "h": ("int | str", "x"),
    }  # fmt: skip
    config = frozen("Config", **kinds)
    assert isolated_manager(plugin_of(KIND, Entry("x", config, print))).get(KIND, "x").entry.config is config


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"root": ("Nowhere", 1)}, "option 'root' of Config has the annotation 'Nowhere', which cannot be resolved"),
        (
            {"name": ("str", "x")},
            "'name' of Config is refused: an option cannot be called 'name', which is the plugin's",
        ),
    ],
)
def test_options_that_no_file_can_hold(annotations: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        isolated_manager(plugin_of(KIND, Entry("x", frozen("Config", **annotations), print)))
    assert str(caught.value).startswith("plugin test:fake_lr_schedules 0: saekit_register_lr_schedules: entry 'x': ")
