"""Plugins that misbehave in every way that was thought of, installed by pip beside a good one, and commands among them.

What each does is in ``rude_plugins.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import warm
from support.installed import install, project
from support.rude_plugins import HELPERS, LEFT_OUT, MODULES, QUIET, TOLD, good

pytestmark = pytest.mark.slow
DAMAGED = {
    # another name in the metadata than the folder's: a key of saekit's own
    "liar-1.0.dist-info": {
        "METADATA": b"Metadata-Version: 2.1\nName: saekit\nVersion: 1.0\n",
        "entry_points.txt": b"[saekit]\ncosine = rude_old\n",
    },
    "versions-1.dist-info": {
        "METADATA": b"Metadata-Version: 2.1\nName: versions\nVersion: \x1b[31mbanana\n",
        "entry_points.txt": b"[saekit]\nplugin = versions_plugin\n",
    },
    "nameless-1.dist-info": {"METADATA": b"", "entry_points.txt": b"[saekit]\nplugin = nameless_plugin\n"},
    "bytes-1.dist-info": {"METADATA": b"Name: \xff\xfe\n", "entry_points.txt": b"[saekit]\nplugin = bytes_plugin\n"},
    "pointless-1.dist-info": {
        "METADATA": b"Metadata-Version: 2.1\nName: pointless\nVersion: 1\n",
        "entry_points.txt": b"[saekit]\nplugin = not a module!\n",
    },
}
UNREADABLE = {
    "torn-1.dist-info": {
        "METADATA": b"Metadata-Version: 2.1\nName: torn\nVersion: 1\n",
        "entry_points.txt": b"[saekit]\nno equals sign\n",
    },
    "other-1.dist-info": {
        "METADATA": b"Metadata-Version: 2.1\nName: other\nVersion: 1\n",
        "entry_points.txt": b"[console_scripts]\nno equals sign\n",
    },
}


def write(folder: Path, distributions: dict[str, dict[str, bytes]]) -> None:
    for name, files in distributions.items():
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rude distribution, a polite one, and some whose metadata are not what they should be."""
    folder = tmp_path_factory.mktemp("rude")
    modules = {f"rude_{name}.py": text for name, text in MODULES.items()}
    rude = project(folder / "src", "rude", modules, **{name: f"rude_{name}" for name in MODULES})
    polite = project(folder / "src", "polite", {"polite.py": good("polite")}, plugin="polite")
    install([rude, polite], folder / "site")
    for file, text in HELPERS.items():
        (folder / "site" / file).parent.mkdir(exist_ok=True)
        (folder / "site" / file).write_text(text)
    write(folder / "site", DAMAGED)
    for name in ("versions", "nameless", "bytes"):
        (folder / "site" / f"{name}_plugin.py").write_text(good(name))
    return folder / "site"


def run(site: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | more
    return warm.python(*arguments, env=environment, light=True)


def cli(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(site, "-m", "saekit.cli", *arguments)


def harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


SLOW = " s to import, in every command"  # a machine that is busy with other things makes anything slow


def check_listing(listed: subprocess.CompletedProcess[str]) -> None:
    assert listed.returncode == 0, listed.stderr
    assert harmless(listed.stdout + listed.stderr)
    lines = listed.stdout.splitlines()
    for name, (_, reason) in LEFT_OUT.items():
        (line,) = [line for line in lines if line.startswith(f"failed: rude:{name} 1.0: ")]
        assert reason in line
        assert len(line) < 500
        assert f"plugin rude:{name} 1.0 was left out: " in listed.stderr
    for name, (_, text) in TOLD.items():
        (line,) = [line for line in lines if line.startswith(f"note: rude:{name} 1.0: ") and text in line]
    keys = {line.split()[0] for line in lines if line.startswith("  ") and ":" in line.split()[0]}
    assert {"saekit:cosine", "polite:polite", "rude:old", "rude:prints", "rude:slow", "rude:heavy"} <= keys
    assert {"versions:versions", "rude:colors", "rude:fails-later", "rude:needs", "rude:right"} <= keys
    told = [line for line in lines if line.startswith(("failed: ", "note: ")) and SLOW not in line]
    assert not [line for line in told if line.split()[1].removeprefix("rude:") in QUIET]
    assert not [line for line in told if line.startswith("note: ") and "rude:" not in line]


def test_everything_is_contained_and_named(site: Path) -> None:
    listed = cli(site, "plugins")
    check_listing(listed)
    assert r"\x1b[31mred\x1b[0m and more" in listed.stdout
    assert "its options cannot be listed: KeyError: 1" in listed.stdout
    assert "[needs: pip install broken_parent.inner]" in listed.stdout
    assert r"versions \x1b[31mbanana" in listed.stdout
    told = "its metadata says that it is saekit, which is another distribution that is installed here"
    assert f"failed: saekit:cosine 1.0: {told}" in listed.stdout
    assert "failed: pointless:plugin 1: its entry point is 'not a module!', expected a module" in listed.stdout
    shown = cli(site, "plugins", "lr_schedules:rude:colors")
    assert shown.returncode == 0
    assert harmless(shown.stdout)


def test_where_warnings_are_errors(site: Path) -> None:
    strict = "import sys, warnings, saekit.cli; warnings.simplefilter('error'); saekit.cli.main()"
    check_listing(run(site, "-c", strict, "plugins"))


def test_what_programs_read_stays_clean(site: Path) -> None:
    listed = cli(site, "plugins", "--json")
    found = json.loads(listed.stdout)
    assert {failure["plugin"] for failure in found["failed"]} >= {f"rude:{name}" for name in LEFT_OUT}
    noted = {note["plugin"] for note in found["notes"] if SLOW not in note["text"]}
    assert noted | {"rude:slow"} == {f"rude:{name}" for name in TOLD}
    assert harmless(listed.stdout)
    assert "from a command" in listed.stderr
    written = cli(site, "config", "--format", "json")
    assert json.loads(written.stdout)["lr_schedule"]


def test_unknown_names_tell_of_all_that_failed(site: Path) -> None:
    unknown = cli(site, "plugins", "lr_schedules:\x1b[31mnothing")
    assert unknown.returncode == 2
    assert harmless(unknown.stderr)
    for name, (_, reason) in LEFT_OUT.items():
        assert f"Plugin rude:{name} failed to load: " in unknown.stderr
        assert reason in unknown.stderr


def test_distributions_whose_entry_points_cannot_be_read_hide_no_others(site: Path, tmp_path: Path) -> None:
    write(tmp_path, UNREADABLE)
    listed = run(site, "-m", "saekit.cli", "plugins", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert listed.returncode == 0, listed.stderr
    assert "saekit:cosine" in listed.stdout
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: torn 1: its entry_points.txt cannot be read (")
    assert "other" not in listed.stderr


BUILD = """
import json, warnings
warnings.simplefilter("ignore")
import saekit
manager, found = saekit.default_manager(), {}
for item in manager.registries["lr_schedules"].items:
    if item.plugin == "rude:builds":
        try:
            manager.build("lr_schedules", item.key, lr=1.0, steps=10)
        except BaseException as error:
            found[item.entry.name] = [type(error).__name__, str(error), type(error.__cause__).__name__,
                                      *getattr(error, "__notes__", [])]
print(json.dumps(found))
"""
WHO = "LR schedule 'rude:{}' (rude 1.0)"


def test_what_fails_in_build_or_comes_back_wrong_names_the_plugin(site: Path) -> None:
    found = json.loads(run(site, "-c", BUILD).stdout)
    returned = {
        "nothing": "None, expected an LR schedule",
        "class": "<class 'rude_builds.Rate'>, a class, expected an LR schedule: an instance of it",
        "no-end": "which lacks end; expected an LR schedule, as saekit.protocols describes it",
        "bad-end": "whose end is 'now', expected a finite number",
        "number": "3, which lacks __call__(), end; expected an LR schedule",
        "async": "a coroutine, expected an LR schedule: build must not be async",
    }
    for name, text in returned.items():
        kind, message, cause = found.pop(name)
        assert (kind, cause) == ("PluginFailedError", "NoneType")
        assert message.startswith(f"{WHO.format(name)}: build returned ")
        assert text in message
    assert found == {
        "fails": [
            "PluginFailedError", WHO.format("fails") + r" failed in build: KeyError: 'where\x1b[31m'", "KeyError"
        ],
        "stops": ["PluginFailedError", WHO.format("stops") + " failed in build: SystemExit: 1", "SystemExit"],
        "imports": [
            "ModuleNotFoundError", "No module named 'heavy'", "NoneType", f"In build of the {WHO.format('imports')}."
        ],
        "refuses": ["ConfigError", "end must be smaller", "NoneType", f"In build of the {WHO.format('refuses')}."],
        "interrupts": ["KeyboardInterrupt", "", "NoneType"],
    }  # fmt: skip
