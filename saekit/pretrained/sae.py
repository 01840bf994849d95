"""``SAE``: a dictionary that is loaded and saved, for people.

The module itself, :class:`saekit.sae.SAEModule`, knows no loaders: this class is where the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import torch

from saekit.config import PluginChoice
from saekit.errors import SAEFormatError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager
from saekit.pretrained.load import load_sae
from saekit.pretrained.pushing import push_sae
from saekit.sae.folder import save_sae
from saekit.sae.module import SAEModule
from saekit.saved import SAEFiles

__all__ = ["SAE"]

_S = TypeVar("_S", bound="SAE")


class SAE(SAEModule):
    """What users load, and architectures derive from; all it can do beside files is :class:`SAEModule`'s."""

    beside_mathematics: ClassVar[frozenset[str]] = frozenset({"from_hub", "load", "push_to_hub", "save"})

    def save(self, path: str | Path) -> Path:
        """Write the SAE folder (``cfg.json``, ``sae_weights.safetensors``, ``sparsity.safetensors``), all or nothing.

        sae-lens 6 reads it too, where it has the architecture.
        """
        return save_sae(self, as_path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        loader: PluginChoice | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        plugins: PluginManager | None = None,
    ) -> Self:
        """The SAE in a folder, or in one file of weights, of whatever format a loader plugin knows.

        ``loader`` names one by its key, or is an object of its options class or a table, as in a configuration:
        ``{"name": "connor_rob_hook_z", "sae": "gpt2-small_L0_Hcat_z"}``.  ``dtype`` is what its weights shall be in:
        ``float32``, ``bfloat16`` or ``float64``; None: what they are in.  No second copy of them is made for it, nor
        for ``device``.
        """
        return _as(cls, load_sae(SAEFiles.at(path), loader=loader, device=device, dtype=dtype, plugins=plugins))

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
    ) -> Self:
        """The SAE in a folder of a Hugging Face repository, or in the one file of weights of that path in it.

        ``revision`` is a branch, a tag or a commit, and ``token`` as huggingface_hub has it: by default that with which
        you are logged in.  Only the files that the SAE needs are downloaded, into the Hub's cache.
        """
        files = SAEFiles.on_hub(repo_id, folder, revision=revision, token=token)
        return _as(cls, load_sae(files, loader=loader, device=device, dtype=dtype, plugins=plugins))

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
    ) -> str:
        """Put the SAE into a repository of the Hub, or into a folder of it, with a model card; the commit's address.

        One commit does it all.  The repository, and the branch ``revision``, are made if they are not there; who may
        see a new one says ``private``, by default as your account has it.  The card says what is known of the SAE, and
        of ``metrics``, as :attr:`saekit.TrainResult.metrics` has them, how good it is; one that saekit did not make
        stays.  ``token`` is as huggingface_hub has it: by default that with which you are logged in.

        :class:`ConfigError` for what cannot be a repository, and :class:`StorageError` where the Hub does not take it.
        """
        return push_sae(
            self, repo_id, folder=folder, metrics=metrics, private=private, revision=revision, message=commit_message,
            token=token,
        )  # fmt: skip


def _as(cls: type[_S], sae: SAEModule) -> _S:
    if not isinstance(sae, cls):
        raise SAEFormatError(f"this is a {type(sae).__name__}, not a {cls.__name__}; load it with saekit.SAE.load")
    return sae
