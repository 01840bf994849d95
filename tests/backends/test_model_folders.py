"""Damaged files of models are an error that names them, and never advises to read them in an unsafe way."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from support.tiny import TOKENIZER, hooked_mamba, tokenizer

import saekit
from saekit.config import ModelConfig
from saekit.errors import ModelError

UNSAFE = ("weights_only", "torch.load", "trust_remote_code", "allow_pickle", "safe_globals", "trust the source")
DEEP = b"[" * 100_000


class Trap:
    """A pickle that does something when it is read."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('the pickle ran')",)


def pickled(value: object) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def loaded(folder: Path) -> object:
    choice: object = "HookedTransformer"
    if folder.name == "mamba":
        from saekit_plugins.backends.hooked_mamba import HookedMambaOptions

        choice = HookedMambaOptions(tokenizer=str(TOKENIZER))
    model = ModelConfig(name=str(folder))
    return saekit.default_manager().build("model_backends", choice, model=model, loaded=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind: ours, of Hugging Face with safetensors and with a pickle, and a Mamba."""
    mamba = hooked_mamba()  # which imports mamba-lens without its dependencies' warnings
    from mamba_lens.HookedMamba import (
        convert_hooked_mamba_config_to_original_config,
        convert_hooked_state_dict_to_original_state_dict,
    )
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path_factory.mktemp("models")
    shutil.copytree(TOKENIZER, base / "native")
    sizes = {"vocab_size": 2048, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    hf = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    for name in ("safe", "pickle"):
        hf.save_pretrained(base / name)
        tokenizer().save_pretrained(base / name)
    torch.save(hf.state_dict(), base / "pickle/pytorch_model.bin")
    (base / "pickle/model.safetensors").unlink()
    config = convert_hooked_mamba_config_to_original_config(mamba.cfg)
    (base / "mamba").mkdir()
    (base / "mamba/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "initializer_cfg"}))
    weights = convert_hooked_state_dict_to_original_state_dict(mamba.cfg, mamba.state_dict())
    torch.save(weights, base / "mamba/pytorch_model.bin")
    return base


def damages(file: Path) -> dict[str, bytes | None]:
    raw = file.read_bytes()
    kinds: dict[str, bytes | None] = {"empty": b"", "half": raw[: len(raw) // 2], "noise": b"\x93\x00\xff" * 99}
    if file.suffix == ".json":
        types = json.dumps(dict.fromkeys(json.loads(raw), "x")).encode()
        kinds |= {"null": b"null", "list": b"[1, 2]", "deep": DEEP, "types": types}
    elif file.suffix == ".bin":
        kinds |= {"missing": None, "trap": pickled({"a": Trap()}), "raw trap": pickle.dumps({"a": Trap()})}
        kinds |= {"others": pickled({"a": torch.zeros(2)}), "a list": pickled([1])}
    else:
        tensors = load(raw)
        first = min(tensors)
        less = {name: value for name, value in tensors.items() if name != first}
        kinds |= {"missing": None, "lacking": save(less, {"format": "pt"})}
        kinds["cut"] = save(less | {first: tensors[first][:1].clone()}, {"format": "pt"})
    return kinds


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # mamba-lens leaves config.json open
@pytest.mark.parametrize(
    "name",
    [
        "native/hooked_transformer.json", "native/model.safetensors", "native/tokenizer.json",
        "native/tokenizer_config.json", "safe/config.json", "safe/model.safetensors", "safe/tokenizer.json",
        "pickle/pytorch_model.bin", "mamba/config.json", "mamba/pytorch_model.bin",
    ],
)  # fmt: skip
def test_damaged_files(folders: Path, tmp_path: Path, name: str) -> None:
    for kind, content in damages(folders / name).items():
        folder = tmp_path / kind / Path(name).parent
        shutil.copytree(folders / Path(name).parent, folder)
        file = folder / Path(name).name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            loaded(folder)
        text = str(caught.value)
        assert str(folder) in text, (kind, text)
        assert "cannot be loaded" in text or "the weights in" in text, (kind, text)
        assert not any(words in text for words in UNSAFE), (kind, text)
        assert "\n" not in text, (kind, text)


def test_the_whole_folders_load(folders: Path) -> None:
    for name in ("native", "safe", "pickle"):
        backend: saekit.ModelBackend = loaded(folders / name)  # type: ignore[assignment]
        assert backend.special_tokens["bos"] == 0


def test_weights_that_are_not_there_are_not_drawn_at_random(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "safe", tmp_path / "m")
    tensors = load((tmp_path / "m/model.safetensors").read_bytes())
    for name in sorted(tensors)[:5]:
        del tensors[name]
    (tmp_path / "m/model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    with pytest.raises(ModelError, match=r"the weights in .*/m lack transformer\.h\.0\..* and 2 more"):
        loaded(tmp_path / "m")


def test_a_model_that_brings_code_is_refused_and_not_asked_about(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "safe", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    code = {"AutoConfig": "model.Config", "AutoModelForCausalLM": "model.Model"}
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": code}))
    (tmp_path / "m/model.py").write_text("raise SystemExit('its code ran')")
    with pytest.raises(ModelError, match="needs code of its own, and saekit runs no code that comes with a model"):
        loaded(tmp_path / "m")
