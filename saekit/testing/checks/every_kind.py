"""What every plugin promises, of whatever kind: options that are data, and modules that do nothing on the side."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import attrs

from saekit.config.converter import ConfigConverter
from saekit.config.describe import describe_fields
from saekit.config.files import plain_config
from saekit.config.formats import READERS, write
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must

__all__ = ["OF_EVERY_KIND", "check_import"]

OF_EVERY_KIND = Checks()
_SECONDS = 0.5
_PRINTED = 200


@OF_EVERY_KIND.add
def options_round_trip(subject: Subject) -> None:
    """load(dump(options)) == options: from TOML, YAML and JSON they come back, None in every place included."""
    kind, converter = subject.item.kind, ConfigConverter(subject.plugins)
    for options in _variations(converter.choice(subject.options, kind).options):
        for ending, read in READERS.items():
            form = {"yml": "yaml"}.get(ending[1:], ending[1:])
            plain = plain_config(options, subject.plugins, spare=form == "toml")
            text = write({"chosen": {"name": subject.item.key, **plain}}, form)
            try:
                back = converter.choice(read(text)["chosen"], kind).options
            except Exception as error:
                raise Fault(f"{options} is written to {form}, and cannot be read again: {error_text(error)}") from error
            must(back == options, f"from {form} comes {back}, expected {options}")


def _variations(options: Any) -> Iterator[Any]:
    """The options, and with None for each that may be None, as far as they may stand together."""
    yield options
    attrs.resolve_types(type(options))
    for field in attrs.fields(type(options)):
        if field.init and type(None) in get_args(field.type) and getattr(options, field.name) is not None:
            try:
                yield attrs.evolve(options, **{field.alias or field.name: None})
            except Exception:  # not with the others
                continue


@OF_EVERY_KIND.add
def options_are_plain(subject: Subject) -> None:
    """Options can be copied, compared and pickled, so that they reach other processes."""
    options = subject.options
    must(copy.deepcopy(options) == options, "a copy of the options is not equal to them")
    try:
        back = pickle.loads(pickle.dumps(options))
    except Exception as error:
        raise Fault(f"{options} cannot be pickled: {error_text(error)}") from error
    must(back == options, f"from a pickle comes {back}, expected {options}")


@OF_EVERY_KIND.add
def options_are_explained(subject: Subject) -> None:
    """Under every option stands a docstring line, which `saekit plugins` shows."""
    config = type(subject.options)
    try:
        inspect.getsource(config)
    except (OSError, TypeError):
        raise NotTried(f"the source of {config.__qualname__} is not at hand") from None
    silent = [field.name for field in describe_fields(config) if not field.doc]
    must(not silent, f"{config.__qualname__} says nothing of {', '.join(silent)}; expected a docstring line under each")


# ---- importing


_IMPORT = """
import contextlib, importlib, io, json, logging, os, random, signal, sys, threading, time, warnings
import attrs, numpy
import saekit, saekit.config, saekit.errors, saekit.values, saekit.protocols, saekit.site
from saekit import Entry, SAEConfig, Site, hookimpl
from saekit.plugins.manager import PluginManager

def state():
    return {
        "the environment": dict(os.environ), "the working directory": os.getcwd(), "sys.path": list(sys.path),
        "Python's random numbers": random.getstate(), "NumPy's random numbers": str(numpy.random.get_state()),
        "signal handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "sys.excepthook": str(sys.excepthook), "running threads": [str(thread) for thread in threading.enumerate()],
        "logging": (logging.root.level, [str(handler) for handler in logging.root.handlers]),
        "warning filters": [str(entry) for entry in warnings.filters],
        "standard output": (id(sys.stdout), id(sys.stderr)),
    }

before, start = state(), time.process_time()
importlib.import_module(sys.argv[1])
seconds, after = time.process_time() - start, state()
found = {"seconds": seconds, "torch": "torch" in sys.modules,
         "changed": [what for what in before if before[what] != after[what]]}
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


def check_import(module: str, place: Path) -> None:
    """Importing the plugin's module imports no torch, prints nothing, changes nothing of the process, and is quick."""
    _findable(module)
    result = place / "import.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    command = [sys.executable, "-c", _IMPORT, module, str(result)]
    found: dict[str, Any] = {}
    for again in (False, True):  # the first may have had to compile
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        last = ran.stderr.strip().splitlines()[-1:] or [f"exit status {ran.returncode}"]
        must(ran.returncode == 0 and result.is_file(), f"importing {module} alone fails: {last[0]}")
        found = json.loads(result.read_text())
        if found["torch"] or found["seconds"] <= _SECONDS or again:
            break
    printed = (ran.stdout + ran.stderr).strip()
    must(not printed, f"importing {module} prints {printed[:_PRINTED]!r}")
    must(not found["torch"], f"importing {module} imports torch, which slows every command: import it inside build")
    changed = found["changed"]
    must(not changed, f"importing {module} changes {', '.join(changed)}")
    seconds = found["seconds"]
    must(
        seconds <= _SECONDS,
        f"importing {module} takes {seconds:.1f} s, in every command, expected {_SECONDS} s at most: import heavy "
        "packages inside build",
    )


def _findable(module: str) -> None:
    try:
        spec = None if module == "__main__" else find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        raise NotTried("it is no module that another process could import")
