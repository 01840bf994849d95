"""SAEs as SAEBench's evals take them (Karvonen et al. 2025, "SAEBench", arXiv 2503.09532).

What is given to them is a copy with an interface of its own; SAEBench itself is not imported.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from saekit.errors import ConfigError
from saekit.for_sae_lens import said_to_sae_lens
from saekit.site import flatten_heads

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["SAEBenchConfig", "SAEBenchSAE", "for_saebench"]

_UNKNOWN_TOKENS = -100_000  # what SAEBench takes for "not known"
_CLOSE = 1e-3  # of an output's size: two ways to the same number, in the SAE's own type
_CLOSE_HALF = 5e-2


def for_saebench(
    sae: SAEModule, *, model_name: str | None = None, hook_name: str | None = None, hook_layer: int | None = None
) -> SAEBenchSAE:
    """What SAEBench's evals take as a custom SAE: ``run_eval(config, [("a name", for_saebench(sae))], device, ...)``.

    It is made of a copy, so what evals do to it, such as ``to(dtype=...)``, leaves ``sae`` as it is.  Its decoder rows
    have norm 1 and its features are so many times as large, so outputs stay what they are, with any architecture: which
    features are active is decided before.

    ``model_name`` and ``hook_name`` are those of transformer_lens, which SAEBench loads the model with; left out, what
    the SAE knows of itself.  ``hook_layer`` is the block of the hook; left out, the number in the hook's name.

    :class:`ConfigError` for what is no SAE of one site and of each token for itself, and for a model or a hook that is
    not known.
    """
    _refuse(sae)
    return SAEBenchSAE(sae, SAEBenchConfig.of(sae, model_name, hook_name, hook_layer))


def _refuse(sae: SAEModule) -> None:
    """:class:`ConfigError` says why SAEBench cannot evaluate ``sae``."""
    what, kind = "SAEBench takes SAEs that give back what they read, of one site", _kind(sae)
    if not sae.ports.same:
        raise ConfigError(
            f"{what}; this {kind} reads {', '.join(sae.ports.inputs)} and writes {', '.join(sae.ports.targets)}, and "
            "SAEBench would put what it gives in the place of what it reads. Evaluate it with saekit"
        )
    if len(sae.ports.inputs) > 1:
        raise ConfigError(
            f"{what}; this {kind} has {len(sae.ports.inputs)} sites ({', '.join(sae.ports.inputs)}), and SAEBench "
            "reads and replaces one. Evaluate it with saekit"
        )
    if sae.reads_sequences:
        raise ConfigError(
            f"SAEBench gives tokens without those before them, and takes what is decoded of features for all of the "
            f"output; the features of this {kind} depend on the positions before theirs, and its prediction passes "
            "them by. Evaluate it with saekit"
        )
    with torch.no_grad():
        passed = sae.bypass(torch.zeros(1, sae.d_in, dtype=sae.dtype, device=sae.device))
    if passed is not None:
        raise ConfigError(
            f"SAEBench takes what is decoded of features for all of the output; with this {kind}, a skip connection "
            "adds to it. Evaluate it with saekit"
        )
    if sae.info.scale_is_unknown:
        raise ConfigError(
            "this SAE was trained on activations that were multiplied by a factor, and nobody knows which; SAEBench "
            "gives them as they are. Fold the factor in first: sae.fold_activation_scale(factor)"
        )


def _kind(sae: SAEModule) -> str:
    return sae.info.architecture.rpartition(":")[2] or type(sae).__name__


class SAEBenchConfig:
    """What SAEBench reads of an SAE's configuration.  It adds attributes of its own; :meth:`to_dict` has those as well.

    Fields that saekit has no other value for hold what SAEBench's own custom SAEs have there.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    @classmethod
    def of(
        cls, sae: SAEModule, model_name: str | None, hook_name: str | None, hook_layer: int | None
    ) -> SAEBenchConfig:
        """The configuration of ``sae``; see :func:`for_saebench`."""
        known, site = sae.info.metadata, sae.info.site
        model_name = model_name or known.get("model_name")
        if not model_name:
            raise ConfigError(
                "this SAE does not say which model it is for, and SAEBench loads the model by its name: give it, "
                'for_saebench(sae, model_name="gpt2-small")'
            )
        hook_name = hook_name or (site.hook_name if site is not None else None)
        if not hook_name:
            raise ConfigError(
                "this SAE does not say which hook it is for: give its name in transformer_lens, "
                'for_saebench(sae, hook_name="blocks.8.hook_resid_pre")'
            )
        if hook_layer is None:
            number = re.search(r"\d+", hook_name)
            if number is None:
                raise ConfigError(
                    f"there is no block's number in the hook's name {hook_name!r}, and SAEBench stops the model after "
                    "it: give the block, for_saebench(sae, hook_layer=0)"
                )
            hook_layer = int(number.group())
        return cls(
            model_name=model_name,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            hook_name=hook_name,
            hook_layer=hook_layer,
            hook_head_index=site.hook_head_index if site is not None else None,
            **_options(sae),
            **_fed(known, hook_name),
        )

    def to_dict(self) -> dict[str, Any]:
        """All that can be written as JSON, as it is read again."""
        return {name: value for name, field in vars(self).items() if (value := _plain(field)) is not _NOT_PLAIN}


_NOT_PLAIN = object()


def _plain(value: object) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):  # such as the object that SAEBench puts there under `metadata`
        return _NOT_PLAIN


def _options(sae: SAEModule) -> dict[str, Any]:
    activation = sae.info.options.get("activation", "")
    activation = activation.get("name", "") if isinstance(activation, Mapping) else str(activation)
    return {
        "architecture": _kind(sae),
        "apply_b_dec_to_input": sae.config.apply_b_dec_to_input,
        "finetuning_scaling_factor": sae.scaling_factor is not None,
        "activation_fn_str": activation.rpartition(":")[2],
        "activation_fn_kwargs": {},
        "normalize_activations": "none",  # what normalizes rows does so inside encode and decode
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": str(sae.device),
    }


def _fed(known: Mapping[str, Any], hook_name: str) -> dict[str, Any]:
    known = {**known, **said_to_sae_lens(known, hook_name)}
    return {
        "context_size": known.get("context_size"),
        "prepend_bos": known.get("prepend_bos", True),
        "model_from_pretrained_kwargs": dict(known.get("model_from_pretrained_kwargs") or {}),
        "dataset_path": known.get("dataset_path") or "",
        "dataset_trust_remote_code": False,
        "seqpos_slice": tuple(known.get("seqpos_slice") or (None,)),
        "exclude_special_tokens": known.get("exclude_special_tokens"),
        "training_tokens": known.get("training_tokens", _UNKNOWN_TOKENS),
        "sae_lens_training_version": None,
        "neuronpedia_id": known.get("neuronpedia_id"),
    }


class SAEBenchSAE(nn.Module):
    """An SAE as SAEBench's evals take it; :func:`for_saebench` makes it.

    ``W_enc [d_in, d_sae]`` and ``b_enc [d_sae]`` are of the features as they are here: what is active is so large as
    these say, with what the architecture does beside.  An architecture without an encoder of its own has the decoder's
    transpose there, and one without ``b_enc`` the bias of its magnitudes, or zeros.

    Of an SAE that normalizes each row by its own numbers, ``decode`` needs the rows.  It takes those that the very
    features were made of, or of features that were changed those of the last ``encode``, if there are as many: change
    features before the next ``encode``.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    norms: Tensor

    @torch.no_grad()
    def __init__(self, sae: SAEModule, cfg: SAEBenchConfig) -> None:
        super().__init__()
        self.sae: SAEModule = copy.deepcopy(sae).requires_grad_(False)
        self.cfg = cfg
        self.hook_z_reshaping_mode = True
        self._heads: tuple[int, int] | None = None
        self._last: Tensor | None = None
        self._read: WeakIdKeyDictionary = WeakIdKeyDictionary()
        tensors = {name: value.to(sae.device) for name, value in sae.public_tensors().items()}
        W_dec = tensors.get("W_dec")
        if W_dec is None or W_dec.shape != (sae.d_sae, sae.d_in):
            raise ConfigError(f"SAEBench needs a W_dec [d_sae, d_in], which this {_kind(sae)} has not")
        norms = W_dec.float().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        read = tensors.get("W_enc", W_dec.T)
        shift = tensors.get("b_enc", tensors.get("b_mag", torch.zeros(sae.d_sae)))
        zeros = torch.zeros(1, sae.d_sae, dtype=sae.dtype, device=sae.device)
        for name, value in (
            ("W_enc", read * norms),
            ("W_dec", W_dec / norms[:, None]),
            ("b_enc", shift.to(norms) * norms),
            ("b_dec", sae.reconstruction(zeros)[0]),
        ):
            self.register_parameter(name, nn.Parameter(value.to(sae.dtype).contiguous(), requires_grad=False))
        self.register_buffer("norms", norms.to(sae.dtype))
        self._check_decoder()

    def _check_decoder(self) -> None:
        """:class:`ConfigError` unless what the SAE decodes is what ``W_dec`` and ``b_dec`` say, which evals rely on."""
        some = torch.arange(0, self.sae.d_sae, max(self.sae.d_sae // 4, 1), device=self.device)
        features = torch.zeros(len(some), self.sae.d_sae, dtype=self.dtype, device=self.device)
        features[torch.arange(len(some)), some] = 1
        expected = self.W_dec[some] + self.b_dec
        error = (self.sae.reconstruction(features / self.norms) - expected).abs().max()
        close = _CLOSE if self.dtype.itemsize > 2 else _CLOSE_HALF
        if not error <= close * expected.abs().max().clamp_min(1):
            raise ConfigError(
                f"this {_kind(self.sae)} does not decode features as f W_dec + b_dec, and SAEBench takes the rows of "
                f"W_dec for their directions; of single features, outputs differ by {error:.2g}"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.W_dec.dtype

    @property
    def b_mag(self) -> Tensor:
        """``b_enc``, by the name under which SAEBench looks for it in gated SAEs."""
        return self.b_enc

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchSAE:
        """As :meth:`torch.nn.Module.to`; the configuration says it, too."""
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)  # type: ignore[attr-defined]
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Features ``[..., d_sae]`` of ``x [..., d_in]``, or of ``[..., head, d_head]``."""
        rows, heads = flatten_heads(x, self.sae.d_in)
        self._heads = (x.shape[-2], x.shape[-1]) if heads else None
        features = self.sae.encode(rows) * self.norms
        if self.sae.input_transform is not None:
            self._last = self._read[features] = rows
        return features

    def decode(self, feature_acts: Tensor) -> Tensor:
        """What ``feature_acts [..., d_sae]`` stand for, ``[..., d_in]``; in that mode, in heads as the last input."""
        rows = None if self.sae.input_transform is None else self._rows_of(feature_acts)
        output = self.sae.decode(feature_acts / self.norms, like=rows)
        return output.unflatten(-1, self._heads) if self.hook_z_reshaping_mode and self._heads else output

    def _rows_of(self, features: Tensor) -> Tensor:
        rows: Tensor | None = self._read.get(features, self._last)
        if rows is None or rows.shape[:-1] != features.shape[:-1]:
            found = "nothing was encoded yet" if rows is None else f"the last that was encoded is {list(rows.shape)}"
            raise ConfigError(
                "this SAE normalizes each row by its own numbers, so what features stand for depends on the rows that "
                f"they were made of: features are {list(features.shape)}, and {found}. Call encode on their rows first"
            )
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """From now on, what was given in heads is given back in heads."""
        self.hook_z_reshaping_mode = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """From now on, outputs are flat."""
        self.hook_z_reshaping_mode = False
