"""Pretrained loader ``deepseek_r1``: the SAE of qresearch for DeepSeek-R1-Distill-Llama-8B, one ``.pt`` file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import attrs

from saekit import Entry, hookimpl
from saekit_plugins.loaders.reading import LINEAR, OneOfSeveral, ReLUFileLoader


@attrs.frozen(kw_only=True)
class DeepSeekR1Config(OneOfSeveral):
    """Which file."""


class DeepSeekR1Loader(ReLUFileLoader):
    """Reads ``DeepSeek-R1-...-SAE-l19.pt``."""

    key = "deepseek_r1"
    pattern = r"(DeepSeek-R1-[^/]*)-SAE-l(\d+)\.pt"
    names = LINEAR
    owner = "deepseek-ai"
    defaults: ClassVar = {"context_size": 1024, "prepend_bos": True, "dataset_path": "lmsys/lmsys-chat-1m"}


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "the SAE for DeepSeek-R1-Distill-Llama-8B (DeepSeek-R1-...-SAE-l19.pt)"
    yield Entry("deepseek_r1", DeepSeekR1Config, f"{__name__}:DeepSeekR1Loader", summary=summary)
