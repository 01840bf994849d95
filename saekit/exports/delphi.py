"""A feature store as the cache from which delphi interprets features: files of ranges of them, for each module.

``FOLDER/MODULE/{first}_{last}.safetensors`` has ``locations [n, 3]``: context, position, and feature minus ``first``;
``activations [n]`` in float16; and ``tokens [contexts, context_size]``.  Both ends of a range are in it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from saekit.abilities import TranslatesHooks
from saekit.errors import ConfigError, DataError, PlaceError
from saekit.features.store import SAEFeatures
from saekit.files.names import fault_of_name
from saekit.files.storage import new_folder, read_json, write_text
from saekit.files.tensors import save_tensors

__all__ = ["DelphiCache", "module_path_of"]

_LEAST = 1e-5  # what delphi takes for zero
_NARROW = 1 << 16  # numbers below this fit uint16
_LARGEST = float(np.finfo(np.float16).max)
_STACKS = re.compile(r"(model\.|transformer\.|gpt_neox\.|language_model\.)+")  # of classes with a head
_OF_LENS = re.compile(r"blocks\.\d+\..+|hook_\w+|ln_final\.\w+")


def module_path_of(hook: str, backend: object | None) -> str:
    """The module whose output a hook holds, as delphi names it: ``layers.5``, without the class's own prefix.

    ``backend``, of a model of transformers, translates the names of transformer_lens; where there is none, a hook must
    be a module's path already.  :class:`ConfigError` where no module's output is what the hook holds.
    """
    found: str | None = hook
    if backend is not None:
        found = backend.hook_like(hook) if isinstance(backend, TranslatesHooks) else None
    if found is None or _OF_LENS.fullmatch(found):
        how = "pass a model of transformers, which knows (model), or " if backend is None else ""
        raise ConfigError(
            [("module_path", f"is missing: delphi names modules of transformers, and {hook!r} is a name of "
              f"transformer_lens; {how}say the path, such as layers.5")]
        )  # fmt: skip
    path = _STACKS.sub("", found, count=1) if _STACKS.match(found) else found
    if not path.endswith(".input"):
        return path
    layer = re.fullmatch(r"(.+)\.(\d+)\.input", path)
    if layer is not None and int(layer[2]) > 0:  # what enters a layer is what the one before it gives
        return f"{layer[1]}.{int(layer[2]) - 1}"
    raise ConfigError(
        [("module_path", f"is missing: {hook!r} is the input of {path.removesuffix('.input')!r}, and delphi names "
          "modules by their outputs; say the path of the module that it shall be called by")]
    )  # fmt: skip


@attrs.frozen(eq=False)
class DelphiCache:
    """What is to be written of one SAE."""

    sae: SAEFeatures
    module_path: str = attrs.field()
    n_splits: int

    @module_path.validator
    def _check_path(self, attribute: attrs.Attribute[str], value: str) -> None:
        if fault := fault_of_name(value):
            raise ConfigError([(attribute.name, f"{fault}: found {value!r}, expected such as layers.5")])

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.n_splits <= self.sae.about.d_sae:
            raise ConfigError(
                [("n_splits", f"must be 1 to {self.sae.about.d_sae:,}, the SAE's features, found {self.n_splits}")]
            )
        self._check_complete()

    def _check_complete(self) -> None:
        """:class:`DataError` unless every activation is in the store: delphi counts them, and looks at others."""
        sae = self.sae
        starts = sae.table("index", "starts")
        lacking = sae.indices[np.diff(starts) < sae.fired]
        if len(lacking):
            raise DataError(
                f"of {len(lacking):,} features of {sae.name} (such as {lacking[0]}) the store has a sample of the "
                "activations, and delphi's cache has all. Collect again with "
                f"max_per_feature={int(sae.fired.max())} (--max-per-feature)"
            )
        if len(sae) < sae.about.d_sae:
            raise DataError(
                f"the store has {len(sae):,} of the {sae.about.d_sae:,} features of {sae.name}, and in delphi's cache "
                "the others would be such that never fire. Collect all (features='all')"
            )
        largest = max(float(np.abs(sae.maximum).max()), float(np.abs(sae.minimum).max()))
        if largest > _LARGEST:
            raise DataError(
                f"{sae.name} has activations up to {largest:.3g}, and delphi's cache holds float16, up to "
                f"{_LARGEST:,.0f}: scale the SAE's activations first"
            )

    def write(self, folder: Path, report: Callable[[int], Any], *, overwrite: bool = False) -> Path:
        """Write all of it, or nothing, into a folder of the module's name below ``folder``; that folder."""
        home = folder / self.module_path
        if home.exists():
            if not overwrite:
                raise PlaceError(f"{str(home)!r} is there already: name another folder, or say overwrite (--overwrite)")
            if not self._is_cache(home):
                raise PlaceError(f"{str(home)!r} holds something else than delphi's cache: name another folder")
        with new_folder(home, replace=overwrite) as temporary:
            write_text(temporary / "config.json", json.dumps(self._config(), indent=1, allow_nan=False) + "\n")
            tokens = torch.from_numpy(self.sae.store.contexts.astype(np.int64))
            for first, last in self._ranges():
                tensors = self._range(first, last) | {"tokens": tokens}
                save_tensors(temporary / f"{first}_{last}.safetensors", tensors)
                report(last - first + 1)
        return home

    @staticmethod
    def _is_cache(home: Path) -> bool:
        if not home.is_dir() or home.is_symlink():
            return False
        names = {path.name for path in home.iterdir()}
        try:
            config = read_json(home / "config.json") if "config.json" in names else {}
        except (OSError, ValueError):
            return False
        ours = isinstance(config, dict) and (not config or {"n_splits", "cache_ctx_len"} <= config.keys())
        return ours and all(re.fullmatch(r"\d+_\d+\.safetensors", name) for name in names - {"config.json"})

    def _ranges(self) -> Iterator[tuple[int, int]]:
        bounds = np.linspace(0, self.sae.about.d_sae, self.n_splits + 1).astype(np.int64).tolist()
        yield from ((first, after - 1) for first, after in itertools.pairwise(bounds))

    def _range(self, first: int, last: int) -> dict[str, torch.Tensor]:
        """The activations of features ``first`` to ``last``, token by token."""
        columns: list[Sequence[NDArray[Any]]] = []
        for row in range(*np.searchsorted(self.sae.indices, [first, last + 1])):
            contexts, positions, values, _ = self.sae.entries(row)
            there = np.abs(values) > _LEAST
            own = np.full(int(there.sum()), self.sae.indices[row] - first)
            columns.append((contexts[there], positions[there], own, values[there].astype(np.float16)))
        contexts, positions, own, values = (np.concatenate(one) for one in zip(*columns, strict=True))
        order = np.lexsort((own, positions, contexts))
        locations = np.stack([contexts, positions, own], axis=1)[order]
        small = locations.max(initial=0) < _NARROW
        return {
            "locations": torch.from_numpy(locations.astype(np.uint16 if small else np.uint32)),
            "activations": torch.from_numpy(values[order]),
        }

    def _config(self) -> dict[str, Any]:
        store = self.sae.store
        return {
            "dataset_repo": str(store.manifest.dataset.get("dataset") or ""),
            "dataset_split": "train",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": 32,
            "cache_ctx_len": store.context_size,
            "n_tokens": store.n_contexts * store.context_size,
            "n_splits": self.n_splits,
            "model_name": store.model_name,
        }
