"""SAEs of several architectures, and a model some of whose tokens are hard to show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.saes import at, drawn_sae

import saekit
from saekit.testing import FakeBackend

EMBED, EARLY, LATE = "hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
HEADS = "blocks.0.attn.hook_z"
TWO = {"early": 8, "late": 8}
ODD = {
    1: "<script>document.title = 'owned'</script>", 2: "</script>", 3: "\n", 4: "    ", 5: "\ufffd", 6: "\u202egnp",
    7: "<!--", 8: "\t", 9: "", 10: "&amp;", 11: "<img src=x onerror=alert(1)>", 12: "\u2028",
}  # fmt: skip
"""Texts of tokens by their ids."""


class OddBackend(FakeBackend):
    """The fake model with other texts."""

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [ODD.get(token, f" w{token}" if token else "<bos>") for token in tokens]


def odd_contexts() -> torch.Tensor:
    """``[40, 12]``: the first token of each is BOS."""
    found = torch.randint(1, 128, (40, 12), generator=torch.Generator().manual_seed(5))
    found[:, 3:5] = torch.randint(1, 13, (40, 2), generator=torch.Generator().manual_seed(6))
    found[:, 0] = 0
    return found


def of(name: str, **options: Any) -> Any:
    """An SAE of an architecture; its weights are drawn, and its feature 3 never fires."""
    sae = saekit.SAE.from_dict({"name": name, "d_sae": 16, **options}, seed=3)
    with torch.no_grad():
        sae.b_enc[3] = -1e4
    return sae


def several_saes() -> dict[str, Any]:
    """By name: ``topk`` leaves special tokens out, and what is at the heads has no way to the logits."""
    special = {"model_name": "fake", "exclude_special_tokens": True}
    transcoder = drawn_sae(8, 8, d_sae=16)
    with torch.no_grad():
        transcoder.b_enc.sub_(2)
        transcoder.b_enc[3] = -1e4
    crosscoder = saekit.SAE.from_dict({"name": "crosscoder", "d_sae": 16}, ports=saekit.Ports(TWO, TWO), seed=1)
    return {
        "topk": at(of("topk", k=3, d_in=8), LATE, **special),
        "jumprelu": at(of("jumprelu", d_in=8, initial_threshold=0.3), EARLY, model_name="fake"),
        "transcoder": at(transcoder, EMBED, targets=(LATE,), model_name="fake"),
        "crosscoder": at(crosscoder, EARLY, LATE, model_name="fake"),
        "signed": at(of("abstopk", k=3, d_in=8), LATE, model_name="fake"),
        "heads": at(of("topk", k=3, d_in=8), HEADS, model_name="fake"),
    }


def collected(saes: Any, folder: Path, contexts: torch.Tensor, **options: Any) -> saekit.FeatureStore:
    given = {"model": OddBackend(), "contexts": contexts, "verbose": False, "device": "cpu"} | options
    return saekit.collect_features(saes, folder=folder, **given)
