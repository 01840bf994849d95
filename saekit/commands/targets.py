"""What can be checked of `saekit pretokenize` before a library is imported: see :mod:`saekit.commands.preflight`."""

from __future__ import annotations

from pathlib import Path

from saekit.config import PretokenizeConfig
from saekit.errors import ConfigError, ModelError, PlaceError
from saekit.hub import is_path

__all__ = ["WITH_A_TOKEN", "check_target", "check_tokenizer"]

WITH_A_TOKEN = "Pushing needs a token that may write there (`hf auth login`, or HF_TOKEN)"


def check_target(config: PretokenizeConfig) -> None:
    """The folder must be new, and the repository one that can be pushed to."""
    if config.folder is not None and Path(config.folder).exists():
        raise ConfigError([("folder", f"{config.folder!r} exists already; choose another, or remove it")])
    if config.hub_repo_id is not None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(config.hub_repo_id)
            fault = "" if "/" in config.hub_repo_id else "it has no owner"
        except HFValidationError as error:
            fault = str(error).splitlines()[0]
        if fault:
            raise ConfigError([("hub_repo_id", f"must be owner/name, found {config.hub_repo_id!r}: {fault}")])
        if config.folder is None and get_token() is None:  # all the work would be lost
            raise PlaceError(f"cannot push to the dataset repository {config.hub_repo_id!r}: {WITH_A_TOKEN}")


def check_tokenizer(name: str) -> None:
    """A tokenizer that only a folder can be meant by must be there."""
    if not Path(name).exists() and is_path(name):
        raise ModelError(f"the tokenizer {name!r} cannot be loaded: there is no such folder")
