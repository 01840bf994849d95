"""Step kernels of plugins, for architectures that others wrote: when they are taken, and what stays as it was."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.topk import TopKConfig
from support.faulty.step_kernels import Right
from support.kernels import seeded

from saekit import Entry
from saekit.errors import PluginWarning
from saekit.kinds import SAE_ARCHITECTURES
from saekit.sae.build import build_module, initialize
from saekit.testing import FakeConfig, fake_plugin, isolated_manager, plugin_of
from saekit.values import StepInput

CONFIG = TopKConfig(d_sae=640, k=4)


class Choosy(Right):
    def refuses(self, sae: Any, use: Any) -> str | None:
        return "it is Tuesday"


class Elsewhere(Right):
    devices = frozenset({"nowhere"})


@attrs.frozen(kw_only=True)
class OtherConfig(TopKConfig):
    """An architecture of its own."""


def built(kernel: Any = Right, *more: object, config: Any = CONFIG, **entry: Any) -> Any:
    """A TopK SAE where a plugin serves it."""
    entry = {"serves": ("saekit:topk",), **entry}
    plugins = isolated_manager(fake_plugin("step_kernels", build=kernel, **entry), *more, builtins=True)
    sae = build_module(plugins.find(SAE_ARCHITECTURES, config), config, 8, plugins)
    initialize(sae, seeded(), torch.randn(64, 8, generator=seeded(1)), scale=1.0)
    return sae


def test_a_served_kernel_is_taken_before_the_architectures_own() -> None:
    sae = built()
    assert sae.step_path().startswith("a stranger's kernel")
    assert [type(one) for one in sae.served_by] == [Right]


def test_its_steps_are_made_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    step = Right.step
    monkeypatch.setattr(Right, "step", lambda self, *given: made.append(self) or step(self, *given))
    sae = built()
    sae.training_step(torch.randn(9, 8, generator=seeded(2)), StepInput(step=0, generator=seeded()))
    assert made == [*sae.served_by]


def test_a_refusal_is_shown() -> None:
    path = built(Choosy).step_path()
    assert path.startswith("fast kernels")
    assert path.endswith("(not a stranger's kernel: it is Tuesday)")


@pytest.mark.parametrize(
    ("kernel", "entry"),
    [
        (Elsewhere, {}),
        (Right, {"requires": ("not_there_at_all",)}),
        (Right, {"serves": ("stranger:topk",)}),
        (Right, {"serves": ("topk",)}),
    ],
    ids=["other devices", "what it requires", "another architecture", "no qualified key"],
)
def test_where_it_is_not_for_an_sae_it_is_as_if_it_were_not_there(kernel: Any, entry: dict[str, Any]) -> None:
    path = built(kernel, **entry).step_path()
    assert path.startswith("fast kernels")
    assert "stranger" not in path


def test_reference_turns_it_off() -> None:
    sae = built()
    sae.kernels = "reference"
    assert sae.step_path().startswith('plain torch: a stranger\'s kernel: kernels is "reference"')


def test_an_architecture_under_another_key_is_not_served() -> None:
    entry = Entry("other", OtherConfig, "saekit_plugins.architectures.topk.module:TopKSAE")
    sae = built(Right, plugin_of("sae_architectures", entry), config=OtherConfig(d_sae=640, k=4))
    assert sae.info.architecture != "saekit:topk"
    assert sae.served_by == ()
    assert sae.step_path().startswith("fast kernels")


def test_copies_and_pickles_keep_it() -> None:
    sae = built()
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert other.step_path() == sae.step_path()
        assert other.step_path().startswith("a stranger's kernel")


def test_a_pickle_is_read_where_its_plugin_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = built()
    pickled, x = pickle.dumps(sae), torch.randn(5, 8, generator=seeded(2))
    monkeypatch.setitem(sys.modules, "support.faulty.step_kernels", None)
    other = pickle.loads(pickled)
    assert other.served_by == ()
    assert other.step_path().startswith("fast kernels")
    with torch.no_grad():
        torch.testing.assert_close(other(x), sae(x), rtol=0, atol=0)


def test_one_that_cannot_be_built_is_left_out_with_a_warning() -> None:
    def fails(config: FakeConfig) -> Any:
        raise OSError("no compiler here")

    with pytest.warns(PluginWarning, match=r"the step kernel test:fake is left out: .*no compiler here"):
        sae = built(fails)
    assert sae.step_path().startswith("fast kernels")
