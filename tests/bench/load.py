"""Loading a large SAE: its time beside that of reading its file, and its peak memory beside the file's size.

    python tests/bench/load.py [--gigabytes 2] [--rounds 5] [--only saekit sae_lens ...] [--quick]

The files are in the page cache, and each load is a process of its own, in turn with plain reading. Prints figures; it
judges nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from figures import Figure, row, spread

D_IN = 2048
CASES: Mapping[str, Mapping[str, Any]] = {
    "saekit": {},
    "sae_lens": {},
    "saekit, in bfloat16": {"dtype": "bfloat16"},
    "dictionary_learning (.pt, both turned)": {},
    "gemma_2 (.npz)": {"loader": "gemma_2"},
}
FILES = {"saekit": "sae_weights.safetensors", "sae_lens": "sae_weights.safetensors", "dictionary_learning": "ae.pt",
         "gemma_2": "params.npz"}  # fmt: skip


def write(kind: str, folder: Path, gigabytes: float) -> None:
    """A random SAE in a folder of the format ``kind``."""
    d_sae = int(gigabytes * 1e9 / 8 / D_IN)
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_IN, d_sae), (d_sae, D_IN)))
    WRITERS[kind](folder, W_enc, W_dec, torch.zeros(d_sae), torch.zeros(D_IN))


def _saekit(folder: Path, *weights: torch.Tensor) -> None:
    import saekit
    from saekit.pretrained.load import build_sae

    tensors = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), weights, strict=True))
    options = {"d_in": D_IN, "d_sae": len(weights[2])}
    site = saekit.Site(hook_name="blocks.1.hook_resid_post")
    read = saekit.PretrainedSAE(architecture="saekit:standard", options=options, tensors=tensors, site=site)
    build_sae(read, saekit.default_manager()).save(folder)  # type: ignore[attr-defined]


def _sae_lens(folder: Path, *weights: torch.Tensor) -> None:
    _saekit(folder, *weights)
    config = json.loads((folder / "cfg.json").read_text())
    del config["saekit"]
    (folder / "cfg.json").write_text(json.dumps(config))


def _dictionary_learning(
    folder: Path, W_enc: torch.Tensor, W_dec: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor
) -> None:
    folder.mkdir()
    state = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc, "decoder.weight": W_dec.T.contiguous(),
             "bias": b_dec}  # fmt: skip
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "layer": 1, "lm_name": "gpt2", "activation_dim": D_IN,
               "dict_size": len(b_enc), "submodule_name": "resid_post_layer_1"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


def _gemma_2(folder: Path, W_enc: torch.Tensor, W_dec: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor) -> None:
    import numpy as np

    folder.mkdir()
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": b_enc}
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})


WRITERS: Mapping[str, Callable[..., None]] = {
    "saekit": _saekit, "sae_lens": _sae_lens, "dictionary_learning": _dictionary_learning, "gemma_2": _gemma_2
}  # fmt: skip


def load(folder: Path, options: Mapping[str, Any]) -> None:
    """One load, in this process: prints seconds and the peak memory before and after."""
    import saekit

    saekit.SAE.load  # noqa: B018 - what is imported for it is not timed
    saekit.default_manager()
    warm()
    before, start, worked = megabytes("VmHWM"), time.perf_counter(), time.process_time()
    sae = saekit.SAE.load(folder, **options)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    assert sae.d_in == D_IN
    print(json.dumps({"seconds": seconds, "worked": worked, "before": before, "peak": megabytes("VmHWM")}))


def megabytes(field: str) -> float:
    """A size in ``/proc/self/status``; what is imported for a bench is no part of it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def warm() -> None:
    """Load an SAE of no size, so that everything is imported."""
    import saekit
    from saekit.pretrained.load import build_sae

    tensors = {"W_enc": torch.zeros(2, 3), "W_dec": torch.zeros(3, 2), "b_enc": torch.zeros(3), "b_dec": torch.zeros(2)}
    read = saekit.PretrainedSAE(architecture="saekit:standard", options={"d_in": 2, "d_sae": 3}, tensors=tensors)
    with tempfile.TemporaryDirectory() as small:
        build_sae(read, saekit.default_manager()).save(Path(small) / "sae")  # type: ignore[attr-defined]
        saekit.SAE.load(Path(small) / "sae")


def read(file: Path) -> None:
    """Read a file's bytes, in this process."""
    start, worked = time.perf_counter(), time.process_time()
    data = file.read_bytes()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "worked": worked, "size": len(data)}))


def measured(*arguments: str) -> dict[str, float]:
    """What a process of this program prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(case: str, folder: Path, rounds: int) -> None:
    """Print the figures of a case."""
    kind = case.split(",")[0].split(" ")[0]
    file = folder / FILES[kind]
    loads, reads = [], []
    for _ in range(rounds):
        reads.append(measured("read", str(file)))
        loads.append(measured("load", str(folder), json.dumps(CASES[case])))
    size = file.stat().st_size / 1e6
    found: dict[str, Figure] = {}

    def median(runs: list[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in runs)

    for title, name in (("seconds", "seconds"), ("of processors", "worked")):
        read_in, load_in = median(reads, name), median(loads, name)
        limits = "-".join(f"{limit(one[name] for one in reads):.2f}" for limit in (min, max))
        print(f"  {case:40} {title:13}  read {read_in:5.2f} ({limits})  load {load_in:5.2f}  x {load_in / read_in:.2f}")
        found |= {f"{title}, reading": spread(one[name] for one in reads)}
        found |= {f"{title}, loading": spread(one[name] for one in loads), f"{title}, ×": load_in / read_in}
    peak, before = median(loads, "peak"), median(loads, "before")
    row(f"{size:,.0f} MB in the page cache", case, {**found, "peak, × the file": peak / size})
    print(
        f"  {'':40} peak {peak:.0f} MB = x {peak / size:.3f} of {size:.0f} MB; {before:.0f} MB were there before",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--quick", action="store_true", help="a tenth of a gigabyte, two rounds")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, path, *more = options.one
        read(Path(path)) if what == "read" else load(Path(path), json.loads(more[0]))
        return
    gigabytes, rounds = (0.1, 2) if options.quick else (options.gigabytes, options.rounds)
    print(f"loading {gigabytes:g} GB, against reading the file's bytes; both from the page cache")
    place = Path(tempfile.mkdtemp())
    try:
        for kind in options.only:
            write(kind, place / kind, gigabytes)
            for case in CASES:
                if case.split(",")[0].split(" ")[0] == kind:
                    compare(case, place / kind, rounds)
            shutil.rmtree(place / kind)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
