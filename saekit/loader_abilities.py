"""What a pretrained loader may have beside what it promises; :mod:`saekit.abilities` has these, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from saekit.protocols import PretrainedLoader

if TYPE_CHECKING:
    from pathlib import Path

    from saekit.converted import ConvertedConfig
    from saekit.saved import SAEFiles

__all__ = ["ConvertsConfigs", "KnowsParts", "LocatesFiles", "WritesSAEs"]


@runtime_checkable
class LocatesFiles(PretrainedLoader, Protocol):
    """A loader that knows which file a release means by a path that is neither a file nor a folder."""

    def locate(self, path: str, names: Collection[str]) -> str | None:
        """The path of a file or folder among ``names``, all files of the repository; None: there is none."""


@runtime_checkable
class KnowsParts(PretrainedLoader, Protocol):
    """A pretrained loader that knows which files its format has beside those that are there, for messages."""

    def missing_part(self, files: SAEFiles) -> str | None:
        """Where ``files`` are of its format but for one that is missing: its name, and of which other file it is.

        Such as ``sae_weights.safetensors beside cfg.json``.  None: they do not look like its format, or are whole.
        Judged as by ``detects``, and asked only where no loader recognizes the files.
        """


@runtime_checkable
class ConvertsConfigs(Protocol):
    """A pretrained loader that knows the configurations of its library's runs, too, for `saekit convert-config`."""

    def convert_config(self, table: Mapping[str, Any]) -> ConvertedConfig | None:
        """What ``table``, as the library saved it, is here; None: it is no configuration of that library.

        Raise :class:`saekit.errors.ConfigError` for one that is, and that cannot be converted.
        """


@runtime_checkable
class WritesSAEs(Protocol):
    """A pretrained loader that writes its format, too, for `SAE.export`; what it reads of that is the same SAE."""

    def write_sae(self, sae: Any, folder: Path) -> None:
        """Write ``sae``, a :class:`saekit.SAE`, into ``folder``, which is new and empty.

        Its ``public_tensors()`` are what is to be written.  Raise :class:`saekit.errors.SAEFormatError` with what the
        format has no place for.
        """
