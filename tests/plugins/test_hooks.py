"""Every hook, by registering through it.  Nothing here imports torch."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support import warm

import saekit
from saekit.kinds import KINDS
from saekit.plugins import hookspecs
from saekit.testing import fake_plugin, isolated_manager

ROOT = Path(saekit.__file__).parent


def registers_and_builds(kind: str) -> None:
    manager = isolated_manager(fake_plugin(kind))
    for key in ("fake", "test:fake"):
        item = manager.get(kind, key)
        assert (item.key, item.distribution, item.version) == ("test:fake", "test", "0")
        assert item.plugin == f"test:fake_{kind}"
        assert manager.build(kind, key, service=1) == (kind, item.entry.config(), {"service": 1})
    options = manager.get(kind, "fake").entry.config
    assert manager.build(kind, options(value=3)) == (kind, options(value=3), {})
    assert all(not registry.items for name, registry in manager.registries.items() if name != kind)


def test_hook_saekit_register_model_backends() -> None:
    registers_and_builds("model_backends")


def test_hook_saekit_register_activation_functions() -> None:
    registers_and_builds("activation_functions")


def test_hook_saekit_register_pretrained_loaders() -> None:
    registers_and_builds("pretrained_loaders")


def test_hook_saekit_register_lr_schedules() -> None:
    registers_and_builds("lr_schedules")


def test_hook_saekit_register_sae_architectures() -> None:
    registers_and_builds("sae_architectures")


def test_hook_saekit_register_activation_sources() -> None:
    registers_and_builds("activation_sources")


def test_hook_saekit_register_trackers() -> None:
    registers_and_builds("trackers")


def test_hook_saekit_register_evals() -> None:
    registers_and_builds("evals")


def test_hook_saekit_register_optimizers() -> None:
    registers_and_builds("optimizers")


def test_hook_saekit_register_input_transforms() -> None:
    registers_and_builds("input_transforms")


def test_hook_saekit_register_releases() -> None:
    registers_and_builds("releases")


def test_hook_saekit_register_step_kernels() -> None:
    registers_and_builds("step_kernels")


def test_every_hook_has_a_test_and_a_docstring_and_no_argument() -> None:
    hooks = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("saekit_register_")}
    assert set(hooks) == {f"saekit_register_{kind}" for kind in KINDS}
    for name, spec in hooks.items():
        assert f"test_hook_{name}" in globals()
        assert not inspect.signature(spec).parameters
        assert "``build(config" in spec.__doc__
        assert not spec.saekit_spec["firstresult"]


def imports_of(path: Path) -> set[str]:
    """Modules that the file imports anywhere, also as ``from saekit import manager`` or by a name in a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {name for alias in node.names if is_module(name := f"{node.module}.{alias.name}")}
        elif isinstance(node, ast.Constant) and str(node.value).startswith("saekit_plugins"):
            found.add(node.value)
    return found


@cache
def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_the_kernel_never_imports_a_plugin() -> None:
    for path in ROOT.rglob("*.py"):
        if "saekit_plugins" not in path.read_text(encoding="utf-8"):
            continue  # it has not even the name
        assert not [name for name in imports_of(path) if name.startswith("saekit_plugins")], path


PUBLIC_MODULES = [
    "abilities",
    "backends",
    "cautions",
    "config",
    "converted",
    "data",
    "data.cache",
    "data.vocabulary",
    "devices",
    "distributed",
    "errors",
    "evals",
    "files",
    "for_sae_lens",
    "garbage",
    "hub",
    "kernels",
    "kinds",
    "measuring",
    "pretrained",
    "protocols",
    "reasons",
    "sae",
    "sae.init",
    "site",
    "splicing",
    "testing",
    "toy",
    "tokens",
    "transforms",
    "values",
]
PUBLIC = {"saekit", *(f"saekit.{name}" for name in PUBLIC_MODULES)}


def test_plugins_import_public_modules_only() -> None:
    import saekit_plugins

    for path in Path(saekit_plugins.__file__).parent.rglob("*.py"):
        used = {name for name in imports_of(path) if name.split(".")[0] == "saekit"}
        assert used <= PUBLIC, (path.name, used - PUBLIC)


LIGHT = """
import sys
import saekit, saekit.plugins.manager, saekit.testing, saekit.config.files, saekit.cli
assert len(saekit.default_manager().registries["lr_schedules"].items) >= 5
saekit.testing.FakeBackend().tokenize("x")
heavy = {"torch", "transformer_lens", "transformers", "datasets", "wandb", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_kernel_and_the_plugin_modules_import_nothing_heavy_in_a_subprocess() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


WITHOUT_TORCH = """
import sys
import pytest
sys.modules["torch"] = None
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not subprocess", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_kernel_tests_run_without_torch_in_a_subprocess() -> None:
    files = [
        path
        for path in Path(__file__).parent.glob("test_*.py")
        if not path.stem.endswith(("distributions", "rude_plugins"))
    ]
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, files)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_public_names_are_all_there_in_a_subprocess() -> None:
    code = """
import saekit
assert {'pretrained', 'evals', 'toy', 'exports', 'splicing', 'analysis', 'testing'} <= {*dir(saekit)}
assert all(getattr(saekit, name) is not None for name in saekit.__all__)
"""
    found = warm.python("-c", warm.ANEW + code)
    assert found.returncode == 0, found.stderr
    assert set(saekit.__all__) <= set(dir(saekit))
    with pytest.raises(AttributeError, match="No saekit attribute trian"):
        saekit.trian  # noqa: B018
