"""Activation source ``toy``: hidden activations of a toy model, whose true features are known.  No language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from saekit import Batch, ConfigError, DataError, Entry, Site, hookimpl
from saekit.config import path_field
from saekit.toy import ToyConfig

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.config import TrainConfig
    from saekit.data import StreamContext
    from saekit.toy import ToyModel

_SHOWN = 4096  # rows, for what is estimated before training
_OF_TRAINING = (
    "importance", "loss", "steps", "batch_size", "lr", "lr_schedule", "lr_warm_up_steps", "lr_decay_steps", "beta1",
    "beta2",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class ToySourceConfig(ToyConfig):
    """Hidden activations of a toy model of superposition: a saved one, or one that is trained as the run opens."""

    path: str | None = path_field(None)
    """A toy model that `saekit.toy.ToyModel.save` wrote; it knows the other options, which are left out then."""
    directions: Literal["learned", "random"] = "learned"
    """`learned`: those of the toy model that these options train; `random`: unit vectors, without training."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.path is not None:
            self._refuse(
                [field.name for field in attrs.fields(type(self)) if field.name != "path"],
                f"is an option of a toy model that is made here, and activations.source.path names one, {self.path}; "
                "leave one of the two out",
            )
        if self.directions == "random":
            self._refuse(_OF_TRAINING, "is about training, and directions = 'random' trains none; leave it out")

    def _refuse(self, names: Iterable[str], why: str) -> None:
        fields = attrs.fields_dict(type(self))
        if problems := [(name, why) for name in names if getattr(self, name) != fields[name].default]:
            raise ConfigError(problems)

    @property
    def toy(self) -> ToyConfig:
        """The options of the toy model alone."""
        return ToyConfig(**{field.name: getattr(self, field.name) for field in attrs.fields(ToyConfig)})


class ToySource:
    """Batches of hidden activations, each row drawn anew, without an end."""

    shares_rows = True

    def __init__(self, config: ToySourceConfig, stream: StreamContext) -> None:
        import torch

        self._site = _only(stream.sites)
        self._batch_size, self._part = stream.batch_size, (stream.process, stream.processes)
        self.model = _model(config)
        """The toy model, with the true directions."""
        self._generator = torch.Generator().manual_seed(stream.seed)

    @property
    def widths(self) -> Mapping[Site, int]:
        """That of the hidden layer."""
        return {self._site: self.model.config.n_hidden}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        number, parts = self._part  # all draw all rows, which cost little, so that they are those of one process
        own = self._batch_size // parts
        return Batch({self._site: self._rows(self._batch_size)[number * own : (number + 1) * own]})

    def peek(self) -> Mapping[Site, Tensor]:
        state = self._generator.get_state()
        rows = self._rows(max(self._batch_size, _SHOWN))
        self._generator.set_state(state)
        return {self._site: rows}

    def _rows(self, n: int) -> Tensor:
        return self.model.hidden(self.model.draw(n, self._generator)).detach()

    def state_dict(self) -> dict[str, Any]:
        """The weights, too: trained anew on another machine, they would differ in the last digits."""
        return {"generator": self._generator.get_state(), "W": self.model.W.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["W"].shape != self.model.W.shape:
            raise DataError(
                f"the run went on from a toy model with weights of shape {list(state['W'].shape)}, and this one has "
                f"{list(self.model.W.shape)}; use the toy model that the run began with (activations.source)"
            )
        self.model.W.data.copy_(state["W"])
        self._generator.set_state(state["generator"])

    def recipe_size(self) -> tuple[int, int]:
        """Rows are drawn."""
        return 0, 0

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.load_state_dict(states[0])  # all draw the same

    def close(self) -> None:
        """Nothing is held open."""


def _only(sites: tuple[Site, ...]) -> Site:
    """The one site, which stands for the hidden layer, whatever it is called."""
    site, *others = sites
    if others or site.hook_head_index is not None:
        names = ", ".join(site.name for site in sites)
        raise ConfigError(
            [("activations.source", "is 'toy', and a toy model has one hidden layer and no heads, so it has "
              f"activations for one site; here {names} are wanted")]
        )  # fmt: skip
    return site


def _model(config: ToySourceConfig) -> ToyModel:
    from saekit.toy import ToyModel, train_toy_model

    if config.path is not None:
        return ToyModel.load(config.path)
    return train_toy_model(config.toy).model if config.directions == "learned" else ToyModel.random(config.toy)


def _precheck(config: ToySourceConfig, whole: TrainConfig) -> None:
    """A run with a language model would measure an SAE of toy activations inside it."""
    if not whole.model.backend.item.entry.no_model:
        raise ConfigError(
            [("model.backend", f"is '{whole.model.backend.key}', and activations.source is 'toy', whose activations "
              "are no language model's; set model.backend=none, and evals.run=[]")]
        )  # fmt: skip


@hookimpl
def saekit_register_activation_sources() -> Iterable[Entry]:
    summary = "hidden activations of a toy model of superposition, whose features are known"
    yield Entry("toy", ToySourceConfig, ToySource, summary=summary, precheck=_precheck, needs_text=False)
