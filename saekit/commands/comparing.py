"""``saekit.compare``: which of several SAEs is better, on the same contexts, with what the numbers can and cannot tell.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.cautions import warn
from saekit.commands.evaluating import ChosenTokens, asked_evals, check_arguments, checked_data, evaluated
from saekit.commands.material import Material, Text
from saekit.commands.subjects import Subject, subjects_of
from saekit.config import PluginChoice
from saekit.defaults import DEFAULT_EVALS
from saekit.errors import ConfigError, PlaceError, SaekitError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import printable
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.evals.comparison import Comparison
    from saekit.measuring import Evaluation
    from saekit.protocols import ModelBackend
    from saekit.tokens import Mask

__all__ = ["FILES", "compare"]

FILES = ("compare.json", "compare.png", "compare.html")
"""What is written."""
_MOST_VERDICTS = 16
_FACTS = ("dataset", "context_size", "held_out")


def compare(
    saes: object,
    *,
    out: str | Path | None = None,
    model: object | None = None,
    backend: PluginChoice | None = None,
    dataset: object | None = None,
    contexts: Tensor | None = None,
    n_contexts: int = 64,
    context_size: int | None = None,
    evals: Iterable[PluginChoice] = DEFAULT_EVALS,
    site: Site | Sites | str | None = None,
    exclude_special_tokens: bool | Sequence[int] | None = None,
    seqpos_slice: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    device: str = "auto",
    seed: int = 0,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **options: Any,
) -> Comparison:
    """How SAEs of one model differ on the same contexts, with intervals, and whether that can be told from chance.

    ``saes`` are two or more, as for :func:`saekit.evaluate`: a list, or a mapping of names.  They may be at different
    sites.  The other arguments are as there, too.

    Every two SAEs are compared in every number that has an error, by resampling the contexts of both together; of more
    than two, intervals are widened so that those of all pairs hold at once (:mod:`saekit.evals.comparing`).
    ``print(found)`` shows the numbers and the verdicts; with ``out``, a folder, ``compare.json``, ``compare.png`` and
    ``compare.html`` are written into it: the numbers, and each SAE as a named point over L0 with its intervals.

    :class:`ConfigError` for SAEs that were not trained on one model, whose texts or contexts differ, or of which other
    tokens count, where no argument says it for all.
    """
    plugins = plugins or default_manager()
    chosen = asked_evals(evals, options, plugins)
    choice = check_arguments(n_contexts, contexts, exclude_special_tokens, seqpos_slice, mask, least=2)
    contexts, mask = checked_data(contexts, mask)
    folder = None if out is None else _folder(out)
    from saekit.devices import resolve_device
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAEs")
        found = _named(subjects_of(saes, plugins, device=resolve_device(device, "device")))
        text = Text(
            dataset=dataset, contexts=contexts, n_contexts=n_contexts, context_size=context_size, seed=seed, mask=mask
        )
        material = Material(plugins, text, model=model, backend=backend, device=device, say=say)
        _check_same(found, material, choice, site)
        results = evaluated(found, chosen, material, choice, site=site, verbose=verbose, say=say)
    compared = _of(results)
    return compared if folder is None else attrs.evolve(compared, files=_written(compared, folder))


def _of(results: Mapping[str, Evaluation]) -> Comparison:
    """What was found, compared; remarks are warnings."""
    from saekit.evals.comparison import Comparison

    for name, one in results.items():
        for remark in one.remarks:
            warn(f"{name}: {remark}", UserWarning)
    first = next(iter(results.values())).about
    shared = {
        name: first.get(name)
        for name in ("model", "backend", "dtype", "n_contexts", *_FACTS, "tokens", "tokens_used", "saekit")
    }
    sites = {name: str(one.about.get("sites")) for name, one in results.items()}
    return Comparison(evaluations=dict(results), about=shared, sites=sites)


def _folder(out: str | Path) -> Path:
    """Where files are written; :class:`PlaceError` where none can be."""
    folder = as_path(out)
    if folder.exists() and not folder.is_dir():
        raise PlaceError(f"cannot write a comparison into {str(out)!r}: it is a file; give a folder, which may be new")
    return folder


def _named(found: Mapping[str, Subject]) -> dict[str, Subject]:
    """Two or more, by short names: of paths what they do not have in common."""
    if len(found) < 2:
        only = f": {next(iter(found))}" if found else ""
        raise ConfigError([("saes", f"must be two or more to be compared, found {len(found)}{only}")])
    for name in found:
        if not name.strip() or printable(name) != name:
            raise ConfigError([("saes", f"have a name {name!r}, which tables cannot show: give a word or more, without "
                                "line breaks")])  # fmt: skip
    names = [name.replace("\\", "/").split("/") for name in found]
    while all(len(parts) > 1 for parts in names) and len({parts[0] for parts in names}) == 1:
        names = [parts[1:] for parts in names]
    while all(len(parts) > 1 for parts in names) and len({parts[-1] for parts in names}) == 1:
        names = [parts[:-1] for parts in names]
    short = ["/".join(parts) for parts in names]
    short = short if len({*short}) == len(short) else list(found)
    return {name: attrs.evolve(one, name=name) for name, one in zip(short, found.values(), strict=True)}


def _check_same(
    found: Mapping[str, Subject], material: Material, choice: ChosenTokens, site: Site | Sites | str | None
) -> None:
    """:class:`ConfigError` unless all have one model, the same contexts, and the same tokens of them count."""
    groups = list(material.groups(found, site))
    group, *others = groups
    first = group.names[0]
    for one in others:
        other = one.names[0]
        _check_model(first, group.backend, other, one.backend)
        if group.contexts.shape != one.contexts.shape or bool((group.contexts != one.contexts).any()):
            raise ConfigError(_other_text(first, group.about[first], other, one.about[other]))
        if group.mask is not one.mask and not _are_alike(group.mask, one.mask):
            raise ConfigError(
                f"the texts of {first} and {other} have other masks, so that other tokens count. Say it for all: "
                "mask=..., or name one text (dataset=...)"
            )
    kept = {name: choice.of(found[name].sae, group.backend, group.contexts) for group in groups for name in group.names}
    for name, own in kept.items():
        if own != kept[first]:
            told = " and ".join(f"{who}: {kept[who].metadata() or 'all tokens'}" for who in (first, name))
            raise ConfigError(
                f"other tokens count for {first} than for {name} ({told}), and their numbers are not of the same "
                "tokens. Say it for all: exclude_special_tokens, or seqpos_slice"
            )


def _are_alike(one: Any, other: Any) -> bool:
    return hasattr(one, "shape") and hasattr(other, "shape") and one.shape == other.shape and bool((one == other).all())


def _check_model(first: str, backend: ModelBackend, other: str, backend_of_other: ModelBackend) -> None:
    same = backend.name == backend_of_other.name and backend.fingerprint() == backend_of_other.fingerprint()
    if same:
        return
    if backend.name != backend_of_other.name:
        what = f"{first} is of the model {backend.name!r} and {other} of {backend_of_other.name!r}"
    else:
        what = f"the model {backend.name!r} of {first} has other weights than that of {other}"
    raise ConfigError(
        f"{what}: losses of two models, and activations of two models, cannot be compared. Evaluate each by itself, or "
        "name one model for both (model=..., --model), and how it is loaded (backend=..., --backend)"
    )


def _other_text(first: str, one: Mapping[str, Any], other: str, two: Mapping[str, Any]) -> str:
    differ = [f"{name} {one.get(name)!r} and {two.get(name)!r}" for name in _FACTS if one.get(name) != two.get(name)]
    what = ", ".join(differ) or "how their text is packed into contexts, or what of it was held out, is not the same"
    if one.get("dataset") == two.get("dataset") and one.get("held_out") and two.get("held_out"):
        what += "; where each held out another part of one text, name a text that none was trained on"
    return (
        f"{first} and {other} would be measured on other contexts ({what}), and differences are paired by contexts. "
        "Name one text for all (dataset=..., --dataset), and one context_size if these differ; of SAEs that were "
        "trained with other special tokens at the beginning of contexts, give the contexts themselves (contexts=...)"
    )


def _written(compared: Comparison, folder: Path) -> tuple[Path, ...]:
    """The files; a picture that cannot be drawn is a warning."""
    from saekit.files.storage import write_bytes, write_text
    from saekit.reasons import error_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"cannot write a comparison into {str(folder)!r}: {error.strerror or error}") from error
    data, picture, page = (folder / name for name in FILES)
    write_text(data, json.dumps(compared.to_dict(), indent=2, allow_nan=False) + "\n")
    files = [data]
    for path, draw in ((picture, _png), (page, _html)):
        try:
            drawn = draw(compared)
            if drawn is not None:
                write_bytes(path, drawn)
                files.append(path)
        except Exception as error:  # of matplotlib, of the disk, of numbers that nobody has thought of
            told = str(error) if isinstance(error, SaekitError) else f"{path.name}: {error_text(error)}"
            warn(f"a picture of the comparison was not drawn: {told}", RuntimeWarning)
    return tuple(files)


def _png(compared: Comparison) -> bytes | None:
    from saekit.reports.comparison import comparison_figure
    from saekit.reports.figures import as_png, styled

    with styled():
        figure = comparison_figure(compared.rows(), compared.title, compared.where)
        return None if figure is None else as_png(figure)


def _html(compared: Comparison) -> bytes | None:
    from saekit.reports.comparison import comparison_page

    verdicts = compared.summary()
    told, left = verdicts[:_MOST_VERDICTS], len(verdicts) - _MOST_VERDICTS
    told += [f"and {left:,} more: the last table has all differences"] if left > 0 else []
    lines = [*compared.where, *compared.rules()]
    page = comparison_page(compared.rows(), compared.title, lines, [*compared.tables()], told)
    return None if page is None else page.encode()
