"""Files that pickled whole objects: what they hold is read, and nothing that they would do is done."""

from __future__ import annotations

import builtins
import codecs
import collections
import gzip
import io
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.formats import FIXTURES

from saekit import SAE
from saekit.errors import SAEFormatError

MODULE = "sae_training.config"


@pytest.fixture
def foreign() -> Iterator[Callable[..., Any]]:
    """Makes objects of a class that is nowhere when they are read."""
    made = types.ModuleType(MODULE)
    cls = type("LanguageModelSAERunnerConfig", (), {"__module__": MODULE})
    made.LanguageModelSAERunnerConfig = cls  # type: ignore[attr-defined]
    sys.modules |= {"sae_training": types.ModuleType("sae_training"), MODULE: made}

    def make(**fields: Any) -> Any:
        found = cls()
        found.__dict__.update(fields)
        return found

    yield make
    forget()


def forget() -> None:
    for name in ("sae_training", MODULE):
        sys.modules.pop(name, None)


def tensors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "sae_lens_2.1.3_folder/sae_weights.safetensors")


FIELDS = {
    "hook_point": "blocks.2.hook_mlp_out",
    "hook_point_layer": 2,
    "d_in": 16,
    "expansion_factor": 4,
    "model_name": "gpt2-small",
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


def write(path: Path, thing: Any) -> Path:
    """As the name says."""
    if path.name.endswith(".gz"):
        with gzip.open(path, "wb") as file:
            pickle.dump(thing, file)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(thing))
    else:
        torch.save(thing, path, _use_new_zipfile_serialization="old" not in path.name)
    return path


@pytest.mark.parametrize("name", ["sae_lens_2.1.3_legacy_pt", "sae_lens_2.1.3_legacy_pkl_gz"])
def test_what_the_peer_computes(tmp_path: Path, name: str) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    for sae in ((loaded := SAE.load(FIXTURES / name)), SAE.load(loaded.save(tmp_path))):
        with torch.no_grad():
            features = sae.encode(expected["x"])
            assert (features - expected["encode"]).abs().max() <= 1e-6 * expected["encode"].abs().max()
            assert (sae(expected["x"]) - expected["forward"]).abs().max() <= 1e-6 * expected["forward"].abs().max()
    assert loaded.info.provenance["loader"] == "saekit:sae_lens_legacy"
    assert loaded.info.site.hook_name == "blocks.0.hook_resid_pre"
    assert loaded.info.metadata["prepend_bos"] is True
    assert "sae_lens" not in sys.modules


@pytest.mark.parametrize("name", ["sae.pt", "old.pt", "sae.pkl", "sae.pkl.gz"])
def test_every_kind_of_file(tmp_path: Path, foreign: Callable[..., Any], name: str) -> None:
    state = {key: value for key, value in tensors().items() if key != "scaling_factor"}
    state["W_dec"] = state["W_dec"].T.contiguous().T  # of other strides
    path = write(tmp_path / name, {"cfg": foreign(**FIELDS), "state_dict": collections.OrderedDict(state)})
    forget()
    for place in (path, tmp_path):
        sae = SAE.load(place)
        for key, value in state.items():
            assert torch.equal(getattr(sae, key), value)
        assert sae.info.site.hook_name == "blocks.2.hook_mlp_out"
        assert sae.info.metadata["model_name"] == "gpt2-small"
        assert sae.info.provenance["renamed"] == {"hook_point": "hook_name", "hook_point_layer": "hook_layer"}
        assert sae.scaling_factor is None, "without one, factors are ones"


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_pickle(tmp_path: Path, foreign: Callable[..., Any], protocol: int) -> None:
    whole = {"cfg": foreign(**FIELDS), "state_dict": tensors()}
    (tmp_path / "sae.pkl").write_bytes(pickle.dumps(whole, protocol=protocol))
    forget()
    assert torch.equal(SAE.load(tmp_path).W_enc, tensors()["W_enc"])


def test_how_often_features_fire_lies_beside(tmp_path: Path, foreign: Callable[..., Any]) -> None:
    write(tmp_path / "final_sparse_autoencoder_x.pt", {"cfg": foreign(**FIELDS), "state_dict": tensors()})
    torch.save(torch.zeros(64), tmp_path / "final_sparse_autoencoder_x_log_feature_sparsity.pt")
    assert torch.equal(SAE.load(tmp_path).W_enc, tensors()["W_enc"])


class Modules:
    """A group: its modules hold others, functions among them."""


@pytest.mark.parametrize("name", ["group.pt", "old.pt", "group.pkl"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_group(tmp_path: Path, foreign: Callable[..., Any], name: str) -> None:
    module = torch.nn.Module()
    for key, value in tensors().items():
        module.register_parameter(key, torch.nn.Parameter(value))
    module.activation = torch.nn.ReLU()
    module.cfg = foreign(**FIELDS)
    group = Modules()
    group.cfg, group.autoencoders, group.odd = foreign(**FIELDS), {"a": module}, [getattr, {1, 2}]
    path = write(tmp_path / name, group)
    assert torch.equal(SAE.load(path).W_enc, tensors()["W_enc"])
    group.autoencoders["b"] = module
    write(path, group)
    with pytest.raises(SAEFormatError, match=r"holds 2 SAEs \(a, b\); say which: loader="):
        SAE.load(path)
    with pytest.raises(SAEFormatError, match=r"holds 2 SAEs \(a, b\); none is 'c'"):
        SAE.load(path, loader={"name": "sae_lens_legacy", "member": "c"})
    assert torch.equal(SAE.load(path, loader={"name": "sae_lens_legacy", "member": "b"}).W_enc, tensors()["W_enc"])


# ---- what a stranger may have put there


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called


def nested(mark: Path, kind: str) -> bytes:
    """A file of torch's with a gadget in it: its pickle comes where a storage should be."""
    file = io.BytesIO()
    torch.save(Calls(os.system, f"touch {mark}"), file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


GADGETS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "a method by getattr": lambda mark: Calls(getattr, mark, "touch"),
    "an import": lambda mark: Calls(builtins.__import__, "this"),
    "a file that is pickled again": lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))),
    "a storage, old": lambda mark: Calls(torch.storage._load_from_bytes, nested(mark, "old")),
    "a storage, zip": lambda mark: Calls(torch.storage._load_from_bytes, nested(mark, "zip")),
    "a storage, plain": lambda mark: Calls(
        torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {mark}"))
    ),
    "torch.load": lambda mark: Calls(torch.load, io.BytesIO(nested(mark, "old")), None, None),
    "a tensor's storage": lambda mark: Calls(
        torch._utils._rebuild_tensor_v2, Calls(os.system, f"touch {mark}"), 0, (1,), (1,), False, {}
    ),
    "hooks of a tensor": lambda mark: Calls(
        torch._utils._rebuild_parameter, torch.ones(1), True, Calls(os.system, f"touch {mark}")
    ),
    "what a dictionary is made of": lambda mark: Calls(collections.OrderedDict, [Calls(os.system, f"touch {mark}")]),
}


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("name", ["sae.pt", "old.pt", "sae.pkl", "sae.pkl.gz"])
@pytest.mark.parametrize("where", ["alone", "in the configuration", "among the tensors"])
def test_nothing_runs(tmp_path: Path, foreign: Callable[..., Any], gadget: str, name: str, where: str) -> None:
    mark = tmp_path / "it-ran"
    bomb, state = GADGETS[gadget](mark), tensors()
    thing: Any = {"cfg": foreign(**FIELDS), "state_dict": state}
    if where == "alone":
        thing = bomb
    elif where == "in the configuration":
        thing["cfg"].odd = bomb
    else:
        state["W_enc"] = bomb
    path = write(tmp_path / name, thing) if gadget != "torch.load" else without_streams(tmp_path / name, thing)
    before = set(sys.modules)
    try:
        sae = SAE.load(path)
    except SAEFormatError:
        assert not mark.exists()
    else:
        assert where == "in the configuration", "what is not used may be there, as long as nothing is done"
        assert torch.equal(sae.W_enc, tensors()["W_enc"])
    assert not mark.exists()
    assert "this" not in set(sys.modules) - before


def without_streams(path: Path, thing: Any) -> Path:
    """A stream cannot be pickled: the bytes that it is made of come in its place."""

    def reduced(self: io.BytesIO) -> Any:
        return io.BytesIO, (self.getvalue(),)

    import copyreg

    copyreg.pickle(io.BytesIO, reduced)  # type: ignore[arg-type]
    try:
        return write(path, thing)
    finally:
        copyreg.dispatch_table.pop(io.BytesIO)


def test_the_gadgets_work_where_a_pickle_is_run(tmp_path: Path) -> None:
    """Else the test above proves nothing."""
    pickle.loads(pickle.dumps(GADGETS["os.system"](tmp_path / "a")))
    torch.load(io.BytesIO(nested(tmp_path / "b", "old")), weights_only=False)
    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


OPCODES: dict[str, tuple[bytes, str]] = {
    "no pickle": (b"hello", "is no readable pickle"),
    "nothing": (b"", "cannot be read: it is empty"),
    "cut off": (pickle.dumps({"cfg": list(range(1000))})[:-40], "is no readable pickle"),
    "an empty stack": (b"\x80\x040.", "is no readable pickle"),
    "no mark": (b"\x80\x04t.", "is no readable pickle"),
    "an extension": (b"\x80\x04\x82\x01.", "the opcode EXT1 is none that these files have"),
    "a name that is no text": (b"\x80\x04K\x01K\x02\x93.", "there is int where str should be"),
    "a call without arguments": (b"\x80\x04cos\nsystem\nK\x01R.", "there is int where tuple should be"),
    "a persistent id": (b"\x80\x04K\x01Q.", "it refers to something outside of it"),
    "a key that is a list": (b"\x80\x04}]K\x01s.", "is no readable pickle: TypeError"),
    "bytes of an encoding": (
        pickle.dumps({"cfg": Calls(codecs.encode, "x", "utf-7")}),
        "there is str in 'utf-7' where bytes should be",
    ),
    "another thing": (pickle.dumps([1, 2]), "must hold cfg and state_dict, or a group of SAEs; found list"),
    "no tensors": (pickle.dumps({"cfg": {}}), "must hold cfg and state_dict, or a group of SAEs; found cfg"),
    "a text as tensors": (pickle.dumps({"cfg": {}, "state_dict": {"W_enc": 1}}), "lacks b_enc, W_dec, b_dec"),
    "one that holds itself": (b"\x80\x04}\x94\x8c\x03cfgh\x00s.", "must hold cfg and state_dict"),
    "a deep one": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "found list"),
}


@pytest.mark.parametrize("what", OPCODES)
def test_pickles_that_are_no_sae(tmp_path: Path, what: str) -> None:
    content, message = OPCODES[what]
    (tmp_path / "sae.pkl").write_bytes(content)
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(tmp_path)


def tensor(storage: Any, offset: object, size: object, stride: object) -> Any:
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


@pytest.mark.parametrize(("offset", "size", "stride", "message"), [
    (0, (1 << 40,), (1,), "needs more than the 4 numbers there are"), (0, (1 << 40,), (0,), "repeats the 4 numbers"),
    (-1, (2,), (1,), "has the shape"), (0, (2,), (1, 1), "has the shape"), (0, "x", (1,), "where a shape should be"),
    (3, (2,), (1,), "needs more than"), (0, (1,) * 9, (1,) * 9, "has the shape"), (0, (2.0,), (1,), "has the shape"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["sae.pt", "old.pt", "sae.pkl"])
def test_tensors_outside_of_their_storage(
    tmp_path: Path, name: str, offset: object, size: object, stride: object, message: str
) -> None:
    typed = torch.storage.TypedStorage(
        wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    write(tmp_path / name, {"cfg": {}, "state_dict": {"W_enc": tensor(typed, offset, size, stride)}})
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(tmp_path)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl"])
@pytest.mark.parametrize(("change", "message"), [
    ({"W_enc": torch.full((16, 64), torch.nan)}, "W_enc of sae.p.* holds 1024 NaN among 1024 numbers"),
    ({"W_enc": torch.ones(16, 63)}, r"W_enc has shape \[16, 63\], expected \[16, 64\]"),
    ({"b_dec": torch.ones(16, dtype=torch.int64)}, "b_dec of .* holds numbers of type int64"),
    ({"b_dec": "x"}, "b_dec of .* is of type str, expected a tensor"),
    ({"more": torch.ones(1)}, "has more, of which this format knows nothing"),
])  # fmt: skip
def test_tensors_that_are_no_weights(
    tmp_path: Path, foreign: Callable[..., Any], name: str, change: dict[str, Any], message: str
) -> None:
    write(tmp_path / name, {"cfg": foreign(**FIELDS), "state_dict": tensors() | change})
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(tmp_path)


def test_a_bomb_of_gzip(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "sae.pkl.gz", "wb") as file:
        for _ in range(70):
            file.write(bytes(1 << 20))
    with pytest.raises(SAEFormatError, match="unpacks to more than 67,108,864 bytes"):
        SAE.load(tmp_path)
    (tmp_path / "sae.pkl.gz").write_bytes(b"no gzip")
    with pytest.raises(SAEFormatError, match="cannot be read: Not a gzipped file"):
        SAE.load(tmp_path)


def test_an_archive_of_torchs_that_is_damaged(tmp_path: Path, foreign: Callable[..., Any]) -> None:
    path = write(tmp_path / "sae.pt", {"cfg": foreign(**FIELDS), "state_dict": tensors()})
    members = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changes: dict[str, tuple[Any, str]] = {
        "data/0": (b"1234", "a storage has 4 bytes, expected"),
        "byteorder": (b"big", "has the byte order 'big'"),
        "data.pkl": (None, "is no archive of torch's: it has 0 files data.pkl"),
    }
    for ending, (content, message) in changes.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name, old in members.items():
                if not name.endswith(ending):
                    archive.writestr(name, old)
                elif content is not None:
                    archive.writestr(name, content)
        with pytest.raises(SAEFormatError, match=message):
            SAE.load(path)


def test_the_old_format_cut_off_anywhere(tmp_path: Path, foreign: Callable[..., Any]) -> None:
    path = write(tmp_path / "old.pt", {"cfg": foreign(**FIELDS), "state_dict": tensors()})
    whole = path.read_bytes()
    for length in range(1, len(whole), len(whole) // 60):
        path.write_bytes(whole[:length])
        with pytest.raises(SAEFormatError):
            SAE.load(path)
