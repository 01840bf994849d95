"""The lanes of a plan, as a run would open them: SAEs that train on the same batches, and what these come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from saekit.abilities import HasMemory, KeepsRecipe, SourceForwards, StatesForwards
from saekit.data import Corpus, StreamContext
from saekit.data.shared import SharedForwards
from saekit.data.stream import PROBED
from saekit.distributed.world import World
from saekit.planning.members import PlannedMember, longest_of
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.opening import open_source, open_stream, widths_of
from saekit.runs.supervised import SupervisedSource
from saekit.runs.sweep import lane_key
from saekit.runs.timing import bytes_text, duration_text
from saekit.site import Site

__all__ = ["LaneSizes", "PlannedLane", "held_bytes", "open_lanes", "reads", "recipe_seconds", "recipe_text"]


def reads(stream: StreamContext) -> bool:
    """Whether a source has opened the text."""
    return "contexts" in vars(stream) or "contexts" in vars(stream.own)


@attrs.define
class LaneSizes:
    """What batches come from."""

    source: SourceForwards = attrs.field(factory=SourceForwards)
    """How the source runs the model."""
    buffer: int = 0
    """Bytes of the rows that batches are drawn from."""
    waiting: int = 0
    """What a checkpoint has of them: those, or a recipe."""
    recipe: tuple[int, int] = (0, 0)
    """Bytes of a recipe, and the forwards that it takes; of none, both are 0."""


@attrs.define(eq=False)
class PlannedLane:
    """SAEs that train on the same batches."""

    members: Sequence[PlannedMember]
    stream: StreamContext
    context_size: int
    source: SupervisedSource | None = None
    """None: it could not be opened."""
    counted: LaneSizes = attrs.field(factory=LaneSizes)
    _reads: bool | None = attrs.field(default=None, init=False)

    def opened(self, plugins: PluginManager) -> SupervisedSource:
        """Its source, which the caller closes."""
        return open_source(self.longest.config, plugins, self.stream)

    def close(self) -> None:
        """Its source, where there is one."""
        if self.source is not None:
            self.source.close()

    def widths(self) -> Mapping[Site, int]:
        """Of its sites."""
        return self.stream.widths if self.source is None else widths_of(self.source, self.stream)

    @property
    def names(self) -> list[str]:
        """Of its SAEs."""
        return [member.name for member in self.members]

    @property
    def longest(self) -> PlannedMember:
        """The one that takes batches to the end."""
        return longest_of(self.members)

    @property
    def numbers(self) -> int:
        """In a batch, at all sites."""
        ports = [member.ports for member in self.members if member.ports is not None]
        widths = {name: width for own in ports for some in (own.inputs, own.targets) for name, width in some.items()}
        return self.stream.batch_size * sum(widths.values())

    @property
    def reads(self) -> bool:
        """Whether the model runs for it; a source that has not opened the text when it was opened does without it."""
        if self._reads is None:
            self._reads = self.source is None or reads(self.stream)
        return self._reads

    @property
    def rows_per_context(self) -> int:
        """That count, at most."""
        return self.stream.rows_per_context(self.context_size)

    @property
    def rows_per_forward(self) -> int:
        """Rows of one forward of the source, at most."""
        return self.counted.source.contexts * self.rows_per_context

    @property
    def forwards_at_once(self) -> int:
        """That its source makes before it waits: those that fill the buffer, and those that are made ahead."""
        source = self.counted.source
        return source.buffered + source.ahead * -(-self.stream.batch_size // max(self.rows_per_forward, 1))

    @property
    def forwards_alike(self) -> object:
        """The same for lanes that share forwards of the model."""
        return self.counted.source.contexts if self.reads else id(self)

    @property
    def timed_alike(self) -> object:
        """The same for lanes whose rows take as long."""
        if self.reads:
            tokens = self.longest.config.tokens
            return True, self.counted.source.contexts, self.rows_per_context, tokens if tokens.chooses else None
        # What is read is told by all that says where it is from, but for its order.
        config = self.longest.config
        widths = sorted(port for member in self.members if member.ports for port in member.ports.inputs.values())
        return False, self.stream.batch_size, repr(config.activations.source), (*self.stream.sites,), (*widths,)

    def count(self, processes: int) -> None:
        """Count its batches, each of which so many ``processes`` share."""
        source, self.counted = self.source, (counted := LaneSizes())
        if isinstance(source, StatesForwards):
            counted.source = source.source_forwards
        counted.buffer = counted.waiting = source.memory_bytes() if isinstance(source, HasMemory) else 0
        size, forwards = source.recipe_size() if isinstance(source, KeepsRecipe) else (0, 0)
        kept = self.longest.config.checkpoints
        if not forwards or not kept.keep_last:
            return
        # A short run does not come to as many.
        trained = self.longest.config.training.total_tokens // processes // self.rows_per_forward
        made = max(trained + counted.source.buffered, 1)
        counted.recipe = size * min(made, forwards) // forwards, min(made, forwards)
        if kept.buffer == "recipe":
            counted.waiting = counted.recipe[0]


def open_lanes(
    members: Sequence[PlannedMember],
    plugins: PluginManager,
    corpus: Corpus,
    backend: ModelBackend,
    world: World,
    doubt: Callable[[str, Sequence[str]], None],
) -> list[PlannedLane]:
    """A lane for all ``members`` that can train on the very same batches; their sources are still to be opened.

    Of several, forwards hold what each of them reads, as those do that a run shares among them; here they are not kept.
    ``doubt`` is told what looks wrong, and of which SAEs.
    """
    groups: dict[str, list[PlannedMember]] = {}
    for member in members:
        groups.setdefault(lane_key(member.config, plugins), []).append(member)
    shared = SharedForwards(backend, most_bytes=0) if len(groups) > 1 else None
    lanes: list[PlannedLane] = []
    for group in groups.values():
        sites = list(dict.fromkeys(site for member in group for site in member.config.sites.all))
        reader = None if shared is None else shared.reader({site.hook_name for site in sites})
        lane_names = [member.name for member in group]
        stream = open_stream(
            longest_of(group).config,
            corpus,
            plugins,
            reader or backend,
            sites,
            beside=lanes[0].stream if lanes else None,
            world=world,
            doubt=lambda text, names=lane_names: doubt(text, names),  # type: ignore[misc]
        )
        if reader is not None:
            reader.follow(lambda: 0)  # whoever is the first to take some tokens finds the others still to come
        lanes.append(PlannedLane(group, stream, corpus.context_size))
    return lanes


def held_bytes(lanes: Sequence[PlannedLane], backend: ModelBackend) -> int:
    """What hooks hold of one context for all of ``lanes``."""
    if not lanes:
        return 0
    hooks = {site.hook_name for lane in lanes for site in lane.stream.sites}
    tokens = torch.zeros(PROBED, dtype=torch.long)
    with lanes[0].stream.model_lock:
        held: Mapping[str, torch.Tensor] = backend.run(tokens, read=hooks).held
    return sum(value.nbytes for value in held.values()) * lanes[0].context_size // tokens.numel()


def recipe_text(
    lanes: Sequence[PlannedLane],
    *,
    chosen: bool,
    each: bool,
    per_forward: Callable[[PlannedLane], float] | None = None,
) -> str:
    """What checkpoints have of the rows of ``lanes``, or would have; empty where there is no choice.

    ``chosen``: whether they have recipes; ``each``: whether each of several processes has as much; ``per_forward``:
    seconds of a forward for a lane.
    """
    able = [lane for lane in lanes if lane.counted.recipe[1]]
    if not able:
        return ""
    rows, recipe = sum(lane.counted.buffer for lane in able), sum(lane.counted.recipe[0] for lane in able)
    choice = "as it is" if chosen else "with checkpoints.buffer=recipe"
    text = (
        f"{bytes_text(rows)}{' of each process' * each} as rows; about {bytes_text(recipe)} as a recipe ({choice}), "
        f"and about {sum(lane.counted.recipe[1] for lane in able):,} forwards to go on from it"
    )
    return text if per_forward is None else f"{text}, {duration_text(recipe_seconds(able, per_forward))}"


def recipe_seconds(lanes: Sequence[PlannedLane], per_forward: Callable[[PlannedLane], float]) -> float:
    """For which the model computes the rows of recipes again."""
    return sum(per_forward(lane) * lane.counted.recipe[1] for lane in lanes if lane.counted.recipe[1])
