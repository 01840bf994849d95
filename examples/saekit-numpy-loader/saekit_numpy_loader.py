"""Pretrained loader ``npz``: an SAE in one NumPy archive."""

import attrs
import numpy as np

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl


@attrs.frozen(kw_only=True)
class NpzConfig:
    """No options."""


class NpzLoader:
    """Reads the one ``.npz`` file of a folder or repository; object arrays, which hold pickles, are refused."""

    def detects(self, files: SAEFiles) -> bool:
        return any(name.endswith(".npz") for name in files.names)

    def load(self, files: SAEFiles) -> PretrainedSAE:
        import torch

        with np.load(files.path(files.only(".npz")), allow_pickle=False) as archive:
            arrays = dict(archive)
        hook_name = arrays.pop("hook_name", None)
        d_in, d_sae = arrays["W_enc"].shape
        return PretrainedSAE(
            options={"d_in": d_in, "d_sae": d_sae, "normalize_sae_decoder": False},
            tensors={name: torch.from_numpy(array) for name, array in arrays.items()},
            site=None if hook_name is None else Site(hook_name=str(hook_name)),
        )


@hookimpl
def saekit_register_pretrained_loaders():
    yield Entry("npz", NpzConfig, lambda config: NpzLoader(), summary="one NumPy archive")
