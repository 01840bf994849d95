"""An SAE, which is a :class:`saekit.sae.module.SAEModule`, in one line, and as a table for notebooks."""

from __future__ import annotations

from typing import Any

from saekit.tables import facts_html

__all__ = ["in_a_table", "in_one_line"]


def in_one_line(sae: Any) -> str:
    """``StandardSAE(d_in=128, d_sae=1024, blocks.1.hook_resid_post of gpt2, float32 on cpu)``."""
    sites = "" if sae.info.sites is None else f", {sae.info.sites.name}"
    model = sae.info.metadata.get("model_name")
    return f"{type(sae).__name__}({_sizes(sae)}{sites}{f' of {model}' if model else ''}, {_dtype(sae)} on {sae.device})"


def in_a_table(sae: Any) -> str:
    """All that is known of it, as HTML."""
    facts = [("sizes", _sizes(sae)), ("type, device", f"{_dtype(sae)}, {sae.device}")]
    facts += [(name, value) for name, _, value in (line.partition("=") for line in sae.info.lines())]
    return facts_html(type(sae).__name__, facts)


def _sizes(sae: Any) -> str:
    out = "" if sae.ports.same else f", d_out={sae.d_out}"
    return f"d_in={sae.d_in}{out}, d_sae={sae.d_sae}"


def _dtype(sae: Any) -> str:
    return str(sae.dtype).removeprefix("torch.")
