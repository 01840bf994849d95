"""What evals read is no text of training's: its stream is where it was, and goes on with the same rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from support.tiny import run_config

import saekit
from saekit.runs.measuring import evaluate
from saekit.runs.session import Session
from saekit.testing import FakeBackend, fake_plugin, isolated_manager

TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


def opened(folder: Path) -> Session:
    backend = fake_plugin("model_backends", "fake", lambda config, **services: FakeBackend())
    config = run_config(
        folder, site={"hook_name": "hook_embed"}, model={"backend": "test:fake"}, evals={"n_contexts": 4, "split": None}
    )  # fmt: skip
    plugins = isolated_manager(backend, builtins=True)
    session = Session({"sae": saekit.load_config(config, plugins=plugins)}, plugins, None, TEXTS)
    session.give_weights()
    return session


def state(session: Session) -> bytes:
    """Of everything that batches come from."""
    memory = io.BytesIO()
    torch.save([lane.source.state_dict() for lane in session.lanes], memory)
    return memory.getvalue()


def rows(session: Session) -> torch.Tensor:
    (lane,) = session.lanes
    (site,) = session.members["sae"].config.sites.inputs
    batch: Any = next(iter(lane.source))
    return batch.activations[site].clone()


def test_evals_take_nothing_of_the_text_that_is_trained_on(tmp_path: Path) -> None:
    measured, plain = opened(tmp_path / "measured"), opened(tmp_path / "plain")
    try:
        for _ in range(3):
            assert torch.equal(rows(measured), rows(plain))
            before = state(measured)
            assert evaluate(measured, [measured.members["sae"]])["sae"]["evals/ce_recovered"] is not None
            assert state(measured) == before
            assert state(plain) == before, "the state tells where the stream is, and nothing else"
        assert torch.equal(rows(measured), rows(plain))
        assert state(measured) != before
    finally:
        measured.close()
        plain.close()
