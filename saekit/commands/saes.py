"""What ``saekit saes`` shows, as data and as text.  What needs torch is imported after what can be seen to be wrong."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saekit.commands.vague import hooks_like, models_like, near_hooks
from saekit.errors import SAEFormatError, UnknownKeyError
from saekit.files.paths import as_path
from saekit.plugins.text import printable
from saekit.pretrained.catalog import Catalog, find_sae, nearest
from saekit.pretrained.hooks_of import hook_of
from saekit.released import Release, ReleasedSAE

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

__all__ = ["converted", "found_release", "info", "info_text", "listed", "published", "table", "verified"]

_NEURONPEDIA = "https://www.neuronpedia.org/"


def listed(
    catalog: Catalog, *, model: str | None = None, hook: str | None = None, loader: str | None = None
) -> list[dict[str, Any]]:
    """The releases, those of ``model`` and ``loader`` alone, with the ids of the SAEs that read ``hook``.

    A model may be written without its owner and a hook without its block, and a part of either will do
    (:mod:`saekit.commands.vague`).  :class:`UnknownKeyError` for what no release has, with what is like it.
    """
    found, among = catalog.releases, list[str]()
    for what, wanted, name_of in (("model", model, _model_of), ("loader", loader, _loader_of)):
        if wanted is not None:
            names = {name for one in found if (name := name_of(one)) is not None}
            fitting = models_like(wanted, names) if what == "model" else {wanted} & names
            if not fitting:
                raise UnknownKeyError(_none(wanted, names, what, nearest(wanted, sorted(names)), among))
            found = [one for one in found if name_of(one) in fitting]
            among.append(f"{what} {wanted!r}")
    if hook is None:
        return [row for one in found if (row := _row(one, one.ids))["ids"]]
    hooks = set().union(*map(_hooks, found))
    fitting = hooks_like(hook, hooks)
    if not fitting:
        raise UnknownKeyError(_none(hook, hooks, "hook", near_hooks(hook, hooks), among))
    rows = [_row(one, [name for name, sae in one.saes.items() if hook_of(one, sae) in fitting]) for one in found]
    return [row for row in rows if row["ids"]]


def _model_of(release: Release) -> str | None:
    return release.model


def _loader_of(release: Release) -> str | None:
    return release.loader


def _hooks(release: Release) -> set[str]:
    return {hook for sae in release.saes.values() if (hook := hook_of(release, sae)) is not None}


def _none(wanted: str, names: Iterable[str], what: str, close: Sequence[str], among: Sequence[str]) -> str:
    names = sorted(names, key=_in_order)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = "" if close else f" There are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    of = f" of {' and '.join(among)}" if among else ""
    return printable(f"no release{of} has the {what} {wanted!r}.{hint}{shown}")


def _in_order(name: str) -> list[tuple[int, str]]:
    """Block 2 comes before block 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _row(release: Release, ids: Iterable[str]) -> dict[str, Any]:
    return {
        "release": release.name,
        "source": release.source,
        "model": release.model,
        "loader": release.loader,
        "repo": release.repo,
        "folder": release.folder,
        "ids": list(ids),
    }


def table(rows: list[dict[str, Any]], columns: int | None = None) -> str:
    """A line for each release; where a line has ``columns`` characters, without what does not fit into them."""
    shown = [
        (row["release"], str(len(row["ids"])), row["model"] or "?", row["loader"] or "by its files",
         row["repo"] or row["folder"] or "")
        for row in rows
    ]  # fmt: skip
    head = ("release", "SAEs", "model", "loader", "repository")
    widths = [max(len(line[n]) for line in (head, *shown)) for n in range(len(head))]
    kept = len(head)
    while columns is not None and kept > 3 and sum(widths[:kept]) + 2 * (kept - 1) > columns:
        kept -= 1
    lines = ["  ".join(f"{line[n]:{widths[n]}}" for n in range(kept)) for line in (head, *shown)]
    total = sum(len(row["ids"]) for row in rows)
    left_out = f" ({' and '.join(head[kept:])}: in a wider terminal, or with --json)" if kept < len(head) else ""
    counted = f"{len(rows)} release{'s' * (len(rows) != 1)}, {total:,} SAE{'s' * (total != 1)}{left_out}"
    return "\n".join([*(printable(line.rstrip()) for line in lines), "", counted])


def info(release: Release, sae: ReleasedSAE | None = None, *, hook: str | None = None) -> dict[str, Any]:
    """All that is known of a release, or of one SAE of it.  What nobody stated is None.

    With ``hook``, only of the SAEs that read it, which may be a part of its name as in :func:`listed`.
    """
    about = {name: value for name, value in _row(release, release.ids).items() if name != "ids"}
    about |= {"revision": release.revision, "overrides": dict(release.overrides), "links": dict(release.links)}
    if sae is None:
        facts = [_facts(release, one) for one in release.saes.values()]
        if hook is not None:
            hooks = _hooks(release)
            if not (fitting := hooks_like(hook, hooks)):
                text = _none(hook, hooks, "hook", near_hooks(hook, hooks), ())
                raise UnknownKeyError(text.replace("no release", f"no SAE of {release.name}", 1))
            facts = [one for one in facts if one["hook_name"] in fitting]
        return about | {"saes": facts}
    return about | _facts(release, sae)


def found_release(name: str, files: Sequence[str]) -> Release:
    """The release called ``name``; :class:`UnknownKeyError` of a path that is there says what shows that."""
    try:
        return Catalog(files).find(name)
    except UnknownKeyError as error:
        if as_path(name).exists():
            error.add_note(printable(f"{name} is a path here: saekit show {shlex.quote(name)} shows what it is"))
        raise


def _facts(release: Release, sae: ReleasedSAE) -> dict[str, Any]:
    return {
        "id": sae.id,
        "path": sae.path,
        "hook_name": hook_of(release, sae),
        "l0": sae.l0,
        "explained_variance": sae.explained_variance,
        "norm_scaling_factor": sae.norm_scaling_factor,
        "neuronpedia": None if sae.neuronpedia is None else f"{_NEURONPEDIA}{sae.neuronpedia}",
    }


def info_text(data: dict[str, Any]) -> str:
    """The same for people: what is known, a line each, and how it is loaded."""
    saes = data.get("saes")
    shown = {name: value for name, value in data.items() if name != "saes" and value not in (None, {})}
    flat = {
        **{name: value for name, value in shown.items() if not isinstance(value, dict)},
        **{f"{part}.{name}": value for part in ("overrides", "links") for name, value in data[part].items()},
    }
    width = max(map(len, flat))
    lines = [f"{name:{width}}  {value}" for name, value in flat.items()]
    if saes is None:
        unknown = [name for name in ("l0", "explained_variance", "hook_name") if data[name] is None]
        lines += [f"{', '.join(unknown)}: not known"] if unknown else []
    else:
        lines += ["", *_sae_lines(saes)]
    sae_id = data["id"] if saes is None else saes[0]["id"]
    call = f'saekit.SAE.from_pretrained("{data["release"]}", "{sae_id}")'
    return "\n".join(printable(line) for line in [*lines, "", call])


def _sae_lines(saes: list[dict[str, Any]]) -> list[str]:
    columns = ("id", "hook_name", "l0", "explained_variance")
    rows = [tuple("" if one[name] is None else str(one[name]) for name in columns) for one in saes]
    heads = ("id", "hook", "L0", "explained variance")
    kept = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    widths = {n: max(len(row[n]) for row in (heads, *rows)) for n in kept}
    return ["  ".join(f"{row[n]:{widths[n]}}" for n in kept).rstrip() for row in (heads, *rows)]


def converted(source: str, target: str, to: str, loader: str | None, releases: Sequence[str]) -> str:
    """Write the SAE that ``source`` names to ``target`` in the format ``to``; a line about it."""
    _check_format(to)
    found = published(source, releases)
    from saekit.pretrained.exporting import export

    sae = _read(source, found, loader, releases)
    export(sae, target, to)
    return printable(f"{sae.get_name()} ({sae.info.architecture}) is in {target} as {to}")


def _check_format(name: str) -> None:
    from saekit.kinds import PRETRAINED_LOADERS
    from saekit.plugins.manager import default_manager

    if name == "saekit":
        return
    try:
        default_manager().get(PRETRAINED_LOADERS, name)
    except UnknownKeyError:
        names = ["saekit", *(item.entry.name for item in default_manager().registry(PRETRAINED_LOADERS).items)]
        close = nearest(name, names)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        text = f"no format is called {name!r}.{hint} There are {', '.join(names)}, of which some are only read"
        raise UnknownKeyError(printable(text)) from None


def published(source: str, releases: Sequence[str]) -> tuple[str, str] | None:
    """The release and the id that ``source`` names; None: it is a path.

    :class:`SAEFormatError` or :class:`UnknownKeyError` for what is neither.
    """
    if as_path(source).exists():
        return None
    catalog = Catalog(releases)
    known = {name for one in catalog.releases for name in (one.name, one.key)}
    release, colon, sae_id = (source, "", "") if source in known else source.rpartition(":")
    if not colon and source not in known:
        close = nearest(source, known)
        close = [*_near_folders(source), *close][:3]
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise SAEFormatError(
            f"there is no file or folder {source}, and no release of that name.{hint} RELEASE:ID names a published "
            "SAE; of a release that has one SAE alone, RELEASE is enough (`saekit saes list`)"
        )
    return release, find_sae(catalog.find(release), sae_id or None).id


def _near_folders(source: str) -> list[str]:
    """What is spelled alike in the folder that ``source`` would be in."""
    path = as_path(source)
    try:
        there = [one.name for one in path.parent.iterdir() if not one.name.startswith(".")]
    except OSError:
        return []
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, there, n=2)]


def _read(
    source: str, published: tuple[str, str] | None, loader: str | None, releases: Sequence[str], *, verify: bool = False
) -> SAE:
    from saekit.pretrained.sae import SAE

    if published is None:
        return SAE.load(source, loader=loader, verify=verify)
    return SAE.from_pretrained(*published, loader=loader, releases=releases, verify=verify)


def verified(source: str, loader: str | None, releases: Sequence[str] = ()) -> str:
    """A line that says that the SAE is as it was saved; else :class:`SAEFormatError` says what is not."""
    if (found := published(source, releases)) is not None:
        _read(source, found, loader, releases, verify=True)
        return f"{source}: as it was saved"
    from saekit.pretrained.probe import verify

    if faults := verify(source, loader=loader):
        lines = "".join(f"\n  - {printable(one)}" for one in faults)
        raise SAEFormatError(f"the SAE in {source} is not as it was saved:{lines}")
    return f"{source}: as it was saved"
