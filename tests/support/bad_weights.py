"""What can be wrong with a file of weights, for each kind of file: faults by name, each with what is said of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.bad_forms import EVIL, Form

Fault: TypeAlias = Callable[[Path, Form], object]
Faults: TypeAlias = Mapping[str, tuple[Fault, str]]

# ---- any file


def _cut(part: float) -> Fault:
    def fault(path: Path, form: Form) -> None:
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])

    return fault


def in_bytes(data: bytes) -> Fault:
    return lambda path, form: path.write_bytes(data)


def _folder(path: Path, form: Form) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("")


def _loop(path: Path, form: Form) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _pipe(path: Path, form: Form) -> None:
    path.unlink()
    os.mkfifo(path)


# ---- tensors by name, in every kind of file


def read(path: Path) -> dict[str, Any]:
    """What a good file of weights holds."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.suffix == ".npz":
        return {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    return dict(torch.load(path, weights_only=True))


def write(path: Path, tensors: dict[str, Any]) -> None:
    """The same kind of file again."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
    else:
        torch.save(tensors, path)


def _tensor(which: str, change: Callable[[torch.Tensor], Any]) -> Fault:
    def fault(path: Path, form: Form) -> None:
        tensors, name = read(path), getattr(form, which)
        tensors[name] = change(tensors[name])
        write(path, tensors)

    return fault


def _without(which: str) -> Fault:
    def fault(path: Path, form: Form) -> None:
        tensors = read(path)
        del tensors[getattr(form, which)]
        write(path, tensors)

    return fault


def _extra(name: str) -> Fault:
    return lambda path, form: write(path, {**read(path), name: torch.zeros(3)})


def _with(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[0] = number
        return value

    return change


TENSORS: Faults = {
    "NaN": (_tensor("matrix", _with(float("nan"))), "{matrix} of .*holds 1 NaN among"),
    "infinity": (_tensor("bias", _with(float("inf"))), "{bias} of .*holds 1 infinite among"),
    "whole numbers": (_tensor("matrix", lambda t: t.to(torch.int64)), "{matrix} of .*of type int64"),
    "a row too few": (_tensor("matrix", lambda t: t[:-1].clone()), r"shape|is for \[?\d|reads \d+ numbers and writes"),
    "a column too few": (_tensor("matrix", lambda t: t[:, :-1].clone()), r"shape|is for \[?\d"),
    "a vector for a matrix": (_tensor("matrix", lambda t: t.flatten()), r"shape \[\d+\]"),
    "a bias too short": (_tensor("bias", lambda t: t[:-1].clone()), "shape"),
    "a tensor missing": (
        _without("matrix"),
        "(lacks|must hold|is missing|none of).*|{matrix}.*not found|W_enc is missing",
    ),
    "a tensor more": (_extra(EVIL), "evil"),
}
PICKLED: Faults = {
    "complex": (_tensor("matrix", lambda t: t.to(torch.complex64)), "{matrix} of .*of type complex64"),
    "sparse": (_tensor("matrix", lambda t: t.float().to_sparse()), "{matrix} of .*sparse_coo tensor"),
    "without numbers": (_tensor("matrix", lambda t: t.to("meta")), "{matrix} of .*meta"),
    "stretched": (_tensor("matrix", lambda t: torch.ones(1, 1).expand(t.shape)), "its file holds only 1 numbers"),
    "a list for a tensor": (_tensor("matrix", lambda t: [1.0]), "{matrix} of .*of type list"),
    "a list": (lambda path, form: torch.save([torch.zeros(3)], path), "must hold tensors by name, found list"),
    "numbers for names": (lambda path, form: torch.save({1: torch.zeros(3)}, path), "must hold tensors by name"),
}


# ---- safetensors


def _header(table: Any, size: int | None = None, numbers: bytes = b"\0" * 64) -> Fault:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return in_bytes(struct.pack("<Q", len(text) if size is None else size) + text + numbers)


def _entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


_NOT_READABLE = "is not a readable safetensors file"
SAFETENSORS = {
    "cut in half": (_cut(0.5), _NOT_READABLE),
    "empty": (_cut(0), _NOT_READABLE),
    "a header without end": (_header(b"{}", 2**62), _NOT_READABLE),
    "a header of 90 MB that is not there": (_header(b"{}", 90 << 20), _NOT_READABLE),
    "a header that is no JSON": (_header(b"{not json}"), _NOT_READABLE),
    "a header nested deep": (_header(b'{"a":' * 50_000), _NOT_READABLE),
    "numbers behind the end": (_header({"W_enc": _entry([16, 64], 0, 4096)}), _NOT_READABLE),
    "a shape of another size": (_header({"W_enc": _entry([16, 64], 0, 64)}), _NOT_READABLE),
    "tensors on top of each other": (_header({"a": _entry([16], 0, 64), "b": _entry([16], 0, 64)}), _NOT_READABLE),
    "a shape without end": (_header({"W_enc": _entry([2**40, 2**40], 0, 64)}), _NOT_READABLE),
    "a pickle": (lambda path, form: torch.save({"W_enc": torch.zeros(3)}, path), _NOT_READABLE),
}


# ---- pickles


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def marker(path: Path) -> Path:
    """Beside what is made: what something that was run would leave."""
    return path.parent / "executed"


def _evil(old: bool) -> Fault:
    def fault(path: Path, form: Form) -> None:
        state = {"cfg": {}, "state_dict": {}, form.matrix: Evil(marker(path))}
        torch.save(state, path, _use_new_zipfile_serialization=not old)

    return fault


def _deep_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def _laughs() -> bytes:
    """Lists of the same list, again and again: small, and without end if each is counted."""
    data = b"\x80\x02]q\x00"
    for level in range(1, 40):
        data += b"](" + b"h" + bytes([level - 1]) + (b"h" + bytes([level - 1])) * 30 + b"eq" + bytes([level])
    return data + b"}q\x50(X\x03\x00\x00\x00cfgh\x27X\x0a\x00\x00\x00state_dicth\x27u."


def _bomb(names: str) -> Fault:
    def fault(path: Path, form: Form) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in names.split():
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(80):
                        file.write(b"\0" * (1 << 20))

    return fault


def _more_entries(path: Path, form: Form) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(EVIL, "x")


def _says_huge(path: Path, form: Form) -> None:
    """The directory of an archive says that a part of it is of many gigabytes."""
    path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fabc")


_PLAIN = "is not a plain file of tensors, and nothing else is unpickled"
PICKLES = {
    "cut in half": (_cut(0.5), _PLAIN),
    "empty": (_cut(0), _PLAIN),
    "code": (_evil(old=False), _PLAIN),
    "code, as torch wrote once": (_evil(old=True), _PLAIN),
    "code in a plain pickle": (lambda path, form: path.write_bytes(pickle.dumps(Evil(marker(path)))), _PLAIN),
    "nested deep": (in_bytes(_deep_pickle()), f"{_PLAIN}|must hold tensors"),
    "a text of 2 GB": (_says_huge, _PLAIN),
    "a bomb": (
        _bomb("archive/data.pkl archive/data/0"),
        "says that it unpacks to .*no weights can be packed like that",
    ),
    "a path out of the archive": (_more_entries, _PLAIN),
    "safetensors": (lambda path, form: save_file({"a": torch.zeros(3)}, path), _PLAIN),
}
_OBJECTS = "(is no readable pickle|cannot be read|is cut off|must hold cfg and state_dict|is no archive|has no|lacks)"


def _zipped(data: bytes) -> Fault:
    return lambda path, form: path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


LEGACY = {
    "cut in half": (_cut(0.5), _OBJECTS),
    "empty": (_cut(0), _OBJECTS),
    "no pickle": (_zipped(b"hello, this is no pickle"), _OBJECTS),
    "code": (
        lambda path, form: _zipped(pickle.dumps({"cfg": {}, "state_dict": Evil(marker(path))}))(path, form),
        _OBJECTS,
    ),
    "nested deep": (_zipped(_deep_pickle()), _OBJECTS),
    "lists of lists of lists": (_zipped(_laughs()), f"{_OBJECTS}|holds more than"),
    "a text of 2 GB": (_zipped(b"\x80\x02X\xff\xff\xff\x7fabc"), _OBJECTS),
    "plain values": (_zipped(pickle.dumps({"cfg": {"d_in": 3}, "state_dict": {"W_enc": 5}})), "lacks b_enc|W_enc"),
}


def gz_bomb(path: Path, form: Form) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(80):
            file.write(b"\0" * (1 << 20))


# ---- npz


_F4 = "'descr': '<f4', 'fortran_order': False, "


def _npy(header: str, numbers: bytes = b"\0" * 64) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + numbers


def _npz(members: Mapping[str, bytes]) -> Fault:
    def fault(path: Path, form: Form) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return fault


def _objects(path: Path, form: Form) -> None:
    file = io.BytesIO()
    np.save(file, np.array([Evil(marker(path))], dtype=object), allow_pickle=True)
    _npz({"W_enc.npy": file.getvalue()})(path, form)


def _twice(path: Path, form: Form) -> None:
    data = _npy("{" + _F4 + "'shape': (4,)}")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", data)
        archive.filelist[0].filename = "other.npy"
        archive.NameToInfo.clear()
        archive.writestr("other.npy", data)


_NO_NPZ = "is not a readable .npz file"
NPZ = {
    "cut in half": (_cut(0.5), _NO_NPZ),
    "empty": (_cut(0), _NO_NPZ),
    "no archive": (in_bytes(b"PK\x03\x04 and nothing else"), _NO_NPZ),
    "objects": (_objects, "should be numbers of type object"),
    "a bomb": (_bomb("W_enc.npy"), "says that it unpacks to .*no weights can be packed like that"),
    "a path out of the archive": (_npz({f"{EVIL}.npy": _npy("{" + _F4 + "'shape': (4,)}")}), "evil|lacks"),
    "a shape without end": (_npz({"W_enc.npy": _npy("{" + _F4 + "'shape': (1099511627776,)}")}), "bytes cannot be"),
    "a header nested deep": (_npz({"W_enc.npy": _npy("(" * 5000)}), _NO_NPZ),
    "a header that is code": (_npz({"W_enc.npy": _npy("__import__('os').system('touch executed')")}), _NO_NPZ),
    "texts": (_npz({"W_enc.npy": _npy("{" + _F4.replace("f4", "U4") + "'shape': (4,)}")}), "should be numbers of type"),
    "one name twice": (_twice, "holds other.npy twice"),
    "no arrays": (_npz({}), f"{_NO_NPZ}|lacks"),
}


PLACES: Faults = {"a folder": (_folder, "."), "a link to itself": (_loop, "."), "a pipe": (_pipe, ".")}
"""Where a file should be."""
