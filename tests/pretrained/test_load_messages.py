"""What is said of folders that cannot be loaded: what is missing, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from support.bad_forms import FORMS, good

from saekit import SAE
from saekit.errors import SAEFormatError
from saekit.testing import fake_plugin, isolated_manager

_CONNOR = "gpt2-small_L0_Hcat_z_lr1.20e-03_l11.80e+00_ds64_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
_LLAMA = "Llama3_1-8B-Base-L3R-8x/"
LACKING = {
    ("saekit", "cfg.json"): "sae_lens lacks cfg.json beside sae_weights.safetensors",
    ("sae_lens", "cfg.json"): "sae_lens lacks cfg.json beside sae_weights.safetensors",
    ("sae_lens", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("sae_lens 2", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("gated", "sae_weights.safetensors"): "sae_lens lacks sae_weights.safetensors beside cfg.json",
    ("sparsify", "layers.2/cfg.json"): "sparsify lacks cfg.json beside layers.2/sae.safetensors",
    ("sparsify", "layers.2/sae.safetensors"): "sparsify lacks sae.safetensors beside layers.2/cfg.json",
    ("dictionary_learning", "ae.pt"): "dictionary_learning lacks ae.pt beside config.json",
    ("mntss", "W_dec_4.safetensors"): "mntss lacks W_dec_4.safetensors beside W_enc_4.safetensors",
    ("mntss", "W_enc_4.safetensors"): "mntss lacks W_enc_4.safetensors beside W_dec_4.safetensors",
    ("temporal", "layer_12/temporal/conf.yaml"): "temporal lacks conf.yaml beside layer_12/temporal/latest_ckpt.safete",
    ("temporal", "layer_12/temporal/latest_ckpt.safetensors"): "temporal lacks latest_ckpt.safetensors beside layer_12",
    ("llama_scope", f"{_LLAMA}hyperparams.json"): "llama_scope lacks hyperparams.json in the folder above Llama3_1-8B-",
    ("llama_scope", f"{_LLAMA}checkpoints/final.safetensors"): "llama_scope lacks checkpoints/final.safetensors beside",
    ("gemma_3", FORMS["gemma_3"].weights): "gemma_3 lacks params.safetensors beside resid_post/layer_9_width_16k_l0_s",
    ("llama_scope_r1_distill", FORMS["llama_scope_r1_distill"].weights): "llama_scope_r1_distill lacks sae_weights.sa",
    ("connor_rob_hook_z", f"{_CONNOR}.pt"): f"connor_rob_hook_z lacks {_CONNOR}.pt beside {_CONNOR}_cfg.json",
}
"""Of a form, the file that is missing, and what is said."""


@pytest.mark.parametrize("case", LACKING, ids=lambda case: f"{case[0]} {Path(case[1]).name[-30:]}")
def test_what_is_missing_is_said(tmp_path: Path, case: tuple[str, str]) -> None:
    folder = good(FORMS[case[0]], tmp_path)
    (folder / case[1]).unlink()
    with pytest.raises(SAEFormatError, match="no loader recognizes .*, which has") as error:
        SAE.load(folder)
    name, lacks, missing = LACKING[case].partition(" lacks ")
    told = str(error.value)
    assert f". It looks like a folder of saekit:{name} [" in told
    assert f"] that{lacks}{missing}" in told
    assert "name one" not in told
    assert "; or" not in told
    assert "\n" not in told


def test_a_model_looks_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "cfg.json").write_text('{"d_in": 8}')
    with pytest.raises(SAEFormatError, match="which has cfg.json, config.json. There are .*; name one: loader=..."):
        SAE.load(tmp_path)


class Knowing:
    """Of a format of two files."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def detects(self, files: Any) -> bool:
        return {"a.json", "a.bin"} <= files.names

    def load(self, files: Any) -> Any: ...

    def missing_part(self, files: Any) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_loaders_of_plugins_say_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")

    def told(**saying: Any) -> str:
        plugins = [
            fake_plugin(
                "pretrained_loaders",
                name,
                build=lambda config, said=said: Knowing(said),
                config=attrs.make_class("Config", {}, frozen=True),
            )
            for name, said in saying.items()
        ]
        with pytest.raises(SAEFormatError) as error:
            SAE.load(tmp_path, plugins=isolated_manager(*plugins))
        return str(error.value)

    both = told(one="a.bin beside a.json", other="b.bin")
    assert "a folder of test:one [" in both
    assert "] that lacks a.bin beside a.json; or it looks like a folder of test:other [" in both
    assert "There are test:one; name one" in told(one=None)
    assert "failed in missing_part: KeyError: 'x'" in told(one=KeyError("x"))
    assert "missing_part returned 5, expected a text, or None" in told(one=5)
