"""What a step may report, and what it may not do: whatever an architecture does wrong names its plugin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from support.runs import fake_config, manager, train
from support.saes import drawn_sae
from torch import Tensor

import saekit
from saekit import StepOutput
from saekit.errors import PluginFailedError
from saekit.testing import fake_plugin
from saekit.training.reported import Unwritten

pytestmark = pytest.mark.usefixtures("one_thread")
WHO = re.escape("SAE architecture 'test:mine' (test 0)")


@attrs.frozen(kw_only=True)
class Config(StandardConfig):
    """Of an architecture that is not as it should be."""


def architecture(losses: Callable[[Any, Tensor, Any], Any]) -> saekit.PluginManager:
    """One whose ``losses(sae, x, step)`` are these, where ``StandardSAE.losses`` are as they should be."""
    kind = type("Odd", (StandardSAE,), {"losses": losses})
    return manager(None, fake_plugin("sae_architectures", "mine", kind, config=Config))


def changed(**fields: Any) -> saekit.PluginManager:
    """One whose steps report these in the place of what is right."""

    def losses(sae: Any, x: Tensor, step: Any) -> Any:
        found = StandardSAE.losses(sae, x, step)
        return found._replace(**{name: new(found) if callable(new) else new for name, new in fields.items()})

    return architecture(losses)


def table(folder: Path) -> dict[str, Any]:
    training = {"training_tokens": 2000, "finetuning_tokens": 0, "finetuning_method": None, "log_frequency": 1}
    config = fake_config(folder, training=training, evals={"run": []})
    config["sae"] = config["sae"] | {"name": "mine", "noise_scale": 0.0, "use_ghost_grads": False}
    config["activations"] = config["activations"] | {"normalize_activations": "none"}
    return config


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"fired": None}, "has fired=None, expected a tensor [d_sae], which is [64]"),
        ({"fired": lambda found: found.fired[:3]}, "has fired=a tensor [3] of int64, expected a tensor [d_sae], which"),
        ({"output": lambda found: found.output[:, :3]}, ", 3] of float32, expected a tensor [n, d_out], which is ["),
        ({"metrics": {"a": torch.zeros(5)}}, "has metrics['a'] = a tensor [5] of float32, expected a number, or a ten"),
        ({"metrics": {"a": np.zeros(2)}}, "has metrics['a'] = array([0., 0.]), expected a number, or a tensor of one"),
        ({"metrics": {"a": "b"}}, "has metrics['a'] = 'b', expected a number, or a tensor of one"),
        ({"metrics": {3: 1.0}}, "has metrics of the name 3, expected a text"),
        ({"metrics": None}, "has metrics=None, expected a mapping of numbers by name"),
        ({"coefficients": {"c": "x"}}, "has coefficients['c'] = 'x', expected a number, or a tensor of one"),
        ({"losses": {"mse_loss": 1.0}}, "has losses['mse_loss'] = 1.0, expected a tensor of one number"),
        (
            {"losses": lambda found: {"overall_loss": found.loss}},
            "losses['overall_loss'], logged as 'losses/overall",
        ),
        (
            {"metrics": {"metrics/l0": 123.0}},
            "has metrics['metrics/l0'], logged as 'metrics/l0', which is a name of",
        ),
        ({"metrics": {"seconds": 1.0}}, "has metrics['seconds'], logged as 'seconds', which is a name of saekit's own"),
        ({"metrics": {"step": 123.0}}, "has metrics['step'], logged as 'step', which is a name of saekit's own; give"),
        ({"metrics": {"evals/ce_recovered": 1.0}}, "which is a name of saekit's own"),
        ({"coefficients": {"learning_rate": 9.0}}, "logged as 'details/current_learning_rate', which is a name of sae"),
        (
            {"metrics": {"details/current_b": 1.0}, "coefficients": {"b": 1.0}},
            "has metrics['details/current_b'] and coefficients['b'], which are both logged as 'details/current_b'",
        ),
    ],
)
def test_what_a_step_reports(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(
        PluginFailedError, match=rf"^{WHO}: the saekit.StepOutput of a training step .*{re.escape(told)}"
    ):
        train(table(tmp_path), plugins=changed(**fields))


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (lambda sae, x, step: x.sum(), "losses returned a tensor [], expected a saekit.StepOutput"),
        (lambda sae, x, step: None, "losses returned None, expected a saekit.StepOutput"),
    ],
)
def test_what_losses_return(tmp_path: Path, losses: Any, told: str) -> None:
    with pytest.raises(PluginFailedError, match=rf"^{WHO} failed in training_step: TypeError: {re.escape(told)}"):
        train(table(tmp_path), plugins=architecture(losses))


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (
            lambda found: found.loss.item(),
            r"losses returned loss=\d.*, expected a tensor of one number with a gradient",
        ),
        (lambda found: found.loss.repeat(3), r"losses returned loss=a tensor \[3\], expected a tensor of one number"),
        (lambda found: found.loss.detach(), r"loss=a tensor \[\], which depends on no parameter \(\.item"),
    ],
)
def test_a_loss_that_has_no_gradient(tmp_path: Path, loss: Any, told: str) -> None:
    with pytest.raises(PluginFailedError, match=rf"^{WHO} failed in training_step: TypeError: .*{told}"):
        train(table(tmp_path), plugins=changed(loss=loss))


def test_names_that_come_later(tmp_path: Path) -> None:
    def losses(sae: Any, x: Tensor, step: Any) -> StepOutput:
        found = StandardSAE.losses(sae, x, step)
        return found._replace(metrics={"step" if step.step == 2 else "mine": found.loss.detach()})

    with pytest.raises(PluginFailedError, match=rf"^{WHO}: .*logged as 'step'"):
        train(table(tmp_path), plugins=architecture(losses))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all('"mine":' in line for line in lines)


def test_numbers_of_numpys_are_numbers(tmp_path: Path) -> None:
    train(
        table(tmp_path),
        plugins=changed(metrics={"a": np.bool_(True), "b": np.array(2.0), "c": np.float32(3), "d": Fraction(1, 2)}),
    )
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert [line[name] for name in "abcd"] == [1, 2, 3, 0.5]


def test_the_batch_is_not_written_into(tmp_path: Path) -> None:
    def losses(sae: Any, x: Tensor, step: Any) -> StepOutput:
        x -= x.mean(-1, keepdim=True)
        return StandardSAE.losses(sae, x, step)

    told = r"has written into x, which is the batch of all SAEs that train on it\. .*: x.clone\(\)$"
    with pytest.raises(PluginFailedError, match=rf"^{WHO}: a training step {told}"):
        train(table(tmp_path), plugins=architecture(losses))


def test_what_a_step_writes_into_is_told_by_its_contents() -> None:
    sae = drawn_sae(8)
    buffer = torch.randn(401, 8)
    x, target = buffer[:200], buffer[200:400]  # which share the number that torch counts

    def fault(change: Callable[[], Any], *, own: bool = False) -> str:
        given = Unwritten(x=(x, x.clone() if own else x), target=(target, target))
        change()
        try:
            given.check(sae)
        except PluginFailedError as error:
            return re.sub(r".*(written into .*)\. Work.*", r"\1", str(error))
        return ""

    assert fault(lambda: buffer[400].add_(1)) == ""  # another thread fills it meanwhile
    shared = "is the batch of all SAEs that train on it"
    assert fault(lambda: target.mul_(2)) == f"written into step.target, which {shared}"
    assert fault(lambda: x[20:].mul_(2)) == f"written into x, which {shared}"
    assert fault(lambda: x.mul_(2), own=True) == "written into x, which must stay as it is"
    x[0] = math.nan
    assert fault(lambda: buffer[400].add_(1)) == ""


def test_others_may_write_into_the_buffer_of_which_a_batch_is_a_view(tmp_path: Path) -> None:
    class Views:
        widths: Any

        def __init__(self, stream: Any) -> None:
            self._stream, self.widths, self.buffer = stream, stream.widths, {}
            for site, width in stream.widths.items():
                generator = torch.Generator().manual_seed(0)
                self.buffer[site] = torch.randn(stream.batch_size + 1, width, generator=generator)
                sources.append(self.buffer[site])

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> saekit.Batch:
            return saekit.Batch({site: rows[: self._stream.batch_size] for site, rows in self.buffer.items()})

        def peek(self) -> Any:
            return next(self).activations

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

        def close(self) -> None: ...

    sources: list[Tensor] = []

    def losses(sae: Any, x: Tensor, step: Any) -> StepOutput:
        sources[0][-1] += 1  # as the source's thread does
        return StandardSAE.losses(sae, x, step)

    kind = type("Odd", (StandardSAE,), {"losses": losses})
    own = manager(
        None,
        fake_plugin("sae_architectures", "mine", kind, config=Config),
        fake_plugin("activation_sources", "views", lambda config, stream: Views(stream)),
    )
    config = table(tmp_path)
    config["activations"] = {"source": "views"}
    train(config, plugins=own)
