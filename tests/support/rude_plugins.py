"""The modules of a distribution whose every entry point does something that a plugin should not."""

from __future__ import annotations

GOOD = """
import attrs, saekit

@attrs.frozen(kw_only=True)
class Config:
    {field}

@saekit.hookimpl
def saekit_register_lr_schedules():
    return [saekit.Entry("{name}", Config, lambda config, lr, steps: None{more})]
"""


def good(name: str, *, field: str = '"No options."', more: str = "") -> str:
    return GOOD.format(name=name, field=field, more=more)


LEFT_OUT = {
    "skips": ("import pytest\npytest.skip('not here', allow_module_level=True)", "Skipped: not here"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "cancels": ("import asyncio\nraise asyncio.CanceledError", "CanceledError"),
    "escapes": ("raise ValueError('\\x1b[2J\\x1b[31mgone\\u202e')", r"ValueError: \x1b[2J\x1b[31mgone\u202e"),
    "talks": ("raise ValueError('y' * 5000)", "ValueError: yyyyyy"),
    "halfway": (
        good("halfway").replace("    return [", "    yield from [") + "    raise KeyError('later')\n",
        "saekit_register_lr_schedules raised KeyError: 'later'",
    ),
    "endless": (
        good("endless").replace("    return [", "    while True: yield from ["),
        "saekit_register_lr_schedules returned more than 1000 entries",
    ),
    "stops": (good("stops").replace("    return [", "    raise SystemExit(4)\n    ["), "raised SystemExit: 4"),
    "summary": (good("x", more=", summary=3"), "entry 'x': summary is 3, expected a text"),
    "extra": (good("x", more=", extra=['a']"), "entry 'x': extra is ['a'], expected the name of an extra, or None"),
    "extra_text": (good("x", more=", extra='a]; rm'"), "entry 'x': extra is 'a]; rm', expected the name of an extra"),
    "requires": (good("x", more=", requires={'a': 1}"), "entry 'x': requires is {'a': 1}, expected a list of package"),
    "requires_text": (good("x", more=", requires=['a b']"), "entry 'x': requires is ['a b'], expected a list of pack"),
    "odd_name": (good("x\\x1b[31m"), r"entry 'x\x1b[31m': the name must be made of letters"),
    "checking_only": (
        "from __future__ import annotations\n" + good("x", field="root: Path"),
        "'root' of Config has the annotation 'Path', which cannot be resolved: NameError: name 'Path' is not defined",
    ),
    "class_variable": (
        "from __future__ import annotations\nfrom typing import ClassVar\n" + good("x", field="seen: ClassVar[Path]"),
        "name 'Path' is not defined",
    ),
    "untyped": (good("x", field="end = attrs.field(default=1)"), "option 'end' of Config has no type"),
    "chooses": (
        good("x", field="inner: object = saekit.config.plugin_field('schedules', 'x')").replace(
            "import attrs, saekit", "import attrs, saekit, saekit.config"
        ),
        "option 'inner' of Config chooses a plugin of kind 'schedules', and the kinds are model_backends, ",
    ),
    "lists": (
        "def __dir__(): return ['a']\ndef __getattr__(name): raise RuntimeError('lazy ' + name)",
        "RuntimeError: lazy a",
    ),
}
"""Entry point: its module, and what is said of it."""

TOLD = {
    "old": (
        "import warnings\nwarnings.warn('it is \\x1b[31mold', DeprecationWarning)" + good("old"),
        r"warned while it was loaded: DeprecationWarning: 'it is \x1b[31mold'",
    ),
    "prints": (
        "print('hello')" + good("prints").replace("    return", "    print('there')\n    return"),
        r"printed while it was loaded, which was held back: 'hello\nthere'",
    ),
    "slow": ("import time\ntime.sleep(0.6)" + good("slow"), " s to import, in every command: import heavy packages"),
    "heavy": (
        "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')" + good("heavy"),
        "imports torch at discovery, which slows every command: import it inside build",
    ),
    "starts": ("print('x')\nimport os\nos.system('echo from a command')" + good("starts"), "held back: 'x'"),
    "empty": ("import saekit", "offers nothing: no hook of its returns an entry"),
}
"""Entry point: its module, which is listed, and what is noted."""

QUIET = {
    "colors": good("colors", field="'''It is \x1b[31mred.'''", more=", summary='\x1b[31mred\x1b[0m\\nand\\tmore'"),
    "fails_later": "import typing\n"
    + good("fails-later", field="table: dict[str, typing.Any] = attrs.Factory(lambda: {}[1])"),
    "needs": good("needs", more=", requires=('broken_parent.inner',)"),
    "builds": """
import attrs, saekit
from saekit.errors import ConfigError


class Rate:
    end = 0.5

    def __call__(self, step):
        return 0.5


class NoEnd:
    def __call__(self, step):
        return 0.5


class BadEnd(Rate):
    end = "now"


def raises(error):
    raise error


async def later(config, **services):
    return Rate()


CASES = {
    "right": lambda **_: Rate(),
    "nothing": lambda **_: None,
    "class": lambda **_: Rate,
    "no-end": lambda **_: NoEnd(),
    "bad-end": lambda **_: BadEnd(),
    "number": lambda **_: 3,
    "fails": lambda **_: raises(KeyError("where\\x1b[31m")),
    "stops": lambda **_: raises(SystemExit(1)),
    "imports": lambda **_: raises(ModuleNotFoundError("No module named 'heavy'")),
    "refuses": lambda **_: raises(ConfigError("end must be smaller")),
    "interrupts": lambda **_: raises(KeyboardInterrupt()),
}


def entry(name, build):
    config = attrs.make_class("Config", [], frozen=True)
    return saekit.Entry(name, config, build)


@saekit.hookimpl
def saekit_register_lr_schedules():
    for name, make in CASES.items():
        yield entry(name, lambda config, make=make, **services: make(**services))
    yield entry("async", later)
""",
}
"""Entry point: its module, which loads without a word."""

MODULES = {name: module for name, (module, _) in (LEFT_OUT | TOLD).items()} | QUIET
HELPERS = {"broken_parent/__init__.py": "raise RuntimeError('broken')", "broken_parent/inner.py": ""}
