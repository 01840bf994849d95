"""Makes ``tests/golden_sparsify/`` with eai-sparsify 1.3.3, in an environment that has it.

Each file holds what ``SparseCoder.forward`` gave at each of 24 steps of transcoding in float64, two steps' gradients,
and the weights before and after.  The start is the one that its ``Trainer`` makes of the first batch, the schedule of k
is ``Trainer.get_current_k``, and the optimizer is Adam.  Dead latents are drawn: the trainer's own count begins after
millions of tokens.  k begins where every row has as many latents above zero: with fewer, its encoder passes gradients
to some that are zero, whichever its sorting finds.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.trainer import Trainer

HERE = Path(__file__).parent
STEPS, BATCH, D, LATENTS, K, START, LR = 24, 40, 12, 40, 4, 11, 3e-3
CASES: dict[str, dict[str, Any]] = {
    "skip": {"skip_connection": True, "alpha": 0.0},
    "skip_auxk": {"skip_connection": True, "alpha": 0.5, "dead": 0.4},
    "few_dead": {"alpha": 1.0, "dead": 0.1},
    "k_decay": {"skip_connection": True, "alpha": 1 / 32, "dead": 0.3, "k_decay_steps": 15},
}
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}


def named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """By saekit's names, in its layout."""
    found = {NAMES.get(key, key): value.detach().clone() for key, value in tensors.items()}
    return {f"{prefix}.{key}": value.T if key == "W_enc" else value for key, value in found.items()}


def start(coder: SparseCoder, x: torch.Tensor, y: torch.Tensor) -> None:
    """As in the hook of its trainer at step 0, where the lines stand in the middle of a function."""
    coder.encoder.bias.data = -x.mean(0) @ coder.encoder.weight.data.T
    coder.b_dec.data = y.mean(0)


def make(name: str, options: dict[str, Any], rows: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(len(name))
    config = SparseCoderConfig(
        num_latents=LATENTS, k=K, transcode=True, skip_connection=options.get("skip_connection", False)
    )
    coder = SparseCoder(D, config, dtype=torch.float64)
    start(coder, rows["x"][0], rows["y"][0])
    steps = options.get("k_decay_steps", 0)
    schedule: Any = SimpleNamespace(global_step=0, cfg=SimpleNamespace(k_decay_steps=steps), initial_k=START, final_k=K)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)
    dead = torch.rand(STEPS, LATENTS) < options.get("dead", 0.0)
    found = named(dict(coder.named_parameters()), "init")
    traces: dict[str, list[float]] = {}
    for step, (x, y) in enumerate(zip(rows["x"], rows["y"], strict=True)):
        schedule.global_step = step
        coder.cfg.k = Trainer.get_current_k(schedule)
        assert bool((coder.encode(x).top_acts > 0).all())
        output = coder(x, y, dead_mask=dead[step] if options["alpha"] else None)
        loss = output.fvu + options["alpha"] * output.auxk_loss
        optimizer.zero_grad()
        loss.backward()
        if step in (0, 5):
            gradients = {key: value.grad for key, value in coder.named_parameters() if value.grad is not None}
            found |= named(gradients, f"grad{step}")
        optimizer.step()
        values = {"loss": loss, "fvu": output.fvu, "auxk": output.auxk_loss, "k": coder.cfg.k}
        for key, value in values.items():
            traces.setdefault(key, []).append(float(torch.as_tensor(value).detach()))
    found |= named(dict(coder.named_parameters()), "final") | {"dead": dead}
    found |= {f"trace.{key}": torch.tensor(values, dtype=torch.float64) for key, values in traces.items()}
    metadata = {
        "made_with": f"eai-sparsify {version('eai-sparsify')}",
        "options": json.dumps({**options, "k": K, "start": START, "lr": LR}),
    }
    save_file({key: value.contiguous() for key, value in found.items()}, HERE / f"{name}.safetensors", metadata)
    losses = f"loss {traces['loss'][0]:.4f} to {traces['loss'][-1]:.4f}, auxk {max(traces['auxk']):.4f}"
    print(f"{name}: {losses}, k {traces['k'][:3]}")


def main() -> None:
    draws = torch.Generator().manual_seed(0)
    mix, through = (torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((20, D), (D, D)))
    sparse = torch.rand(STEPS, BATCH, 20, generator=draws, dtype=torch.float64)
    sparse *= torch.rand(STEPS, BATCH, 20, generator=draws) < 0.2
    x = (sparse @ mix + 0.5).float()  # in float32 in the file: half the size
    y = (x.double() @ through / D**0.5).relu().float() - 1
    rows = {"x": x, "y": y}
    save_file(rows, HERE / "rows.safetensors")
    for name, options in CASES.items():
        make(name, options, {key: value.double() for key, value in rows.items()})


if __name__ == "__main__":
    main()
