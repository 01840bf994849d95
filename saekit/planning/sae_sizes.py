"""What one SAE of a run takes, counted from its shapes."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from saekit.config import SAEConfig, TrainConfig
from saekit.devices import resolve_device
from saekit.distributed.costs import Job, Mesh
from saekit.distributed.world import World
from saekit.errors import ConfigError
from saekit.evals.forwards import logit_contexts
from saekit.kinds import EVALS, SAE_ARCHITECTURES
from saekit.planning.members import PlannedMember
from saekit.planning.memory import eval_bytes
from saekit.planning.mesh import advice
from saekit.planning.step_costs import job_of
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.parts import moment_bytes, updates_numbers
from saekit.runs.spreading import spread
from saekit.runs.transforms import estimator_of
from saekit.sae.build import build_module
from saekit.sae.init import starts_by_parts
from saekit.sae.module import SAEModule

__all__ = ["SAESizes", "device_of", "devices_of", "eval_prompts", "site_facts", "training_device"]

_PROMPTS = 16  # contexts in one forward of an eval that does not say how many it takes


@attrs.frozen(kw_only=True)
class SAESizes:
    """Of one SAE; of many processes, what one of them has of it."""

    d_in: int
    d_out: int
    d_sae: int
    parameters: int
    saved: int
    """Bytes of its folder."""
    weights: int
    """Bytes of the weights in training."""
    kept: int | None
    """Bytes that the optimizer keeps; None: that is not known."""
    written: int
    """Bytes that all processes write of it to a checkpoint."""
    whole: int
    """Of an SAE whose features are split, what evals gather."""
    copied: int
    """What evals have of one beside that which trains, where that is not as it is saved."""
    drawn: int
    """Likewise, what its start draws."""
    step: int
    """Bytes that a step takes beside what is kept."""
    features: int
    """Bytes that evals take for its features."""
    job: Job
    advice: str
    """Which mesh is best, in words; empty: there is nothing to say."""

    @property
    def trained(self) -> int:
        """Bytes of the weights, their gradients and what the optimizer keeps."""
        return 2 * self.weights + (self.kept or 0)

    @property
    def state(self) -> int:
        """What a checkpoint has of it."""
        return self.weights + (self.kept or 0)

    @property
    def doubts(self) -> list[str]:
        """What looks wrong with it, in words."""
        found = []
        if self.d_sae < self.d_in:
            found.append(f"the SAE has fewer features ({self.d_sae}) than its input has dimensions ({self.d_in})")
        if self.kept is None:
            found.append("what the optimizer keeps is not known, and left out of memory and disk")
        return found

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.d_sae:,} features, {self.parameters:,} parameters"

    @classmethod
    def of(
        cls,
        member: PlannedMember,
        plugins: PluginManager,
        world: World,
        backend: ModelBackend,
        context_size: int,
        free: Mapping[str, float],
        *,
        shares: bool,
    ) -> SAESizes:
        """``free``: bytes on each device, for advice; ``shares``: whether processes have rows of each other."""
        assert member.ports is not None
        config, options = member.config, member.options
        # Memory is taken as it is written to, so this takes none.
        sae = build_module(plugins.find(SAE_ARCHITECTURES, config.sae), options, member.ports, plugins)
        d_sae, parameters = sae.d_sae, sae.table.count()
        weights, saved = _weights(sae, options.dtype)
        whole = weights if world.features.size > 1 else 0
        as_saved = weights == saved and estimator_of(config, plugins) is None
        drawn = whole if options.decoder_orthogonal_init or not starts_by_parts(sae.table) else 0
        kept = written = moment_bytes(config, plugins, sae)  # written by all processes with the same features
        mesh, device = Mesh(world.data.size, world.features.size), training_device(member)
        by_numbers = kept is not None and updates_numbers(config, plugins, sae)
        job = job_of(sae, config.training, device, kept, mesh=mesh, gathers_rows=shares, elementwise=by_numbers)
        advised = advice(sae, job, mesh, free.get(device), device)
        if (column := world.column).size > 1:  # from here on, what one process has
            sae.to("meta")
            spread(sae, column)
            weights, written = _weights(sae, options.dtype)[0], kept and moment_bytes(config, plugins, sae)
            kept = kept and moment_bytes(config, plugins, sae, column.data)
        rows = eval_prompts(config, plugins, backend, context_size) * context_size
        return cls(
            d_in=member.ports.d_in,
            d_out=member.ports.d_out,
            d_sae=d_sae,
            parameters=parameters,
            saved=saved + 4 * d_sae,
            weights=weights,
            kept=kept,
            written=world.features.size * (weights + (written or 0)),
            whole=whole,
            copied=0 if as_saved or whole else saved,
            drawn=drawn,
            step=int(job.step_bytes(mesh)),
            features=eval_bytes(sae, rows),
            job=job,
            advice=advised,
        )


def _weights(sae: SAEModule, dtype: str) -> tuple[int, int]:
    """The bytes of the weights of ``sae``, in training and as they are saved."""
    chosen = getattr(torch, dtype)
    saved = sae.table.count(lambda entry: entry.dtype(chosen).itemsize)
    return max(saved, sae.table.count() * torch.float32.itemsize), saved  # bfloat16 trains in float32


def site_facts(member: PlannedMember, model: str) -> dict[str, str]:
    """What is read and written, and how wide it is, in words."""
    ports = member.ports
    assert ports is not None
    inputs, targets = (
        ", ".join(f"{name} of {model}, width {width}" for name, width in widths.items())
        for widths in (ports.inputs, ports.targets)
    )
    if ports.same:
        return {"site" if len(ports.inputs) == 1 else "sites": inputs}
    return {"inputs": inputs, "targets": targets}


def eval_prompts(config: TrainConfig, plugins: PluginManager, backend: ModelBackend, context_size: int) -> int:
    """Contexts in the largest forward of evals."""
    measured = [
        getattr(plugins.options(EVALS, choice), "batch_size_prompts", _PROMPTS)
        for choice in config.evals.run
        if plugins.find(EVALS, choice).entry.needs_text
    ]
    most = logit_contexts(backend, context_size, device_of(config.model.device, config.model.dtype))
    return min(max(measured, default=0), config.evals.n_contexts, most)


def training_device(member: PlannedMember) -> str:
    """Where it trains."""
    return device_of(member.config.training.device, member.options.dtype)


def device_of(asked: str, dtype: str) -> str:
    """``asked`` as it is on this machine, or would be on one that has it."""
    try:
        return resolve_device(asked, "", dtype)
    except ConfigError:
        return asked


def devices_of(config: TrainConfig, options: SAEConfig) -> list[str]:
    """Where the model, the SAE and what is written to checkpoints are."""
    asked = (
        device_of(config.model.device, config.model.dtype),
        device_of(config.training.device, options.dtype),
        "cpu",
    )
    return list(dict.fromkeys(asked))
