"""The documentation says what is so: signatures, options, commands, and code that runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import attrs
import pytest
from support import warm
from support.follow import blocks_of, commands_of, script_of
from support.installed import install

import saekit
from saekit.config import CacheConfig, PretokenizeConfig, TrainConfig
from saekit.config.describe import describe_fields
from saekit.plugins import hookspecs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "CONTRIBUTING.md",
]
TRAIN_WELL = {"README.md", *(f"docs/{name}.md" for name in ("index", "getting-started", "data", "training", "mamba"))}
"""Pages all of whose examples end above an explained variance of 0.7 on held-out text."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


COMMANDS = """
import typer
from saekit.cli import app

def walk(name, command):
    for word, inner in getattr(command, "commands", {}).items():
        print(f"{name} {word}")
        walk(f"{name} {word}", inner)

walk("saekit", typer.main.get_command(app))
"""


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def lines(page: Path) -> list[str]:
    """The commands of a page."""
    return [line for block in blocks_of(page) if block.language in ("console", "sh") for line in commands_of(block)]


def to_follow(page: Path) -> bool:
    return any(block.language == "python" for block in blocks_of(page)) or any(
        "saekit " in line for line in lines(page)
    )


def hook_signatures() -> dict[str, tuple[str, str]]:
    """Hook name to its signature and its build signature, from the source of the specifications."""
    found = {}
    for node in ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            text = f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
            (build,) = re.findall(r"``(build\(.*?)``", ast.get_docstring(node), re.S)
            found[node.name] = (text, " ".join(build.split()))
    return found


@pytest.mark.parametrize(("hook", "signatures"), hook_signatures().items())
def test_every_hook_is_documented_with_its_exact_signature(hook: str, signatures: tuple[str, str]) -> None:
    page = (DOCS / "writing-plugins.md").read_text(encoding="utf-8")
    for signature in signatures:
        assert f"`{signature}`" in page, hook


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_follow(page)], ids=title)
def test_a_page_can_be_followed_to_the_letter(page: Path, tmp_path: Path) -> None:
    results, folder = tmp_path / "results.json", tmp_path / "reader"
    folder.mkdir()
    script = folder / "page.py"
    script.write_text(script_of(page, results), encoding="utf-8")
    paths = [str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if "examples" in page.parts:  # whose distribution its page installs
        install([page.parent], tmp_path / "installed")
        paths.insert(0, str(tmp_path / "installed"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found = warm.python("-W", "error::UserWarning", script.name, cwd=folder, env=environment)
    assert found.returncode == 0, found.stderr
    if title(page) in TRAIN_WELL:  # what newcomers read first says nothing is wrong where nothing is
        assert not re.search(r"[Ww]arning: ", found.stderr), found.stderr
        trained = json.loads(results.read_text(encoding="utf-8"))
        assert all(value > 0.7 for one in trained for value in one["explained_variance"]), trained


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_toml_and_commands(page: Path) -> None:
    for text in blocks(page, "toml"):
        table = tomllib.loads(text)
        if "project" not in table and not re.match(r"# \S+\.toml\n", text):  # a file of a page that is followed
            saekit.load_config(table)
    cli = (ROOT / "saekit/cli.py").read_text(encoding="utf-8")  # importing it would import click, which warns
    commands = set(re.findall(r'^app\.(?:command\(|add_typer\(.*name=)"([\w-]+)"', cli, re.M))
    assert "train" in commands
    for command in (line.split()[1] for line in lines(page) if line.startswith("saekit ")):
        assert command in commands


@pytest.mark.parametrize("page", [page for page in PAGES if lines(page)], ids=title)
def test_commands_of_a_checkout_name_what_is_there(page: Path) -> None:
    """Those of saekit itself are followed; of others, what they name must exist."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in lines(page):
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words[0] == "make":
                assert set(words[1:]) <= set(targets), line
            elif "pip" in words:
                wanted = [word for word in words if word.startswith(".[")]
                assert {extra for word in wanted for extra in word[2:-1].split(",")} <= set(extras), line
                assert "saekit" not in words or page.parent != ROOT, f"{line}: there is no release to install"
            elif "pytest" in words:
                assert all((page.parent / word).exists() for word in words if word.startswith("tests/")), line
            else:
                assert words[0] in ("saekit", "git", "cd", "python3", "python", "."), line


def test_the_strictness_example_is_what_is_printed() -> None:
    with pytest.raises(saekit.ConfigError) as caught:
        saekit.load_config({"training": {"lr": "fast", "verbose": "false"}, "sae": {"l1_coeficient": 5}})
    assert str(caught.value) in (DOCS / "configuration.md").read_text(encoding="utf-8")


def assert_described(page: str, name: str, cls: type) -> None:
    """A section ``name`` has a row with an explanation for each option of ``cls``; each kind may have such a name."""
    sections = re.findall(rf"^### `{re.escape(name)}`\n(.*?)(?=^##|\Z)", page, re.M | re.S)
    fields = describe_fields(cls) if attrs.has(cls) else ()
    missing = [
        [field.name for field in fields if not re.search(rf"^\| `{field.name}` \| .+ \| .+ \| \S.* \|$", one, re.M)]
        for one in sections
    ]
    assert [] in missing, (name, missing)


def test_the_reference_has_every_option() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from generate_reference import reference
    finally:
        sys.path.remove(str(DOCS))
    page = reference()
    for field in describe_fields(TrainConfig):
        assert_described(page, field.name, type(getattr(TrainConfig(), field.name)))
    assert_described(page, "activations.cache", CacheConfig)
    for field in describe_fields(PretokenizeConfig):
        assert f"| `{field.name}` |" in page.partition("## `saekit pretokenize`")[2]
    for registry in saekit.default_manager().registries.values():
        for item in registry.items:
            if item.distribution == "saekit":
                assert_described(page, item.key, item.entry.config)


FOR_EACH = ("config/", "commands/terminal/", "testing/checks/")
"""Rooms with a file for each of something, as the tree says in words."""


def named_in_the_tree() -> list[tuple[tuple[str, ...], str]]:
    """The files that the tree of the architecture names in the kernel, each with the rooms that its line is about."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^saekit/ .*?\n(.*?)^plugins/", text, re.M | re.S)
    rooms, found = ("",), []
    for line in tree.splitlines():
        if re.match(r"  \w", line):  # one that is indented by more is about the room before
            rooms = ("", *re.findall(r"(\w+/)", line[:27]))
        found += [(rooms, name) for name in re.findall(r"\w+\.py\b", line)]
    return found


def test_the_tree_of_the_architecture_names_every_file_and_no_other() -> None:
    paths = {path.relative_to(ROOT / "saekit").as_posix() for path in (ROOT / "saekit").rglob("*.py")}
    kernel = {path: (path[: path.find("/") + 1], path.rpartition("/")[2]) for path in paths if "__init__" not in path}
    there, named = {*kernel.values()}, named_in_the_tree()
    assert [name for rooms, name in named if not there & {(room, name) for room in rooms}] == []
    told = {(room, name) for rooms, name in named for room in rooms}
    assert [path for path, key in kernel.items() if key not in told and not path.startswith(FOR_EACH)] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.endswith(".generated.md"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


NO_NAMES = {"saekit.json", "saekit.seal"}
"""Files and keys of files."""


def stub_names(module: Path) -> dict[str, Path]:
    """Public names of a package to the modules that its stub says they are from; modules to themselves."""
    stub = module / "__init__.pyi"
    found = ast.parse(stub.read_text(encoding="utf-8")).body if stub.is_file() else []
    imports = [node for node in found if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: module.joinpath(*(node.module.split(".") if node.module else [alias.name]))
        for node in imports for alias in node.names
    }  # fmt: skip


def is_there(name: str) -> bool:
    """Whether a dotted name is there after ``import saekit`` alone, whatever else this process has imported."""
    _, *parts = name.split(".")
    place, thing = ROOT / "saekit", saekit
    for part in parts:
        lazy = (place / "__init__.pyi").is_file()
        if lazy and part not in stub_names(place) and not hasattr(type(thing), part):
            return False
        if not hasattr(thing, part):
            return False
        thing, place = getattr(thing, part), stub_names(place).get(part, place / part) if lazy else place / part
    return True


def test_names_are_there_after_import_saekit() -> None:
    assert is_there("saekit.SAE.load")
    assert not is_there("saekit.commands.jobs")
    assert not is_there("saekit.SAE.lode")
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    imported = {*re.findall(r"(?:from|import) (saekit\.[\w.]+)", text)}  # these need not be attributes
    names = {*re.findall(r"\bsaekit(?:\.[a-z_]+)+(?:\.[A-Z]\w*)?", text)} - imported - NO_NAMES
    assert len(names) > 60
    assert [name for name in sorted(names) if not is_there(name)] == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="Sphinx is not installed")
def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    found = warm.python(ROOT / "tests" / "support" / "docs_build.py", DOCS, tmp_path)
    assert found.returncode == 0, found.stderr
    index = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "_static/styles/furo.css" in index
    assert 'href="reference/api.generated.html"' in index, "in the tree of all pages"
    pages = {
        path.name.partition(".")[0]: path.read_text(encoding="utf-8") for path in tmp_path.glob("html/reference/*.html")
    }
    assert "l1_coefficient" in pages["configuration"]
    packages = {"api": "saekit"} | {f"api-{name}": f"saekit.{name}" for name in ("reports", "testing", "kernels")}
    for page, package in packages.items():
        stub = ROOT.joinpath(*package.split("."), "__init__.pyi").read_text(encoding="utf-8")
        names = set(re.findall(r"(?<!^from \. )import \w+ as ([a-zA-Z]\w*)", stub, re.M))
        assert len(names) > 5
        assert {name for name in names if f'id="{package}.{name}"' not in pages[page]} == set()
    for registry in saekit.default_manager().registries.values():
        for config in (item.entry.config for item in registry.items if item.distribution == "saekit"):
            assert f'id="{config.__module__}.{config.__name__}"' in pages["api-options"]
    commands = warm.python("-c", COMMANDS, light=True).stdout
    assert "saekit cache verify" in commands.splitlines()
    assert pages["cli"].count('class="highlight-sh') == len(commands.splitlines()) + 1, "each has examples"
    assert [name for name in commands.splitlines() if f'href="#{name.replace(" ", "-")}"' not in pages["cli"]] == []
