"""A dictionary of features: five lines of mathematics, six hook points, and the step that trains it.

The mathematics stand here and in the architectures, for autograd.  What makes them fast stands beside: see
:mod:`saekit.kernels.encoder`, :mod:`saekit.kernels.gradients` and :mod:`saekit.kernels.inference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saekit.config import SAEConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.kernels import inference
from saekit.kernels.sparse import SparseFeatures
from saekit.protocols import ActivationFunction
from saekit.sae import init
from saekit.sae.attributes import Named
from saekit.sae.familiar import Familiar
from saekit.sae.folding import Folding
from saekit.sae.hooks import Hooked
from saekit.sae.inputs import check_input, check_rows, check_sequences, check_size, check_type, check_width
from saekit.sae.learning import Learning, learned_from
from saekit.sae.parameters import Parameter, ParameterTable, tensors_of
from saekit.sae.placing import Placed
from saekit.sae.shown import in_a_table, in_one_line
from saekit.sae.transforms import Transforming
from saekit.sae.ways import Ways
from saekit.site import flatten_heads
from saekit.values import Ports, SAEInfo, StepInput, StepOutput

__all__ = ["SAEModule"]


class SAEModule(Familiar, Hooked, Learning, Placed, Transforming, Folding, Ways, Named):
    """Features that are read from some sites and written to some: ``ŷ = (act(x̄ W_enc + b_enc) ⊙ scale) W_dec + b_dec``.

    In an SAE both are one site, and ``x̄`` is ``x − b_dec`` or ``x``.  ``scale``, the ``scaling_factor [d_sae]`` of
    fine-tuning (Wright and Sharkey 2024, "Addressing feature suppression in SAEs"), is there only where it is used: see
    :meth:`add_scaling_factor`.

    Takes ``[..., d_in]``, or ``[..., head, d_head]`` with that product; an SAE returns the same shape and dtype.
    Several inputs are side by side (:meth:`saekit.Ports.join_input`), and so are targets (``Ports.split_target``).
    Architectures derive from :class:`saekit.SAE`, which also saves and loads.  They state their parameters in
    :meth:`parameters_of`, and override :meth:`losses`, and :meth:`features_of` where they differ.  Those that have fast
    ways list them in :attr:`step_kernels`.
    """

    b_enc: nn.Parameter
    W_dec: nn.Parameter
    W_enc: nn.Parameter
    b_dec: nn.Parameter
    scaling_factor: nn.Parameter | None
    reads_sequences: ClassVar[bool] = False
    """Whether features depend on the positions before theirs: then it takes ``[batch, position, d_in]`` alone."""
    why_no_training: ClassVar[str | None] = None
    """Of an architecture that is for inference alone: why, in words.  None: it defines :meth:`losses`."""

    def __init__(self, config: SAEConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        super().__init__()
        if config.apply_b_dec_to_input and not ports.same:
            raise ConfigError(
                [("sae.apply_b_dec_to_input", "takes what is added to the targets from the inputs, and these are other "
                  "sites; set it to false")]
            )  # fmt: skip
        self.config, self.ports = config, ports
        self.d_in, self.d_out, self.d_sae = ports.d_in, ports.d_out, config.features(ports.d_in)
        self.activation = activation
        self.info = SAEInfo()
        self.read_from: Path | None = None
        """The folder that it was read from, if it was; its weights may have changed since."""
        self.log_sparsity: Tensor | None = None
        """``[d_sae]``: log10 of the fraction of tokens on which each feature fired, if known."""
        self.probe_rows: Tensor | None = None
        """``[n, d_in]``: a few inputs of its own, for the probe that ``save`` makes; None: it makes some."""
        self.use_error_term = False
        self.table.allocate(self, getattr(torch, config.dtype))
        self.add_hook_points()

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        """The architecture's parameters.  One with others of its own adds them to these, or states all of them."""
        return (
            # In this order sae-lens sums the gradient's norm; the last digits depend on it.
            Parameter("b_enc", ("d_sae",), init=init.zeros, grows=1, histogram="b_e"),
            Parameter(
                "W_dec",
                ("d_sae", "d_out"),
                init=init.decoder,
                scale={"d_out": -1},
                grows=-1,
                unit_rows=config.normalize_sae_decoder,
                groups=("decoder",),
                histogram="W_dec_norms",
            ),
            Parameter(
                "W_enc",
                ("d_in", "d_sae"),
                init=init.encoder,
                turn=0,
                scale={"d_in": 1},
                grows=1,
                columns_contiguous=True,
            ),
            Parameter(
                "b_dec", ("d_out",), init=init.b_dec, scale={"d_out": -1}, groups=("decoder", "unrotated_decoder")
            ),
            Parameter(
                "scaling_factor",
                ("d_sae",),
                init=init.ones,
                grows=0,
                groups=("scale", "decoder", "unrotated_decoder"),
                folds_into="W_dec",
            ),
        )

    @cached_property
    def table(self) -> ParameterTable:
        """All that is known of the parameters."""
        sizes = {"d_in": self.d_in, "d_out": self.d_out, "d_sae": self.d_sae}
        sizes |= {"inputs": len(self.ports.inputs), "targets": len(self.ports.targets)}
        table = ParameterTable(type(self).parameters_of(self.config), sizes)
        table.check()
        return table

    def kept_in_digits(self) -> list[Tensor]:
        found = [getattr(self, entry.name) for entry in self.table if entry.keeps_digits]
        return [value for value in found if value is not None]

    @property
    def _leading(self) -> Tensor:
        return getattr(self, self._leading_name)  # type: ignore[no-any-return]

    @cached_property
    def _leading_name(self) -> str:
        always = [entry for entry in self.table if not entry.optional]
        return min(always, key=lambda entry: entry.keeps_digits).name

    # ---- inference

    def forward(self, x: Tensor, *, use_error_term: bool | None = None, of: Tensor | None = None) -> Tensor:
        """The reconstruction; with ``use_error_term``, plus the error of the SAE as it is without its hooks.

        ``use_error_term`` is the SAE's own, unless it is given here.  What the error is ``of`` are the targets
        ``[..., d_out]`` as they really are; left out, ``x``, of what reads and writes the same sites.  No gradient
        flows through an error.
        """
        output = self._reconstructed(x)
        if self.use_error_term if use_error_term is None else use_error_term:
            output = output + self.run_hook("error", self.missing(x, output, of))
        return self.run_hook("output", output)

    def _reconstructed(self, x: Tensor) -> Tensor:
        rows = self.run_hook("input", self._rows(x))
        like = x if self.input_transform is None else rows.reshape(x.shape).to(x.dtype)  # as hooks have left it
        read = self.transformed(rows)
        kernel = self._kernel_for(read)
        if kernel is None:
            features, passed = self.features_and_bypass(read)
            return self._with(passed, self.decode(self.run_hook("acts_post", features), like=like), rows)
        if self._hooked("acts_pre", "acts_post"):
            output = self.decode(self._encoded(read), like=like)
        else:
            flat = _flat(read)
            with self._lent(kernel) as workspace:
                groups = kernel.groups(self, flat, workspace)
                output = inference.reconstructions(groups, len(flat), kernel.decoder(self))
            output = self._finished(output.reshape(*rows.shape[:-1], self.d_out), like)
        return self.with_bypass(output, rows)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]``."""
        return self._encoded(self.transformed(self.run_hook("input", self._rows(x))))

    def _encoded(self, rows: Tensor) -> Tensor:
        kernel = None if self._hooked("acts_pre") else self._kernel_for(rows)
        if kernel is None:
            features = self.features_from(rows)
        else:
            flat = _flat(rows)
            with self._lent(kernel) as workspace:
                groups = kernel.groups(self, flat, workspace)
                features = inference.dense_features(groups, len(flat), self.d_sae, flat, self.memory)
            features = features.reshape(*rows.shape[:-1], self.d_sae)
        return self.run_hook("acts_post", features)

    def features_from(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]`` of inputs ``[..., d_in]``: :meth:`features_of` pre-activations.

        For architectures whose features do not follow from pre-activations.  They refuse hooks on these.
        """
        return self.features_of(self.run_hook("acts_pre", self.pre_activations(x)))

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        """The active features of ``x``, without gradients; rows are those of ``x`` flattened to ``[n, d_in]``.

        With hooks on features or pre-activations, they are those that the hooks leave.
        """
        check_input(x, self.ports)
        with torch.no_grad():
            kernel = None if self._hooked("acts_pre", "acts_post") else self._kernel_for(x)
            if kernel is None:
                return inference.nonzero_features(self.encode(x).reshape(-1, self.d_sae))
            flat = _flat(self.transformed(self.run_hook("input", self._rows(x))))
            with self._lent(kernel) as workspace:
                return inference.sparse_features(kernel.groups(self, flat, workspace), self.d_sae, flat)

    def encode_topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest feature activations of each row, in falling order, and their features: ``[..., k]`` both.

        Features that may be below zero count by their size.  Where fewer are not zero, the values are 0 and the numbers
        -1.  Without gradients.
        """
        if not 1 <= k <= self.d_sae:
            raise ValueError(f"k must be 1 to {self.d_sae}, the number of features; found {k}")
        values, features = self.encode_sparse(x).top(k)
        shape = (*flatten_heads(x, self.d_in)[0].shape[:-1], k)
        return values.reshape(shape), features.reshape(shape)

    def decode(self, features: Tensor, *, like: Tensor | None = None, target: str | None = None) -> Tensor:
        """Reconstructions ``[..., d_out]``, in the shape and dtype of ``like``, an input, if that is given.

        With an :attr:`input_transform` it must be: rows have their own units.  ``target`` is the name of one of several
        targets (``ports.targets``), for ``[..., width]`` of that alone.
        """
        check_width(features, self.d_sae, "d_sae", "features")
        self.check_like(like)
        if target is not None:
            return self.ports.one_target(self.decode(features, like=like), target)
        kernel = self._kernel_for(features)
        if kernel is None:
            return self._finished(self.reconstruction(features.to(self.dtype)), like)
        output = inference.decoded_rows(kernel.decoder(self), features.detach().reshape(-1, self.d_sae), self.memory)
        return self._finished(output.reshape(*features.shape[:-1], self.d_out), like)

    def _finished(self, output: Tensor, like: Tensor | None) -> Tensor:
        output = self.run_hook("recons", output)
        if like is None:
            return output
        check_type(like, "like")
        shape = like.shape if self.ports.same else (*flatten_heads(like, self.d_in)[0].shape[:-1], self.d_out)
        check_size(output, shape, "outputs", "like inputs of which outputs would be")
        if self.input_transform is not None:
            output = self.undone(output, self._rows(like).reshape(output.shape))
        return output.reshape(shape).to(like.dtype)

    def centered(self, x: Tensor) -> Tensor:
        """``x̄``, the encoder's input: ``[..., d_in]``."""
        check_width(x, self.d_in, "d_in", "inputs")
        return x - self.share.alike(self.b_dec) if self.config.apply_b_dec_to_input else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """``x̄ W_enc + b_enc``: ``[..., d_in]`` to ``[..., d_sae]``."""
        return self.centered(x) @ self.W_enc + self.b_enc

    def features_of(self, pre: Tensor) -> Tensor:
        """Feature activations from pre-activations, ``[..., d_sae]`` both."""
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        return self.activation(pre)

    def bypass(self, x: Tensor) -> Tensor | None:
        """What reaches the outputs past the features, ``[..., d_in]`` to ``[..., d_out]``; None: nothing.

        :meth:`forward` adds it, :meth:`decode` does not.
        """
        return None

    def features_and_bypass(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`features_from` and :meth:`bypass` of ``x``, for architectures that find both in one pass."""
        return self.features_from(x), self.bypass(x)

    def with_bypass(self, output: Tensor, x: Tensor) -> Tensor:
        """``output``, decoded from features of ``x``, with what passes them by: what :meth:`forward` gives."""
        rows = self._rows(x)
        return self._with(self.bypass(self.transformed(rows)), output, rows)

    def _with(self, passed: Tensor | None, output: Tensor, rows: Tensor) -> Tensor:
        if passed is None:
            return output
        passed = self.undone_share(passed, rows)
        check_size(passed, output.shape, "what passes the features by", "added to outputs")
        return output + passed.reshape(output.shape).to(output.dtype)

    def decoder_norms(self) -> Tensor:
        """``‖W_dec row‖``: ``[d_sae]``."""
        return self.W_dec.norm(dim=1)  # type: ignore[no-any-return]

    def reconstruction(self, features: Tensor) -> Tensor:
        """``(f ⊙ scale) W_dec + b_dec``: ``[..., d_sae]`` to ``[..., d_out]``, without the hooks of :meth:`decode`."""
        check_width(features, self.d_sae, "d_sae", "features")
        scale = self.decoder_scale()
        return self.share.sum((features if scale is None else features * scale) @ self.W_dec) + self.b_dec

    def decoder_scale(self) -> Tensor | None:
        """``[d_sae]``: what features are multiplied by before they are decoded; None: nothing."""
        return self.scaling_factor

    def scaled_decoder(self) -> Tensor:
        """``W_dec [d_sae, d_out]`` with the factors of fine-tuning in its rows, where there are any."""
        return self.W_dec if self.scaling_factor is None else self.W_dec * self.scaling_factor[:, None]

    def _rows(self, x: Tensor) -> Tensor:
        check_input(x, self.ports)
        rows = flatten_heads(x, self.d_in)[0].to(self.dtype)
        if self.reads_sequences:
            check_sequences(rows, self.info.architecture)
        return rows

    # ---- training

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        """The loss on rows ``x [n, d_in]``, differentiable.  Each architecture has its own."""
        if self.why_no_training is not None:
            raise ConfigError(
                f"{type(self).__name__} is for inference alone, and cannot be trained: {self.why_no_training}"
            )
        raise TypeError(f"{type(self).__name__} does not say how it is trained: it must define losses(x, step)")

    def training_step(self, x: Tensor, step: StepInput) -> StepOutput:
        """The loss on ``x [n, d_in]`` and its gradient, left in the parameters' ``grad``, which must be None before."""
        check_rows(x, step.target, self.ports)
        self.check_target(step.target)
        result = self._step(self.transformed(x), step)
        return result if self.input_transform is None else result._replace(output=self.undone(result.output, x))

    def _step(self, x: Tensor, step: StepInput) -> StepOutput:
        kernel, _ = self._training_kernel()
        if kernel is not None and not self._leaves(kernel, x, step):
            with torch.no_grad(), self._lent(kernel, "step") as workspace, self.share.agreed(kernel):
                return kernel.step(self, x.contiguous(), step, workspace)
        with torch.enable_grad(), self.share.agreed():
            return learned_from(self.losses(x, step))

    def restate(self, option: str, value: Any, *, within: float) -> bool:
        """Become one whose ``option`` is ``value`` and that gives the same outputs, if there is such a one: True.

        It is asked of options with :data:`saekit.config.SAME_AT_START`, where training starts from saved weights.
        ``within`` is how much, relative to itself, a number may be off by rounding.
        """
        return False

    # ---- saving and loading

    def public_config(self) -> dict[str, Any]:
        """The entries of ``cfg.json`` that name this architecture to other libraries; ``metadata`` goes into its own.
        What they cannot represent must not have a name that they know: of a subclass with other features or outputs
        it is the key, unless that states its entries anew.
        """
        return {"architecture": self.info.architecture}

    def saved_options(self) -> dict[str, Any]:
        """The options by which :meth:`public_tensors` are to be understood when saekit loads them."""
        return dict(self.info.options)

    def public_tensors(self) -> dict[str, Tensor]:
        """The tensors of ``sae_weights.safetensors``, contiguous, on the CPU: parameters, and buffers too.

        A scaling factor is part of ``W_dec`` there: other readers know none.
        """
        return self.table.folded({name: value.detach().cpu().contiguous() for name, value in tensors_of(self).items()})

    @torch.no_grad()
    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` in; :class:`SAEFormatError` names what is missing, unknown or of another shape.

        A ``scaling_factor`` among them becomes the SAE's; without one, it has none or factors of 1.
        """
        self.table.load(self, tensors, self.info.architecture)

    def check_state(self) -> None:
        """:class:`SAEFormatError` for state that could not be saved: better said before training than after it."""
        found = {name: value for name, value in tensors_of(self).items() if not value.is_floating_point()}
        if found and type(self).public_tensors is not SAEModule.public_tensors:  # it may save something in their place
            saved = self.public_tensors()
            found = {name: saved[name] for name in found if name in saved and not saved[name].is_floating_point()}
        if odd := [f"{name} ({value.dtype})" for name, value in found.items()]:
            raise SAEFormatError(
                f"{type(self).__name__} has buffers that could not be loaded again: {', '.join(odd)}. Keep them in "
                "floating-point numbers, register them with persistent=False, or override public_tensors and "
                "load_public_tensors"
            )

    @property
    def saved_as_it_is(self) -> bool:
        """Whether :meth:`public_tensors` are the very tensors that it has, all of them and nothing else."""
        own = type(self).public_tensors is SAEModule.public_tensors
        return own and all(getattr(self, entry.name) is None for entry in self.table if entry.optional)

    __repr__ = in_one_line
    _repr_html_ = in_a_table


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()
