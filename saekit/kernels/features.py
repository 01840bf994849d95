"""What is asked in the same words of all the features of a group of rows, and of the active ones alone."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from saekit.kernels.sparse import SparseFeatures

__all__ = ["Features", "at_features", "at_rows", "feature_sums", "row_sums", "values_of"]

Features: TypeAlias = Tensor | SparseFeatures
"""The features of a group of rows: all of them, ``[rows, d_sae]``, or those that are active."""


def values_of(features: Features) -> Tensor:
    """The numbers: ``[rows, d_sae]``, or of active features ``[entries]``."""
    return features.values if isinstance(features, SparseFeatures) else features


def at_features(each: Tensor, features: Features) -> Tensor:
    """``each [d_sae]``, a number for each feature, so that it goes with their values."""
    return each.index_select(0, features.features) if isinstance(features, SparseFeatures) else each


def at_rows(each: Tensor, features: Features) -> Tensor:
    """``each [rows]``, a number for each row, so that it goes with the values of its features."""
    return each.index_select(0, features.rows) if isinstance(features, SparseFeatures) else each[:, None]


def feature_sums(features: Features, values: Tensor) -> Tensor:
    """``[d_sae]``: the sums over the rows of ``values``, which are of the shape of the features'."""
    return features.sums(values) if isinstance(features, SparseFeatures) else values.sum(0)


def row_sums(features: Features, values: Tensor) -> Tensor:
    """``[rows]``: the sums over the features of ``values``, which are of the shape of the features'."""
    return features.row_sums(values) if isinstance(features, SparseFeatures) else values.sum(1)
