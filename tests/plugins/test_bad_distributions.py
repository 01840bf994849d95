"""Bad plugins, each in a distribution: that pip really built and installed where there are several, written else."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import warm
from support.installed import install, project, written

pytestmark = pytest.mark.slow

GOOD = """
import attrs, saekit

@attrs.frozen(kw_only=True)
class Config:
    "No options."

@saekit.hookimpl
def saekit_register_lr_schedules():
    return [saekit.Entry("halving", Config, lambda config, lr, steps: None{more})]
"""
MARKED = "import saekit\n@saekit.hookimpl\n"
MODULES = {
    "bad-import": ("bad_import.py", "from saekit import no_such_name\n"),
    "misspelt-hook": (
        "misspelt_hook.py",
        MARKED + "def saekit_register_lr_scheduls(): return []\n",
    ),
    "junk-returned": (
        "junk_returned.py",
        MARKED + "def saekit_register_lr_schedules(): return 42\n",
    ),
    "no-attrs": (
        "no_attrs.py",
        MARKED + "def saekit_register_lr_schedules():\n    yield saekit.Entry('x', dict, print)\n",
    ),
    "needs-package": ("needs_package.py", GOOD.format(more=', requires=("no_such_package",), extra="heavy"')),
    "first-owner": ("first_owner.py", GOOD.format(more="")),
    "second-owner": ("second_owner.py", GOOD.format(more="")),
}
REASONS = {
    "bad-import": "ImportError: cannot import name 'no_such_name' from 'saekit'",
    "misspelt-hook": "there is no hook saekit_register_lr_scheduls",
    "junk-returned": "saekit_register_lr_schedules returned 42, expected an iterable of saekit.Entry",
    "no-attrs": "entry 'x': config is <class 'dict'>, expected a frozen attrs class",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Installs the named distributions into a folder of their own."""
    folder = tmp_path_factory.mktemp("bad")

    def installed(*names: str) -> Path:
        target = folder / "+".join(names)
        if not target.exists():
            homes = [project(folder / f"src-{'+'.join(names)}", name, dict([MODULES[name]]),
                             plugin=MODULES[name][0].removesuffix(".py")) for name in names]  # fmt: skip
            if len(homes) > 1:
                install(homes, target)
            else:
                written(homes[0], target)
        return target

    return installed


def python(site: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return warm.python(*arguments, env=os.environ | {"PYTHONPATH": str(site)} | more, light=True)


def saekit_cli(site: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return python(site, "-m", "saekit.cli", *arguments, **more)


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_plugin_costs_one_warning(site: Callable[..., Path], name: str) -> None:
    where = site(name)
    listed = saekit_cli(where, "plugins")
    assert listed.returncode == 0
    (warning,) = listed.stderr.splitlines()
    assert warning.startswith(f"warning: plugin {name}:plugin 1.0 was left out: ")
    assert REASONS[name] in warning
    assert f"failed: {name}:plugin 1.0: " in listed.stdout
    assert REASONS[name] in listed.stdout
    assert "saekit:cosine" in listed.stdout, "everything else works"
    assert saekit_cli(where, "plugins", "lr_schedules:cosine").returncode == 0
    unknown = saekit_cli(where, "plugins", "lr_schedules:nothing")
    assert unknown.returncode == 2
    assert f"Plugin {name}:plugin failed to load: " in unknown.stderr
    assert REASONS[name] in unknown.stderr
    blocked = saekit_cli(where, "plugins", SAEKIT_DISABLE_PLUGINS=name)
    assert blocked.stderr == ""
    assert f"disabled: {name}:plugin" in blocked.stdout


def test_all_broken_plugins_together(site: Callable[..., Path]) -> None:
    listed = saekit_cli(site(*REASONS, "needs-package"), "plugins", "--json")
    assert listed.returncode == 0
    assert len(listed.stderr.splitlines()) == len(REASONS)
    found = json.loads(listed.stdout)
    assert [failure["plugin"] for failure in found["failed"]] == sorted(f"{name}:plugin" for name in REASONS)
    assert {"saekit:cosine", "needs-package:halving"} <= {item["key"] for item in found["plugins"]}


def test_two_distributions_with_one_key(site: Callable[..., Path]) -> None:
    where = site("first-owner", "second-owner")
    listed = saekit_cli(where, "plugins", "--json")
    assert listed.stderr == "", "nobody is told before the key is used"
    keys = {item["key"] for item in json.loads(listed.stdout)["plugins"]}
    assert {"first-owner:halving", "second-owner:halving"} <= keys
    (where / "run.toml").write_text('lr_schedule = "halving"')
    found = saekit_cli(where, "config", str(where / "run.toml"))
    assert found.returncode == 2
    assert (
        "lr_schedule: LR schedule 'halving' is supplied by several distributions (first-owner 1.0 and second-owner "
        "1.0). Write one of 'first-owner:halving' and 'second-owner:halving'."
    ) in found.stderr
    found = saekit_cli(where, "config", str(where / "run.toml"), "lr_schedule=second-owner:halving")
    assert 'lr_schedule = "second-owner:halving"' in found.stdout


def test_one_key_twice_in_one_distribution(tmp_path: Path) -> None:
    home = project(
        tmp_path, "twice", {"one.py": GOOD.format(more=""), "two.py": GOOD.format(more="")}, one="one", two="two"
    )
    written(home, tmp_path / "site")
    found = saekit_cli(tmp_path / "site", "plugins", "lr_schedules:twice:halving")
    assert found.returncode == 2
    assert "'twice:halving' is registered 2 times by one distribution, from twice:one and twice:two" in found.stderr
    assert saekit_cli(tmp_path / "site", "plugins").stderr == ""


def test_a_missing_optional_package(site: Callable[..., Path]) -> None:
    where = site("needs-package")
    listed = saekit_cli(where, "plugins")
    assert listed.stderr == ""
    assert "[needs: pip install 'needs-package[heavy]']" in listed.stdout
    code = "import saekit; saekit.default_manager().build('lr_schedules', 'halving', lr=1, steps=1)"
    found = python(where, "-c", code)
    assert found.returncode == 1
    assert (
        "LR schedule 'needs-package:halving' needs no_such_package, not installed here. "
        "Install it with: pip install 'needs-package[heavy]'"
    ) in found.stderr
