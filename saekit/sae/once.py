"""Features and outputs of the same inputs, with the encoder run once."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.distributed.share import Share
from saekit.kernels import inference
from saekit.kernels.sparse import SparseFeatures
from saekit.sae.module import SAEModule

__all__ = ["features_and_outputs", "of_all_parts"]


@torch.no_grad()
def features_and_outputs(sae: SAEModule, x: Tensor) -> tuple[SparseFeatures, Tensor]:
    """What :meth:`~saekit.SAE.encode_sparse` gives for ``x``, and the reconstructions, in the shape of outputs.

    With the hooks of the SAE, and without its error term, whatever ``use_error_term`` says.  Of one whose features are
    split over processes, all of these must ask, with the same ``x``: each gets the features and outputs of the whole.
    """
    rows = sae.run_hook("input", sae._rows(x))
    like = x if sae.input_transform is None else rows.reshape(x.shape).to(x.dtype)
    read = sae.transformed(rows)
    kernel = None if sae._hooked("acts_pre", "acts_post") else sae._kernel_for(read)
    if kernel is None:
        dense, passed = sae.features_and_bypass(read)
        dense = sae.run_hook("acts_post", dense)
        outputs = sae._with(passed, sae.decode(dense, like=like), rows)
        return of_all_parts(inference.nonzero_features(dense.reshape(-1, sae.d_sae)), sae.share), outputs
    flat = read.detach().reshape(-1, read.shape[-1]).contiguous()
    found: list[SparseFeatures] = []
    outputs = flat.new_empty(len(flat), sae.d_out)
    with sae._lent(kernel) as workspace:
        decoder = kernel.decoder(sae)
        for start, group in kernel.groups(sae, flat, workspace):
            outputs[start : start + group.shape[0]] = decoder(group)
            found.append(group if isinstance(group, SparseFeatures) else inference.nonzero_features(group))
    features = SparseFeatures.joined(found) if found else inference.nonzero_features(flat.new_zeros(0, sae.d_sae))
    outputs = sae._finished(outputs.reshape(*rows.shape[:-1], sae.d_out), like)
    return features, sae.with_bypass(outputs, rows)


def of_all_parts(own: SparseFeatures, share: Share) -> SparseFeatures:
    """The features of all processes that ``share`` them, of which ``own`` are this one's: by rows, then by features."""
    if share.parts == 1:
        return own
    group, like = share.features, own.values.device
    counts = [int(count) for count in group.gather(torch.tensor(len(own.values), device=like))]
    first = share.first_feature(own.d_sae)
    if max(counts):
        rows, features, values = (
            torch.cat(group.gather_rows(found, counts)) for found in (own.rows, own.features + first, own.values)
        )
        order = torch.argsort(rows * (own.d_sae * share.parts) + features)
        rows, features, values = rows[order], features[order], values[order]
    else:
        rows, features, values = own.rows, own.features, own.values
    return SparseFeatures(rows, features, values, own.shape[0], own.d_sae * share.parts)
