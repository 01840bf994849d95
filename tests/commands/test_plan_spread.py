"""What `saekit plan` says of many processes: sizes of one of them, what it sends, and which mesh is advised."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from support.tiny import run_config

import saekit
from saekit.distributed.costs import Job, Mesh, advised, meshes
from saekit.planning.mesh import advice
from saekit.sae.module import SAEModule


def planned(tmp_path: Path, d_sae: int = 64, *, load: bool = False, **distributed: int) -> saekit.Plan:
    config = run_config(tmp_path, distributed=distributed, training={"train_batch_size_tokens": 240})
    config["sae"] = {"name": "topk", "k": 4, "d_sae": d_sae, "dtype": "float32"}
    return saekit.plan(config, load=load)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)])
def test_sizes_are_those_of_one_process(tmp_path: Path, mesh: tuple[int, int]) -> None:
    data, features = mesh
    found, alone = planned(tmp_path, data=data, features=features), planned(tmp_path)
    width = int(alone.numbers["d_in"])
    assert found.problems == []
    own = 64 // features * (2 * width + 1) + width
    assert found.numbers["sae_bytes"] == 16 * own, "weights, gradients and two moments"
    assert found.numbers["optimizer_bytes"] == 8 * own
    whole = features * 12 * own + data * features * found.numbers["buffer_bytes"]
    assert found.numbers["checkpoint_bytes"] == whole, "parts once, buffers of all"
    assert found.numbers["steps"] == alone.numbers["steps"]
    assert found.facts["SAE"] == alone.facts["SAE"]
    assert found.facts["processes"] == (
        f"{data * features}, {data} × {features} (data × features): in each step, each has {240 // data} of 240 rows "
        f"and {64 // features} of 64 features"
    )
    assert found.verdict.endswith(f"each of {data * features} processes; those that share a device need so many times "
                                  "as much of it.")  # fmt: skip
    assert "processes" not in alone.facts


@pytest.mark.usefixtures("short_rehearsals")
def test_it_is_timed_by_one_of_them(tmp_path: Path) -> None:
    found = planned(tmp_path, load=True, data=2, features=2)
    assert found.problems == []
    assert found.numbers["step_seconds"] > 0
    assert found.facts["SAE step"].startswith("fast kernels")
    assert found.facts["duration"].endswith("messages and evals not counted")


def test_what_many_processes_cannot_do_is_a_problem(tmp_path: Path) -> None:
    (text,) = planned(tmp_path, features=3).problems
    assert text == "distributed.features: is 3, which does not divide the 64 features of the SAE"
    (text,) = planned(tmp_path, data=7).problems
    assert text.startswith("training.train_batch_size_tokens: is 240, which 7 processes cannot share evenly")


# ---- costs, by hand


def test_a_process_has_its_part() -> None:
    job = Job.topk(d=8, d_sae=1000, rows=40, k=3)
    assert (job.parameters(Mesh()), job.parameters(Mesh(4, 2))) == (17008, 500 * 17 + 8)
    assert job.state_bytes(Mesh(4, 2)) == 16 * 8508 + 16 * 500
    assert job.messages(Mesh()) == []
    assert {message.what: message.size for message in job.messages(Mesh(2, 2))} == {
        "rows": 4 * 10 * 8, "largest features": 4 * 20 * 3, "reconstructions": 4 * 20 * 8, "gradient of b_dec": 4 * 8,
        "gradients": 0, "firing counts and small gradients": 8 * (8508 + 500),  # in float64, in one message
    }  # fmt: skip
    sums = 2 * 1 / 2
    assert job.sent_bytes(Mesh(1, 2)) == 4 * 20 * 8 + 4 * 40 * 3 + sums * (4 * 40 * 8 + 4 * 8)


def test_of_grids_that_fit_that_which_sends_least_is_advised() -> None:
    assert meshes(6) == [Mesh(6, 1), Mesh(3, 2), Mesh(2, 3), Mesh(1, 6)]
    wide, narrow = Job.topk(8, 6000, 60, 3), Job.topk(8, 60, 6000, 3)
    for job in (wide, narrow):
        free = max(map(job.bytes, meshes(6)))
        found = advised(job, 6, lambda mesh: True, free)
        assert found is not None
        assert job.sent_bytes(found) == min(map(job.sent_bytes, meshes(6)))
    assert advised(wide, 6, lambda mesh: True, 1e9) == Mesh(1, 6), "gradients are larger than a batch"
    assert advised(narrow, 6, lambda mesh: True, 1e9) == Mesh(6, 1), "a batch is larger than gradients"
    assert advised(wide, 6, lambda mesh: mesh.features < 6, 1e9) == Mesh(2, 3)
    assert advised(wide, 6, lambda mesh: True, wide.bytes(Mesh(1, 6)) - 1) in (None, *meshes(6)[:3])
    assert advised(wide, 6, lambda mesh: True, 1) is None


def test_what_compete_over_a_batch_are_told_to_all() -> None:
    job = attrs.evolve(Job.topk(8, 1000, 40, 3), competes="all")
    told = {message.over: message.size for message in job.messages(Mesh(2, 2)) if "largest" in message.what}
    size = 8 * ((2**11 - 1) + (2**11 - 1) + (2**10 - 1))  # counts of each digit of a float32, but for one of them
    assert told == {"features": size, "data": size}


def test_advice_says_why() -> None:
    sae: SAEModule = saekit.SAE.from_dict({"name": "topk", "d_in": 8, "d_sae": 1024, "k": 3})
    job = Job.topk(8, 1024, 64, 3)
    least = job.bytes(Mesh(1, 8))

    assert advice(sae, job, Mesh(), None, "cuda") == advice(sae, job, Mesh(), 1e9, "cuda") == ""
    assert advice(sae, job, Mesh(1, 2), 1e9, "cuda").startswith(
        "1 × 2 (data × features), as it is; of all grids that fit, each process sends least on it, "
    )
    other = advice(sae, job, Mesh(2, 1), 1e9, "cuda")
    assert other.startswith("1 × 2 (data × features): torchrun --nproc-per-node 2 ... distributed.features=2; of all")
    assert " as it is" in other
    assert advice(sae, job, Mesh(), least, "cuda").startswith("8 processes that split features: each needs ")
    assert advice(sae, job, Mesh(), 1.0, "cuda").startswith("none: on no number of processes up to 512 does it fit")
