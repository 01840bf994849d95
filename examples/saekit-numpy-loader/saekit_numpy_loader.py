"""Pretrained loader ``npz``: an SAE in one NumPy archive."""

import attrs
import numpy as np

from saekit import Entry, PretrainedSAE, SAEFiles, Site, hookimpl
from saekit.errors import SAEFormatError


@attrs.frozen(kw_only=True)
class NpzConfig:
    """No options."""


class NpzLoader:
    """Reads the one ``.npz`` file of a folder or repository; object arrays, which hold pickles, are refused."""

    def detects(self, files: SAEFiles) -> bool:
        return any(name.endswith(".npz") and "/" not in name for name in files.names)

    def load(self, files: SAEFiles) -> PretrainedSAE:
        import torch

        try:
            with np.load(files.path(files.only(".npz")), allow_pickle=False) as archive:
                arrays = dict(archive)
            d_in, d_sae = arrays["W_enc"].shape
        except Exception as error:  # numpy raises six kinds for a damaged file
            raise SAEFormatError(f"the .npz file in {files.place} does not hold an SAE: {error!r}") from error
        return PretrainedSAE(
            options={"d_in": d_in, "d_sae": d_sae, "normalize_sae_decoder": False},
            tensors={name: torch.from_numpy(array) for name, array in arrays.items() if name != "hook_name"},
            site=Site(hook_name=str(arrays["hook_name"])) if "hook_name" in arrays else None,
        )


@hookimpl
def saekit_register_pretrained_loaders():
    yield Entry("npz", NpzConfig, lambda config: NpzLoader(), summary="one NumPy archive")
