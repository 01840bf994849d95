"""What loaders work with: the files of a saved SAE, in a folder or on the Hub, and what is read from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.defaults import DEFAULT_ARCHITECTURE
from saekit.errors import SAEFormatError
from saekit.files.checksums import Checksums
from saekit.files.faults import pointer_size
from saekit.files.names import SAE_CONFIG, SAE_WEIGHTS, half_written
from saekit.files.paths import as_path
from saekit.files.strict_json import read_object
from saekit.hub_files import HubRepository
from saekit.reasons import reason
from saekit.shapes import by_shapes
from saekit.site import Site, Sites
from saekit.values import Ports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WEIGHT_FILES", "PretrainedSAE", "SAEFiles", "revision_of"]


@attrs.frozen(kw_only=True)
class PretrainedSAE:
    """What a loader reads: an architecture's options and its tensors, under saekit's names."""

    architecture: str = DEFAULT_ARCHITECTURE
    """The key of the architecture."""
    options: Mapping[str, Any]
    """The architecture's options as plain data, ``d_in`` and ``d_sae`` among them."""
    tensors: Mapping[str, Tensor]
    """The architecture's parameters by name: of most, ``W_enc [d_in, d_sae]``, ``b_enc``, ``W_dec [d_sae, d_in]`` and
    ``b_dec``."""
    site: Site | None = None
    """The one site of an SAE."""
    sites: Sites | None = None
    """The sites of what has other ones: a transcoder, or a crosscoder.  None: :attr:`site`."""
    ports: Ports | None = None
    """Their widths by their names (:attr:`saekit.Site.name`).  None: :attr:`site` alone, of width ``d_in``."""
    log_sparsity: Tensor | None = None
    """``[d_sae]``: log10 of the fraction of tokens on which each feature fired; -inf for never."""
    activation_scale: float | None = 1.0
    """What activations were multiplied by before the weights saw them; it is folded into the SAE.  None: by a factor
    that is not known, which is said at every load."""
    input_transform: Any = None
    """What each row goes through before the encoder: the key of an input transform, or a table with its ``name`` and
    options; None: nothing."""
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """What else is known of it, as JSON: the model, the text, and how activations were made of them."""
    defaulted: Sequence[str] = ()
    """What the files do not state, so that the format's own default holds: of the metadata, of the sites, and of what
    decides how the weights are used."""
    renamed: Mapping[str, str] = attrs.field(factory=dict)
    """What the files call by another name than saekit does: their names to saekit's."""
    provenance: Mapping[str, Any] = attrs.field(factory=dict)
    """What is known already of where it is from; a loader leaves it out."""

    __repr__ = by_shapes


@attrs.frozen
class _OnHub:
    """The files of a repository whose names begin with ``prefix``."""

    repository: HubRepository
    prefix: str

    def one(self, name: str) -> Path:
        """The local path of a file, by its name without the prefix."""
        return self.several([name])[name]

    def several(self, names: Collection[str]) -> dict[str, Path]:
        """Those of several."""
        found = self.repository.get([self.prefix + name for name in names])
        return {name: found[self.prefix + name] for name in names}


@attrs.frozen
class SAEFiles:
    """The files of one SAE: their names, and a way to get each."""

    place: str
    """For messages."""
    names: frozenset[str]
    _get: Callable[[str], Path] = attrs.field(repr=False)
    address: str = attrs.field(kw_only=True)
    """Where they lie, with ``/``: ``owner/repository/folder`` on the Hub, also in a copy that its cache has made, else
    the folder's whole path.  Some formats say only there which layer of what an SAE is for.  Left out: the place."""
    chosen: str = attrs.field(default="", kw_only=True)
    """The one of several files that was asked for, where it was a file and not a folder."""
    repo: str | None = attrs.field(default=None, kw_only=True)
    """The repository of the Hub that they are from."""
    opened: dict[str, Path] = attrs.field(factory=dict, kw_only=True, repr=False, eq=False)
    """The files that were asked for until now, by name."""
    about: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True, repr=False, eq=False)
    """What a release says of the SAE beside its files; see :meth:`said`."""
    asked: set[str] = attrs.field(factory=set, kw_only=True, repr=False, eq=False)
    """What of it was asked for."""
    sums: Checksums | None = attrs.field(default=None, kw_only=True, repr=False, eq=False)
    """Where the checksums of files that are asked for are computed, while they are read."""
    hub: _OnHub | None = attrs.field(default=None, kw_only=True, repr=False, eq=False)
    """Where on the Hub they are, if they are there."""

    @address.default
    def _place(self) -> str:
        return self.place

    @classmethod
    def at(cls, path: str | Path) -> SAEFiles:
        """The files of a local folder, or the one file of weights of that path with those beside it."""
        file = as_path(path)
        if not file.name.lower().endswith(WEIGHT_FILES) or not file.is_file():
            return cls.in_folder(path)
        try:
            names = frozenset(item.name for item in file.parent.iterdir() if item.is_file())
            address = _address(file.parent)
        except OSError as error:
            raise SAEFormatError(f"the SAE folder {file.parent} cannot be read: {reason(error)}") from error
        return cls(str(file), names, file.parent.joinpath, address=address, chosen=file.name, repo=_cached_repo(file))

    @classmethod
    def in_folder(cls, path: str | Path) -> SAEFiles:
        """The files of a local folder; of a run folder or a checkpoint, those of the one SAE in it."""
        try:
            folder = as_path(path)
            of_a_run = not any((folder / name).exists() for name in (SAE_CONFIG, SAE_WEIGHTS))
            if of_a_run and (folder / "sae" / SAE_CONFIG).is_file():
                folder = folder / "sae"
            if not folder.is_dir():
                what = "is a file, not a folder" if folder.exists() else "is not there"
                raise SAEFormatError(f"the SAE folder {folder} {what}")
            names = frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            names = frozenset(name for name in names if not any(map(half_written, name.split("/"))))
            address = _address(folder)
        except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, no right to look, no such user
            raise SAEFormatError(f"the SAE folder {path} cannot be read: {reason(error)}") from error
        return cls(str(folder), names, folder.joinpath, address=address, repo=_cached_repo(folder))

    @classmethod
    def on_hub(
        cls,
        repo_id: str,
        folder: str = "",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        repository: HubRepository | None = None,
    ) -> SAEFiles:
        """The files below ``folder`` of a Hugging Face repository, or the one file of that path with those beside it.

        Their names are asked for once.  Downloads, of what is asked for alone, go through the Hub's cache, and what is
        not the file that the Hub has is refused.  ``token`` is as huggingface_hub has it.  ``repository`` is that whose
        names were asked for already.
        """
        repository = repository or HubRepository.listed(repo_id, revision, token)
        everything, inner = repository.names, folder.strip("/")
        prefix = f"{inner}/" if inner else ""
        place, chosen = f"{repo_id}/{prefix}".rstrip("/"), ""
        if inner in everything:
            place, (parent, _, chosen) = f"{repo_id}/{inner}", inner.rpartition("/")
            prefix = f"{parent}/" if parent else ""
        place += " (what the cache has of it; the Hub was not asked)" * repository.cached
        names = frozenset(name[len(prefix) :] for name in everything if name.startswith(prefix))
        if not names:
            folders = sorted({name.rpartition("/")[0] for name in everything} - {""})
            raise SAEFormatError(f"{repo_id} has no folder {folder!r}; it has {', '.join(folders) or 'no folders'}")
        address = f"{repo_id}/{prefix}".rstrip("/")
        hub = _OnHub(repository, prefix)
        return cls(place, names, hub.one, address=address, chosen=chosen, repo=repo_id, hub=hub)

    def fetch(self, *names: str) -> None:
        """Have those of these files that are there downloaded side by side, if they are on the Hub."""
        if self.hub is not None:
            self.hub.several([name for name in names if name in self.names])

    def unopened(self, sums: Checksums | None = None) -> SAEFiles:
        """The same, of which nothing was asked for yet."""
        return attrs.evolve(self, opened={}, asked=set(), sums=sums)

    def said(self, name: str) -> Any:
        """What a release says of the SAE, such as ``norm_scaling_factor``; None: nothing.

        For loaders: what counts more than the files (``normalize_activations``), or what they leave open.
        """
        self.asked.add(name)
        return self.about.get(name)

    def check_factor(self, found: float, where: str) -> None:
        """:class:`SAEFormatError` if a release says another factor of activations than ``found``, which ``where`` has.

        Releases have rounded ones: half a unit of the last digit does not count, nor does a part in a thousand.
        """
        said = self.said("norm_scaling_factor")
        if said is None:
            return
        digits = Decimal(repr(said)).as_tuple().exponent
        unit = 10.0 ** (digits if isinstance(digits, int) else 0)
        if abs(said - found) > min(max(1e-3 * found, 0.5 * unit), 0.02 * found):
            raise SAEFormatError(
                f"the release of {self.place} says that activations were multiplied by {said:g} (norm_scaling_factor), "
                f"and {where} says {found:g}: only one of them can be right. If the release is wrong, load the SAE "
                "without it, by its repository and folder"
            )

    def within(self, folder: str) -> SAEFiles:
        """Those below ``folder``, by their names there."""
        prefix = f"{folder.strip('/')}/"
        names = frozenset(name.removeprefix(prefix) for name in self.names if name.startswith(prefix))
        place, address = f"{self.place}/{folder.strip('/')}", f"{self.address}/{folder.strip('/')}"
        return attrs.evolve(
            self,
            place=place,
            names=names,
            get=lambda name: self.path(prefix + name),
            address=address,
            chosen="",
            opened={},
            sums=None,  # what is asked for is asked of these
            hub=None,
        )

    def path(self, name: str) -> Path:
        """The local path of one of the files."""
        if name not in self.names:
            shown = sorted(self.names)[:20]
            raise SAEFormatError(f"{self.place} has no file {name!r}; it has {', '.join(shown) or 'no files'}")
        self.opened[name] = found = self._get(name)
        self._check_no_pointer(name, found)
        if self.sums is not None:
            self.sums.begin(found)
            if self.hub is not None:
                self.hub.repository.expect(self.hub.prefix + name, found, self.sums)
        return found

    def pointers(self) -> list[str]:
        """The names of those that are pointers of git-LFS in a folder here: ten at most, of weights and of JSON."""
        found: list[str] = []
        names = () if self.hub is not None else self.names
        for name in sorted(name for name in names if name.lower().endswith((*WEIGHT_FILES, ".json"))):
            if len(found) == _ENOUGH_POINTERS:
                break
            with suppress(OSError):
                if pointer_size(self._get(name)) is not None:
                    found.append(name)
        return found

    def _check_no_pointer(self, name: str, found: Path) -> None:
        try:
            size = pointer_size(found)
        except OSError as error:
            raise SAEFormatError(f"{name} in {self.place} cannot be read: {reason(error)}") from error
        if size is not None:
            raise SAEFormatError(
                f"{name} in {self.place} is a pointer of git-LFS in the place of the file"
                + (f", which has {size:,} bytes" if size else "")
                + ": `git lfs pull` in that repository fetches it"
            )

    def only(self, suffix: str) -> str:
        """The one top-level name that ends in ``suffix``."""
        found = sorted(name for name in self.names if name.endswith(suffix) and "/" not in name)
        if len(found) != 1:
            raise SAEFormatError(f"expected one file *{suffix} in {self.place}, found {', '.join(found) or 'none'}")
        return found[0]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object."""
        return read_object(self.path(name), f"{name} in {self.place}")

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file that holds a table of plain values."""
        from saekit.files.strict_yaml import read_table

        return read_table(self.path(name), f"{name} in {self.place}")

    def state(self, name: str) -> dict[str, Any]:
        """All that a ``.pt``, ``.pth`` or ``.bin`` file holds by name: tensors, unchecked, and plain values.

        No pickle is run.
        """
        from saekit.weights import read_state

        return read_state(self.path(name), f"{name} in {self.place}")

    def objects(self, name: str) -> Any:
        """What a ``.pt``, ``.pkl`` or ``.pkl.gz`` file holds that somebody pickled with objects in it.

        The pickle is not run: tensors, unchecked, and plain values are built, and every object is a plain dictionary of
        its attributes.  For formats that have no other files.
        """
        from saekit.legacy import as_plain, read_objects

        where = f"{name} in {self.place}"
        return as_plain(read_objects(self.path(name), where), where)

    @staticmethod
    def check_weights(tensors: Mapping[str, object], where: str) -> None:
        """:class:`SAEFormatError` unless each is a dense tensor of finite floating-point numbers.

        :meth:`tensors` gives no others.  For what :meth:`state` gave; ``where`` is for messages.
        """
        from saekit.weights import check_tensors

        check_tensors(tensors, where)

    def tensors(
        self, name: str, only: Collection[str] | None = None, *, minus_infinity: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of a file of safetensors or NumPy (``.npz``), or of a ``.pt``, ``.pth`` or ``.bin`` file.

        No pickle is run.
        With ``only``, those of these names.  All are dense and of finite floating-point numbers (with
        ``minus_infinity``, as in the logarithm of nothing, that is allowed), or it is a :class:`SAEFormatError`.
        """
        from saekit.weights import read_tensors

        return read_tensors(self.path(name), f"{name} in {self.place}", only, minus_infinity=minus_infinity)


WEIGHT_FILES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".pkl", ".pkl.gz")
"""How the names of files end that can be asked for alone."""
_ENOUGH_POINTERS = 10
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)")  # how huggingface_hub names its folders


def _address(folder: Path) -> str:
    whole = folder.absolute().as_posix()
    cached = _CACHED.search(whole)
    return whole if cached is None else f"{cached[1]}/{cached[2]}{whole[cached.end() :]}"


def _cached_repo(path: Path) -> str | None:
    cached = _CACHED.search(path.absolute().as_posix())
    return None if cached is None else f"{cached[1]}/{cached[2]}"


def revision_of(path: Path) -> str | None:
    """The commit of a file that lies in the Hub's cache."""
    cached = _CACHED.search(path.absolute().as_posix())
    return None if cached is None else cached[3]
