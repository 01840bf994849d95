"""What a run was to do, from its ``config.toml`` as plain data: it is said without any plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from saekit.config.formats import read_toml
from saekit.defaults import ALWAYS_TRACKED
from saekit.files.storage import check_file

__all__ = ["Options"]


@attrs.frozen
class Options:
    """A configuration that was written, whatever there is of it."""

    table: Mapping[str, Any] = attrs.field(factory=dict)
    problem: str | None = None
    """Why it could not be read."""

    @classmethod
    def read(cls, path: Path) -> Options:
        """Those in a file."""
        try:
            check_file(path)
            table = read_toml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls({}, f"{path} is not there")
        except (OSError, ValueError, RecursionError) as error:
            return cls({}, f"{path} cannot be read: {error}")
        return cls(table)

    def get(self, path: str, default: Any = None) -> Any:
        """The option at a dotted ``path``; of a plugin that is chosen with options, its key."""
        found: Any = self.table
        for key in path.split("."):
            if not isinstance(found, Mapping) or key not in found:
                return default
            found = found[key]
        if isinstance(found, Mapping) and isinstance(found.get("name"), str):
            return found["name"]
        return default if found is None else found

    def text(self, path: str) -> str:
        """The option as a text, empty where it is none."""
        found = self.get(path)
        return found if isinstance(found, str) else ""

    def whole(self, path: str) -> int:
        """The option as a whole number, 0 where it is none."""
        found = self.get(path)
        return found if isinstance(found, int) and not isinstance(found, bool) else 0

    @property
    def architecture(self) -> str:
        """The key of the architecture, without the name of saekit's own distribution."""
        distribution, colon, name = self.text("sae").partition(":")
        return name if distribution == "saekit" else distribution + colon + name

    @property
    def total_tokens(self) -> int:
        """Activation vectors to train on, fine-tuning's included; 0 where it is not known."""
        tokens = self.whole("training.training_tokens")
        return tokens + self.whole("training.finetuning_tokens") if tokens else 0

    @property
    def site(self) -> str:
        """The sites that are read and those that are written, in words."""
        read, written = (_names(self.table.get(key)) for key in ("inputs", "targets"))
        if not read:
            return _names([self.table.get("site")])
        return read if not written or written == read else f"{read} to {written}"

    @property
    def metrics_file(self) -> str:
        """The name of the file of metrics."""
        trackers = self.table.get("trackers")
        for one in trackers if isinstance(trackers, list) else ():
            if isinstance(one, Mapping) and one.get("name") == ALWAYS_TRACKED and isinstance(one.get("file"), str):
                return str(one["file"])
        return "metrics.jsonl"


def _names(sites: object) -> str:
    """Of tables of sites, as :attr:`saekit.Site.name` has them."""
    found = []
    for one in sites if isinstance(sites, list) else ():
        if isinstance(one, Mapping) and isinstance(one.get("hook_name"), str):
            head = one.get("hook_head_index")
            found.append(one["hook_name"] + (f".head{head}" if isinstance(head, int) else ""))
    return "+".join(found)
