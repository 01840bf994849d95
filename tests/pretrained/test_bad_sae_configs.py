"""A ``cfg.json`` that was damaged, edited or made up is refused by the name of file and field."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.foreign import CONNOR, NEW, OLD, tensors, write, write_connor
from support.saved import make

import saekit
from saekit import SAE
from saekit.errors import ConfigError, SAEFormatError, SaekitError
from saekit.sae.build import build_module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(activation="tanh-relu").save(tmp_path_factory.mktemp("saved") / "sae")


def config_of(folder: Path) -> Any:
    return json.loads((folder / "cfg.json").read_text())


def edited(saved: Path, tmp_path: Path, change: Callable[[Any], None], *, sealed: bool = False) -> Path:
    """A copy of the folder, with saekit's part of its cfg.json changed."""
    folder = tmp_path / "edited"
    folder.mkdir(exist_ok=True)
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = config_of(folder)
    change(config["saekit"])
    if not sealed:
        config["saekit"].pop("seal", None)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    below = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, value in below for place in places(value, (*path, key))]


def put(node: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


RUBBISH = [None, True, -1, 0, 3.5, 10**30, float("nan"), float("-inf"), "", "rubbish", "é\x00", [], [None], {},
           {"a": 1}, 10**400]  # fmt: skip


def error_of(folder: Path) -> SaekitError | None:
    """Why it is refused, if it is; any other error goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about factors that are unknown
        try:
            SAE.load(folder)
        except SaekitError as error:
            return error
    return None


def test_any_change_breaks_the_seal(saved: Path, tmp_path: Path) -> None:
    own = config_of(saved)["saekit"]
    for path in places(own):
        if path in (("seal",), ("format",)) or path[0] == "sha256":
            continue

        def change(own: Any, path: tuple[Any, ...] = path) -> None:
            put(own, path, ["changed"])

        with pytest.raises(
            SAEFormatError, match="cfg.json in .* is damaged or was changed after it was saved: it does not fit"
        ):
            SAE.load(edited(saved, tmp_path, change, sealed=True))
        with pytest.raises(SAEFormatError, match="is damaged or was changed"):
            SAE.load(edited(saved, tmp_path, lambda own, path=path: remove(own, path), sealed=True))


def test_the_seal_is_of_what_others_read_too(saved: Path, tmp_path: Path) -> None:
    for name, value in (("d_in", 7), ("apply_b_dec_to_input", False), ("metadata", {"hook_name": "elsewhere"})):
        folder = edited(saved, tmp_path, lambda own: None, sealed=True)
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(SAEFormatError, match="is damaged or was changed after it was saved"):
            SAE.load(folder)


def remove(node: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]


def test_the_seal_is_of_what_is_said_not_of_how(saved: Path, tmp_path: Path) -> None:
    config = config_of(saved)
    folder = edited(saved, tmp_path, lambda own: None, sealed=True)
    config["saekit"] = dict(reversed(config["saekit"].items()))
    (folder / "cfg.json").write_text(json.dumps(config, indent=7))
    assert SAE.load(folder).info.architecture == "saekit:standard"
    assert "seal" in config["saekit"]


def test_a_fault_in_an_option_is_told_with_its_file(saved: Path, tmp_path: Path) -> None:
    folder = edited(saved, tmp_path, lambda own: put(own, ("options", "d_sae"), "many"))
    told = r"the SAE in .*: its options do not fit saekit:standard: d_sae: .* \(saekit.options in cfg.json\)$"
    with pytest.raises(SAEFormatError, match=told):
        SAE.load(folder)


def test_rubbish_in_any_field_without_a_seal(saved: Path, tmp_path: Path) -> None:
    """It is an error of ours, or it is no rubbish there; never a raw one."""
    own, refused = config_of(saved)["saekit"], 0
    for path in places(own):
        for value in RUBBISH:
            folder = edited(saved, tmp_path, lambda own, path=path, value=value: put(own, path, copy.deepcopy(value)))
            if (error := error_of(folder)) is not None:
                refused += 1
                assert str(folder) in str(error), (path, value)
                assert not isinstance(error, ConfigError), (path, value)
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("site"), "saekit.site in cfg.json of .* found nothing, expected an object or null"),
        (lambda own: own.pop("metadata"), "saekit.metadata in cfg.json of .* found nothing, expected an object"),
        (lambda own: own["site"].pop("hook_name"), "saekit.site in cfg.json of .* is not a site: hook_name: is miss"),
        (lambda own: put(own, ("site", "hook_name"), 5), "is not a site: hook_name: must be a text, found 5"),
        (lambda own: put(own, ("site", "hook_head_index"), 1.0), "hook_head_index: must be a whole number or None, fo"),
        (lambda own: put(own, ("site", "hook_head_index"), True), "hook_head_index: must be a whole number or None, f"),
        (lambda own: put(own, ("metadata", "activation_scale"), "2"), "metadata.activation_scale in .* found '2'"),
        (lambda own: put(own, ("sha256",), [1]), r"saekit.sha256 in .* found \[1\], expected an object of checksums"),
        (lambda own: put(own, ("sha256",), {"a": "b"}), "saekit.sha256 in .* has no checksum of sae_weights"),
        (lambda own: own["options"].pop("activation"), "saekit.options in cfg.json of .* lacks activation, without"),
        (lambda own: own["options"].pop("apply_b_dec_to_input"), "lacks apply_b_dec_to_input, without which"),
        (lambda own: own["options"].pop("d_sae"), "lacks d_sae, without which"),
    ],
)  # fmt: skip
def test_messages(saved: Path, tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(edited(saved, tmp_path, change))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [TopKConfig(d_sae=30, k=8), BatchTopKConfig(d_sae=30, k=8)])
def test_no_default_takes_the_place_of_k(tmp_path: Path, config: TopKConfig) -> None:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, 12, plugins)
    folder = sae.save(tmp_path / "sae")
    assert SAE.load(folder).config.k == 8  # type: ignore[attr-defined]
    for option in ("k", "rescale_acts_by_decoder_norm"):
        with pytest.raises(SAEFormatError, match=f"saekit.options in cfg.json of .* lacks {option}, without which"):
            SAE.load(edited(folder, tmp_path, lambda own, option=option: own["options"].pop(option)))


def test_a_folder_from_before_the_seal_loads(saved: Path, tmp_path: Path) -> None:
    folder = edited(saved, tmp_path, lambda own: [own["options"].pop(name) for name in ("use_ghost_grads", "dtype")])
    assert torch.equal(SAE.load(folder).W_enc, SAE.load(saved).W_enc)


def test_sparsity_that_belongs_to_other_weights_is_not_read(saved: Path, tmp_path: Path) -> None:
    sae = make()
    sae.log_sparsity = None
    folder = sae.save(tmp_path / "sae")
    (folder / "sparsity.safetensors").write_bytes((saved / "sparsity.safetensors").read_bytes())
    assert SAE.load(folder).log_sparsity is None


TEXTS = {
    "deep": ('{"saekit": ' + "[" * 5000 + "]" * 5000 + "}", "cfg.json in .* is nested too deeply, expected at most 64"),
    "deeper": ('{"saekit": ' + "[" * 200_000 + "]" * 200_000 + "}", "cfg.json in .* is nested too deeply"),
    "quite deep": ('{"saekit": ' + "[" * 80 + "]" * 80 + "}", "is nested too deeply, expected at most 64 levels"),
    "surrogate": (r'{"saekit": {"a": ["\ud800"]}}', r"saekit.a\[0\] in cfg.json in .* is '.ud800', which is not a tex"),
    "surrogate name": (r'{"d_in": 1, "\udfff": 2}', r"has a field '.udfff', which is not a text in Unicode"),
    "bytes": (b'{"a": "\xff"}', "cfg.json in .* is not valid JSON: 'utf-8' codec"),
    "twice": ('{"saekit": {"format": 1, "format": 1}}', "is not valid JSON: it gives 'format' twice"),
    "no object": ('{"saekit": 5}', "saekit in cfg.json of .* is 5, expected an object"),
    "empty": ("", "cfg.json in .* is not valid JSON"),
    "digits": ('{"d_in": ' + "9" * 5000 + "}", "cfg.json in .* is not valid JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_json_that_is_not_fit(saved: Path, tmp_path: Path, name: str) -> None:
    text, message = TEXTS[name]
    folder = edited(saved, tmp_path, lambda own: None)
    (folder / "cfg.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)


def test_metadata_that_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    sae = make()
    for metadata, message in (
        ({"where": tmp_path}, "sae.info.metadata cannot be saved, as it is not plain JSON: .*PosixPath"),
        ({"name": "\ud800"}, "name in sae.info.metadata is '.ud800', which is not a text in Unicode"),
    ):
        sae.info = attrs.evolve(sae.info, metadata=metadata)
        with pytest.raises(SAEFormatError, match=message):
            sae.save(tmp_path / "sae")
    sae.info = attrs.evolve(sae.info, metadata={2: "b", 10: "a"})  # JSON has texts for keys
    assert SAE.load(sae.save(tmp_path / "sae")).info.metadata == {"2": "b", "10": "a"}


@pytest.mark.parametrize("config", [OLD, NEW])
def test_rubbish_in_any_field_of_the_peers(tmp_path: Path, config: dict[str, Any]) -> None:
    refused = 0
    for path in places(config):
        for value in RUBBISH:
            changed = copy.deepcopy(config)
            put(changed, path, copy.deepcopy(value))
            folder = write(tmp_path, changed, tensors())
            if (error := error_of(folder)) is not None:
                refused += 1
                assert isinstance(error, SAEFormatError)
                assert str(folder) in str(error), (path, value)
    assert refused > 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_point": 5}, "hook_name in cfg.json in .* is 5, expected a text"),
        ({"hook_point": ""}, "hook_name in cfg.json in .* is '', expected a text"),
        ({"hook_point_head_index": "a"}, "hook_head_index: must be a whole number or None, found 'a'"),
        ({"hook_point_head_index": -1}, "hook_head_index: must be 0 or more, found -1"),
        ({"d_in": 6.0}, "d_in in cfg.json in .* is 6.0, expected a whole number above 0"),
        ({"d_sae": True}, "d_sae in cfg.json in .* is True, expected a whole number above 0"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input in cfg.json in .* is 'no', expected true or false"),
        ({"activation_fn": ["relu"]}, r"activation_fn in cfg.json in .* is \['relu'\], expected a text"),
        ({"activation_fn": "swish"}, "the SAE in .*: its options do not fit saekit:standard: activation: .*swish"),
        ({"metadata": [1]}, r"metadata in cfg.json in .* is \[1\], expected an object"),
        ({"architecture": 3}, "architecture in cfg.json in .* is 3, expected a text"),
    ],
)
def test_messages_about_the_peers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(write(tmp_path, OLD | changes, tensors()))


@pytest.mark.parametrize("name", list(CONNOR))
def test_rubbish_in_the_config_of_a_pt_file(tmp_path: Path, name: str) -> None:
    for value in RUBBISH:
        if value in ("rubbish", "é\x00") and name == "act_name":
            continue
        folder = write_connor(tmp_path, tensors(), config=CONNOR | {name: value})
        if type(value) is int and name == "layer" and value >= 0:
            SAE.load(folder)
            continue
        with pytest.raises(SAEFormatError, match=rf"{name} in .*_cfg.json in .* is .*, expected|do not fit"):
            SAE.load(folder)


def test_a_place_that_cannot_be() -> None:
    for path in ("x" * 300, "x\0y", "~nobody-of-this-name/x"):
        with pytest.raises(SAEFormatError, match="the SAE folder .* (cannot be read|is not there)"):
            SAE.load(path)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make().save(tmp_path / "sae")
    assert SAE.load("~/sae").d_sae == 30


def test_a_device_that_is_none(saved: Path) -> None:
    with pytest.raises(ConfigError, match="device: 'gpu' cannot be used"):
        SAE.load(saved, device="gpu")
