"""Plugins that fail while a run is at work: the error names them, and what was learned until then is saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from support.runs import fake_config, manager, resume, train
from torch import Tensor

import saekit
from saekit import Forward
from saekit.errors import DataError, PluginFailedError
from saekit.runs.checkpoints import newest_checkpoint
from saekit.testing import FakeBackend, fake_plugin
from saekit.values import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


class Source:
    """Batches of random rows, of which the fourth is what ``fourth`` gives."""

    def __init__(self, stream: Any, fourth: Any = None) -> None:
        self._stream, self._fourth, self._made = stream, fourth, 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Batch:
        if self._made == 3 and self._fourth is not None:
            return self._fourth(self._rows())  # type: ignore[no-any-return]
        batch = Batch(self._rows())
        self._made += 1
        return batch

    def _rows(self) -> dict[saekit.Site, Tensor]:
        generator = torch.Generator().manual_seed(self._made)
        sizes = self._stream.widths.items()
        return {site: torch.randn(self._stream.batch_size, width, generator=generator) for site, width in sizes}

    def peek(self) -> Mapping[saekit.Site, Tensor]:
        return self._rows()

    def state_dict(self) -> dict[str, Any]:
        return {"made": self._made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._made = state["made"]

    def close(self) -> None: ...


def failing(error: BaseException) -> Any:
    def fail(*arguments: object, **services: object) -> Any:
        raise error

    return fail


def with_source(fourth: Any) -> saekit.PluginManager:
    return manager(None, fake_plugin("activation_sources", "mine", lambda config, stream: Source(stream, fourth)))


def config(folder: Path) -> dict[str, Any]:
    table = fake_config(folder, training={"training_tokens": 2000, "finetuning_tokens": 0, "finetuning_method": None})
    return table | {"activations": {"source": "mine"}}


@pytest.mark.parametrize(
    ("fourth", "told"),
    [
        (failing(SystemExit(3)), "failed in __next__: SystemExit: 3"),
        (failing(GeneratorExit()), "failed in __next__: GeneratorExit"),
        (failing(KeyError("rows")), "failed in __next__: KeyError: 'rows'"),
        (lambda rows: None, "__next__ returned None, expected a saekit.Batch; a source whose data has ended raises"),
        (lambda rows: rows, r"__next__ returned \{.*, expected a saekit.Batch"),
        (lambda rows: Batch({}), r"__next__ returned .*, which lacks the activations of blocks.0.hook_resid_post"),
        (lambda rows: Batch({site: x[:0] for site, x in rows.items()}), r"__next__ returned .*, which has no rows"),
        (
            lambda rows: Batch({site: x.repeat(2, 1) for site, x in rows.items()}),
            r"__next__ returned .*, which has 512 rows, expected stream.batch_size, 256, and fewer in the last alone",
        ),
    ],
)
def test_a_source(tmp_path: Path, fourth: Any, told: str) -> None:
    with pytest.raises(PluginFailedError, match=rf"^activation source 'test:mine' \(test 0\)(:)? {told}") as caught:
        train(config(tmp_path), plugins=with_source(fourth))
    assert newest_checkpoint(tmp_path / "run").facts["batches"] == 3
    assert "step-3; saekit train --resume" in caught.value.__notes__[0]
    resume(tmp_path / "run", plugins=with_source(None))
    train(config(tmp_path / "whole"), plugins=with_source(None))
    weights = "run/sae/sae_weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_source_whose_state_fails(tmp_path: Path) -> None:
    class Stateless(Source):
        state_dict = failing(SystemExit(3))

    own = manager(None, fake_plugin("activation_sources", "mine", lambda config, stream: Stateless(stream)))
    with pytest.raises(
        PluginFailedError, match=r"activation source 'test:mine' \(test 0\) failed in state_dict: System"
    ):
        train(config(tmp_path), plugins=own)
    assert saekit.SAE.load(tmp_path / "run/sae").d_sae == 64


def test_a_source_without_a_state(tmp_path: Path) -> None:
    class Stateless(Source):
        def state_dict(self) -> Any:
            return None

    own = manager(None, fake_plugin("activation_sources", "mine", lambda config, stream: Stateless(stream)))
    with pytest.raises(
        PluginFailedError, match=r"source 'test:mine' \(test 0\): state_dict returned None, expected a ma"
    ):
        train(config(tmp_path), plugins=own)


def test_a_source_whose_state_cannot_be_saved(tmp_path: Path) -> None:
    class Odd(Source):
        def state_dict(self) -> Any:
            return {"made": self._made, "draw": iter(())}

    own = manager(None, fake_plugin("activation_sources", "mine", lambda config, stream: Odd(stream)))
    told = r"^activation source 'test:mine' \(test 0\): the state at state_dict\(\)/draw holds a tuple_iterator, which"
    with pytest.raises(PluginFailedError, match=told):
        train(config(tmp_path), plugins=own)
    assert saekit.SAE.load(tmp_path / "run/sae").d_sae == 64


def test_a_source_that_ends_at_once(tmp_path: Path) -> None:
    class Ended(Source):
        def __next__(self) -> Batch:
            raise StopIteration

    own = fake_plugin("activation_sources", "mine", lambda config, stream: Ended(stream), needs_text=False)
    with pytest.raises(DataError, match="the activation source 'test:mine' ended before its first batch"):
        train(config(tmp_path), plugins=manager(None, own))


def test_a_schedule_that_fails_at_once_is_not_the_optimizers_fault(tmp_path: Path) -> None:
    class Negative:
        end = 1.0

        def __call__(self, step: int) -> float:
            return -1e-3

    own = manager(None, fake_plugin("lr_schedules", "mine", lambda config, lr, steps: Negative()))
    table = fake_config(tmp_path, training={"lr_warm_up_steps": 0}) | {"lr_schedule": "mine"}
    with pytest.raises(PluginFailedError, match=r"^LR schedule 'test:mine' .* step 0 returned -0.001") as caught:
        train(table, plugins=own)
    assert not any("optimizer" in note for note in getattr(caught.value, "__notes__", ()))


def test_a_schedule_is_asked_once_before_the_first_step(tmp_path: Path) -> None:
    asked: list[int] = []

    class Rounded:
        end = 1.0

        def __call__(self, step: int) -> float:
            asked.append(step)
            return -1e-20 if step == 3 else 1e-3  # a rate of 0, but for rounding

    own = manager(None, fake_plugin("lr_schedules", "mine", lambda config, lr, steps: Rounded()))
    train(fake_config(tmp_path, training={"lr_warm_up_steps": 0}) | {"lr_schedule": "mine"}, plugins=own)
    assert asked == [0, *range(len(asked) - 1)]
    assert len(asked) > 4


def test_a_want_of_memory_is_nobodys_fault(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train(config(tmp_path), plugins=with_source(failing(torch.OutOfMemoryError("CUDA out of memory"))))
    assert newest_checkpoint(tmp_path / "run").facts["batches"] == 3


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("broken")])
def test_an_eval(tmp_path: Path, error: BaseException) -> None:
    own = manager(None, fake_plugin("evals", "mine", lambda config, run: failing(error)))
    sections = {"run": ["mine"], "every_n_steps": 4, "n_contexts": 4}
    with pytest.raises(PluginFailedError, match=r"^eval 'test:mine' \(test 0\) failed in __call__: (SystemE|RuntimeE)"):
        train(fake_config(tmp_path, evals=sections), plugins=own)
    assert newest_checkpoint(tmp_path / "run").facts["batches"] == 4


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_model_is_not_the_sources_fault(tmp_path: Path, prefetch: bool) -> None:
    class Failing(FakeBackend):
        left = 9

        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if len(tokens) == 4:
                self.left -= 1
                if self.left == 0:
                    raise SystemExit(3)
            return super().run(tokens, **options)

    source = {"name": "live", "store_batch_size_prompts": 4, "n_batches_in_buffer": 8, "prefetch": prefetch}
    table = fake_config(tmp_path, source, evals={"run": []})
    with pytest.raises(PluginFailedError, match=r"^model backend 'test:fake' \(test 0\) failed in run: SystemEx"):
        train(table, plugins=manager(Failing()))
    assert newest_checkpoint(tmp_path / "run").facts["batches"] >= 1


@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (failing(SystemExit(3)), "failed in __call__ of step 2: SystemExit: 3"),
        (lambda: None, "failed in __call__ of step 2: TypeError"),
        (lambda: float("nan"), "__call__ of step 2 returned nan, expected a finite number"),
        (lambda: -1e-3, "__call__ of step 2 returned -0.001, expected a finite number of 0 or more"),
    ],
)
def test_a_schedule(tmp_path: Path, rate: Any, told: str) -> None:
    class Schedule:
        end = 1.0

        def __call__(self, step: int) -> float:
            return rate() if step == 2 else 1e-3  # type: ignore[no-any-return]

    own = manager(None, fake_plugin("lr_schedules", "mine", lambda config, lr, steps: Schedule()))
    table = fake_config(tmp_path) | {"lr_schedule": "mine"}
    with pytest.raises(PluginFailedError, match=rf"^LR schedule 'test:mine' \(test 0\)(:)? {told}"):
        train(table, plugins=own)
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_an_architecture(tmp_path: Path) -> None:
    @attrs.frozen(kw_only=True)
    class Config(StandardConfig):
        pass

    class Broken(StandardSAE):
        def training_step(self, x: Tensor, step: Any) -> Any:
            if step.step == 4:
                raise SystemExit(3)
            return super().training_step(x, step)

    def build(config: Any, *, ports: Any, activation: Any) -> Any:
        return Broken(config, ports=ports, activation=activation)

    own = manager(None, fake_plugin("sae_architectures", "mine", build, config=Config))
    table = fake_config(tmp_path)
    table["sae"] = table["sae"] | {"name": "mine"}
    with pytest.raises(
        PluginFailedError, match=r"^SAE architecture 'test:mine' \(test 0\) failed in training_step: Sys"
    ):
        train(table, plugins=own)
    assert (tmp_path / "run/checkpoints/step-4/sae/cfg.json").exists()


@pytest.mark.parametrize("form", ["function", "object"])
def test_an_activation(tmp_path: Path, form: str) -> None:
    calls = [0]

    def activation(pre: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise ValueError("no such number")
        return pre.relu()

    class Activation:
        def __call__(self, pre: Tensor) -> Tensor:
            return activation(pre)

    made: Any = activation if form == "function" else Activation()
    own = manager(None, fake_plugin("activation_functions", "mine", lambda config: made))
    table = fake_config(tmp_path, evals={"run": []})
    table["sae"] = table["sae"] | {"activation": "mine"}
    who = r"^activation function 'test:mine' \(test 0\) failed in (activation|__call__): ValueError: no such number"
    with pytest.raises(PluginFailedError, match=who):
        train(table, plugins=own)


def test_a_tracker_that_asks_the_process_to_end(tmp_path: Path) -> None:
    tracker = SimpleNamespace(log=failing(SystemExit(3)), close=lambda: None)
    own = manager(None, fake_plugin("trackers", "mine", lambda config, run: tracker))
    with pytest.warns(RuntimeWarning, match="tracker test:mine failed at step 1 and is off now: SystemExit: 3"):
        train(fake_config(tmp_path) | {"trackers": ["mine"]}, plugins=own)
