"""What things are called at neuronpedia.org, and their addresses there.  Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Self
from urllib.parse import quote

import attrs

from saekit.errors import ConfigError

__all__ = ["ADDRESS", "NeuronpediaName", "quick_list_url"]

ADDRESS = "https://neuronpedia.org"
_ID = re.compile(r"(?P<model>\w[\w.-]*)/(?P<layer>[^\W_]+)-(?P<set>[\w.-]+?)(?:__(?P<suffix>[\w.-]+))?")


@attrs.frozen
class NeuronpediaName:
    """The name of an SAE at Neuronpedia: ``gpt2-small/8-res-jb``, of which each part has a place in its files.

    ``gemma-2-2b/12-gemmascope-res-16k__l0-82``, too: what follows two underscores is a suffix.
    """

    model: str
    """Neuronpedia's name of the model, which is not always that of the weights."""
    layer: str
    """A number, as a rule; ``e`` for what is embedded."""
    set: str
    """The set of SAEs that it is one of."""
    suffix: str | None = None
    """Which of them, where a layer has several."""

    @classmethod
    def of(cls, name: object) -> Self:
        """Of its text; :class:`ConfigError` for what is none."""
        match = _ID.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise ConfigError(
                [("neuronpedia_id", f"must be MODEL/LAYER-SET, such as gpt2-small/8-res-jb, found {name!r}")]
            )
        return cls(match["model"], match["layer"], match["set"], match["suffix"])

    @property
    def source(self) -> str:
        """The part after the slash, ``8-res-jb``, which Neuronpedia calls a source, and in places a layer."""
        return f"{self.layer}-{self.set}" + (f"__{self.suffix}" if self.suffix else "")

    @property
    def layer_number(self) -> int:
        """The layer as a number; :class:`ConfigError` where it is none."""
        if not self.layer.isdecimal():
            raise ConfigError(
                [("neuronpedia_id", f"names the layer {self.layer!r} in {str(self)!r}, and the batches of SAEDashboard "
                  "have whole numbers there: write another schema (sae_lens_3 or bulk)")]
            )  # fmt: skip
        return int(self.layer)

    def page(self, index: int) -> str:
        """The address of a feature's page."""
        return f"{ADDRESS}/{self}/{_index(index)}"

    def __str__(self) -> str:
        return f"{self.model}/{self.source}"


def quick_list_url(neuronpedia_id: str | NeuronpediaName, features: Iterable[int], name: str = "features") -> str:
    """The address of a page that shows these features of an SAE as a list, which is kept nowhere.

    The model is named as Neuronpedia calls it, by the id's first part.
    """
    one = neuronpedia_id if isinstance(neuronpedia_id, NeuronpediaName) else NeuronpediaName.of(neuronpedia_id)
    if not isinstance(name, str):
        raise ConfigError([("name", f"must be a text, found {name!r}")])
    listed = [{"modelId": one.model, "layer": one.source, "index": str(_index(number))} for number in features]
    if not listed:
        raise ConfigError([("features", "names none")])
    return f"{ADDRESS}/quick-list/?name={quote(name, safe='')}&features={quote(json.dumps(listed), safe='')}"


def _index(number: object) -> int:
    """A feature's number; NumPy's are numbers, too."""
    try:
        found = number.__index__()  # type: ignore[attr-defined]
    except AttributeError:
        found = -1
    if isinstance(number, bool) or not isinstance(found, int) or found < 0:
        raise ConfigError([("features", f"must be whole numbers of 0 or more, found {number!r}")])
    return found
