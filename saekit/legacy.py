"""Files that pickled whole objects, tensors among them: ``.pt``, ``.pkl`` and ``.pkl.gz``.

They are read by :mod:`saekit.files.opcodes`: tensors and plain values are built, everything else is a bag, and nothing
that such a file names is ever called.
"""

from __future__ import annotations

import gzip
import io
import math
import sys
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch
from torch import Tensor

from saekit.errors import SAEFormatError
from saekit.files.faults import cut_off
from saekit.files.opcodes import Bag, Builder, Name, read_pickle
from saekit.reasons import reason, reason_of_unpickling
from saekit.weights import MOST_PACKED, SMALL, check_archive

__all__ = ["as_plain", "read_objects"]

_MAGIC = 0x1950A86A20F9469CFC6C  # torch's, before it wrote archives
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_MOST_DIMENSIONS = 8
_DEEPEST = 12
_MOST_VALUES = 200_000


def read_objects(path: Path, where: str) -> Any:
    """What ``path`` holds: tensors, plain values, and :class:`saekit.files.opcodes.Bag` for everything else."""
    check_archive(path, where)
    try:
        if fault := cut_off(path):
            raise SAEFormatError(f"{where} cannot be read: {fault}")
        if path.name.endswith(".gz"):
            return _plain(io.BytesIO(_unzipped(path, where)), where)
        if zipfile.is_zipfile(path):
            return _archive(path, where)
        with path.open("rb") as file:
            return _plain_or_old(file, where)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, KeyError) as error:
        raise SAEFormatError(f"{where} cannot be read: {reason(error)}") from error


def as_plain(value: Any, where: str) -> Any:
    """``value`` with a dictionary of its attributes for every bag, a text for every name, and None where it is deep.

    One that holds itself would be without end; and one that holds others again and again is small as a file, and huge
    as plain data: :class:`SAEFormatError`.
    """
    return _Plain(where).made(value, _DEEPEST)


@attrs.define
class _Plain:
    """Counts what it makes."""

    where: str
    count: int = 0

    def made(self, value: Any, left: int) -> Any:
        self.count += 1
        if self.count > _MOST_VALUES:
            raise SAEFormatError(f"{self.where} holds more than {_MOST_VALUES:,} values, repetitions counted")
        if isinstance(value, Name):
            return value.full
        if isinstance(value, Tensor | str | bytes | int | float | bool | None):
            return value
        if not left:
            return None
        if isinstance(value, Bag):
            value = value.fields
        if isinstance(value, dict):
            return {key: self.made(one, left - 1) for key, one in value.items() if isinstance(key, str | int)}
        return [self.made(one, left - 1) for one in value] if isinstance(value, list | tuple) else None


def _unzipped(path: Path, where: str) -> bytes:
    most = max(SMALL, MOST_PACKED * path.stat().st_size)
    try:
        with gzip.open(path) as file:
            data = file.read(most + 1)
    except EOFError as error:
        raise SAEFormatError(f"{where} cannot be read: it is cut off. Fetch or copy it again") from error
    if len(data) > most:
        raise SAEFormatError(f"{where} unpacks to more than {most:,} bytes: no weights can be packed like that")
    return data


def _plain_or_old(file: BinaryIO, where: str) -> Any:
    first = read_pickle(file, where, _BUILDERS)
    if type(first) is not int or first != _MAGIC:
        return first
    for _ in range(2):  # the version of the format, and the system that wrote it
        read_pickle(file, where, _BUILDERS)
    later = _Later(where)
    made = read_pickle(file, where, _BUILDERS | later.builders, later)
    keys = read_pickle(file, where, _BUILDERS)
    if not isinstance(keys, list):
        raise SAEFormatError(f"{where} has no list of its storages")
    return later.filled(made, keys, file)


def _plain(file: BinaryIO, where: str) -> Any:
    return read_pickle(file, where, _BUILDERS)


def _archive(path: Path, where: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(roots) != 1:
            raise SAEFormatError(f"{where} is no archive of torch's: it has {len(roots)} files data.pkl")
        root = roots[0]
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else sys.byteorder
        if order != sys.byteorder:
            raise SAEFormatError(f"{where} has the byte order {order!r}, and this machine {sys.byteorder!r}")
        made: dict[str, Tensor] = {}

        def storage(given: Any) -> Any:
            if _is_class(given):
                return given[1]
            key, dtype, count = _storage_of(given)
            if key not in made:
                made[key] = _numbers(archive.read(f"{root}data/{key}"), dtype, count)
            return made[key]

        return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), where, _BUILDERS, storage)


def _is_class(given: Any) -> bool:
    """Whether this is a module's class with its source, which torch's old format keeps beside its name."""
    return isinstance(given, tuple) and len(given) > 1 and given[0] == "module" and isinstance(given[1], Name)


def _storage_of(given: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and size of what torch's persistent ids refer to."""
    if not isinstance(given, tuple) or len(given) < 5 or given[0] != "storage" or not isinstance(given[1], Name):
        raise SAEFormatError("it refers to something that is no storage of torch's")
    kind, key, count = given[1].full.rpartition(".")[2].removesuffix("Storage"), given[2], given[4]
    if kind not in _STORAGES or not isinstance(key, str) or "/" in key or type(count) is not int or count < 0:
        raise SAEFormatError(f"it has a storage {kind!r} {key!r} of {count!r} numbers")
    return key, _STORAGES[kind], count


def _numbers(data: bytes, dtype: torch.dtype, count: int) -> Tensor:
    if len(data) != count * dtype.itemsize:
        raise SAEFormatError(f"a storage has {len(data):,} bytes, expected {count} numbers of type {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)


class _Later:
    """Storages of torch's old format, whose numbers come behind the pickle that refers to them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._wanted: dict[str, tuple[torch.dtype, int]] = {}
        self.builders: dict[str, Builder] = dict.fromkeys(_REBUILD, _Made.of)

    def __call__(self, given: Any) -> Any:
        if _is_class(given):
            return given[1]
        key, dtype, count = _storage_of(given)
        if len(given) > 5 and given[5] is not None:
            raise SAEFormatError("it has views of storages, which this reader does not know")
        self._wanted[key] = dtype, count
        return _Key(key)

    def filled(self, made: Any, keys: list[Any], file: BinaryIO) -> Any:
        """``made`` with tensors in the place of what was to become them."""
        numbers = {}
        for key in keys:
            if key not in self._wanted:
                raise SAEFormatError(f"{self._where} has a storage {key!r} to which nothing refers")
            dtype, count = self._wanted[key]
            if int.from_bytes(file.read(8), "little") != count:
                raise SAEFormatError(f"{self._where} has a storage that is not of {count} numbers, as it says")
            numbers[key] = _numbers(file.read(count * dtype.itemsize), dtype, count)
        return _filled(made, numbers)


class _Key(str):
    """Of a storage that is yet to come."""


class _Made:
    """A tensor that is yet to be made."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    @classmethod
    def of(cls, *args: Any) -> _Made:
        return cls(*args)


def _filled(made: Any, numbers: Mapping[str, Tensor]) -> Any:
    """``made`` and all that is in it."""
    whole = {"it": made}
    left: list[Any] = [whole]
    seen: set[int] = set()
    while left:
        table = left.pop()
        if id(table) in seen:
            continue
        seen.add(id(table))
        if isinstance(table, Bag):
            left += [table.fields, table.items]
            continue
        for key, value in list(table.items()) if isinstance(table, dict) else list(enumerate(table)):
            if isinstance(value, _Made):
                storage, *rest = value.args
                if not isinstance(storage, _Key) or storage not in numbers:
                    raise SAEFormatError("a tensor has no numbers")
                table[key] = _tensor(numbers[storage], *rest)
            elif isinstance(value, dict | list | Bag):
                left.append(value)
    return whole["it"]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor of a storage's numbers, inside of it."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise SAEFormatError(f"a tensor is made of {type(storage).__name__}, expected a storage")
    numbers = [offset, *_whole(size), *_whole(stride)]
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise SAEFormatError(f"a tensor has the shape {size!r} and strides {stride!r}")
    if math.prod(size):
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= len(storage):
            raise SAEFormatError(f"a tensor of shape {list(size)} needs more than the {len(storage)} numbers there are")
        if math.prod(size) > len(storage):
            raise SAEFormatError(f"a tensor of shape {list(size)} repeats the {len(storage)} numbers there are")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _whole(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise SAEFormatError(f"a tensor has {value!r} where a shape should be")
    return tuple(value)


def _nested(data: Any) -> Tensor:
    """A storage that plain pickles hold as a file of torch's, which only weights-only unpickling reads."""
    if not isinstance(data, bytes | bytearray) or data[:2] == b"PK":
        raise SAEFormatError("a storage in it is not as torch pickles them")
    try:
        storage = torch.load(io.BytesIO(bytes(data)), map_location="cpu", weights_only=True)
        if isinstance(storage, torch.UntypedStorage) or not hasattr(storage, "untyped"):
            raise TypeError(f"it is {type(storage).__name__}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, that such storages are of yesterday
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    except Exception as error:  # an unpickler meets anything in a damaged file
        raise SAEFormatError(
            f"a storage in it is not a plain one, and nothing else is unpickled: {reason_of_unpickling(error)}"
        ) from error


def _entries(*args: Any) -> dict[Any, Any]:
    """``collections.OrderedDict``."""
    return dict(args[0]) if args else {}


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``, by which pickles of protocol 2 and below have bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise SAEFormatError(f"there is {type(text).__name__} in {encoding!r} where bytes should be")
    return text.encode("latin1")


_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_BUILDERS: dict[str, Builder] = {
    **dict.fromkeys(_REBUILD, _tensor),
    "torch._utils._rebuild_parameter": lambda value, *_: value,
    "torch.storage._load_from_bytes": _nested,
    "_codecs.encode": _bytes,
    "collections.OrderedDict": _entries,
    "torch.device": lambda *args: ":".join(map(str, args)),
}
