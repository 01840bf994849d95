"""The kinds of plugin: one typed object each, from which hook, label and what is checked of what is built follow.

``manager.build(LR_SCHEDULES, choice, ...)`` is an :class:`saekit.protocols.LRSchedule`, to type checkers too.
Importing this imports no torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

import attrs

from saekit.errors import UnknownKeyError
from saekit.protocols import (
    ActivationFunction,
    ActivationSource,
    Dictionary,
    Eval,
    LRSchedule,
    ModelBackend,
    Optimizer,
    PretrainedLoader,
    ReleaseList,
    ServingKernel,
    Tracker,
)
from saekit.transforms import InputTransform

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "ACTIVATION_SOURCES",
    "EVALS",
    "INPUT_TRANSFORMS",
    "KINDS",
    "LR_SCHEDULES",
    "MODEL_BACKENDS",
    "OPTIMIZERS",
    "PRETRAINED_LOADERS",
    "RELEASES",
    "SAE_ARCHITECTURES",
    "STEP_KERNELS",
    "TRACKERS",
    "Kind",
    "kind_of",
]

_CALLED = ("__call__", "__iter__", "__next__")
T_co = TypeVar("T_co", covariant=True)


@attrs.frozen
class Kind(Generic[T_co]):
    """A kind of plugin, which builds ``T_co``."""

    name: str
    """As in ``saekit plugins`` and at the end of the hook's name: ``lr_schedules``."""
    label: str
    """What people call one of them: ``LR schedule``."""
    protocol: type
    """What is built keeps to it; its methods and values are looked for in what ``build`` returns."""
    numbers: tuple[str, ...] = ()
    """Values of the protocol that must be finite numbers."""

    @property
    def hook(self) -> str:
        """The name of the hook that registers them."""
        return f"saekit_register_{self.name}"

    @property
    def labels(self) -> str:
        """What people call several of them."""
        return f"{self.label}s"

    @property
    def one(self) -> str:
        """The label with its article."""
        return f"an {self.label}" if self.label.startswith(("LR", "SAE", "a", "e", "i", "o")) else f"a {self.label}"

    @property
    def methods(self) -> tuple[str, ...]:
        """What can be called on what is built."""
        return _members(self.protocol)[0]

    @property
    def values(self) -> tuple[str, ...]:
        """What else it must have."""
        return _members(self.protocol)[1]

    def is_met_by(self, found: object) -> TypeGuard[T_co]:
        """Whether ``found`` has all methods of what is built; their names are looked at, and no more."""
        return all(hasattr(found, name) for name in self.methods)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _members(protocol: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The methods, and the annotated values and properties, of a protocol, in the order in which it names them."""
    methods: list[str] = []
    values: list[str] = []
    for base in reversed(protocol.__mro__):
        if base not in (object, Protocol, Generic):
            public = {name: member for name, member in vars(base).items() if name in _CALLED or name[0] != "_"}
            methods += [name for name, member in public.items() if callable(member)]
            values += [*inspect.get_annotations(base)]
            values += [name for name, member in public.items() if isinstance(member, property)]
    return tuple(dict.fromkeys(methods)), tuple(dict.fromkeys(values))


MODEL_BACKENDS: Kind[ModelBackend] = Kind("model_backends", "model backend", ModelBackend)
ACTIVATION_FUNCTIONS: Kind[ActivationFunction] = Kind("activation_functions", "activation function", ActivationFunction)
PRETRAINED_LOADERS: Kind[PretrainedLoader] = Kind("pretrained_loaders", "pretrained loader", PretrainedLoader)
LR_SCHEDULES: Kind[LRSchedule] = Kind("lr_schedules", "LR schedule", LRSchedule, numbers=("end",))
SAE_ARCHITECTURES: Kind[Dictionary] = Kind("sae_architectures", "SAE architecture", Dictionary)
ACTIVATION_SOURCES: Kind[ActivationSource] = Kind("activation_sources", "activation source", ActivationSource)
TRACKERS: Kind[Tracker] = Kind("trackers", "tracker", Tracker)
EVALS: Kind[Eval] = Kind("evals", "eval", Eval)
OPTIMIZERS: Kind[Optimizer] = Kind("optimizers", "optimizer", Optimizer)
INPUT_TRANSFORMS: Kind[InputTransform] = Kind("input_transforms", "input transform", InputTransform)
RELEASES: Kind[ReleaseList] = Kind("releases", "release list", ReleaseList)
STEP_KERNELS: Kind[ServingKernel] = Kind("step_kernels", "step kernel", ServingKernel)

KINDS: Mapping[str, Kind[Any]] = {
    kind.name: kind
    for kind in (
        MODEL_BACKENDS,
        ACTIVATION_FUNCTIONS,
        PRETRAINED_LOADERS,
        LR_SCHEDULES,
        SAE_ARCHITECTURES,
        ACTIVATION_SOURCES,
        TRACKERS,
        EVALS,
        OPTIMIZERS,
        INPUT_TRANSFORMS,
        RELEASES,
        STEP_KERNELS,
    )
}
"""By name."""


def kind_of(kind: Kind[Any] | str) -> Kind[Any]:
    """The kind itself, or the one of that name; :class:`UnknownKeyError` when there is none."""
    known = kind if isinstance(kind, Kind) else KINDS.get(kind)
    if known is None:
        raise UnknownKeyError(f"there is no kind of plugin {kind!r}; the kinds are {', '.join(KINDS)}")
    return known
