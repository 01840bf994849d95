"""Sweeps on the fake model, what they leave, and an architecture of their own."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import SAE, Forward
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.values import StepInput, StepOutput

DOCUMENTS = [{"text": "".join(f"value_{n}_{k} = {n * k}\n" for k in range(n % 7 + 12))} for n in range(150)]
Changes = Mapping[str, Mapping[str, Any]]
NOW = "seconds"  # what a line of metrics says of the clock


@attrs.frozen(kw_only=True)
class GainConfig(saekit.SAEConfig):
    """An architecture with a tensor of its own, which draws in every step."""

    penalty: float = 0.1
    """Weight of the sum of activations."""


class GainSAE(SAE):
    def __init__(self, config: Any, *, ports: Any, activation: Any) -> None:
        super().__init__(config, ports=ports, activation=activation)
        self.gain = torch.nn.Parameter(torch.rand(self.d_sae))  # of the process's random numbers, as torch's own are

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * self.gain

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        features = self.activation(self.pre_activations(x)) * self.gain
        kept = torch.rand(features.shape, generator=step.generator) < 0.9
        output = self.reconstruction(features * kept)
        loss = (output - x).pow(2).sum(-1).mean() + self.config.penalty * features.sum(-1).mean()
        return StepOutput(loss, {"mse_loss": loss.detach()}, output.detach(), (features > 0).sum(0))


class CountingBackend(FakeBackend):
    """Remembers the tokens of each forward, but for the short ones that only find widths."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def run(self, tokens: Tensor, **options: Any) -> Forward:
        if tokens.shape[1] > 7 and options.get("want", "held") == "held":
            self.seen.append(tokens.numpy().tobytes())
        return super().run(tokens, **options)


def manager(backend: FakeBackend | None = None, *others: object) -> saekit.PluginManager:
    used = backend or FakeBackend()
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: used),
        fake_plugin("sae_architectures", "gain", build=GainSAE, config=GainConfig),
        *others,
        builtins=True,
    )


def changed(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Options of some sections changed; another plugin comes without the options of the one before."""
    merged: dict[str, Any] = {name: copy.copy(options) for name, options in config.items()}
    for section, options in changes.items():
        old = merged.get(section, {})
        other = section in ("sae", "lr_schedule") and options.get("name", old.get("name")) != old.get("name")
        merged[section] = dict(options) if other else old | dict(options)
    return merged


def fake(folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    base = run_config(
        folder,
        model={"backend": "test:fake"},
        dataset={"context_size": 16},
        site={"hook_name": "blocks.0.hook_resid_post"},
        sae={"name": "standard", "d_sae": 12, "l1_coefficient": 0.1},
        training={"training_tokens": 1500, "train_batch_size_tokens": 200, "lr": 0.01},
        evals={"n_contexts": 2, "split": None, "held_out_every": 10},
    )
    return changed(base, sections)


def train(configs: Any, plugins: saekit.PluginManager | None = None, dataset: Any = DOCUMENTS) -> Any:
    return saekit.train(configs, plugins=plugins or manager(), dataset=dataset)


def kept(home: Path) -> dict[str, str]:
    """Every file of the SAE, and the metrics, as checksums."""
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert lines
    metrics = json.dumps([{name: value for name, value in line.items() if name != NOW} for line in lines])
    files = {path.name: path.read_bytes() for path in sorted((home / "sae").iterdir())}
    assert len(files) == 4
    found = files | {"metrics.jsonl": metrics.encode()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def as_csv(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
