"""SAEs, contexts and a run to try evals with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.defaults import DEFAULT_ARCHITECTURE
from saekit.kinds import SAE_ARCHITECTURES
from saekit.site import Site, Sites
from saekit.testing.backend import FakeBackend
from saekit.testing.checks.check import Subject
from saekit.testing.checks.numbers import seeded
from saekit.values import EvalRun, Ports

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEModule

__all__ = ["ONE", "SEVERAL", "TRANSCODER", "built_for", "some_contexts", "some_sae"]

EARLY, LATE = (Site(hook_name=f"blocks.{block}.hook_resid_post") for block in (0, 1))
HEAD = Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)  # of another width than those
ONE = Sites.one(EARLY)
TRANSCODER = Sites((HEAD,), (LATE,))
SEVERAL = Sites((EARLY, HEAD), (HEAD, LATE, EARLY))


def some_contexts() -> Tensor:
    """Token ids of the tiny language model."""
    import torch

    return torch.randint(1, 120, (6, 16), generator=seeded())


def some_sae(subject: Subject, sites: Sites = ONE, *, d_sae: int = 24, seed: int = 0) -> SAEModule:
    """One of the built-in architecture, at ``sites``."""
    import attrs

    from saekit.data.stream import probe
    from saekit.sae.build import build_module, initialize

    item = subject.plugins.get(SAE_ARCHITECTURES, DEFAULT_ARCHITECTURE)
    ports = Ports.of(sites, {site: width for site, (width, _) in probe(FakeBackend(), sites.all).items()})
    of_one = {} if sites.same else {"apply_b_dec_to_input": False, "init_encoder_as_decoder_transpose": False}
    sae = build_module(item, item.entry.config(d_sae=d_sae, **of_one), ports, subject.plugins)
    initialize(sae, seeded(seed))
    sae.info = attrs.evolve(sae.info, sites=sites)
    return sae


def built_for(subject: Subject, sites: Sites = ONE) -> Any:
    """The eval, for a run at ``sites``."""
    run = EvalRun(
        name="sae",
        backend=FakeBackend(),
        sites=sites,
        device="cpu",
        steps=10,
        seed=0,
        open_contexts=some_contexts,
    )
    return subject.build(run=run)
