"""``SAE``: a dictionary that is loaded and saved, for people.

The module itself, :class:`saekit.sae.SAEModule`, knows no loaders: this class is where the two meet.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch

from saekit.config import PluginChoice
from saekit.errors import ConfigError, SAEFormatError
from saekit.files.names import SAE_CONFIG
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager
from saekit.pretrained.asking import ReleaseFiles, asked_for, catalog_of, hinting_at_release
from saekit.pretrained.exporting import export
from saekit.pretrained.load import load_sae
from saekit.pretrained.made import made_from, options_of
from saekit.pretrained.probe import check
from saekit.pretrained.published import load_published
from saekit.pretrained.pushing import push_sae
from saekit.sae.folder import save_sae, tell_of_name
from saekit.sae.module import SAEModule
from saekit.saved import SAEFiles
from saekit.site import Site, Sites
from saekit.values import Ports

__all__ = ["SAE"]

_S = TypeVar("_S", bound="SAE")


class SAE(SAEModule):
    """A sparse autoencoder (SAE), or a transcoder or crosscoder: activations as a few active features out of many.

    It reads activations ``x [..., d_in]`` of a language model, makes ``d_sae`` features of them, most of which are 0,
    and from these what it reads (or of a transcoder, what it writes) ``[..., d_out]``; ``W_dec [d_sae, d_out]`` has
    the direction of each feature in its rows.  It is a :class:`torch.nn.Module`::

        sae = saekit.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        model = saekit.load_model(sae)  # the one that it was trained on, loaded as in training
        tokens = torch.tensor([model.tokenize("The Golden Gate Bridge")])
        x = model.run(tokens, read=[sae.site.hook_name]).held[sae.site.hook_name]  # [batch, position, d_in]
        with torch.no_grad():
            features = sae.encode(x)  # [batch, position, d_sae]
            reconstruction = sae.decode(features, like=x)  # [batch, position, d_in], as sae(x)

    - Get one: :meth:`from_pretrained`, :meth:`from_hub`, :meth:`load`, :func:`saekit.train`, :meth:`from_dict`.
    - Use it: :meth:`encode`, :meth:`encode_topk`, :meth:`encode_sparse`, :meth:`decode`, ``sae(x)``; six hook points.
    - Know it: :attr:`info`, :attr:`site`, :attr:`config`, :attr:`log_sparsity`; :func:`saekit.evaluate`.
    - Look at its features, and put it into its model: :func:`saekit.top_texts`, :func:`saekit.dashboard`,
      :func:`saekit.splice`.
    - Keep it: :meth:`save`, :meth:`export`, :meth:`push_to_hub`.

    Architectures derive from this class: see :class:`saekit.sae.SAEModule`.
    """

    beside_mathematics: ClassVar[frozenset[str]] = frozenset(
        {"export", "from_dict", "from_hub", "from_pretrained", "from_release", "load", "push_to_hub", "save", "to_dict"}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """As always, but for what somebody gives who means :meth:`from_dict` or :meth:`load`."""
        given = args[0] if args else None
        told = isinstance(given, Mapping | str | os.PathLike) and not _takes(cls, args, kwargs)
        if told or (cls is SAE and kwargs and "ports" not in kwargs):
            raise ConfigError(
                f"{cls.__name__}(...) is how saekit builds an architecture. Of options, "
                "saekit.SAE.from_dict({'name': 'topk', 'd_in': 768, 'd_sae': 6144, 'k': 32}) makes an SAE, and "
                "saekit.SAE.load(folder) or saekit.SAE.from_pretrained(release, sae_id) loads one"
            )
        return super().__new__(cls)

    def save(self, path: str | Path) -> Path:
        """Write the SAE folder (``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``), all or nothing.

        sae-lens 6 reads it too, where it has the architecture.  A warning says why a class that is derived from one
        that it has is not saved by that one's name.
        """
        tell_of_name(self)
        return save_sae(self, as_path(path))

    def export(
        self,
        folder: str | Path,
        format: PluginChoice,  # noqa: A002 - as people say it
        *,
        plugins: PluginManager | None = None,
    ) -> Path:
        """Write it in the ``format`` of another library, as :func:`saekit.pretrained.formats` lists them.

        The key is that of the loader that reads it, such as ``"dictionary_learning"``.  Layers may share a folder; no
        file takes the place of another.  :class:`saekit.errors.SAEFormatError` says what has no place in the format.
        """
        return export(self, folder, format, plugins=plugins)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> Self:
        """The SAE in a folder, or in one file of weights, of whatever format a loader plugin knows.

        ``loader`` names one by its key, or is an object of its options class or a table, as in a configuration:
        ``{"name": "connor_rob_hook_z", "sae": "gpt2-small_L0_Hcat_z"}``.  ``dtype`` is what its weights shall be in:
        ``float32``, ``bfloat16`` or ``float64``; None: what they are in.  No second copy of them is made for it, nor
        for ``device``.  With ``verify``, what it computes is compared with the probe in the folder
        before it goes to ``dtype``: :class:`saekit.errors.SAEFormatError` says what does not fit.
        """
        how = {"loader": loader, "device": device, "dtype": dtype, "plugins": plugins}
        return _as(cls, _local(path, verify, **how))

    @classmethod
    def from_dict(
        cls,
        options: Mapping[str, Any],
        *,
        ports: Ports | None = None,
        site: Site | Sites | str | None = None,
        seed: int = 42,
        device: str = "cpu",
        plugins: PluginManager | None = None,
    ) -> Self:
        """An SAE of these options with starting weights: what `sae` holds in a configuration, ``d_in`` among it.

        ``{"name": "topk", "d_in": 768, "d_sae": 6144, "k": 32}``; ``architecture`` is understood for ``name``, too.
        ``b_dec`` starts at zero, as there are no activations to take a mean of.  ``ports`` are the sites with their
        widths, of what has several; among the options they are ``{"inputs": {"a": 8}, "targets": {"b": 4}}``.
        ``input_transform`` is there what normalizes rows, by its name or with its options.  ``site`` is where in a
        model it belongs, as :attr:`site` is set: a hook's name, a :class:`saekit.Site` or :class:`saekit.Sites`.
        """
        made = _as(cls, made_from(options, ports, seed, device, plugins))
        made.site = site
        return made

    def to_dict(self) -> dict[str, Any]:
        """The options of :meth:`from_dict`, which makes the same kind of SAE of them, of other weights.

        ``input_transform`` is among them where there is one, and ``ports`` where there is more than one nameless site.
        """
        return options_of(self)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        folder: str = "",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> Self:
        """The SAE in a folder of a Hugging Face repository, or in the one file of weights of that path in it.

        ``revision`` is a branch, a tag or a commit, and ``token`` as huggingface_hub has it: by default that with which
        you are logged in.  Only the files that the SAE needs are downloaded, into the Hub's cache.  ``dtype`` and
        ``verify`` are as for :meth:`load`.
        """
        files = SAEFiles.on_hub(repo_id, folder, revision=revision, token=token)
        how = {"loader": loader, "device": device, "dtype": dtype, "plugins": plugins}
        return _as(cls, _loaded(files, verify, **how))

    @classmethod
    def from_pretrained(
        cls,
        release: str | Path | None = None,
        sae_id: str | None = None,
        *,
        repo_id: str | None = None,
        folder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        releases: ReleaseFiles = (),
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> Self:
        """A published SAE, with its configuration, where it is from and, where it is known, how often features fire.

        ``from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")`` names a release and an SAE of it (`saekit
        saes list`); ``from_pretrained(repo_id="owner/repository", folder="layer_8")`` is :meth:`from_hub`, and
        ``from_pretrained("a/folder/here")`` is :meth:`load`.  A name of no release with one ``/`` in it is a
        repository, and ``sae_id`` the folder.

        ``revision`` and ``loader`` count more than what the release says.  ``releases`` are TOML files of releases,
        beside those that are known.  The rest is as for :meth:`from_hub`.
        :class:`saekit.errors.UnknownKeyError` for a name that is none has the nearest.
        """
        how: Any = {"loader": loader, "device": device, "dtype": dtype, "plugins": plugins}
        asked = asked_for(release, sae_id, repo_id, folder, releases, plugins)
        if asked.release is not None:
            found = load_published(asked.release, [asked.sae_id], revision=revision, token=token, verify=verify, **how)
            return _as(cls, next(sae for _, sae in found))
        if asked.path is not None and revision is not None:
            raise ConfigError(f"{asked.path} is a path on this machine, and revision is of repositories: leave it out")
        with asked.hinting():
            if asked.path is not None:
                return _as(cls, _local(asked.path, verify, **how))
            files = SAEFiles.on_hub(asked.repo_id or "", asked.folder, revision=revision, token=token)
            return _as(cls, _loaded(files, verify, **how))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str = "",
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        metrics: Mapping[str, float] | None = None,
        token: str | bool | None = None,
        probe: bool = True,
        preview: str | Path | None = None,
    ) -> str:
        """Put the SAE into a repository of the Hub, or into a folder of it, with a model card; the commit's address.

        One commit does it all.  The repository, and the branch ``revision``, are made if they are not there; who may
        see a new one says ``private``, by default as your account has it.  The card says what is known of the SAE, and
        how good it is: ``metrics`` are numbers by their names, as :attr:`saekit.TrainResult.metrics` has them or short
        ones (``l0``, ``explained_variance``, ``ce_recovered``, ``dead_features``), and any others, of which those that
        are NaN are left out.  A card that saekit did not make stays.  ``token`` is as huggingface_hub has it: by
        default that with which you are logged in.  The probe holds up to 16 rows of activations of a run: without
        ``probe`` it is left out, and what is loaded cannot be verified.

        With ``preview``, a new folder, nothing is sent: what would be in a new repository is written there, and the
        folder is what is returned.

        :class:`ConfigError` for what cannot be a repository or is no number, and :class:`StorageError` where the Hub
        does not take it.
        """
        return push_sae(
            self, repo_id, folder=folder, metrics=metrics, private=private, revision=revision, message=commit_message,
            token=token, probe=probe, preview=preview,
        )  # fmt: skip

    @classmethod
    def from_release(
        cls,
        release: str,
        sae_ids: Iterable[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        releases: ReleaseFiles = (),
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> dict[str, Self]:
        """Several SAEs of one release by their ids, in that order, as :meth:`from_pretrained` gives them.

        The release is looked up once, its repository listed once, and its format looked at once.
        """
        found = catalog_of(releases, plugins).find(release)
        ids = [sae_ids] if isinstance(sae_ids, str) else list(sae_ids)
        how: Any = {"loader": loader, "device": device, "dtype": dtype, "plugins": plugins}
        loaded = load_published(found, ids, revision=revision, token=token, verify=verify, **how)
        return {name: _as(cls, sae) for name, sae in loaded}


def _loaded(files: SAEFiles, verify: bool, **how: Any) -> SAEModule:
    return load_sae(files, checked=check if verify else None, **how)


def _local(path: str | Path, verify: bool, **how: Any) -> SAEModule:
    """The SAE at ``path``, which knows where it was read from."""
    with hinting_at_release(path, how["plugins"]):
        files = SAEFiles.at(path)
    sae, place = _loaded(files, verify, **how), as_path(path)
    own = place / "sae"
    sae.read_from = (own if not (place / SAE_CONFIG).exists() and (own / SAE_CONFIG).is_file() else place).absolute()
    return sae


def _takes(cls: type[SAE], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it has an ``__init__`` of its own that takes these: a name as the first, say."""
    if cls.__init__ is SAE.__init__:
        return False
    try:
        inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def _as(cls: type[_S], sae: SAEModule) -> _S:
    if not isinstance(sae, cls):
        raise SAEFormatError(f"this is a {type(sae).__name__}, not a {cls.__name__}; load it with saekit.SAE.load")
    return sae
