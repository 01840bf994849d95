"""Pretrained loader ``goodfire``: Goodfire's SAEs for Llama 3.1 8B and 3.3 70B, one ``.pth`` file each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import attrs

from saekit import Entry, hookimpl
from saekit_plugins.loaders.reading import LINEAR, OneOfSeveral, ReLUFileLoader


@attrs.frozen(kw_only=True)
class GoodfireConfig(OneOfSeveral):
    """Which file."""


class GoodfireLoader(ReLUFileLoader):
    """Reads ``Llama-3...-SAE-l19.pth``."""

    key = "goodfire"
    pattern = r"(Llama-3[^/]*)-SAE-l(\d+)\.pth?"
    names: ClassVar = {theirs.replace(".", "_linear."): ours for theirs, ours in LINEAR.items()}
    owner = "meta-llama"
    defaults: ClassVar = {"prepend_bos": True, "dataset_path": "lmsys/lmsys-chat-1m"}


@hookimpl
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    summary = "Goodfire's SAEs for Llama 3 (Llama-3...-SAE-l19.pth)"
    yield Entry("goodfire", GoodfireConfig, f"{__name__}:GoodfireLoader", summary=summary)
