"""Calls of a HookedSAETransformer, for saekit's and for that of sae-lens 3, which are given the same weights.

``tests/golden_splicing/`` holds what the latter gave.  This file knows neither of them.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RESID, MLP, Z = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
TOKENS = torch.tensor([[1, 4, 2, 8, 5, 7], [3, 1, 4, 1, 5, 9]])
SIZES: dict[str, Any] = {
    "n_layers": 2, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 16, "d_vocab": 11, "n_ctx": 8, "act_fn": "gelu",
    "seed": 0, "device": "cpu",
}  # fmt: skip
SAES: dict[str, tuple[str, int]] = {"a": (RESID, 20), "other_a": (RESID, 12), "m": (MLP, 20), "z": (Z, 20)}
"""Hook and number of features; all read vectors of 8."""
D_IN = 8
Q, D_SAE_OF_HEAD = "blocks.1.attn.hook_q", 10


def numbers(name: str, shape: torch.Size) -> Tensor:
    """The same ones for a name, everywhere; none far from 0."""
    start = zlib.crc32(name.encode()) % 1000
    values = (torch.arange(shape.numel(), dtype=torch.float64) * 1.7 + start).sin() * 0.6
    return values.reshape(shape).float()


def filled(module: torch.nn.Module, prefix: str = "") -> Any:
    """``module`` with :func:`numbers` for parameters; those of norms are near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = numbers(prefix + name, parameter.shape)
            parameter.copy_(1 + 0.2 * values if name.endswith(".w") else values)
    return module


def model_of(kind: Any) -> Any:
    """A small ``kind``, a HookedTransformer's subclass, or anything that is made of its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformerConfig

        return filled(kind(HookedTransformerConfig(**SIZES)))


Calls = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Takes a model, and SAEs by name (``a_err`` has ``use_error_term``); gives tensors, and lists of texts, by name."""


def attached(model: Any) -> list[str]:
    return sorted(model.acts_to_saes)


def once(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found = {"clean": model(TOKENS)}
    for names in ("a", "a_err", "m", "z", "z_err", "a m", "a_err m_err", "a m z"):
        found[names] = model.run_with_saes(TOKENS, saes=[saes[name] for name in names.split()])
    found["not in a list"] = model.run_with_saes(TOKENS, saes=saes["a"])
    found["loss"] = model.run_with_saes(TOKENS, saes=[saes["a"]], return_type="loss")
    found["none"] = model.run_with_saes(TOKENS)
    found["after"], found["attached"] = model(TOKENS), attached(model)
    return found


def added_and_reset(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("a", "m", "z"):
        model.add_sae(saes[name])
    found["three"], found["attached three"] = model(TOKENS), attached(model)
    model.reset_saes(MLP)
    found["without m"], found["attached without m"] = model(TOKENS), attached(model)
    model.reset_saes([RESID], [saes["other_a"]])
    found["other_a for a"], found["attached other_a"] = model(TOKENS), attached(model)
    model.add_sae(saes["a"])
    found["a again"] = model(TOKENS)
    model.reset_saes()
    found["none"], found["attached none"] = model(TOKENS), attached(model)
    return found


def nested(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with model.saes(saes=[saes["a"]]):
        found["outer"] = model(TOKENS)
        with model.saes([saes["m"], saes["z_err"]]):
            found["inner"], found["attached inside"] = model(TOKENS), attached(model)
        found["outer again"] = model(TOKENS)
        with model.saes(saes=[saes["other_a"]]):
            found["same hook"] = model(TOKENS)
        found["the first one of that hook"], found["attached"] = model(TOKENS), attached(model)
    found["after"], found["attached after"] = model(TOKENS), attached(model)
    with model.saes(saes=[saes["a"], saes["m"]], reset_saes_end=False):
        pass
    found["kept"], found["attached kept"] = model(TOKENS), attached(model)
    found["over what was kept"] = model.run_with_saes(TOKENS, saes=[saes["other_a"]])
    found["kept still"] = model(TOKENS)
    model.reset_saes()
    return found


def cached(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for names in ("a", "a_err", "z", "z_err", "a_err m"):
        chosen = [saes[name] for name in names.split()]
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=chosen)
        found[f"{names}: logits"], found[f"{names}: keys"] = logits, sorted(cache)
        found |= {f"{names}: {key}": cache[key] for key in cache if ".hook_sae_" in key}
    _, cache = model.run_with_cache_with_saes(
        TOKENS[:1], saes=[saes["a"]], return_cache_object=False, remove_batch_dim=True,
        names_filter=lambda name: name.endswith("acts_post"),
    )  # fmt: skip
    found["one batch: keys"] = sorted(cache)
    found["one batch: features"] = cache[f"{RESID}.hook_sae_acts_post"]
    with model.saes([saes["m"]]):
        _, cache = model.run_with_cache(TOKENS)
    found["by its own method: keys"] = sorted(cache)
    return found


def hooked(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: list[str] = []

    def without_feature(acts: Tensor, hook: Any) -> Tensor:
        seen.append(hook.name)
        acts = acts.clone()
        acts[..., 3] = 0
        return acts

    def twice(values: Tensor, hook: Any) -> Tensor:
        return 2 * values

    post, output, recons = (f"{RESID}.hook_sae_{name}" for name in ("acts_post", "output", "recons"))
    cases = {
        "features": ("a", [(post, without_feature)]), "with error": ("a_err", [(post, without_feature)]),
        "error": ("a_err", [(f"{RESID}.hook_sae_error", twice)]), "output": ("a", [(output, twice)]),
        "pre-activations": ("a", [(f"{RESID}.hook_sae_acts_pre", twice)]), "recons": ("a_err", [(recons, twice)]),
        "two": ("a", [(post, without_feature), (output, twice)]),
        "elsewhere, too": ("a", [(post, without_feature), ("blocks.1.hook_resid_pre", twice)]),
        "heads": ("z_err", [(f"{Z}.hook_sae_acts_post", without_feature)]),
        "by a filter": ("a", [(lambda name: name.endswith("sae_acts_post"), without_feature)]),
    }  # fmt: skip
    for name, (sae, hooks) in cases.items():
        found[name] = model.run_with_hooks_with_saes(TOKENS, saes=[saes[sae]], fwd_hooks=hooks)
    model.add_sae(saes["a"])
    found["added"] = model.run_with_hooks(TOKENS, fwd_hooks=[(post, without_feature)])
    found["no hook left"] = model(TOKENS)
    model.reset_saes()
    found["names"] = seen
    return found


def backward(model: Any, saes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("a", "a_err"):
        with model.saes(saes=[saes[name]]):
            kept: dict[str, Tensor] = {}

            def keep(gradient: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
                kept[hook.name] = gradient.detach().clone()

            points = [f"{RESID}.hook_sae_acts_post", f"{RESID}.hook_sae_output", "blocks.0.hook_mlp_out"]
            with model.hooks(bwd_hooks=[(point, keep) for point in points]):
                model(TOKENS, return_type="loss").backward()
            model.zero_grad()
        found |= {f"{name}: {point}": gradient for point, gradient in kept.items()}
    return found


PROGRAMS: dict[str, Calls] = {
    "once": once, "added_and_reset": added_and_reset, "nested": nested, "cached": cached, "hooked": hooked,
    "backward": backward,
}  # fmt: skip


def results(kind: Any, sae_of: Callable[[str, str, int, bool], Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and all else, that the programs give, by ``program/name``.

    ``sae_of`` makes an SAE from its name, hook, number of features and whether it has an error term.
    """
    tensors, others = {}, {}
    for name, program in PROGRAMS.items():
        saes = {
            key + suffix: sae_of(key, hook, d_sae, bool(suffix))
            for key, (hook, d_sae) in SAES.items()
            for suffix in ("", "_err")
        }
        for key, value in program(model_of(kind), saes).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().clone().contiguous()
            else:
                others[f"{name}/{key}"] = value
    return tensors, others
