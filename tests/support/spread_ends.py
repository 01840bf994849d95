"""Worlds that are opened again and again in one process, whoever still has them; run by each of two processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from saekit import SaekitError
from saekit.config import DistributedConfig
from saekit.distributed import World, open_world


def threads() -> int:
    """Of this process, those of torch's engine too."""
    return len(list(Path("/proc/self/task").iterdir()))


def opened(times: int, features: int) -> tuple[list[World], list[int]]:
    """So many worlds, all of which are kept, and how many threads there are after each."""
    worlds, found = [], []
    for _ in range(times):
        with open_world(DistributedConfig(features=features, timeout_s=60)) as world:
            assert int(world.all.sum(torch.tensor(1))) == 2
            assert world.behind.objects(world.rank) == [0, 1]
        worlds.append(world)
        found.append(threads())
    return worlds, found


def main(folder: Path) -> None:
    own, alone = opened(3, features=2)
    said = []
    for ask in (lambda: own[0].all.sum(torch.tensor(1)), lambda: own[0].features.objects(1)):
        try:
            ask()
        except SaekitError as error:
            said.append(str(error))
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'met'}", rank=int(os.environ["RANK"]), world_size=2)
    others, beside = opened(3, features=1)
    told = torch.tensor(1)
    dist.all_reduce(told)  # whose group it is goes on with it
    print(json.dumps({"alone": alone, "beside": beside, "said": said, "told": int(told)}))
    assert len(own) == len(others) == 3
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
