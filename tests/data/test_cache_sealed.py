"""A manifest is sealed, and believed in no field that contradicts itself or the files, sealed or not."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.caches import HEAD, SITE, config, hashes, manager, plan, source, write

import saekit
from saekit.data.cache import CacheWriter, Manifest, verify_cache
from saekit.data.cache.manifest import SiteRows
from saekit.data.cache.table import sealed
from saekit.errors import DataError
from saekit.planning.cache import plan_cache
from saekit.testing import FakeBackend

Table = dict[str, Any]
_MADE: dict[str, tuple[Path, str]] = {}


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache of two shards, and its manifest's text; one for all tests, which put it back."""
    if "cache" not in _MADE:
        folder = tmp_path_factory.mktemp("sealed") / "c"
        write(folder, 6, text="some")
        _MADE["cache"] = folder, (folder / "manifest.json").read_text()
    folder, text = _MADE["cache"]
    (folder / "manifest.json").write_text(text)
    return folder, text


def spots(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in ``value``."""
    if at:
        yield at
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from spots(inner, (*at, key))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from(["float16", "bfloat16", "../x", 0, 1, 2, 4, 8, 16, 1.0, True]),
)  # fmt: skip


def load(folder: Path) -> Manifest | None:
    """The manifest, or None where it is refused; whatever else is raised is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a seal that was removed, and nothing else
        try:
            return Manifest.load(folder)
        except DataError:
            return None


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_edit_is_refused_or_changes_nothing(made: tuple[Path, str], data: st.DataObject) -> None:
    folder, text = made
    (folder / "manifest.json").write_text(text)
    wanted, table = Manifest.load(folder), json.loads(text)
    *way, last = data.draw(st.sampled_from(list(spots(table))))
    owner = table
    for key in way:
        owner = owner[key]
    edit = data.draw(st.sampled_from(["replace", "remove", "rename", "double"]))
    if edit == "replace":
        owner[last] = data.draw(VALUES)
    elif edit == "rename" and isinstance(owner, dict):
        owner[data.draw(st.text(max_size=5))] = owner.pop(last)
    elif edit == "double" and isinstance(owner, list):
        owner.insert(last, copy.deepcopy(owner[last]))
    else:
        del owner[last]
    (folder / "manifest.json").write_text(json.dumps(table))
    assert load(folder) in (None, wanted)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused_or_changes_nothing(made: tuple[Path, str], data: st.DataObject) -> None:
    folder, text = made
    (folder / "manifest.json").write_text(text)
    wanted, raw = Manifest.load(folder), bytearray(text.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (folder / "manifest.json").write_bytes(raw)
    assert load(folder) in (None, wanted)


def edited(folder: Path, text: str, edit: Callable[[Table], Any], seal: str) -> None:
    """Write the manifest with an ``edit``, and a seal that is ``broken`` by it, ``gone``, or made ``anew``."""
    table = json.loads(text)
    edit(table)
    if seal == "gone":
        del table["sha256"]
    (folder / "manifest.json").write_text(json.dumps(sealed(table) if seal == "anew" else table))


def test_the_field_that_was_changed_is_named(made: tuple[Path, str]) -> None:
    folder, text = made
    for edit, line in [
        (lambda t: t["identity"].update(text="other"), "identity: is not as it was written"),
        (lambda t: t.update(ended=True), "ended: is not as it was written"),
        (lambda t: t["position"].update(next=5), "position: is not as it was written"),
        (lambda t: t.update(contexts_per_shard=9), "contexts_per_shard: is not as it was written"),
        (lambda t: t.update(more=1), "more: is not as it was written"),
        (lambda t: t["sha256"].pop("ended"), "ended: is not as it was written"),
        (lambda t: t.update(sha256=None), "sha256: found None, expected the checksum of each field"),
    ]:
        edited(folder, text, edit, "broken")
        with pytest.raises(DataError) as caught:
            Manifest.load(folder)
        assert str(caught.value) == (
            f"{folder / 'manifest.json'} is damaged:\n  - {line}\n"
            "Restore it from a copy, or remove the cache and run `saekit cache` again"
        )


TOKENS, OWN = "tokens.safetensors", f"{SITE.name}.safetensors"


@pytest.mark.parametrize("seal", ["gone", "anew"])
@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda t: t.update(context_size="8"), "context_size: found '8', expected a whole number of 1 or more"),
        (lambda t: t.update(context_size=2), r"shards\[0\].files\['tokens.safetensors'\].bytes: found 4,224, expected"),
        (lambda t: t.update(context_size=True), "context_size: found True, expected a whole number"),
        (lambda t: t.update(context_size=10**400), "context_size: found 1000.*, expected a whole number"),
        (lambda t: t.update(sites={}), r"sites: found a dict, expected a list of one or more"),
        (lambda t: t.update(sites=[5]), r"sites\[0\]: found 5, expected a table"),
        (lambda t: t.update(identity=None), "identity: found None, expected a table"),
        (lambda t: t.pop("ended"), "ended: is missing"),
        (lambda t: t.update(rows=7), "rows: found 7, expected 48, the shards' together"),
        (lambda t: t["shards"].pop(), "contexts: found 6, expected 4, the shards' together"),
        (lambda t: t.update(position=None), "position: found null, expected where in the text"),
        (lambda t: t["sites"][0].update(d_in=4), r"files\['blocks.*'\].bytes: found 5,120, expected 4,608 for 32 x 4 "),
        (lambda t: t["sites"][0].update(dtype="float16"), r"sites\[0\].itemsize: found 4, and float16 has 2"),
        (lambda t: t["sites"][0].update(dtype="int8"), r"sites\[0\]: its type is 'int8', and a cache holds float64, "),
        (lambda t: t["sites"][0].update(more=1), r"sites\[0\].more: is not known"),
        (lambda t: t["sites"].append(t["sites"][0]), "sites: two have one name among"),
        (lambda t: t["sites"][0]["site"].update(hook_head_index=-1), r"site.hook_head_index: found -1, expected null"),
        (lambda t: t["shards"][1]["files"].pop(TOKENS), r"shards\[1\].files: tokens.safetensors is missing"),
        (lambda t: t["shards"][1]["files"].update(x={}), r"shards\[1\].files: 'x' is no file of a shard"),
        (lambda t: t["shards"][0]["files"][OWN].update(bytes=5.0), r"\].bytes: found 5.0, expected a whole"),
        (lambda t: t["shards"][0]["files"][OWN].update(sample="x"), r"\].sample: found 'x', expected a sha256"),
        (lambda t: t["shards"][0].update(contexts=0), r"shards\[0\].contexts: found 0, expected a whole"),
    ],
)  # fmt: skip
def test_a_field_that_contradicts_the_facts_is_named(
    made: tuple[Path, str], edit: Callable[[Table], Any], line: str, seal: str
) -> None:
    edited(made[0], made[1], edit, seal)
    with pytest.raises(DataError, match=rf"manifest.json is damaged:\n(.*\n)*?  - .*{line}(.*\n)*.*Restore it from"):
        Manifest.load(made[0])


@pytest.mark.parametrize("name", ["../../x", "a/b", "/etc/passwd", "x\0y", "a\\b", "", "x" * 250, "tokens", "\ud800"])
def test_names_that_lead_elsewhere_are_refused(made: tuple[Path, str], name: str) -> None:
    folder, text = made
    edited(folder, text, lambda t: t["sites"][0]["site"].update(hook_name=name), "anew")
    with pytest.raises(DataError, match=r"sites\[0\]: (its name|a file tokens.safetensors is in every shard)"):
        Manifest.load(folder)
    with pytest.raises(DataError, match=r"cannot be cached: (its name|a file)"):
        planned = saekit.load_config(config(folder), plugins=manager(FakeBackend()))
        site = saekit.Site(hook_name=name)
        stream: Any = type("Stream", (), {"dtypes": {site: torch.float32}, "widths": {site: 8}})
        plan_cache(planned, stream, 8)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"format": ' * 10**4, "\ufeff{}", "nan", '{"format": true}', ""])
def test_what_is_no_manifest(made: tuple[Path, str], text: str) -> None:
    (made[0] / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest.json (cannot be read|has format)"):
        Manifest.load(made[0])


def test_the_files_say_themselves_what_they_hold(made: tuple[Path, str]) -> None:
    """What fits in size and is something else is found by the file's own header."""
    folder, text = made

    def half_as_many(table: Table) -> None:
        for rows in table["sites"]:
            rows.update(d_in=rows["d_in"] * 2, dtype="bfloat16", itemsize=2)

    for seal in ("gone", "anew"):
        edited(folder, text, half_as_many, seal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for full in (True, False):
                with pytest.raises(DataError, match=r"is not what manifest.json says: its own header has .*'F32'") as e:
                    verify_cache(folder, full=full)
                assert str(e.value).count("\n  - ") == 4, "two sites in two shards"


def test_a_cache_from_before_the_seal(tmp_path: Path, made: tuple[Path, str]) -> None:
    folder = tmp_path / "old"
    shutil.copytree(made[0], folder)
    edited(folder, made[1], lambda table: None, "gone")
    before = hashes(folder)
    with pytest.warns(RuntimeWarning, match="did not seal manifests.*`saekit cache verify .*old` compares") as warned:
        read = source(folder, identity={"text": "some"})
    assert len([one for one in warned if one.category is RuntimeWarning]) == 1
    assert len(list(read)) == 2
    read.close()
    assert hashes(folder) == before, "reading writes nothing"
    with pytest.warns(RuntimeWarning, match="did not seal"):
        write(folder, 6, text="some")
    assert (folder / "manifest.json").read_text() == made[1], "sealed by the command that wrote it"
    Manifest.load(folder)


def test_a_damaged_cache_is_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "c", 8)
    (tmp_path / f"c/shard-00001/{HEAD.name}.safetensors").unlink()
    before = hashes(tmp_path / "c")
    with pytest.raises(DataError, match=rf"is damaged:\n  - shard-00001/{HEAD.name}.safetensors is missing"):
        write(tmp_path / "c", 13)
    assert hashes(tmp_path / "c") == before


def test_sites_that_would_share_a_file(tmp_path: Path) -> None:
    twin = saekit.Site(hook_name=HEAD.name)
    manifest = attrs.evolve(plan(), sites=[SiteRows(HEAD, 4, "float32", 4), SiteRows(twin, 4, "float32", 4)])
    stream: Any = type("S", (), {"dtypes": {s.site: torch.float32 for s in manifest.sites},
                                 "widths": {s.site: 4 for s in manifest.sites}})  # fmt: skip
    with pytest.raises(DataError, match="would share a file: cache them apart"):
        plan_cache(saekit.load_config(config(tmp_path), plugins=manager(FakeBackend())), stream, 8)
    with CacheWriter(tmp_path / "c", plan()):
        pass
