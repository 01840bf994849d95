"""``SAE``: a dictionary that is loaded and saved, for people.

The module itself, :class:`saekit.sae.SAEModule`, knows no loaders: this class is where the two meet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from saekit.config import PluginChoice
from saekit.errors import SAEFormatError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager
from saekit.pretrained.exporting import export
from saekit.pretrained.load import load_sae
from saekit.pretrained.probe import check
from saekit.sae.folder import save_sae
from saekit.sae.module import SAEModule
from saekit.saved import SAEFiles

__all__ = ["SAE"]

_S = TypeVar("_S", bound="SAE")


class SAE(SAEModule):
    """What users load, and architectures derive from; all it can do beside files is :class:`SAEModule`'s."""

    beside_mathematics: ClassVar[frozenset[str]] = frozenset({"export", "from_hub", "load", "save"})

    def save(self, path: str | Path) -> Path:
        """Write the SAE folder (``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``), all or nothing.

        sae-lens 6 reads it too, where it has the architecture.
        """
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
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> Self:
        """The SAE in a folder, or in one file of weights, of whatever format a loader plugin knows.

        ``loader`` names one by its key, or is an object of its options class or a table, as in a configuration:
        ``{"name": "connor_rob_hook_z", "sae": "gpt2-small_L0_Hcat_z"}``.  With ``verify``, what it computes is compared
        with the probe in the folder: :class:`saekit.errors.SAEFormatError` says what does not fit.
        """
        return _as(cls, _loaded(SAEFiles.at(path), verify, loader=loader, device=device, plugins=plugins))

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        folder: str = "",
        *,
        revision: str | None = None,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        plugins: PluginManager | None = None,
        verify: bool = False,
    ) -> Self:
        """The SAE in a folder of a Hugging Face repository, or in the one file of weights of that path in it.

        ``verify`` is as for :meth:`load`.
        """
        files = SAEFiles.on_hub(repo_id, folder, revision=revision)
        return _as(cls, _loaded(files, verify, loader=loader, device=device, plugins=plugins))


def _loaded(files: SAEFiles, verify: bool, **how: Any) -> SAEModule:
    sae = load_sae(files, **how)
    if verify:
        check(sae, files)
    return sae


def _as(cls: type[_S], sae: SAEModule) -> _S:
    if not isinstance(sae, cls):
        raise SAEFormatError(f"this is a {type(sae).__name__}, not a {cls.__name__}; load it with saekit.SAE.load")
    return sae
