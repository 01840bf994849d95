"""What is known of published SAEs before any file is fetched: a release, and the SAEs of it by their ids.

Facts that nobody stated are None, and no number is put in their place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from saekit.errors import ConfigError
from saekit.files.paths import leads_out

__all__ = ["OVERRIDES", "Release", "ReleasedSAE", "fault_of_hooks"]

OVERRIDES: Mapping[str, type] = {
    "model_name": str, "hook_name": str, "dataset_path": str, "normalize_activations": str, "context_size": int,
    "prepend_bos": bool, "model_from_pretrained_kwargs": dict, "revision": str,
}  # fmt: skip
"""What a release may say of its SAEs that counts more than what their files say, and of which kind it is."""
_TEXTS, _NUMBERS = ("path", "neuronpedia"), ("l0", "explained_variance", "norm_scaling_factor")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stays(path: str, where: str) -> None:
    if leads_out(path):
        raise ConfigError([(where, f"{path!r} leads out of the repository or folder: no leading / and no .., please")])


@attrs.frozen(kw_only=True)
class ReleasedSAE:
    """One SAE of a release."""

    id: str
    """By which it is asked for: ``blocks.8.hook_resid_pre``."""
    path: str = attrs.field(validator=lambda _, __, path: _stays(path, "path"))
    """Where it lies in the repository: a folder, a file of weights, or what the loader takes for one.  Left out: as the
    id."""
    l0: float | None = None
    """Features that are active on a token, in the mean."""
    explained_variance: float | None = None
    norm_scaling_factor: float | None = None
    """What activations were multiplied by in training, where the files leave it open."""
    neuronpedia: str | None = None
    """Its name at neuronpedia.org: ``gpt2-small/8-res-jb``."""

    @path.default
    def _as_its_id(self) -> str:
        return self.id

    @classmethod
    def of(cls, id: str, facts: object, where: str) -> ReleasedSAE:  # noqa: A002 - it is called so
        """From a table of facts, from its path alone, or from nothing; :class:`ConfigError` names ``where``."""
        facts = {"path": facts} if isinstance(facts, str) else {} if facts is None else facts
        if not isinstance(facts, Mapping):
            raise ConfigError([(where, f"expected the SAE's path, or a table of facts; found {facts!r}")])
        known = {name: value for name, value in facts.items() if value is not None}
        for name, value in known.items():
            if name not in (*_TEXTS, *_NUMBERS):
                raise ConfigError([(f"{where}.{name}", f"is not a fact; there are {', '.join((*_TEXTS, *_NUMBERS))}")])
            if name in _TEXTS and not (isinstance(value, str) and value):
                raise ConfigError([(f"{where}.{name}", f"expected a text, found {value!r}")])
            if name in _NUMBERS and not (_is_number(value) and (name != "norm_scaling_factor" or value > 0)):
                above = " above 0" if name == "norm_scaling_factor" else ""
                raise ConfigError([(f"{where}.{name}", f"expected a number{above}, found {value!r}")])
        _stays(known.get("path", id), f"{where}.path")
        return cls(id=id, **known)


def fault_of_hooks(value: object) -> str | None:
    """What is wrong with :attr:`Release.hooks`; None: nothing."""
    if not isinstance(value, list | tuple):
        return f"expected a list of pairs, found {value!r}"
    for pair in value:
        if not isinstance(pair, list | tuple) or [type(one) for one in pair] != [str, str]:
            return f"expected pairs of a regular expression and a hook, found {pair!r}"
        pattern, hook = pair
        try:
            hook.format(*[""] * re.compile(pattern).groups)
        except re.error as error:
            return f"{pattern!r} is no regular expression: {error}"
        except (LookupError, ValueError, AttributeError):
            return f"{hook!r} has a {{number}} that is no group of {pattern!r}: the first is {{0}}"
    return None


def _check_hooks(release: object, field: attrs.Attribute[Any], value: object) -> None:
    if fault := fault_of_hooks(value):
        raise ConfigError([("hooks", fault)])


@attrs.frozen(kw_only=True, slots=False, eq=False)
class Release:
    """SAEs that were published together, of one model and in one format."""

    name: str
    """By which it is asked for: ``gpt2-small-res-jb``."""
    repo: str | None = None
    """The repository of the Hugging Face Hub."""
    folder: str | None = None
    """The folder on this machine, of a release that is on none."""
    model: str | None = None
    """The language model, as transformer_lens or the Hub calls it."""
    loader: str | None = None
    """The key of the loader that reads them.  None: as their files look."""
    revision: str | None = None
    """Branch, tag or commit.  None: ``main``."""
    overrides: Mapping[str, Any] = attrs.field(factory=dict)
    """What counts more than what the files say: some of :data:`OVERRIDES`."""
    links: Mapping[str, str] = attrs.field(factory=dict)
    """Addresses to read on: ``model``, ``dashboards``, ``publication``."""
    hooks: Sequence[Sequence[str]] = attrs.field(default=(), validator=_check_hooks)
    """Which hooks its SAEs read, where their ids do not begin with them: pairs of a regular expression, which is looked
    for in ``repo/path``, and the hook that this means, ``blocks.{0}.hook_resid_post`` with ``{0}`` for the first group.
    Empty: as other releases of the same loader say."""
    source: str = ""
    """Who says so: ``saekit``, a plugin's distribution, or ``user``."""
    where: str = ""
    """The same in words, for messages: the file, or the plugin."""
    ids: tuple[str, ...] = ()
    _facts: Callable[[str], ReleasedSAE] = attrs.field(repr=False)

    @property
    def key(self) -> str:
        """The qualified name, ``saekit:gpt2-small-res-jb``."""
        return f"{self.source}:{self.name}"

    @property
    def place(self) -> str:
        """The repository or the folder."""
        return self.repo or self.folder or ""

    @cached_property
    def saes(self) -> Mapping[str, ReleasedSAE]:
        """Those of it by their ids, in the order in which they were given."""
        return {one: self._facts(one) for one in self.ids}

    def about(self, sae: ReleasedSAE) -> dict[str, Any]:
        """What is said of one of its SAEs beside its files, by the names of :data:`OVERRIDES` and of facts."""
        said = {name: value for name, value in self.overrides.items() if name != "revision"}
        if sae.norm_scaling_factor is not None:
            said["norm_scaling_factor"] = sae.norm_scaling_factor
        return said
