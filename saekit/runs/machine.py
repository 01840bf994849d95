"""What a machine is, as far as speed depends on it: to stand beside every figure that was measured on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import torch

from saekit.kernels.private_torch import has_bfloat16_products

__all__ = ["Machine", "this_machine"]

_LIBRARIES = {
    "ATEN_CPU_CAPABILITY": "torch",
    "ONEDNN_MAX_CPU_ISA": "oneDNN",
    "DNNL_MAX_CPU_ISA": "oneDNN",
    "MKL_ENABLE_INSTRUCTIONS": "MKL",
}
"""Whom each of these has use fewer instructions than the CPU has."""
_NAMES = {"AVX512": "AVX-512", "DEFAULT": "neither AVX2 nor AVX-512"}


@attrs.frozen(kw_only=True)
class Machine:
    """A machine, and what runs on it."""

    cpu: str
    """Its model, as the system calls it."""
    instructions: str
    """Those that count: `AVX2`, `AVX-512 with VNNI, bfloat16`."""
    held: Mapping[str, str]
    """Variables that hold the libraries to fewer, with their values."""
    bfloat16_products: bool
    """Whether the CPU multiplies bfloat16 by itself, and may."""
    cores: int
    """That this process may use."""
    threads: int
    """Of torch."""
    torch: str
    """Its version."""
    triton: str | None
    """Its version, where it is installed."""
    gpu: str | None
    """The name of the device that was measured, where that is a GPU."""

    @property
    def held_to(self) -> str | None:
        """What the libraries are held to, in words: `AVX2`, or what holds some of them to it; None: to nothing.

        It changes every figure, and stands in the name.
        """
        values = {value.upper() for value in self.held.values()}
        if len(values) == 1 and len({_LIBRARIES[name] for name in self.held}) == len(set(_LIBRARIES.values())):
            return values.pop()
        return " and ".join(f"{name}={value}" for name, value in self.held.items()) or None

    @property
    def name(self) -> str:
        """In a line: ``2 cores of AMD EPYC with AVX2, torch 2.13.0``."""
        held = "" if self.held_to is None else f", held to {self.held_to}"
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''} of {self.cpu} with {self.instructions}"
        threads = "" if self.threads == self.cores else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        gpu = "" if self.gpu is None else f"{self.gpu}; "
        return f"{gpu}{cores}{held}{threads}, torch {self.torch}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, its name among it."""
        return {"name": self.name, "held_to": self.held_to, **attrs.asdict(self)}


def this_machine(device: torch.device | str = "cpu") -> Machine:
    """The one that this runs on, for what is measured on ``device``."""
    device = torch.device(device)
    model, flags = _cpu()
    held = {name: os.environ[name] for name in _LIBRARIES if os.environ.get(name)}
    return Machine(
        cpu=model,
        instructions=_instructions(set() if held else flags),
        held=held,
        bfloat16_products=has_bfloat16_products(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__.partition("+")[0],
        triton=_version("triton"),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else _other(device),
    )


def _other(device: torch.device) -> str | None:
    return None if device.type == "cpu" else device.type


def _cpu() -> tuple[str, set[str]]:
    """The model of the CPU, and the instructions that the system lists; none where it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine() or "an unknown CPU", set()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = " ".join(facts.get("model name", "").split()) or platform.machine() or "an unknown CPU"
    return model, set((facts.get("flags") or facts.get("Features") or "").split())


def _instructions(flags: set[str]) -> str:
    """The set that torch uses, and those for small numbers that the CPU has beside it."""
    found = torch.backends.cpu.get_cpu_capability()
    more = ["VNNI"] if flags & {"avx512_vnni", "avx_vnni"} else []
    more += ["bfloat16"] if has_bfloat16_products() else []
    more += ["AMX"] if "amx_tile" in flags else []
    return _NAMES.get(found, found) + (f" with {', '.join(more)}" if more else "")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
