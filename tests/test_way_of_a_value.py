"""The way of a value, as docs/architecture.md tells it: which packages hand it on, and that none has it twice."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import saekit_plugins
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.kernels import built
from support.training import DOCUMENTS, fake_run, fakes

import saekit
from saekit.sae.module import SAEModule
from saekit.sae.taking import take_over
from saekit.saved import PretrainedSAE, SAEFiles
from saekit.values import Batch

KERNEL, PLUGINS = Path(saekit.__file__).parent, Path(next(iter(saekit_plugins.__path__)))


def code_of(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(getattr(function, "__func__", function)).__code__
    return code


@functools.cache
def package(code: CodeType) -> str | None:
    """The package of the kernel, or of the built-in plugins, that a function is of."""
    path = Path(code.co_filename)
    for root, before in ((KERNEL, ""), (PLUGINS, "plugin: ")):
        if path.is_relative_to(root):
            first, *rest = path.relative_to(root).parts
            return before + first if rest else None
    return None


class Follower:
    """Is told of every call and return, and keeps from which package to which a value goes."""

    def __init__(self, is_value: Callable[[object], bool], ends: CodeType) -> None:
        self.hops: list[tuple[str, str]] = []
        self._is_value, self._ends, self.ended = is_value, ends, False

    def __call__(self, frame: FrameType, event: str, result: object) -> None:
        if self.ended or event not in ("call", "return"):
            return
        here = package(frame.f_code)
        values = frame.f_locals.values() if event == "call" else [result]
        if here is None or not any(map(self._is_value, list(values))):
            return
        other = self._caller(frame)
        if other not in (None, here):
            hop = (other, here) if event == "call" else (here, other)
            self.hops.append(hop)  # type: ignore[arg-type]
        self.ended = event == "call" and frame.f_code is self._ends

    @staticmethod
    def _caller(frame: FrameType) -> str | None:
        back = frame.f_back
        while back is not None:
            if (found := package(back.f_code)) is not None:
                return found
            back = back.f_back
        return None

    @property
    def way(self) -> list[str]:
        """The packages in order; an error where one is met twice."""
        hops = list(dict.fromkeys(self.hops))
        for (_, met), (then, _) in itertools.pairwise(hops):
            assert met == then, f"it is in {met}, and {then} hands it on: {hops}"
        way = [hops[0][0], *(to for _, to in hops)]
        assert len(set(way)) == len(way), f"a package is entered twice: {way}"
        return way


def followed(follower: Follower, work: Callable[[], Any]) -> list[str]:
    before = sys.getprofile()
    sys.setprofile(follower)
    try:
        work()
    finally:
        sys.setprofile(before)
    assert follower.ended, "the end of the way was not reached"
    return follower.way


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_a_batch_from_source_to_step(kernels: str, tmp_path: Path) -> None:
    rows = 192

    def is_value(value: object) -> bool:
        if isinstance(value, Batch):  # and not what a forward gives, which the buffer mixes
            return len(value) == rows
        return isinstance(value, torch.Tensor) and value.shape == (rows, 8)

    source = {"name": "live", "store_batch_size_prompts": 4, "n_batches_in_buffer": 8, "prefetch": False}
    run = fake_run(
        tmp_path,
        activations={"source": source},
        training={"training_tokens": rows, "train_batch_size_tokens": rows, "kernels": kernels},
    )
    follower = Follower(is_value, code_of(SAEModule.training_step))
    way = followed(follower, lambda: saekit.train(run, plugins=fakes(), dataset=DOCUMENTS))
    assert way == ["data", "plugin: sources", "runs", "training", "sae"]
    assert len([name for name in way if not name.startswith("plugin")]) <= 4


def test_an_sae_from_path_to_module(tmp_path: Path) -> None:
    built(StandardConfig(d_sae=24)).save(tmp_path / "sae")
    saekit.default_manager()
    tensors: set[int] = set()

    def is_value(value: object) -> bool:
        if isinstance(value, PretrainedSAE):
            tensors.add(id(value.tensors))
        return isinstance(value, SAEFiles | PretrainedSAE) or id(value) in tensors

    follower = Follower(is_value, code_of(take_over))
    way = followed(follower, lambda: saekit.SAE.load(tmp_path / "sae"))
    assert way == ["pretrained", "sae"]
    assert len(way) <= 3


def test_a_package_that_is_entered_twice_is_found() -> None:
    follower = Follower(lambda value: True, code_of(SAEModule.training_step))
    follower.hops = [("data", "runs"), ("runs", "training"), ("training", "runs")]
    with pytest.raises(AssertionError, match="a package is entered twice"):
        follower.way  # noqa: B018
    follower.hops = [("data", "runs"), ("training", "sae")]
    with pytest.raises(AssertionError, match="it is in runs, and training hands it on"):
        follower.way  # noqa: B018
