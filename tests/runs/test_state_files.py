"""States as files: back as they were, or named and refused."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.errors import StorageError
from saekit.runs.state_files import read_state, write_state

pytestmark = pytest.mark.usefixtures("one_thread")


TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64,
]  # fmt: skip


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of every type, of no, one or many elements, whole or a view of another, with any bits in them."""
    dtype = draw(st.sampled_from(TYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * 2 + 3
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    kind = draw(st.sampled_from(["whole", "slice", "steps", "transposed", "expanded", "parameter", "conjugate"]))
    whole = flat[: math.prod(shape)].clone().reshape(shape)
    if kind == "slice":
        return flat[2 : 2 + math.prod(shape)].reshape(shape)
    if kind == "steps":
        return flat[: 2 * math.prod(shape) : 2].reshape(shape)
    if kind == "transposed":
        return whole.T if whole.ndim == 2 else whole
    if kind == "expanded":
        return whole[..., None].expand(*shape, 3)
    if kind == "parameter" and dtype == torch.float32:
        return torch.nn.Parameter(whole)
    if kind == "conjugate" and dtype == torch.complex64:
        return whole.conj()
    return whole


SHARED = torch.arange(12.0)
KEYS = st.text(max_size=5) | st.sampled_from(["a", "b", "a/b", "/", "", "0", "a'", "\ud800", "\udfff"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=9)
    | tensors() | st.sampled_from([SHARED, SHARED[2:5], SHARED.view(3, 4).T, SHARED[:0]]),
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4)
    | st.lists(inner, max_size=3).map(tuple),
    max_leaves=12,
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Of one kind, with the same bits."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bits(one.detach()) == bits(other)
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and ((math.isnan(one) and math.isnan(other)) or one.hex() == other.hex())
    return type(one) is type(other) and one == other


def bits(value: Tensor) -> bytes:
    whole = value.resolve_conj().clone(memory_format=torch.contiguous_format).flatten()
    return whole.view(torch.uint8).numpy().tobytes() if value.numel() else b""


@given(state=st.dictionaries(KEYS, VALUES, max_size=5))
@example(state={"a/b": torch.ones(1), "a": {"b": torch.zeros(1), "b'": torch.zeros(2)}, "a/b'": torch.ones(3)})
@example(state={"\ud800": torch.ones(1), "?": torch.zeros(1)})
@example(state={"nan": math.nan, "inf": [math.inf, -math.inf], "zero": -0.0, "big": 2**199, "empty": {}, "none": []})
@example(state={"x": torch.tensor([1 + 2j]).conj(), "y": torch.tensor(1.0), "z": [SHARED, SHARED, SHARED[1:3]]})
@example(state={"one": torch.ones(2, dtype=torch.float64)[::2], "none": torch.ones(0, 3).T})
@settings(max_examples=75)
def test_a_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_state(Path(name), "it", state)
        assert {path.name for path in Path(name).iterdir()} == {"it.json", "it.safetensors"}
        found = read_state(Path(name), "it")
        assert not any(name in line for line in Path("/proc/self/maps").read_text().splitlines()), (
            "no file is held open"
        )
    assert same(state, found)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    state = {"a": np.float64(0.1), "b": np.int32(3), "c": np.bool_(True), "d": np.float32(0.5), "e": np.array(4)}
    write_state(tmp_path, "it", state)
    found = read_state(tmp_path, "it")
    assert found == {"a": 0.1, "b": 3, "c": True, "d": 0.5, "e": 4}
    assert [type(value) for value in found.values()] == [float, int, bool, float, int]


class Anything:
    pass


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a": {"b": [1, {2, 3}]}}, "the state at it/a/b/1 holds a set, which cannot be saved. A state_dict may hold"),
        ({"a": (None, Anything())}, "the state at it/a/1 holds a Anything, which cannot be saved"),
        ({"a": b"bytes"}, "the state at it/a holds a bytes"),
        ({"a": {"b": {3: 4}}}, "the state at it/a/b has the key 3, which cannot be saved; use texts"),
        ({"a": {"$tensor": 1}}, r"the state at it/a has the key '\$tensor', which"),
        ({"a": 1j}, "the state at it/a holds a complex"),
        ({"a": torch.zeros(2).numpy()}, "the state at it/a holds a ndarray"),
        ({"a": {"b": torch.zeros(2, device="meta")}}, "at it/a/b holds a tensor of torch.float32, torch.strided, on m"),
        ({"a": {"b": torch.zeros(2, dtype=torch.complex128)}}, "at it/a/b holds a tensor of torch.complex128"),
        ({"a": torch.eye(2).to_sparse()}, "at it/a holds a tensor of torch.float32, torch.sparse_coo, on cpu"),
    ],
)  # fmt: skip
def test_what_is_no_state_is_named(tmp_path: Path, state: dict[str, Any], told: str) -> None:
    with pytest.raises(StorageError, match=told):
        write_state(tmp_path, "it", state)


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    write_state(tmp_path, "it", {"a": torch.ones(3)})
    for name, data in (
        ("it.json", b"{"), ("it.json", b"\xff"), ("it.safetensors", b""), ("it.safetensors", b"\x80\x04."),
        ("it.json", b'{"a": {"$tensor": "other"}}'), ("it.json", None), ("it.safetensors", None),
    ):  # fmt: skip
        path, before = tmp_path / name, (tmp_path / name).read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(StorageError, match="it in .* cannot be read"):
            read_state(tmp_path, "it")
        path.write_bytes(before)
    assert read_state(tmp_path, "it")["a"].tolist() == [1, 1, 1]
