"""Damaged folders that ``save_to_disk`` wrote are an error that names the folder."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

import saekit
from saekit.config import DatasetConfig
from saekit.data import Documents
from saekit.errors import DataError
from saekit.reasons import reason


@pytest.mark.parametrize("kind", ["dataset", "dict"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    hf = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2500})
    made = hf if kind == "dataset" else datasets.DatasetDict(train=hf)
    made.save_to_disk(tmp_path / "d")
    config = DatasetConfig(path=str(tmp_path / "d"))
    assert len(list(Documents.open(config))) == 2500
    for file in [path for path in (tmp_path / "d").rglob("*") if path.is_file()]:
        raw = file.read_bytes()
        damages = {"empty": b"", "half": raw[: len(raw) // 2], "noise": b"\x93\x00\xff" * 99, "list": b"[1, 2]"}
        if file.suffix == ".json":
            types = json.dumps(dict.fromkeys(json.loads(raw), 7)).encode()
            damages |= {"deep": b"[" * 100_000, "null": b"null", "types": types}
        for name, content in damages.items():
            file.write_bytes(content)
            with pytest.raises(DataError, match=f"the dataset '{tmp_path}/d'.* is damaged or not whole: ") as caught:
                Documents.open(config)
            assert "\n" not in str(caught.value), (file.name, name)
        file.write_bytes(raw)
    assert len(list(Documents.open(config))) == 2500


def test_a_run_names_the_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x"] * 50}).save_to_disk(tmp_path / "d")
    (tmp_path / "d/state.json").write_text("{")
    with pytest.raises(DataError, match="the dataset '.*/d', which save_to_disk wrote, is damaged or not whole"):
        saekit.train({"dataset": {"path": str(tmp_path / "d")}, "checkpoints": {"folder": str(tmp_path / "runs")}})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(""), "ValueError"),
        (ValueError("one\ntwo"), "one"),
        (RuntimeError("Error(s) in loading:\n\tsize mismatch for a"), "Error(s) in loading: size mismatch for a"),
        (KeyError("name"), "KeyError: 'name'"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (OSError("Weights only load failed. This file can still be loaded, if you trust it."), "the file is damaged"),
        (ValueError("set `allow_pickle=True`"), "the file is damaged, or holds other things than tensors"),
        (ValueError("it contains\n custom code; pass trust_remote_code=True"), "it needs code of its own, and saekit"),
        (ValueError("x" * 1000), "x" * 400 + "..."),
    ],
)
def test_what_a_library_says_in_a_line(error: Exception, said: str) -> None:
    assert reason(error).startswith(said)
    assert "pickle=" not in reason(error)
    assert "trust" not in reason(error)
