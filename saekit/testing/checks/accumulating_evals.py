"""What an eval that accumulates promises beside."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from saekit.abilities import Accumulates, SharesContexts
from saekit.measuring import Evaluation, Needs
from saekit.testing.backend import FakeBackend
from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.measured_saes import ONE, built_for, some_contexts, some_sae
from saekit.testing.checks.numbers import must_be_equal
from saekit.testing.checks.two_processes import DATA, on_two

if TYPE_CHECKING:
    from saekit.distributed import World
    from saekit.sae import SAEModule

CHECKS = Checks()
_CLOSE = 1e-4  # relative; a forward of fewer contexts may round otherwise
_PARTS = (slice(0, 1), slice(1, 4), slice(4, 6))


def _accumulating(subject: Subject) -> Any:
    measure = built_for(subject)
    if not isinstance(measure, Accumulates):
        raise NotTried("it does not accumulate")
    must(isinstance(measure.needs, Needs), f"its needs are {measure.needs!r}, expected saekit.measuring.Needs")
    return measure


def _sums(
    measure: Any, saes: Sequence[SAEModule], part: slice = slice(0, 6), outline: SAEModule | None = None
) -> list[Any]:
    """Of each SAE, over a part of the contexts; begun with ``outline``, if that is given."""
    from saekit.evals.engine import measure as passed
    from saekit.evals.means import read_means
    from saekit.evals.measured import Measured

    backend, contexts = FakeBackend(), some_contexts()
    subjects = [attrs.evolve(Measured.of(sae, ONE, {"it": measure}, backend), outline=outline) for sae in saes]
    means = read_means(subjects, backend=backend, contexts=contexts)
    found = passed(subjects, backend=backend, contexts=contexts[part], first=part.start, means=means)
    return [sums["it"] for sums in found]


def _numbers(measure: Any, sums: Any) -> dict[str, float]:
    found = measure.result(sums)
    must(isinstance(found, Evaluation), f"its result is {type(found).__name__}, expected saekit.measuring.Evaluation")
    return dict(found.numbers())


def _must_be_near(what: str, found: dict[str, float], expected: dict[str, float]) -> None:
    must_be_equal(f"the names of {what}", sorted(found), sorted(expected))
    for name, value in expected.items():
        near = value != value or abs(found[name] - value) <= _CLOSE * max(abs(value), 1e-2)
        must(near, f"{what}, {name}: found {found[name]:g}, expected {value:g}")


@CHECKS.add
def merge_in_any_order(subject: Subject) -> None:
    """The sums of parts may be merged in any order: the numbers are the same to the last bit."""
    measure, sae = _accumulating(subject), some_sae(subject)
    parts = [_sums(measure, [sae], part)[0] for part in _PARTS]
    merge = measure.merge
    first = _numbers(measure, merge(merge(parts[0], parts[1]), parts[2]))
    for one, two, three in itertools.permutations(parts):
        must_be_equal("the numbers of parts in another order", _numbers(measure, merge(merge(one, two), three)), first)
        must_be_equal("the numbers of parts in another order", _numbers(measure, merge(one, merge(two, three))), first)


@CHECKS.add
def parts_are_the_whole(subject: Subject) -> None:
    """What is merged of parts are the numbers of one pass, but for rounding."""
    measure, sae = _accumulating(subject), some_sae(subject)
    one, two, three = (_sums(measure, [sae], part)[0] for part in _PARTS)
    merged = _numbers(measure, measure.merge(one, measure.merge(two, three)))
    _must_be_near("the numbers of parts", merged, _numbers(measure, _sums(measure, [sae])[0]))


@CHECKS.add
def two_processes(subject: Subject) -> None:
    """Sums can be told to another process: what two make of half of the contexts each is, merged, that of one pass."""
    measure, sae = _accumulating(subject), some_sae(subject)

    def merged(world: World) -> dict[str, float]:
        own = _sums(measure, [sae], (slice(0, 4), slice(4, 6))[world.rank])[0]
        return _numbers(measure, measure.merge(*world.all.objects(own)))

    whole = _numbers(measure, _sums(measure, [sae])[0])
    for number, found in enumerate(on_two({DATA: merged}, subject.place)[DATA]):
        _must_be_near(f"the numbers of two processes, in process {number}", found, whole)


@CHECKS.add
def several_in_one_pass(subject: Subject) -> None:
    """SAEs that are measured together have the numbers that each has alone."""
    measure = _accumulating(subject)
    saes = [some_sae(subject), some_sae(subject, d_sae=40, seed=1)]
    together = [_numbers(measure, sums) for sums in _sums(measure, saes)]
    for sae, found in zip(saes, together, strict=True):
        _must_be_near("the numbers of an SAE beside another", found, _numbers(measure, _sums(measure, [sae])[0]))


@CHECKS.add
def called_alone(subject: Subject) -> None:
    """Called as an eval that does not accumulate, it gives the same numbers."""
    from saekit.evals.calling import called

    measure, sae = _accumulating(subject), some_sae(subject)
    alone = called(measure, sae, backend=FakeBackend(), sites=ONE, contexts=some_contexts())
    _must_be_near("the numbers of a call", dict(alone), _numbers(measure, _sums(measure, [sae])[0]))


@CHECKS.add
def dealt_out(subject: Subject) -> None:
    """Where its contexts are dealt out over processes: sums travel as pickles, and begin without the SAE's weights."""
    from saekit.sae.splitting import outline_of

    measure, sae = _accumulating(subject), some_sae(subject)
    if not (isinstance(measure, SharesContexts) and measure.shares_contexts):
        raise NotTried("it does not say that its contexts can be dealt out")
    own = [_sums(measure, [sae], part)[0] for part in _PARTS]
    begun = [_sums(measure, [sae], part, outline_of(sae))[0] for part in _PARTS]
    first, *others = (pickle.loads(pickle.dumps(sums)) for sums in begun)
    for other in others:
        first = measure.merge(first, other)
    expected = _numbers(measure, measure.merge(measure.merge(own[0], own[1]), own[2]))
    must_be_equal("the numbers of sums that travelled", _numbers(measure, first), expected)
