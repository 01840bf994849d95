"""SAEs to save, and folders to save them in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attrs
import torch
from saekit_plugins.architectures.standard import StandardConfig

import saekit
from saekit import SAE
from saekit.sae.build import build_module
from saekit.sae.folder import CONFIG, PROBE, SPARSITY, WEIGHTS


def make(
    hook_name: str = "blocks.1.hook_resid_post", d_in: int = 12, head: int | None = None, **options: object
) -> SAE:
    config = StandardConfig(**{"d_sae": 30, **options})  # type: ignore[arg-type]
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    generator = torch.Generator().manual_seed(4)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    sae.info = attrs.evolve(
        sae.info,
        sites=saekit.Sites.one(saekit.Site(hook_name=hook_name, hook_head_index=head)),
        metadata={"model_name": "gpt2-small", "context_size": 128, "prepend_bos": True},
    )
    sae.log_sparsity = torch.randn(30, generator=generator)
    return sae


READER = """
import json, sys
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

sae = SAE.load_from_disk(sys.argv[1])
x = load_file(sys.argv[2])["x"]
save_file({"out": sae(x).detach().contiguous(), "features": sae.encode(x).detach().contiguous()}, sys.argv[3])
print(json.dumps({"hook_name": sae.cfg.metadata.hook_name, "model": sae.cfg.metadata.model_name,
                  "reshape": sae.cfg.reshape_activations, "prepend_bos": sae.cfg.metadata.prepend_bos}))
"""


def sae_lens_python() -> str | None:
    """A Python with sae-lens 6: this one, or the one that SAEKIT_SAE_LENS_PYTHON names."""
    for python in (os.environ.get("SAEKIT_SAE_LENS_PYTHON"), sys.executable):
        if python:
            check = [python, "-c", "import importlib.metadata as m; assert m.version('sae-lens').startswith('6.')"]
            if subprocess.run(check, capture_output=True).returncode == 0:
                return python
    return None


OWN = {CONFIG, WEIGHTS, SPARSITY, PROBE}


def other() -> SAE:
    """One that differs in every file."""
    sae = make(d_in=7)
    with torch.no_grad():
        sae.W_dec.add_(1)
    return sae


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def thesis(folder: Path) -> Path:
    """A folder with somebody's work in it."""
    (folder / "chapters").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    (folder / "chapters" / "one.tex").write_text("more of it")
    (folder / ".notes").write_text("hidden")
    return folder


FOREIGN = {"thesis.tex", "chapters", "chapters/one.tex", ".notes"}
