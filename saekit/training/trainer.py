"""One SAE in training: everything about it that changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from saekit.config import TrainingConfig
from saekit.devices import at_hand, rows_on
from saekit.distributed.share import Share
from saekit.distributed.world import ALONE, World
from saekit.errors import ConfigError, DivergedError, StorageError
from saekit.kernels.private_torch import is_of_compiler
from saekit.precision import check_precision, in_words, products
from saekit.protocols import ModelBackend
from saekit.sae.casting import copied
from saekit.sae.module import SAEModule
from saekit.sae.parameters import Factor, factors_of
from saekit.sae.probe import MOST_ROWS
from saekit.sae.splitting import gathered
from saekit.sae.transforms import SiteMaps
from saekit.site import Sites
from saekit.training.firing import FiringStatistics
from saekit.training.metrics import step_metrics, window_metrics
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.reported import Unwritten, check_reported
from saekit.training.together import check_names, of_whole_batch, with_exchange
from saekit.values import Batch, Histogram, Scale, StepInput, StepOutput

__all__ = ["SAETrainer"]


@attrs.define
class SAETrainer:
    """An SAE with its optimizer, firing statistics and random numbers.  It knows nothing of where batches come from."""

    name: str
    """Told apart by this among those that are trained together."""
    sae: SAEModule
    sites: Sites
    """Those that it reads and writes, in the order of :attr:`saekit.sae.SAEModule.ports`."""
    optimizer: ScheduledOptimizer
    firing: FiringStatistics
    generator: torch.Generator
    device: str
    training: TrainingConfig
    scale: Scale = 1.0
    """Activations are multiplied by this before the SAE sees them: the number of its one site, or of several that of
    each by its name."""
    maps: SiteMaps | None = None
    """The affine maps that activations go through before the SAE sees them, where there are any."""
    backend: ModelBackend | None = None
    """The run's model, for steps that want it."""
    step: int = 0
    tokens: int = 0
    diverged: str | None = None
    """Why it was stopped, if its loss is no longer a number."""
    world: World = ALONE
    """The processes that train it together."""
    watched: Callable[[str], AbstractContextManager[None]] = lambda doing: nullcontext()
    """Around each call of the SAE's own code, to say whose it is where it fails."""
    turns: AbstractContextManager[object] = attrs.field(factory=lambda: nullcontext())
    """Held by whoever else multiplies meanwhile, where steps have a precision of their own, which is the process's."""
    _finetuning: bool = attrs.field(default=False, init=False)
    _looked_at: bool = attrs.field(default=False, init=False)
    """Whether what the first step reported was looked at: it is as it should be, and all processes give losses and
    metrics of the same names."""
    _factors: tuple[Scale, tuple[Factor, Factor]] | None = attrs.field(default=None, init=False)
    """The scale, and what is made of it."""
    _recent: Tensor | None = attrs.field(default=None, init=False)
    """A few rows of the last batch, as they are, by which the SAE that is saved can be known again."""
    _sound_until: int = attrs.field(default=0, init=False)
    """The last step of which it is known that all was finite."""

    def __attrs_post_init__(self) -> None:
        for entry in self.sae.table:
            if entry.optional and (factor := getattr(self.sae, entry.name)) is not None:
                factor.requires_grad_(False)  # until fine-tuning begins

    def checked(self) -> Self:
        """Itself; :class:`ConfigError` where it cannot train in the way that was asked for."""
        if self.training.kernels in ("fast", "int8") and (reason := self.why_reference()) is not None:
            raise ConfigError(
                [("training.kernels", f"is '{self.training.kernels}', but there is no fast way to train this SAE: "
                  f"{reason}. Choose 'auto', which takes it where there is one")]
            )  # fmt: skip
        other = None
        if self.rounds_products:
            other = "products are in bfloat16 here (training.autocast, or sae.dtype)"
        elif self.sae.dtype != torch.float32:
            other = f"products are in {str(self.sae.dtype).removeprefix('torch.')} here (sae.dtype)"
        check_precision(self.training.matmul_precision, torch.device(self.device), other)
        return self

    def in_turns(self, turns: AbstractContextManager[object]) -> Self:
        """Itself, whose steps hold ``turns`` where they must: see :attr:`turns`."""
        self.turns = turns
        return self

    @property
    def finished(self) -> bool:
        """Whether it has seen all the tokens that it is to see, or diverged."""
        return self.tokens >= self.training.total_tokens or self.diverged is not None

    @property
    def d_sae(self) -> int:
        """Features of the whole SAE, those of other processes included."""
        return self.sae.d_sae * self.sae.share.parts

    @property
    def as_saved(self) -> bool:
        """Whether the SAE that trains is the one that is saved: its activations are not scaled, and its dtype is that.

        An SAE in bfloat16 trains in float32, with its products in bfloat16, as under autocast: in bfloat16 itself,
        most updates are too small to change a weight or a moment.
        """
        return not self.scaled and self.maps is None and self.sae.dtype == getattr(torch, self.sae.config.dtype)

    @property
    def scaled(self) -> bool:
        """Whether activations are multiplied by anything but 1."""
        scale = self.scale
        return any(factor != 1 for factor in scale.values()) if isinstance(scale, Mapping) else scale != 1

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """What inputs and targets are multiplied by: a number, or ``[d_in]`` and ``[d_out]``."""
        if self._factors is None or self._factors[0] is not self.scale:
            self._factors = self.scale, factors_of(self.scale, self.sae.ports, self.sae.dtype, self.device)
        return self._factors[1]

    @property
    def rounds_products(self) -> bool:
        """Whether products are made in bfloat16."""
        return self.training.autocast or (self.sae.config.dtype == "bfloat16" and self.training.kernels != "fast")

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``[n, d_in]`` of its inputs and ``[n, d_out]`` of its targets; None: they are the same.

        Of one site they are the batch's own, of several side by side in new memory.
        """
        return batch.rows_at(self.sites.inputs), None if self.sites.same else batch.rows_at(self.sites.targets)

    def train_on(
        self, rows: Tensor, target: Tensor | None = None, batch: Batch | None = None
    ) -> dict[str, float | Histogram]:
        """One step on ``rows [n, d_in]``, of ``batch``, towards ``target [n, d_out]``, or the rows themselves.

        Metrics when it is time to log or this was the last step, else nothing.

        :class:`DivergedError` when the loss or its gradient is not finite, which is looked at when metrics are made,
        and at every step where looking costs nothing.  Weights are then those before that step.
        """
        self._begin_finetuning_if_due()
        self._recent = rows[:MOST_ROWS].clone()  # the batch's memory is used again
        x = rows_on(self.device, rows, self.sae.dtype)
        y = None if target is None else rows_on(self.device, target, self.sae.dtype)
        if self.scaled:
            read, written = self.factors
            x, y = x * read, None if y is None else y * written
        wanted = x if y is None else y  # in the units of activations
        if self.maps is not None:
            x, y = self._mapped(x, y)
        share = self.world.share(() if batch is None else batch.counts)
        share = self.sae.share = with_exchange(share, self.sae, self.optimizer.parted)
        due = (self.step + 1) % self.training.log_frequency == 0
        given = Unwritten(x=(x, rows), target=(y, target)) if due or not self._looked_at else None
        with self.watched("training_step"), products(self.training.matmul_precision, self.turns):
            result = self._gradients(x, y, batch)
        if given is not None:
            given.check(self.sae)
        if not self._looked_at:
            with self.watched("training_step"):
                check_reported(self.sae, result, len(x))
                check_names(share, result, self.sae)
            self._looked_at = True
        look = due or at_hand(x.device)
        result, factor = of_whole_batch(self.sae, share, result, len(x), self.optimizer.parted, look=look)
        with self.watched("before_update"):
            self.sae.before_update()
        grad_norm = self.optimizer.step(self.step, result.loss, factor)
        self.step += 1
        self.tokens += (n := share.n(len(x)))

        log = self.step % self.training.log_frequency == 0 or self.step == 1 or self.finished
        if log or self.optimizer.looks:
            self._check_finite(result.loss, grad_norm, x)
        with self.watched("after_update"):
            self.sae.after_update()
        self.sae.share = self.world.share()  # until the next step, nothing depends on a batch
        window_ended = self.firing.update(result.fired, n)
        metrics = self._metrics(wanted, result, grad_norm, share) if log else {}
        if window_ended and self.firing.last_fractions is not None:
            metrics |= window_metrics(share.all_features(self.firing.last_fractions))
        return metrics

    def _metrics(
        self, target: Tensor, result: StepOutput, grad_norm: Tensor, share: Share
    ) -> dict[str, float | Histogram]:
        """Those of the step that was just made towards ``target``, in the units of activations."""
        check_reported(self.sae, result, len(target))  # names may have come since the first step
        if self.maps is not None:
            result = result._replace(output=self.maps.undone(result.output, self.sae.ports.targets))
        return {
            **step_metrics(
                target,
                result,
                since_fired=self.firing.since_fired,
                dead=self.firing.dead(),
                lr=self.optimizer.lr,
                grad_norm=grad_norm,
                tokens=self.tokens,
                ports=self.sae.ports,
                share=share,
            )
        }

    def _mapped(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Inputs, and targets if they are others, by the maps of their sites."""
        assert self.maps is not None
        ports = self.sae.ports
        return self.maps.transformed(x, ports.inputs), None if target is None else self.maps.transformed(
            target, ports.targets
        )

    def _gradients(self, x: Tensor, target: Tensor | None, batch: Batch | None) -> StepOutput:
        dead: Tensor | None = self.firing.dead()
        if not at_hand(x.device) and not self.firing.may_have_dead(self.step):
            dead = None  # none can be; and to look would be to wait for the device
        step = StepInput(
            step=self.step,
            generator=self.generator,
            dead=dead,
            steps=self.training.steps,
            target=target,
            batch=batch,
            backend=self.backend,
        )
        with self._rounding(x.device):
            if not self.training.compile:
                return self.sae.training_step(x, step)
            try:
                return self.sae.training_step(x, step)
            except Exception as error:
                if not is_of_compiler(error):
                    raise
                reason = " ".join(str(error).strip().splitlines()[:2])  # the first may only say which compiler it was
                raise ConfigError(
                    [("training.compile", f"the SAE's step cannot be compiled here: {reason}")]
                ) from error

    def _rounding(self, device: torch.device) -> torch.autocast:
        """What steps are made in: autocast, where products are rounded.

        Torch would keep rounded weights until the autocast ends, but for the whole process: whenever another thread
        leaves an autocast, as a forward of the model does, they are gone.  A gradient of weights that a step uses twice
        (AuxK's decoder) is added up in bfloat16 where they were kept and in float32 where not, so none are kept.
        """
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.rounds_products, cache_enabled=False)

    def step_path(self) -> str:
        """How its steps are made, in words."""
        precision, device = self.training.matmul_precision, torch.device(self.device)
        with (
            products(precision, self.turns),
            self._rounding(device),
        ):
            path = self.sae.step_path()
            words = in_words(precision, device, fast=self.sae.why_reference() is None)
        return path if words is None else f"{path}; {words}"

    def why_reference(self) -> str | None:
        """Why its steps take the way of autograd; None: they take the fast one."""
        with (
            products(self.training.matmul_precision, self.turns),
            self._rounding(torch.device(self.device)),
        ):
            return self.sae.why_reference()

    def _begin_finetuning_if_due(self) -> None:
        method = self.training.finetuning_method
        if method is not None and not self._finetuning and self.tokens >= self.training.training_tokens:
            self.sae.learn_only(self.sae.table.trained_by(method))
            self._finetuning = True

    def _check_finite(self, loss: Tensor, grad_norm: Tensor, x: Tensor) -> None:
        if not self.optimizer.failed:
            self._sound_until = self.step
            return
        found, norm = loss.item(), grad_norm.item()
        if not math.isfinite(found):
            what = f"the loss of {self.sites.name} is {found} at step {self.step}"
        elif not math.isfinite(norm):
            what = f"the gradient of {self.sites.name} is not finite at step {self.step}, where the loss is {found:.4g}"
        else:  # on a device that is not asked at every step
            what = (
                f"the loss or gradient of {self.sites.name} was not finite at a step after {self._sound_until} and "
                f"before {self.step}, and no step was made since"
            )
        share = self.sae.share  # what follows is of the whole batch, so that every process says the same
        mean, most = share.mean(x.norm(dim=-1)).item(), max(map(float, share.rows.gather(x.abs().max())))
        raise DivergedError(
            f"{what} (learning rate {self.optimizer.lr:g}, {share.n(len(x))} activations of mean norm {mean:.4g} and "
            f"largest value {most:.4g}, gradient norm {norm:.4g}). Lower training.lr, or add training.lr_warm_up_steps"
        )

    @torch.no_grad()
    def check_weights(self) -> None:
        """:class:`DivergedError` when a weight is not finite, or a step was left out: this is not worth saving."""
        for name, value in self.sae.named_parameters():
            finite = value.sum().isfinite()  # only if all its numbers are; only if it is not, each is looked at
            if not bool(finite):
                finite = value.isfinite().all()
            if not bool(torch.stack(self.world.all.gather(finite)).all()):  # all agree
                raise DivergedError(
                    f"{name} of the SAE at {self.sites.name} holds numbers that are not finite after step {self.step} "
                    f"(learning rate {self.optimizer.lr:g}). Lower training.lr, or add training.lr_warm_up_steps"
                )
        if self.optimizer.failed:
            raise DivergedError(
                f"the loss or gradient of {self.sites.name} was not finite at a step after {self._sound_until} and up "
                f"to {self.step} (learning rate {self.optimizer.lr:g}). Lower training.lr, or add "
                "training.lr_warm_up_steps"
            )

    def raw_sae(self) -> SAEModule:
        """The SAE for raw activations, with its firing fractions: to measure, and to go on with.

        Of one whose features are split, every process of the group must ask, and has it whole.  It is the SAE itself,
        or a copy with the scale folded in, in the dtype of its options: see :attr:`as_saved`.
        """
        return self._raw(gathered(self.sae) if self.sae.share.parts > 1 else self.sae)

    def raw_part(self) -> SAEModule:
        """The same, with this process's part of the features alone: to save."""
        return self._raw(self.sae)

    def _raw(self, sae: SAEModule) -> SAEModule:
        if sae is self.sae and not self.as_saved:
            sae = copied(sae)
        if sae is not self.sae:
            if self.scaled:
                sae.fold_activation_scale(*self.factors)
            if self.maps is not None:
                sae.fold_affine(*self.maps.folds(sae.ports))
            sae.cast_weights(getattr(torch, sae.config.dtype))
        seen = {"training_tokens": self.tokens, "activation_scale": self.scale}
        sae.info = attrs.evolve(sae.info, metadata={**sae.info.metadata, **seen})
        sae.log_sparsity = self.sae.share.all_features(self.firing.log_sparsity()).cpu()
        sae.probe_rows = self._recent
        return sae

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.sae.named_parameters()), **dict(self.sae.named_buffers())}

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on with the very next step."""
        facts = {"step": self.step, "tokens": self.tokens, "scale": self.scale, "diverged": self.diverged}
        if self.diverged is not None:  # it does not go on
            return facts
        maps = {} if self.maps is None else {"maps": self.maps.state_dict()}
        parts = {
            "weights": {name: value.detach() for name, value in self._tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "firing": self.firing.state_dict(),
            "generator": self.generator.get_state(),
            "recent": self._recent,
        }
        return {**facts, **maps, **parts}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; :class:`StorageError` when it is of another SAE."""
        self.step, self.tokens, self.scale = state["step"], state["tokens"], state["scale"]
        self.diverged = state["diverged"]
        if self.diverged is not None:
            return
        self.maps = SiteMaps.of(state["maps"]) if "maps" in state else None
        own, saved = self._tensors(), state["weights"]
        shapes = {name: list(value.shape) for name, value in own.items()}
        found = {name: list(value.shape) for name, value in saved.items()}
        if shapes != found:
            raise StorageError(f"the checkpoint of {self.name} holds weights {found}, but this run's SAE has {shapes}")
        for name, value in own.items():
            value.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.firing.load_state_dict(state["firing"])
        self._recent = state.get("recent")
        if (rows := self._recent) is not None and list(rows.shape) != [min(len(rows), MOST_ROWS), self.sae.d_in]:
            raise StorageError(f"the checkpoint of {self.name} holds rows {list(rows.shape)} of {self.sae.d_in}")
        self._sound_until = self.step
        self.generator.set_state(state["generator"])
