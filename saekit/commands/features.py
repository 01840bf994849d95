"""``saekit.collect_features``: what features do on text, collected in one pass and kept on the disk.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit._version import __version__
from saekit.commands.beforehand import check_named, check_store
from saekit.commands.evaluating import ChosenTokens, check_arguments, checked_data
from saekit.commands.looking import checked_seed
from saekit.commands.material import Material, Text
from saekit.commands.subjects import Subject, at_home, subjects_of
from saekit.errors import ConfigError, StorageError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager, default_manager
from saekit.runs.checks import has_model
from saekit.runs.place import RECORD
from saekit.site import Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.features.collect import Pass
    from saekit.features.estimate import Options
    from saekit.features.manifest import StoreManifest
    from saekit.features.store import FeatureStore
    from saekit.status import Status
    from saekit.tokens import Mask

__all__ = ["beside", "check_features", "collect_features"]

_SAVED = "checkpoints"
STORE = "features"
"""The name of a store's folder where none is given."""


def collect_features(
    saes: object,
    *,
    model: object | None = None,
    dataset: object | None = None,
    contexts: Tensor | None = None,
    features: object = "all",
    n_contexts: int = 1024,
    context_size: int | None = None,
    folder: str | Path | None = None,
    max_per_feature: int = 100_000,
    top_kept: int = 200,
    partners: int = 20,
    logits: int = 20,
    batch_size: int = 32,
    site: Site | Sites | str | None = None,
    exclude_special_tokens: bool | Sequence[int] | None = None,
    seqpos_slice: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    verbose: bool = True,
    plugins: PluginManager | None = None,
) -> FeatureStore:
    """What features of SAEs do on text: one pass of the model over it, for all of them, kept in ``folder``.

    ``saes``, ``model``, ``dataset``, ``contexts``, ``n_contexts``, ``context_size``, ``site``, ``device``,
    ``exclude_special_tokens``, ``seqpos_slice`` and ``mask`` are as for :func:`saekit.evaluate`; all SAEs must be of
    one model and read the same contexts.  ``features`` are the numbers of those that are wanted, for every SAE or, as a
    mapping, by the SAEs' names; activations are those that the SAE gives of all its features together.

    Every activation is kept, up to ``max_per_feature`` of a feature; of one with more a fair sample of contexts, drawn
    by ``seed``, and the ``top_kept`` largest.  ``partners`` and ``logits`` say how many are kept of the features and
    neurons that are active with each, and of the tokens whose logits it raises and lowers.  Its needs are said first.
    Without ``folder`` the store goes beside the SAE, into ``features``.  A pass that was interrupted goes on; a store
    that is there is opened, with the names that SAEs have now; one of something else is an error, unless ``overwrite``:
    it stays until the new one is whole.  :class:`SaekitError` for what cannot be found, does not fit or has no room.
    """
    plugins = plugins or default_manager()
    tokens = check_arguments(n_contexts, contexts, exclude_special_tokens, seqpos_slice, mask)
    seed = checked_seed(seed)
    contexts, mask = checked_data(contexts, mask)
    kept = _kept(batch_size, max_per_feature=max_per_feature, top_kept=top_kept, partners=partners, logits=logits)
    sizes = {"n_contexts": n_contexts, "context_size": context_size, "seed": seed}
    _check_named(saes, folder, dataset, contexts, None if overwrite else kept | sizes)
    from saekit.devices import resolve_device
    from saekit.features.estimate import Options
    from saekit.status import Status

    with Status(verbose=verbose) as say:
        say("reading the SAEs")
        found = _found(saes, model, features, plugins, resolve_device(device, "device"))
        _check_place(place := beside(found) if folder is None else as_path(folder), overwrite)
        text = Text(dataset=dataset, contexts=contexts, n_contexts=n_contexts, context_size=context_size, seed=seed,
                    mask=mask)  # fmt: skip
        material = Material(plugins, text, model=model, device=device, say=say)
        work, facts = _of_one_model(found, material, tokens, features, site, batch_size)
        options = Options(seed=seed, **kept)
        return _collected(place, work, _manifest(work, facts, options), options, overwrite, verbose, say)


def _found(saes: object, model: object, features: object, plugins: PluginManager, device: str) -> dict[str, Subject]:
    """The SAEs by name; :class:`ConfigError` for one of a run that has no model, and so no text, and for features that
    they have not."""
    found = at_home(subjects_of(saes, plugins, device=device), plugins)
    for name, one in found.items():
        if model is None and one.config is not None and not has_model(one.config, plugins):
            raise ConfigError([("model", f"is missing: {name} is of a run that has no language model, so there is no "
                                "text on which its features could be looked at")])  # fmt: skip
    check_features(features, {name: one.sae.d_sae for name, one in found.items()})
    return found


def _check_place(place: Path, overwrite: bool) -> None:
    from saekit.features.place import check_place

    check_place(place, overwrite=overwrite)


def _kept(batch_size: object, **kept: Any) -> dict[str, Any]:
    _check_counts({"max_per_feature": kept["max_per_feature"], "batch_size": batch_size}, 1)
    _check_counts(kept, 0)
    return kept


def _check_named(saes: object, folder: Any, dataset: object, contexts: object, asked: Any) -> None:
    """What names and manifests alone show; nothing of a store is ``asked`` where one is replaced."""
    check_named(saes, dataset if contexts is None else None)
    if asked is not None and contexts is None:
        check_store(saes, folder, asked)


def _check_counts(counts: Mapping[str, Any], least: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < least:
            raise ConfigError([(name, f"must be a whole number of {least} or more, found {value!r}")])


def beside(subjects: Mapping[str, Subject]) -> Path:
    """The folder of the store of ``subjects``: in their run or sweep, or beside the SAE."""
    files = [one.file for one in subjects.values()]
    homes = [_home(file) for file in files if file is not None]
    if len(homes) < len(files):
        what = "the SAE is in no folder of its own" if len(files) == 1 else "not all SAEs are in folders of their own"
        how = "pass the path of its run, such as 'runs/first', in the place of the object, or folder='features'"
        raise ConfigError([("folder", f"is missing: {what}; {how} (--folder)")])
    parents = {home.absolute().parent for home in homes}
    if len(homes) > 1 and len(parents) == 1 and (homes[0].parent / RECORD).is_file():
        return homes[0].parent / STORE  # of a sweep
    if len(homes) > 1:
        told = f"several SAEs have no folder in common ({', '.join(subjects)})"
        raise ConfigError([("folder", f"is missing: {told}; say where their features go, such as folder='features' "
                            "(--folder features), or name one of them")])  # fmt: skip
    (home,) = homes
    run = next((up.parent for up in (home.absolute().parent, home.absolute().parent.parent) if up.name == _SAVED), None)
    if run is not None and (run / RECORD).is_file():
        aside = home.name if home.parent.name == _SAVED else f"{home.parent.name}-{home.name}"
        raise ConfigError([("folder", f"is missing: {str(home)!r} is in a checkpoint, which goes when newer ones come; "
                            f"say where its features go, such as --folder {run.name}-{aside}")])  # fmt: skip
    return home / STORE


def _home(file: Path) -> Path:
    """The run, or the SAE's folder, of which ``file`` is."""
    own = file.parent
    return own.parent if own.name == "sae" else own


def check_features(features: object, sizes: Mapping[str, int]) -> None:
    """:class:`ConfigError` for features that SAEs with so many have not: before a model and a text are opened."""
    from saekit.features.subject import chosen_features

    if isinstance(features, Mapping) and (unknown := [name for name in features if name not in sizes]):
        raise ConfigError([("features", f"names {unknown[0]!r}, and the SAEs are {', '.join(sizes)}")])
    for name, d_sae in sizes.items():
        chosen_features(features.get(name) if isinstance(features, Mapping) else features, d_sae, name)


def _of_one_model(
    found: Mapping[str, Subject], material: Material, tokens: ChosenTokens, features: object, site: Any, batch_size: int
) -> tuple[Pass, dict[str, Any]]:
    """The pass of the SAEs in their order over the contexts that they share, and what is known of the text."""
    from saekit.evals.measured import allowed_in
    from saekit.features.collect import Pass
    from saekit.features.subject import Collected

    groups = [*material.groups(found, site)]
    if len(groups) > 1:
        lines = "; ".join(f"{', '.join(one.names)}: {one.backend.name}, contexts of {one.contexts.shape[1]} tokens"
                          for one in groups)  # fmt: skip
        raise ConfigError(
            f"the SAEs do not share a model and a text, so no one pass has them all ({lines}). Collect them apart, or "
            "name one model and one text (model, dataset, context_size)"
        )
    (group,) = groups
    subjects = [
        Collected.of(
            name,
            found[name].sae,
            group.about[name]["sites"],
            tokens.of(found[name].sae, group.backend, group.contexts),
            features.get(name) if isinstance(features, Mapping) else features,
        )
        for name in group.names
    ]
    first = group.about[group.names[0]]
    told = ("dataset", "held_out", "seed", "drawn_from_first_documents")
    facts = {key: value for key, value in first.items() if key in told}
    allowed = allowed_in(group.mask, group.contexts, slice(None))
    return Pass(subjects, group.backend, group.contexts, batch_size, None if allowed is None else allowed.cpu()), facts


def _manifest(work: Pass, facts: Mapping[str, Any], options: Options) -> StoreManifest:
    import attrs

    from saekit.features.manifest import StoreManifest

    return StoreManifest(
        model={
            "name": work.backend.name,
            "fingerprint": work.backend.fingerprint(),
            "bos": work.backend.special_tokens.get("bos"),
        },
        dataset=facts,
        contexts=len(work.contexts),
        context_size=work.contexts.shape[1],
        digest=_digest(work.contexts.int()),
        mask=None if work.mask is None else _digest(work.mask),
        options=attrs.asdict(options),
        saes=[one.about(number) for number, one in enumerate(work.subjects)],
        saekit_version=__version__,
    )


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()


def _collected(
    place: Path,
    work: Pass,
    wanted: StoreManifest,
    options: Options,
    overwrite: bool,
    verbose: bool,
    say: Status,
) -> FeatureStore:
    """The store in ``place``: opened, gone on with, or made."""
    import torch

    from saekit.ambient import ambient
    from saekit.features.collect import finish
    from saekit.features.estimate import check_space
    from saekit.features.parts import Parts
    from saekit.features.place import check_place, opened_for, storing
    from saekit.features.store import FeatureStore
    from saekit.progress import Counted, ProgressDisplay

    work.check_text()
    with storing(place), ambient(), torch.no_grad(), ExitStack() as stack:
        check_place(place, overwrite=overwrite)
        if not overwrite and (there := opened_for(place, wanted)) is not None:
            Parts.forget(place, wanted.identity)
            return _renamed(FeatureStore.open(place), there.named_as(wanted))
        parts = Parts.opened(place, wanted.identity, overwrite=overwrite)
        stack.callback(parts.remove_if_empty)
        say("estimating what it takes")
        estimate = work.estimate(options)
        say.rest()
        check_space(place, estimate, sum(int(entry["bytes"]) for entry in parts.files.values()))
        before = done = parts.contexts * work.contexts.shape[1]
        with ProgressDisplay(work.contexts.numel(), doing="collecting features", verbose=verbose) as progress:
            progress.say(f"collecting features into {place}: {estimate}")
            if before:
                progress.say(f"going on after {parts.contexts:,} contexts that are there")

            def report(count: int) -> None:
                nonlocal done
                done += count
                progress.update(done, before=before)

            sums = work.run(parts, report)
        finish(place, parts, sums, work, wanted, options, partial(Counted, verbose=verbose))
        stack.pop_all()
    return FeatureStore.open(place)


def _renamed(store: FeatureStore, manifest: StoreManifest) -> FeatureStore:
    """The store with what its SAEs are called now, which is kept where that can be written."""
    import attrs

    if manifest == store.manifest:
        return store
    with suppress(StorageError):
        manifest.save(store.folder)
    return attrs.evolve(store, manifest=manifest)
