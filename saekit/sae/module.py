"""The SAE itself: five lines of mathematics, six hook points, and the step that trains it.

The mathematics stand here and in the architectures, for autograd.  What makes them fast stands beside: see
:mod:`saekit.kernels.encoder`, :mod:`saekit.kernels.gradients` and :mod:`saekit.sae.inference`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from saekit.config import PluginChoice, SAEConfig
from saekit.devices import KERNEL_DEVICES
from saekit.errors import SAEFormatError
from saekit.files.paths import as_path
from saekit.kernels.encoder import Features
from saekit.kernels.screen import why_no_screen
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import zeros
from saekit.protocols import ActivationFunction
from saekit.sae import inference
from saekit.sae.casting import Castable
from saekit.sae.hooks import HookPoint
from saekit.site import flatten_heads
from saekit.values import SAEInfo, StepInput, StepOutput

if TYPE_CHECKING:
    from saekit.plugins.manager import PluginManager

__all__ = ["SAE"]

_S = TypeVar("_S", bound="SAE")

_BLOCK = 1024  # decoder rows that are worked on together, in the cache
# Parameters whose gradients the fast step makes.
_KNOWN = ("W_enc", "b_enc", "W_dec", "b_dec", "scaling_factor")
_HOOKS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


class SAE(Castable):
    """A sparse autoencoder, ``x̂ = (act(x̄ W_enc + b_enc) ⊙ scale) W_dec + b_dec`` with ``x̄ = x − b_dec`` or ``x``.

    ``scale``, the ``scaling_factor [d_sae]`` of fine-tuning (Wright and Sharkey 2024, "Addressing feature
    suppression in SAEs"), is there only where it is used: see :meth:`add_scaling_factor`.

    Takes ``[..., d_in]``, or ``[..., head, d_head]`` with that product, and returns the same shape and dtype.
    Architectures override :meth:`losses`, and :meth:`features_of` where they differ.  Those that have a fast path
    override :meth:`why_no_fast_path`, :meth:`fast_step` and :meth:`feature_groups`, too.
    """

    kernels: Literal["auto", "fast", "reference"] = "auto"
    """``auto``: the fast kernels where there are any, but for training in float64; ``fast``: there, too; ``reference``:
    plain torch."""

    def __init__(self, config: SAEConfig, *, d_in: int, activation: ActivationFunction) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_sae = d_in, config.features(d_in)
        self.activation = activation
        self.info = SAEInfo()
        self.log_sparsity: Tensor | None = None
        """``[d_sae]``: log10 of the fraction of tokens on which each feature fired, if known."""
        self.use_error_term = False
        self._hooks_off = False
        self._compile_mode: str | None = None
        dtype = getattr(torch, config.dtype)
        # In this order sae-lens sums the gradient's norm; the last digits depend on it.
        cpu = torch.device("cpu")
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, dtype=dtype, device=cpu))
        self.W_dec = nn.Parameter(zeros((self.d_sae, d_in), dtype, cpu))
        # The numbers of a feature lie together, as in W_dec: the kernels read those of the active ones.  In float64,
        # results are compared with those of others to the last digits, which depend on the order in memory.
        turned = dtype != torch.float64
        shape = (self.d_sae, d_in) if turned else (d_in, self.d_sae)
        self.W_enc = nn.Parameter(zeros(shape, dtype, cpu).T if turned else zeros(shape, dtype, cpu))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=cpu))
        self.scaling_factor: nn.Parameter | None
        self.register_parameter("scaling_factor", None)
        for name in _HOOKS:
            self.add_module(f"hook_sae_{name}", HookPoint(f"hook_sae_{name}"))

    # ---- inference

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction; with ``use_error_term``, plus the error of the SAE as it is without its hooks."""
        output = self._reconstructed(x)
        if self.use_error_term:
            with torch.no_grad(), self._without_hooks():
                error = x - self._reconstructed(x)
            output = output + self.run_hook("error", error)
        return self.run_hook("output", output)

    def _reconstructed(self, x: Tensor) -> Tensor:
        rows = self.run_hook("input", self._rows(x))
        if self._hooked("acts_pre", "acts_post") or not inference.is_fast(self, rows):
            return self.decode(self._encoded(rows), like=x)
        return self._finished(inference.reconstructions(self, rows), x)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]``."""
        return self._encoded(self.run_hook("input", self._rows(x)))

    def _encoded(self, rows: Tensor) -> Tensor:
        if inference.is_fast(self, rows) and not self._hooked("acts_pre"):
            features = inference.dense_features(self, rows)
        else:
            features = self.features_of(self.run_hook("acts_pre", self.pre_activations(rows)))
        return self.run_hook("acts_post", features)

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """The active features of ``x``, without gradients; rows are those of ``x`` flattened to ``[n, d_in]``.

        With hooks on features or pre-activations, they are those that the hooks leave.
        """
        with torch.no_grad():
            if not self._hooked("acts_pre", "acts_post") and inference.is_fast(self, x):
                return inference.sparse_features(self, self.run_hook("input", self._rows(x)))
            return inference.nonzero_features(self.encode(x).reshape(-1, self.d_sae))

    def encode_topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest feature activations of each row, in falling order, and their features: ``[..., k]`` both.

        Where fewer are above zero, the values are 0 and the numbers -1.  Without gradients.
        """
        if not 1 <= k <= self.d_sae:
            raise ValueError(f"k must be 1 to {self.d_sae}, the number of features; found {k}")
        values, features = self.encode_sparse(x).top(k)
        shape = (*flatten_heads(x, self.d_in)[0].shape[:-1], k)
        return values.reshape(shape), features.reshape(shape)

    def decode(self, features: Tensor, *, like: Tensor | None = None) -> Tensor:
        """Reconstructions ``[..., d_in]``, in the shape and dtype of ``like`` if that is given."""
        fast = inference.is_fast(self, features)
        output = inference.decoded_rows(self, features) if fast else self.reconstruction(features)
        return self._finished(output, like)

    def _finished(self, output: Tensor, like: Tensor | None) -> Tensor:
        output = self.run_hook("recons", output)
        return output if like is None else output.reshape(like.shape).to(like.dtype)

    def centered(self, x: Tensor) -> Tensor:
        """``x̄``, the encoder's input: ``[..., d_in]``."""
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """``x̄ W_enc + b_enc``: ``[..., d_in]`` to ``[..., d_sae]``."""
        return self.centered(x) @ self.W_enc + self.b_enc

    def features_of(self, pre: Tensor) -> Tensor:
        """Feature activations from pre-activations, ``[..., d_sae]`` both."""
        return self.activation(pre)

    def decoder_norms(self) -> Tensor:
        """``‖W_dec row‖``: ``[d_sae]``."""
        norms: Tensor = self.W_dec.norm(dim=1)
        return norms

    def _hooked(self, *names: str) -> bool:
        return not self._hooks_off and any(self._point(name).hooked for name in names)

    def _point(self, name: str) -> HookPoint:
        return self._modules[f"hook_sae_{name}"]  # type: ignore[return-value]

    def run_hook(self, name: str, x: Tensor) -> Tensor:
        """``x`` as the hooks at ``hook_sae_{name}`` leave it."""
        point = self._point(name)
        return point(x) if point.hooked and not self._hooks_off else x

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        self._hooks_off = True
        try:
            yield
        finally:
            self._hooks_off = False

    def reconstruction(self, features: Tensor) -> Tensor:
        """``(f ⊙ scale) W_dec + b_dec``: ``[..., d_sae]`` to ``[..., d_in]``, without the hooks of :meth:`decode`."""
        scale = self.decoder_scale()
        return (features if scale is None else features * scale) @ self.W_dec + self.b_dec

    def decoder_scale(self) -> Tensor | None:
        """``[d_sae]``: what features are multiplied by before they are decoded; None: nothing."""
        return self.scaling_factor

    def _rows(self, x: Tensor) -> Tensor:
        return flatten_heads(x, self.d_in)[0].to(self.W_enc.dtype)

    # ---- training

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        """The loss on rows ``x [n, d_in]``, differentiable.  Each architecture has its own."""
        raise TypeError(f"{type(self).__name__} does not say how it is trained: it must define losses(x, step)")

    def training_step(self, x: Tensor, step: StepInput) -> StepOutput:
        """The loss on ``x [n, d_in]`` and its gradient, left in the parameters' ``grad``, which must be None before."""
        if self.why_reference() is None:
            with torch.no_grad():
                return self.fast_step(x.contiguous(), step)
        with torch.enable_grad():
            result = self.losses(x, step)
            result.loss.backward()
        return result

    def fast_step(self, x: Tensor, step: StepInput) -> StepOutput:
        """What :meth:`training_step` does, without autograd."""
        raise TypeError(f"{type(self).__name__} says that it has a fast path: it must define fast_step(x, step)")

    def feature_groups(self, rows: Tensor) -> Iterator[tuple[int, Features]]:
        """The features of ``rows [n, d_in]`` for inference, group by group with its first row, without autograd."""
        raise TypeError(f"{type(self).__name__} says that it has a fast path: it must define feature_groups(rows)")

    def why_no_fast_path(self, *, training: bool) -> str | None:
        """Why this SAE, with its options, has no fast path for ``training`` or else for inference; None: it has one."""
        return "the architecture has no fast path"

    def why_no_screen(self) -> str | None:
        """Why the encoder's products are not screened in bfloat16; None: they are where that pays."""
        reason = why_no_screen(self.W_enc.device, self.W_enc.dtype, self.d_sae)
        if reason is None and not self.W_enc.T.is_contiguous():
            return "the numbers of a column of W_enc do not lie together"
        return reason

    def step_path(self) -> str:
        """The way of a training step now, in words."""
        if (reason := self.why_reference()) is not None:
            return f"plain torch: {reason}"
        reason = self.why_no_screen()
        return "fast kernels, " + ("screened in bfloat16" if reason is None else f"not screened: {reason}")

    def why_reference(self) -> str | None:
        """Why a training step now takes the way of autograd; None: it takes the fast one."""
        if self.kernels == "reference":
            return 'kernels is "reference"'
        if "losses" in vars(self):
            return "it is compiled"
        if self.W_enc.device.type not in KERNEL_DEVICES:
            return f"the kernels are for {' and '.join(KERNEL_DEVICES)}, not for {self.W_enc.device.type}"
        if torch.is_autocast_enabled(self.W_enc.device.type):
            return "autocast rounds its products"
        if self.W_enc.dtype != torch.float32 and not (self.W_enc.dtype == torch.float64 and self.kernels == "fast"):
            return f"the weights are {str(self.W_enc.dtype).removeprefix('torch.')}"
        if more := [name for name, value in self.named_parameters() if value.requires_grad and name not in _KNOWN]:
            return f"the kernels have no gradient for {', '.join(more)}"
        return self.why_no_fast_path(training=True) or inference.overridden(type(self))

    def compile_losses(self, mode: str = "default") -> None:
        """From now on train with :meth:`losses` compiled by ``torch.compile``."""
        self._compile_mode = mode
        self.losses = torch.compile(self.losses, mode=mode)  # type: ignore[method-assign]

    @torch.no_grad()
    def before_update(self) -> None:
        """Between gradient and update: remove what a normalized decoder cannot follow."""
        if not self.config.normalize_sae_decoder or not self.W_dec.requires_grad or self.W_dec.grad is None:
            return
        for gradient, row in zip(self.W_dec.grad.split(_BLOCK), self.W_dec.split(_BLOCK), strict=True):
            along = (gradient * row).sum(1, keepdim=True) / row.pow(2).sum(1, keepdim=True)
            gradient.addcmul_(along, row, value=-1)

    @torch.no_grad()
    def after_update(self) -> None:
        """After an update: decoder rows back to norm 1."""
        if self.config.normalize_sae_decoder and self.W_dec.requires_grad:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def add_scaling_factor(self) -> None:
        """Multiply features by a factor of their own before they are decoded, at first 1."""
        if self.scaling_factor is None:
            self.scaling_factor = nn.Parameter(torch.ones_like(self.b_enc))

    def learn_only(self, names: Collection[str]) -> None:
        """From now on train these parameters and leave the others as they are."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        """From now on do on ``x`` what was done on ``scale · x``: ``W_enc · s``, ``W_dec / s``, ``b_dec / s``."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        if self.info.scale_is_unknown:  # until now
            self.info = self.info.with_scale(scale)

    # ---- saving and loading

    def public_config(self) -> dict[str, Any]:
        """The entries of ``cfg.json`` that name this architecture to other libraries.

        Whatever they cannot represent must not be called by a name that they know.
        """
        return {"architecture": self.info.architecture}

    def saved_options(self) -> dict[str, Any]:
        """The options by which :meth:`public_tensors` are to be understood when saekit loads them."""
        return dict(self.info.options)

    def public_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``sae_weights.safetensors``, contiguous, on the CPU.

        A scaling factor is part of ``W_dec`` there: other readers know none.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.named_parameters()}
        factor = tensors.pop("scaling_factor", None)
        return tensors if factor is None else tensors | {"W_dec": tensors["W_dec"] * factor[:, None]}

    @torch.no_grad()
    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` in; :class:`SAEFormatError` names what is missing, unknown or of another shape.

        A ``scaling_factor`` among them becomes the SAE's; without one, it has none or factors of 1.
        """
        if "scaling_factor" in tensors:
            self.add_scaling_factor()
        elif self.scaling_factor is not None:
            tensors = {**tensors, "scaling_factor": torch.ones_like(self.scaling_factor)}
        own = dict(self.named_parameters())
        problems = [f"{name} is missing" for name in own if name not in tensors]
        problems += [f"{name} is not a tensor of this architecture" for name in tensors if name not in own]
        problems += [
            f"{name} has shape {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if problems:
            raise SAEFormatError(f"the weights do not fit {self.info.architecture}: {'; '.join(problems)}")
        for name, value in own.items():
            value.copy_(tensors[name].to(value.dtype))  # here, for another device may not have the other dtype

    def extra_repr(self) -> str:
        """What the SAE is, where it belongs and what it is fed."""
        dtype = str(self.b_dec.dtype).removeprefix("torch.")
        return "\n".join([f"d_in={self.d_in}, d_sae={self.d_sae}, dtype={dtype}", *self.info.lines()])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles.  A compiled :meth:`losses` works on this SAE's own weights: a copy gets its own."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("losses", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compile_mode is not None:
            self.compile_losses(self._compile_mode)

    def save(self, path: str | Path) -> Path:
        """Write the SAE folder (``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``), all or nothing.

        sae-lens 6 reads it too, where it has the architecture.
        """
        from saekit.sae.folder import save_sae

        return save_sae(self, as_path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        plugins: PluginManager | None = None,
    ) -> Self:
        """The SAE in a folder, of whatever format a loader plugin knows.

        ``loader`` names one by its key, or is an object of its options class or a table, as in a configuration:
        ``{"name": "connor_rob_hook_z", "sae": "gpt2-small_L0_Hcat_z"}``.
        """
        from saekit.pretrained import SAEFiles, load_sae

        return _as(cls, load_sae(SAEFiles.in_folder(path), loader=loader, device=device, plugins=plugins))

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        folder: str = "",
        *,
        revision: str | None = None,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        plugins: PluginManager | None = None,
    ) -> Self:
        """The SAE in a folder of a Hugging Face repository."""
        from saekit.pretrained import SAEFiles, load_sae

        files = SAEFiles.on_hub(repo_id, folder, revision=revision)
        return _as(cls, load_sae(files, loader=loader, device=device, plugins=plugins))


def _as(cls: type[_S], sae: SAE) -> _S:
    if not isinstance(sae, cls):
        raise SAEFormatError(f"this is a {type(sae).__name__}, not a {cls.__name__}; load it with saekit.SAE.load")
    return sae
