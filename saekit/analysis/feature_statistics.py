"""A table with a row for each feature: how often it fires, how its weights lie, and how its logits are distributed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, feature_directions
from saekit.analysis.moments import row_moments
from saekit.errors import ConfigError
from saekit.sae.module import SAEModule
from saekit.site import Sites

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "COLUMNS", "LOGIT_COLUMNS", "checked_fractions", "firing_fractions", "layer_of", "statistics_table", "table_of",
    "weight_columns",
]  # fmt: skip

COLUMNS = (
    "sae", "layer", "hook", "feature", "log_feature_sparsity", "dead", "encoder_decoder_cosine", "b_enc",
    "b_dec_projection", "logit_mean", "logit_std", "logit_skewness", "logit_kurtosis",
)  # fmt: skip
LOGIT_COLUMNS = COLUMNS[-4:]
_EPSILON = 1e-10
"""What is added to fractions before their logarithm is saved: see :attr:`saekit.SAE.log_sparsity`."""
_BLOCK = 4096


@ambient()
@torch.no_grad()
def statistics_table(
    sae: SAEModule,
    *,
    name: str,
    sites: Sites | None,
    path: LogitPath | str,
    fractions: Tensor | None = None,
    report: Callable[[int], None] | None = None,
) -> DataFrame:
    """:data:`COLUMNS` of all features of one SAE.

    ``fractions [d_sae]`` are those of tokens on which each fired; left out, those that the SAE was saved with.  What
    cannot be said is NaN (:data:`pandas.NA` of ``dead``), and ``attrs["left_out"]`` of the table says why, by column.
    """
    fired = firing_fractions(sae) if fractions is None else checked_fractions(fractions, sae, name)
    columns: dict[str, Tensor | str] = {**weight_columns(sae), **_of_logits(sae, path, report)}
    return table_of(
        columns, fired, name=name, layer=layer_of(sites), hook="" if sites is None else sites.name,
        features=range(sae.d_sae),
    )  # fmt: skip


def table_of(
    columns: Mapping[str, Tensor | str],
    fired: Tensor | None,
    *,
    name: str,
    layer: int | None,
    hook: str,
    features: Sequence[int],
) -> DataFrame:
    """The table of ``features``, with ``columns [n]``, or why there is none, and the fractions ``fired [n]``."""
    import pandas as pd

    n, left_out = len(features), dict[str, str]()
    values: dict[str, Any] = {
        "sae": pd.Categorical([name] * n),
        "layer": pd.array([layer] * n, dtype="Int64"),
        "hook": pd.Categorical([hook] * n),
        "feature": features,
    }
    if fired is None:
        left_out["log_feature_sparsity"] = left_out["dead"] = "the SAE does not say how often its features fire"
        values |= {"log_feature_sparsity": _nothing(n), "dead": pd.array([None] * n, dtype="boolean")}
    else:
        values["log_feature_sparsity"] = fired.double().log10().numpy()
        values["dead"] = pd.array((fired == 0).numpy(), dtype="boolean")
    for column, found in columns.items():
        if isinstance(found, str):
            left_out[column] = found
        values[column] = _nothing(n) if isinstance(found, str) else found.double().cpu().numpy()
    table = pd.DataFrame(values)[list(COLUMNS)]
    table.attrs["left_out"] = left_out
    return table


def _nothing(n: int) -> Any:
    return torch.full((n,), torch.nan, dtype=torch.float64).numpy()


def firing_fractions(sae: SAEModule) -> Tensor | None:
    """``[d_sae]`` float64: what ``log_sparsity`` says, without the 1e-10 that is in it; None where there is none.

    A feature that never fired is saved as the logarithm of that alone, -10, and has the fraction 0.
    """
    if sae.log_sparsity is None:
        return None
    saved = sae.log_sparsity.detach().double().cpu()
    return (10.0**saved - _EPSILON).where(saved > -9.9999, 0.0).clamp(0, 1)


def checked_fractions(fractions: Tensor, sae: SAEModule, name: str) -> Tensor:
    """``fractions [d_sae]`` as they are used; :class:`ConfigError` for what is none."""
    found = torch.as_tensor(fractions).detach().double().cpu()
    if found.shape != (sae.d_sae,) or not bool(((found >= 0) & (found <= 1)).all()):
        shown = (
            f"{list(found.shape)}" if found.shape != (sae.d_sae,) else f"{float(found.min())} to {float(found.max())}"
        )
        raise ConfigError([("fractions", f"must be [{sae.d_sae}] numbers from 0 to 1 of {name}, found {shown}")])
    return found


def layer_of(sites: Sites | None) -> int | None:
    """How many blocks come before what the SAE reads: the block's number, and one more at what a block gives out.

    None of a place outside of blocks, and of several places in different ones.
    """
    layers = {_layer(site.hook_name) for site in sites.inputs} if sites is not None else {None}
    return layers.pop() if len(layers) == 1 else None


def _layer(hook: str) -> int | None:
    found = re.search(r"\.(\d+)(\.|$)", hook)
    if found is None:
        return None
    return int(found[1]) + (hook.endswith("hook_resid_post") or found.end() == len(hook))


@ambient()
@torch.no_grad()
def weight_columns(sae: SAEModule) -> dict[str, Tensor | str]:
    """``[d_sae]``: the cosine of each feature's column of ``W_enc`` and row of ``W_dec``, and what its biases are.

    Or why there is none.
    """
    found: dict[str, Tensor | str] = {}
    encoder = getattr(sae, "W_enc", None)
    b_enc, b_dec = getattr(sae, "b_enc", None), getattr(sae, "b_dec", None)
    parts = [feature_directions(sae, slice(at, at + _BLOCK)) for at in range(0, sae.d_sae, _BLOCK)]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not isinstance(encoder, Tensor) or encoder.shape != (sae.d_in, sae.d_sae):
        found["encoder_decoder_cosine"] = f"{type(sae).__name__} has no W_enc [d_in, d_sae]"
    elif sae.d_in != sae.d_out:
        found["encoder_decoder_cosine"] = f"it reads vectors of {sae.d_in}, and writes vectors of {sae.d_out}"
    else:
        found["encoder_decoder_cosine"] = torch.cat([
            torch.cosine_similarity(encoder.detach()[:, at : at + _BLOCK].T.float(), part.float(), dim=1, eps=0.0)
            for at, part in zip(range(0, sae.d_sae, _BLOCK), parts, strict=True)
        ])  # fmt: skip
    usable = isinstance(b_enc, Tensor) and b_enc.shape == (sae.d_sae,)
    found["b_enc"] = b_enc.detach() if usable else f"{type(sae).__name__} has no b_enc"  # type: ignore[union-attr]
    usable = isinstance(b_dec, Tensor) and b_dec.shape == (sae.d_out,)
    found["b_dec_projection"] = (
        whole @ b_dec.detach().to(whole) if usable else f"{type(sae).__name__} has no b_dec"  # type: ignore[union-attr]
    )
    return found


def _of_logits(sae: SAEModule, path: LogitPath | str, report: Callable[[int], None] | None) -> dict[str, Tensor | str]:
    if isinstance(path, str):
        return dict.fromkeys(LOGIT_COLUMNS, path)

    def rows(part: slice) -> Tensor:
        return path.in_residual_stream(feature_directions(sae, part).to(path.unembedding.device))

    found = row_moments(rows, sae.d_sae, path.unembedding, report=report)
    return dict(zip(LOGIT_COLUMNS, (found.mean, found.std, found.skewness, found.kurtosis), strict=True))
