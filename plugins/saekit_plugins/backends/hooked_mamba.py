"""Model backend ``HookedMamba`` (mamba-lens, the extra ``mamba``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ConfigError, Entry, ModelError, hookimpl
from saekit.config import path_field
from saekit.devices import resolve_device
from saekit.errors import MissingPackageError
from saekit.hub import within_reach
from saekit_plugins.backends.lens_versions import has_hooked_transformer, lens_version
from saekit_plugins.backends.model_folders import check_folders
from saekit_plugins.backends.outlines import mamba_outline
from saekit_plugins.backends.passed import check_not_for_passed, check_passed

if TYPE_CHECKING:
    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig
    from saekit_plugins.backends.hooked_transformer import TransformerLensBackend


@attrs.frozen(kw_only=True)
class HookedMambaOptions:
    """A Mamba model in the original layout (`config.json`, `pytorch_model.bin`), or one passed from code."""

    tokenizer: str = path_field("EleutherAI/gpt-neox-20b")
    """A folder or Hub name for the tokenizer; Mamba's own models use this default."""
    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Must be empty: HookedMamba's constructor takes nothing beside the name, the device and the tokenizer."""
    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to every forward: `fast_conv`, `fast_ssm`, `warn_disabled_hooks`."""

    @from_pretrained_kwargs.validator
    def _check_kwargs(self, attribute: attrs.Attribute[Any], value: dict[str, Any]) -> None:
        if value:
            raise ConfigError(
                [(attribute.name, f"HookedMamba.from_pretrained does not take {', '.join(map(repr, value))}. It takes "
                  "the name (model.name), the device (model.device) and the tokenizer (model.backend.tokenizer)")]
            )  # fmt: skip

    @forward_kwargs.validator
    def _check_forward(self, attribute: attrs.Attribute[Any], value: dict[str, Any]) -> None:
        allowed = ("fast_conv", "fast_ssm", "warn_disabled_hooks")
        if unknown := [name for name in value if name not in allowed]:
            raise ConfigError([(attribute.name, f"HookedMamba's forward takes {allowed}, found {unknown}")])


_INSTALL = "pip install 'saekit[mamba]' 'transformer-lens<4'"


def _check_version() -> None:
    if not has_hooked_transformer():
        raise MissingPackageError(
            "model backend HookedMamba needs mamba-lens, which works with transformer_lens 3 alone, and "
            f"{lens_version()} is installed. Install what it needs in an environment of its own: {_INSTALL}"
        )


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    fits = has_hooked_transformer()
    yield Entry(
        "HookedMamba",
        HookedMambaOptions,
        _build,
        requires=("mamba_lens",) if fits else (),  # where it could not work, the checks below say so
        extra="mamba",
        summary="Mamba models through mamba-lens" + ("" if fits else f", which needs transformer_lens 3: {_INSTALL}"),
        precheck=_precheck,
        outline=_outline,
    )


def _build(config: HookedMambaOptions, *, model: ModelConfig, loaded: object | None) -> TransformerLensBackend:
    _check_version()
    from saekit_plugins.backends.hooked_transformer import TransformerLensBackend

    _check_fast_paths(config.forward_kwargs)
    check_passed(loaded, "HookedMamba")
    if loaded is not None:
        check_not_for_passed(config, "tokenizer", "from_pretrained_kwargs")
    given: Any = loaded
    _check_dtype(str(next(given.parameters()).dtype) if loaded is not None else model.dtype, config.forward_kwargs)
    module: Any = given if loaded is not None else _load(config, model)
    name = "custom" if loaded is not None else model.name
    return TransformerLensBackend(
        module,
        name=name,
        d_vocab=module.cfg.vocab_size,
        n_ctx=None,
        forward_kwargs=config.forward_kwargs,
        autocast=model.autocast,
        compile_mode=model.compile_mode if model.compile else None,
    )


def _outline(config: HookedMambaOptions, *, model: ModelConfig) -> TransformerLensBackend:
    _check_version()
    from saekit_plugins.backends.hooked_transformer import TransformerLensBackend

    _check_dtype(model.dtype, config.forward_kwargs)
    module = mamba_outline(model)
    # Kernels for CUDA make no shapes; the way in plain torch makes the same.
    slow = {name: value for name, value in config.forward_kwargs.items() if name not in _FAST_PATHS}
    known: dict[str, Any] = {"name": model.name, "d_vocab": module.cfg.vocab_size, "n_ctx": None}
    return TransformerLensBackend(module, forward_kwargs=slow, autocast=model.autocast, **known)


_FAST_PATHS = {"fast_conv": ("causal_conv1d", "causal-conv1d"), "fast_ssm": ("selective_scan_cuda", "mamba-ssm")}
"""For each the module that it needs, and the package that has it."""


def _check_fast_paths(forward_kwargs: Mapping[str, Any]) -> None:
    """The model would look for their packages in its first forward."""
    problems = [
        (f"model.backend.forward_kwargs.{path}", f"needs the module {module}, which is not installed: pip install "
         f"{package} (for CUDA), or leave it out")
        for path, (module, package) in _FAST_PATHS.items()
        if forward_kwargs.get(path) and find_spec(module) is None
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def _check_dtype(dtype: str, forward_kwargs: Mapping[str, Any]) -> None:
    """The scan in plain torch begins with zeros in float32, whatever the model is in, and torch does not mix them."""
    name = dtype.removeprefix("torch.")
    if name in ("bfloat16", "float16") and not forward_kwargs.get("fast_ssm"):
        raise ModelError(
            f"mamba-lens runs no model in {name} without forward_kwargs.fast_ssm (for CUDA): choose float32 "
            "(model.dtype)"
        )


def _precheck(config: HookedMambaOptions, whole: TrainConfig | PretokenizeConfig) -> None:
    _check_version()
    check_folders(whole.model.name, config.tokenizer)


def _load(config: HookedMambaOptions, model: ModelConfig) -> object:
    import torch

    from saekit_plugins.backends.model_folders import load_tokenizer, loading, ready

    device = resolve_device(model.device, "model.device", model.dtype)
    check_folders(model.name, config.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mamba-lens imports names that its dependencies have deprecated
        from mamba_lens import HookedMamba
    tokenizer = load_tokenizer(config.tokenizer)
    with within_reach(unless=model.name), loading(f"the Mamba model {model.name!r}"):
        module = HookedMamba.from_pretrained(model.name, device=device, tokenizer=tokenizer)
        return ready(module, getattr(torch, model.dtype))
