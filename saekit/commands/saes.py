"""What ``saekit saes`` shows, as data and as text.  What needs torch is imported after what can be seen to be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saekit.errors import SAEFormatError, UnknownKeyError
from saekit.files.paths import as_path
from saekit.plugins.text import printable
from saekit.pretrained.catalog import Catalog, find_sae, nearest
from saekit.pretrained.hooks_of import hook_of
from saekit.released import Release, ReleasedSAE

if TYPE_CHECKING:
    from saekit.pretrained.sae import SAE

__all__ = ["converted", "info", "info_text", "listed", "table", "verified"]

_NEURONPEDIA = "https://www.neuronpedia.org/"


def listed(
    catalog: Catalog, *, model: str | None = None, hook: str | None = None, loader: str | None = None
) -> list[dict[str, Any]]:
    """The releases, those of ``model`` and ``loader`` alone, with the ids of the SAEs that read ``hook``.

    A model may be written without its owner, and a hook without its block (``hook_resid_post``).
    :class:`UnknownKeyError` for what no release has, with what is like it.
    """
    found = catalog.releases
    if model is not None:
        names = {one.model for one in found if one.model is not None}
        fitting = _fitting(model, names, "model")
        found = [one for one in found if one.model in fitting]
    if loader is not None:
        fitting = _fitting(loader, {one.loader for one in found if one.loader is not None}, "loader")
        found = [one for one in found if one.loader in fitting]
    rows = [_row(one, one.ids if hook is None else _reading(one, hook)) for one in found]
    rows = [row for row in rows if row["ids"]]
    if hook is not None and not rows:
        hooks = {str(hook_of(one, sae)) for one in found for sae in one.saes.values()}
        raise UnknownKeyError(_none(hook, hooks - {"None"}, "hook"))
    return rows


def _fitting(wanted: str, names: set[str], what: str) -> set[str]:
    folded = wanted.casefold()
    exact = {name for name in names if folded in (name.casefold(), name.casefold().rpartition("/")[2])}
    if not exact:
        raise UnknownKeyError(_none(wanted, names, what))
    return exact


def _none(wanted: str, names: Iterable[str], what: str) -> str:
    names = sorted(names)
    close = nearest(wanted, names)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = "" if close else f" There are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    return printable(f"no release has the {what} {wanted!r}.{hint}{shown}")


def _reading(release: Release, hook: str) -> tuple[str, ...]:
    hooks = {one: hook_of(release, sae) or "" for one, sae in release.saes.items()}
    return tuple(one for one, found in hooks.items() if found == hook or found.endswith(f".{hook}"))


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


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each release."""
    shown = [
        (row["release"], str(len(row["ids"])), row["model"] or "?", row["loader"] or "by its files",
         row["repo"] or row["folder"] or "")
        for row in rows
    ]  # fmt: skip
    head = ("release", "SAEs", "model", "loader", "repository")
    widths = [max(len(line[n]) for line in (head, *shown)) for n in range(len(head))]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)) for line in (head, *shown)]
    total = sum(len(row["ids"]) for row in rows)
    return "\n".join([*(printable(line.rstrip()) for line in lines), "", f"{len(rows)} releases, {total:,} SAEs"])


def info(release: Release, sae: ReleasedSAE | None = None) -> dict[str, Any]:
    """All that is known of a release, or of one SAE of it.  What nobody stated is None."""
    about = {name: value for name, value in _row(release, release.ids).items() if name != "ids"}
    about |= {"revision": release.revision, "overrides": dict(release.overrides), "links": dict(release.links)}
    if sae is None:
        return about | {"saes": [_facts(release, one) for one in release.saes.values()]}
    return about | _facts(release, sae)


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
    published = _published(source, releases)
    from saekit.pretrained.exporting import export

    sae = _read(source, published, loader, releases)
    export(sae, target, to)
    return printable(f"{sae.get_name()} ({sae.info.architecture}) is in {target} as {to}")


def _check_format(name: str) -> None:
    from saekit.kinds import PRETRAINED_LOADERS
    from saekit.plugins.manager import default_manager

    if name != "saekit":
        default_manager().get(PRETRAINED_LOADERS, name)


def _published(source: str, releases: Sequence[str]) -> tuple[str, str] | None:
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
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise SAEFormatError(
            f"there is no file or folder {source}, and no release of that name.{hint} RELEASE:ID names a published "
            "SAE, and RELEASE one of a release that has no other (`saekit saes list`)"
        )
    return release, find_sae(catalog.find(release), sae_id or None).id


def _read(
    source: str, published: tuple[str, str] | None, loader: str | None, releases: Sequence[str], *, verify: bool = False
) -> SAE:
    from saekit.pretrained.sae import SAE

    if published is None:
        return SAE.load(source, loader=loader, verify=verify)
    return SAE.from_pretrained(*published, loader=loader, releases=releases, verify=verify)


def verified(source: str, loader: str | None, releases: Sequence[str] = ()) -> str:
    """A line that says that the SAE is as it was saved; else :class:`SAEFormatError` says what is not."""
    if (published := _published(source, releases)) is not None:
        _read(source, published, loader, releases, verify=True)
        return f"{source}: as it was saved"
    from saekit.pretrained.probe import verify

    if found := verify(source, loader=loader):
        lines = "".join(f"\n  - {printable(one)}" for one in found)
        raise SAEFormatError(f"the SAE in {source} is not as it was saved:{lines}")
    return f"{source}: as it was saved"
