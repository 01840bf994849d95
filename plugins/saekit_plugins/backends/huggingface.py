"""Model backend ``AutoModelForCausalLM`` (transformers): any causal language model, its modules' paths as hooks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.backends import Hooks
from saekit.config import path_field
from saekit_plugins.backends.aliases import also_called
from saekit_plugins.backends.hook_names import RESIDUAL, Layout, layout_of
from saekit_plugins.backends.layered import LayeredBackend, causal_mask, output_weights
from saekit_plugins.backends.model_folders import check_causal_lm, load_causal_lm, load_tokenizer
from saekit_plugins.backends.outlines import causal_lm_outline
from saekit_plugins.backends.passed import check_not_for_passed, check_passed
from saekit_plugins.backends.processing import NOTHING, at_hooks, of_metadata

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import ModelConfig

_ELSEWHERE = ("dtype", "torch_dtype", "device_map", "revision", "attn_implementation")
_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct")
"""Options of models whose positions are computed, and are in no table."""


@attrs.frozen(kw_only=True)
class HuggingFaceOptions:
    """Any causal language model of transformers: a folder, a name on the Hub, or one passed from code."""

    tokenizer: str = path_field("")
    """A folder or Hub name for the tokenizer; empty: the model's own."""
    revision: str = "main"
    """A branch, tag or commit of the model's repository on the Hub."""
    attn_implementation: str | None = None
    """How attention is computed: `eager`, `sdpa`, `flash_attention_2`; without it, as transformers chooses."""
    from_pretrained_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Passed to `AutoModelForCausalLM.from_pretrained`, such as `{variant = "fp16"}`."""

    @from_pretrained_kwargs.validator
    def _check_kwargs(self, attribute: attrs.Attribute[Any], value: dict[str, Any]) -> None:
        problems = [
            f"{name} is an option of its own (of model, or of model.backend)" for name in value if name in _ELSEWHERE
        ]
        if "trust_remote_code" in value:
            problems.append(
                "trust_remote_code is refused: no code that comes with a model is run. Pass the model from code"
            )
        if problems:
            raise ConfigError([(attribute.name, problem) for problem in problems])


class HuggingFaceBackend(LayeredBackend):
    """A causal language model of transformers, with ``transformer.h.1`` or ``model.layers.3.mlp.input`` for hooks."""

    def logits(self, tokens: Tensor) -> Tensor:
        # The library looks at the numbers of a mask that it makes itself, and on the meta device there are none.
        masked = {"attention_mask": causal_mask(tokens)} if tokens.is_meta else {}
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, **masked).logits
        return logits

    def forward(self, tokens: Tensor, hooks: Hooks) -> Tensor | None:
        order = None if hooks.entry is None else self._order
        with nullcontext() if order is None else order.begun_at(str(hooks.entry)):
            return super().forward(tokens, hooks)

    def _last_before(self, hooks: Collection[str]) -> str | None:
        return None if self._order is None else self._order.entry_of(hooks)

    def hook_like(self, name: str) -> str | None:
        """A hook of its own, or the place that transformer_lens has that name for.

        Heads lie side by side here.  What a norm of transformer_lens holds, before its weights, no module does.
        """
        if name in self._hooks:
            return name
        known = self._layout
        if known is None and name.endswith(("hook_resid_pre", "hook_resid_post")) and self._order is not None:
            known = Layout(self._order.path)
        found = None if known is None else known.module_hook(name)
        return found if found in self._hooks else None

    def processing(self, hook_name: str | None = None, about: Mapping[str, Any] | None = None) -> Mapping[str, bool]:
        """See :class:`saekit.abilities.StatesProcessing`: transformers leaves weights as they are."""
        config = self.model.config.get_text_config()
        layout = layout_of(config.model_type, parallel=getattr(config, "use_parallel_residual", False))
        known = None if layout is None or hook_name is None else layout.lens_hook(hook_name)
        if known is None and hook_name is not None and self.in_residual_stream(hook_name):
            known = "hook_resid_pre"
        names = hook_name and [hook_name if known is None else known]
        return at_hooks(NOTHING if about is None else of_metadata(about), names, self.model)

    @cached_property
    def _layout(self) -> Layout | None:
        config = self.model.config.get_text_config()
        return layout_of(config.model_type, parallel=getattr(config, "use_parallel_residual", False))

    def to_residual_stream(self, hook_name: str) -> Tensor | None:
        """Those of the module that attention or an MLP ends with; none where a norm lies behind it, or a gate."""
        known = self._layout
        lens = None if known is None or hook_name not in self._hooks else known.lens_hook(hook_name)
        block, _, place = (lens or "").partition(".attn." if ".attn." in (lens or "") else ".mlp.")
        if known is None or place not in ("hook_z", "hook_pre", "hook_post"):
            return None
        if place == "hook_pre" and "mlp.hook_pre_linear" in known.inside:
            return None
        part, last = ("attn", "attn.hook_z") if place == "hook_z" else ("mlp", "mlp.hook_post")
        added, path = known.module_hook(f"{block}.hook_{part}_out"), known.module_hook(f"{block}.{last}")
        if added is None or path is None or not path.startswith(f"{added}."):  # what is added is not what is projected
            return None
        return output_weights(self.model.get_submodule(path.removesuffix(".input")))

    @cached_property
    def _hooks(self) -> frozenset[str]:
        return frozenset(self.hook_names())

    def in_residual_stream(self, hook_name: str) -> bool:
        """The layers' inputs and outputs, and what is known to be added, or to lie between.

        What is inside a layer may be normalized before it is added.
        """
        if hook_name.removesuffix(".input") in self._layers:
            return True
        lens = None if self._layout is None or hook_name not in self._hooks else self._layout.lens_hook(hook_name)
        return lens is not None and RESIDUAL.fullmatch(lens) is not None

    @cached_property
    def _layers(self) -> frozenset[str]:
        from torch.nn import ModuleList

        number = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        stacks = [(path, one) for path, one in self.model.named_modules() if isinstance(one, ModuleList)]
        return frozenset(f"{path}.{index}" for path, one in stacks if len(one) == number for index in range(number))

    def other_names(self) -> Collection[str]:
        return also_called(self.name, *self.name.split("/")[-1:])

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        return super().unembedding() if head is None else (head.weight.T, getattr(head, "bias", None))


def _build(config: HuggingFaceOptions, *, model: ModelConfig, loaded: object | None) -> HuggingFaceBackend:
    if model.compile:
        raise ConfigError([("model.compile", "is not for AutoModelForCausalLM, since compiled code knows no hooks")])
    check_passed(loaded, "AutoModelForCausalLM")
    if loaded is not None:
        tokenizer_is_known = config.tokenizer or getattr(loaded, "tokenizer", None) is not None
        unused = ("revision",) if tokenizer_is_known else ()  # else that is the tokenizer's
        check_not_for_passed(config, "attn_implementation", "from_pretrained_kwargs", *unused)
    options = {"revision": config.revision, "attn_implementation": config.attn_implementation}
    module: Any = loaded or load_causal_lm(model, **options | config.from_pretrained_kwargs)
    name = model.name if loaded is None else module.name_or_path
    tokenizer = None if config.tokenizer else getattr(module, "tokenizer", None)
    if tokenizer is None and (config.tokenizer or name):
        tokenizer = load_tokenizer(config.tokenizer or name, "main" if config.tokenizer else config.revision)
    return _around(module, model, name or "custom", tokenizer)


def _outline(config: HuggingFaceOptions, *, model: ModelConfig) -> HuggingFaceBackend:
    options = {"revision": config.revision, "attn_implementation": config.attn_implementation}
    return _around(causal_lm_outline(model, **options | config.from_pretrained_kwargs), model, model.name)


def _around(module: Any, model: ModelConfig, name: str, tokenizer: Any = None) -> HuggingFaceBackend:
    text = module.config.get_text_config()
    known = {"d_vocab": text.vocab_size, "n_ctx": getattr(text, "max_position_embeddings", None)}
    backend = HuggingFaceBackend(module, name=name, tokenizer=tokenizer, autocast=model.autocast, **known)
    backend.runs_beyond_n_ctx = any(getattr(text, option, None) is not None for option in _ROTARY)
    return backend


@hookimpl
def saekit_register_model_backends() -> Iterable[Entry]:
    summary = "causal language models of transformers, hooked by module paths"
    yield Entry(
        "AutoModelForCausalLM",
        HuggingFaceOptions,
        _build,
        summary=summary,
        precheck=check_causal_lm,
        outline=_outline,
    )
