"""An SAE is in memory once while it is loaded: what a process takes at most, as the system has counted it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saekit
from saekit.pretrained.load import build_sae

D_IN, D_SAE = 512, 16384  # 64 MB of float32
LOAD = """
import json, sys
from pathlib import Path

import saekit

def kilobytes(field):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

saekit.SAE.load(sys.argv[1])
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on, not from the imports'
except OSError:
    pass
before = kilobytes("VmHWM")
sae = saekit.SAE.load(sys.argv[2])
print(json.dumps([before, kilobytes("VmHWM"), sae.d_sae]))
"""


def saved(folder: Path, d_in: int, d_sae: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_in),
    }
    options = {"d_in": d_in, "d_sae": d_sae}
    read = saekit.PretrainedSAE(architecture="saekit:standard", options=options, tensors=tensors)
    return build_sae(read, saekit.default_manager()).save(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say it so")
def test_an_sae_is_in_memory_once_while_it_is_loaded(tmp_path: Path) -> None:
    folders = saved(tmp_path / "tiny", 4, 8), saved(tmp_path / "sae", D_IN, D_SAE)
    size = (folders[1] / "sae_weights.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True, check=True)
    before, peak, d_sae = json.loads(done.stdout)
    assert d_sae == D_SAE
    assert size <= (peak - before) * 1024 <= 1.3 * size, f"{(peak - before) / 1024:.0f} MiB of {size / 2**20:.0f} MiB"
