"""What ``torchrun`` says of a process, and whether a configuration fits it.  Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from saekit.config.distributed import DistributedConfig
from saekit.errors import ConfigError

__all__ = ["Launched", "check_features", "check_layout", "check_mesh", "refuse_several"]


@attrs.frozen
class Launched:
    """One of several processes, or one alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its machine."""

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> Launched:
        """As the ``environment`` of ``torchrun`` says; without it, one process."""
        if "WORLD_SIZE" not in environment or "RANK" not in environment:
            return cls()
        numbers = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            text = environment.get(name, "0")
            if not text.isdecimal():
                raise ConfigError(
                    f"the environment variable {name} is {text!r}, expected a whole number, as torchrun sets it; unset "
                    "RANK and WORLD_SIZE for a run of one process"
                )
            numbers[name] = int(text)
        return cls(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])


def refuse_several(doing: str) -> None:
    """:class:`ConfigError` in one of several processes, for what one does alone."""
    if (size := Launched.here(os.environ).size) > 1:
        raise ConfigError(
            f"{size} processes were started (torchrun), and {doing} is for one; start it without torchrun, or unset "
            "RANK and WORLD_SIZE"
        )


def check_features(d_sae: int | None, parts: int) -> None:
    """:class:`ConfigError` where ``d_sae`` features, as far as they are known, cannot be split into so many parts."""
    if d_sae is not None and d_sae % parts:
        raise ConfigError(
            [("distributed.features", f"is {parts}, which does not divide the {d_sae:,} features of the SAE")]
        )


def check_mesh(config: DistributedConfig, launched: Launched) -> tuple[int, int]:
    """Processes along data, and along features or SAEs; :class:`ConfigError` where ``config`` does not fit their
    number."""
    size = launched.size
    name, width = ("saes", config.saes) if config.saes > 1 else ("features", config.features)
    if size == 1:
        wanted = width * (config.data or 1)
        if wanted > 1:
            path = f"distributed.{name}" if width > 1 else "distributed.data"
            raise ConfigError(
                [(path, f"asks for {wanted} processes, and this is one: start it with torchrun --nproc-per-node "
                  f"{wanted} --no-python saekit train ...")]
            )  # fmt: skip
        return 1, 1
    if size % width:
        raise ConfigError([(f"distributed.{name}", f"is {width}, which does not divide the {size} processes")])
    data = size // width
    if config.data is not None and config.data != data:
        raise ConfigError(
            [("distributed.data", f"is {config.data}, and {size} processes with distributed.{name} = {width} "
              f"leave {data}; leave it out, or start {config.data * width} processes")]
        )  # fmt: skip
    return data, width


def check_layout(config: DistributedConfig, saes: int) -> None:
    """:class:`ConfigError` where so many ``saes`` are too few to lay them out as ``config`` says."""
    if config.saes <= saes:
        return
    there = "this run trains one SAE" if saes == 1 else f"the sweep has {saes} SAEs"
    instead = "leave it out" if saes == 1 else f"choose {saes} at most"
    raise ConfigError(
        [("distributed.saes", f"is {config.saes}, and {there}, so some processes would have none; {instead}. To have "
          "several processes train one SAE, split batches or its features (distributed.features)")]
    )  # fmt: skip
