"""Model backend ``TransformerBridge`` (transformer_lens): any causal language model that it makes a bridge of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import path_field
from saekit_plugins.backends.model_folders import PROCESSING, check_folders, model_folder
from saekit_plugins.backends.passed import check_not_for_passed, check_passed

if TYPE_CHECKING:
    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig
    from saekit_plugins.backends.bridge_loading import Processing
    from saekit_plugins.backends.bridges import BridgeBackend

__all__ = ["TransformerBridgeOptions"]

_ELSEWHERE = ("dtype", "torch_dtype", "device_map", "revision")


@attrs.frozen(kw_only=True)
class TransformerBridgeOptions:
    """A causal language model of transformers with transformer_lens' hook names: a folder, a name on the Hub, a folder
    of a HookedTransformer that GPT-2 can compute, or a bridge passed from code."""

    compatibility_mode: bool = False
    """Process the weights, so that hooks hold what they hold in a HookedTransformer; otherwise, in the model itself."""
    fold_ln: bool = True
    """In compatibility mode: fold the weights of norms into the layers that read them."""
    center_writing_weights: bool = True
    """In compatibility mode: what layers write to the residual stream has mean 0 (models with LayerNorm)."""
    center_unembed: bool = True
    """In compatibility mode: logits have mean 0."""
    fold_value_biases: bool = True
    """In compatibility mode: add the biases of values to that of the attention's output."""
    refactor_factored_attn_matrices: bool = False
    """In compatibility mode: other queries, keys, values and outputs with the same products."""
    tokenizer: str = path_field("")
    """A folder or Hub name for the tokenizer; empty: the model's own."""
    revision: str = "main"
    """A branch, tag or commit of the model's repository on the Hub."""
    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to `AutoModelForCausalLM.from_pretrained`, such as `{variant = "fp16"}`."""
    forward_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to every forward of the bridge."""

    @from_pretrained_kwargs.validator
    def _check_kwargs(self, attribute: attrs.Attribute[Any], value: dict[str, Any]) -> None:
        problems = [f"{name} is an option of its own (of model, or of model.backend)" for name in value if name in
                    _ELSEWHERE]  # fmt: skip
        problems += [f"{name} is an option of model.backend, for its compatibility mode" for name in value if name in
                     PROCESSING]  # fmt: skip
        if "attn_implementation" in value:
            problems.append("attn_implementation is eager in a bridge, whose hooks hold scores and patterns")
        if "trust_remote_code" in value:
            problems.append(
                "trust_remote_code is refused: no code that comes with a model is run. Pass the bridge from code"
            )
        if problems:
            raise ConfigError([(attribute.name, problem) for problem in problems])

    def __attrs_post_init__(self) -> None:
        if self.compatibility_mode:
            return
        changed = [
            name for name in PROCESSING if getattr(self, name) != getattr(attrs.fields(type(self)), name).default
        ]
        if changed:
            raise ConfigError([(name, "is for model.backend.compatibility_mode=true") for name in changed])

    def processing(self) -> Processing | None:
        """That of compatibility mode; None: without it."""
        from saekit_plugins.backends.bridge_loading import Processing

        return Processing(**{name: getattr(self, name) for name in PROCESSING}) if self.compatibility_mode else None


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    yield Entry(
        "TransformerBridge",
        TransformerBridgeOptions,
        _build,
        summary="causal language models of transformers with transformer_lens' hook names",
        precheck=_precheck,
        outline=_outline,
        timed=False,  # its attention is eager, as in no other backend
    )


def _precheck(config: TransformerBridgeOptions, whole: TrainConfig | PretokenizeConfig) -> None:
    check_folders(whole.model.name, config.tokenizer)
    model_folder(whole.model.name, {})
    _check_compile(whole.model)


def _check_compile(model: ModelConfig) -> None:
    if model.compile:
        raise ConfigError([("model.compile", "is not for TransformerBridge, since compiled code knows no hooks")])


def _build(config: TransformerBridgeOptions, *, model: ModelConfig, loaded: object | None) -> BridgeBackend:
    from saekit_plugins.backends.bridge_loading import bridge_backend

    _check_compile(model)
    check_passed(loaded, "TransformerBridge")
    if loaded is not None:
        names = (one.name for one in attrs.fields(type(config)) if one.name != "forward_kwargs")
        check_not_for_passed(config, *names)
    return bridge_backend(model, loaded=loaded, **_how(config))


def _outline(config: TransformerBridgeOptions, *, model: ModelConfig) -> BridgeBackend:
    from saekit_plugins.backends.bridge_loading import bridge_backend

    return bridge_backend(model, outline=True, **_how(config))


def _how(config: TransformerBridgeOptions) -> dict[str, Any]:
    return {
        "processing": config.processing(),
        "forward_kwargs": config.forward_kwargs,
        "tokenizer": config.tokenizer,
        "revision": config.revision,
        **config.from_pretrained_kwargs,
    }
