"""What plans say of many processes is what they do; the benches that measure it work."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from support import warm
from support.processes import Case

import saekit
from saekit.distributed import ALONE
from saekit.distributed.costs import Job, Mesh, Rates, advised, meshes
from saekit.distributed.group import Group
from saekit.distributed.sizes import LARGE, counts_sent
from saekit.planning.step_costs import job_of, step_bytes
from saekit.runs.parts import moment_bytes

BENCH = Path(__file__).parents[1] / "bench"


def ran(name: str, *arguments: object) -> str:
    found = warm.python("-W", "ignore", BENCH / f"{name}.py", *arguments)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.processes
def test_messages_of_two_processes_are_those_of_the_model() -> None:
    lines = ran("scaling", "count", "--size", 2).splitlines()
    found = {}
    for line in lines:
        kind, data, features, said, there = re.findall(r"[\w,]+", line)[:1] + re.findall(r"[\d,]+", line)[:4]
        found[kind, int(data), int(features)] = [int(number.replace(",", "")) for number in (said, there)]
    kinds = ("topk", "revived", "batchtopk", "standard")
    assert found.keys() == {(kind, *mesh) for kind in kinds for mesh in ((2, 1), (1, 2))}
    # How many of a batch's largest are in whose rows, the rows say; each sends as much as who has most.
    uneven = {("batchtopk", 2, 1): 0.01 * found["batchtopk", 2, 1][0]}
    far = {case: both for case, both in found.items() if abs(both[0] - both[1]) > uneven.get(case, 100)}
    assert not far, "but for losses and a few numbers more"


@pytest.mark.processes
def test_two_processes_are_timed_beside_one() -> None:
    text = ran("processes", "--rounds", 1, "--rows", 64, "--size", 16, 64, "--only", "topk", "standard", "--where")
    for kind in ("topk", "standard"):
        for mesh in ("data", "features"):
            assert re.search(
                rf"{kind} +{mesh} +one process +[\d.]+ ms, two +[\d.]+ ms: x [\d.]+ .*x [\d.]+$", text, re.M
            )
        assert re.search(rf"{kind} +a world of one: \d+ calls in a step, \d+ µs of [\d.]+ ms: [\d.]+%$", text, re.M)
    assert len(re.findall(r"process 0: +1 x gather of 4,096 bytes", text)) == 0  # k = 32 of 64 rows: 8,192 bytes
    assert len(re.findall(r"process 0: +1 x gather of 8,192 bytes", text)) == 1


def test_rows_are_given_where_they_are_less() -> None:
    """Rows and gradients to reconstructions, and a row, a feature and two numbers of each entry; then new weights."""
    job = attrs.evolve(Job.topk(64, 4096, rows=1024, k=8), leaves_weights=True)
    found = {message.what: message.size for message in job.messages(Mesh(2, 1))}
    assert found["rows and gradients to them"] == 4 * 512 * 2 * 64 + 16 * 512 * 8
    assert "gradients" not in found
    assert job.sent_bytes(Mesh(2, 1)) == sum(
        (found["rows and gradients to them"], 4 * 64 * 4096, found["firing counts and small gradients"])
    )
    for other in (
        attrs.evolve(job, leaves_weights=False),
        attrs.evolve(job, on_gpu=True),
        attrs.evolve(job, k_aux=32),
        attrs.evolve(job, k=64),
        attrs.evolve(job, rows=4096),
        attrs.evolve(job, elementwise=False),
    ):
        assert "gradients" in {message.what for message in other.messages(Mesh(2, 1))}


def test_candidates_of_a_whole_batch_are_counted_on_gpus() -> None:
    """Each process has as many as the batch has active entries, whatever it has of rows and features."""
    job = attrs.evolve(Job.topk(8, 4096, rows=2**18, k=64), competes="all", on_gpu=True)
    assert job.held(Mesh(64, 1))["candidates"] == 64 * 64 * 2**18
    assert "candidates" not in attrs.evolve(job, on_gpu=False).held(Mesh(64, 1))
    assert "candidates" not in job.held(Mesh())


def test_a_process_has_its_part() -> None:
    job = Job.topk(64, 4096, rows=2048, k=8)
    assert job.parameters(Mesh()) == 2 * 64 * 4096 + 4096 + 64
    assert job.parameters(Mesh(2, 4)) == (2 * 64 * 4096 + 4096) / 4 + 64
    large = 2 * 64 * 4096
    assert job.state_bytes(Mesh(8, 1)) == job.state_bytes(Mesh()) - 4 * 2 * large * 7 / 8, "moments of large ones"
    whole = attrs.evolve(job, elementwise=False)
    assert whole.state_bytes(Mesh(8, 1)) == job.state_bytes(Mesh())
    assert job.updated(Mesh(3, 1)) == job.parameters(Mesh()), "they cannot be divided"
    assert job.messages(Mesh()) == []
    assert {mesh.size for mesh in meshes(12)} == {12}
    assert len(meshes(12)) == 6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_a_process_keeps_is_what_its_optimizer_has(dtype: str) -> None:
    """In float64 features do not lie one after the other in ``W_enc``, which is updated whole."""
    case = Case({"name": "topk", "k": 3, "k_aux": 1}, widths=(48,), d_sae=2048, dtype=dtype)
    sae, size = case.trainer(ALONE).sae, 4 if dtype == "float32" else 8
    plugins, training = saekit.default_manager(), case.config.training
    job = job_of(sae, training, "cpu", moment_bytes(case.config, plugins, sae), mesh=Mesh(2, 1))
    for data in (1, 2, 3):
        group = Group()
        group.size = data
        assert moment_bytes(case.config, plugins, sae, group) == 2 * size * job.updated(Mesh(data, 1)), data
    assert job.undivided == (48 * 2048 if dtype == "float64" else 0)


def test_what_competes_over_a_batch_on_a_gpu_counts_all_rows() -> None:
    """Which is not waited for; two processes look for it by chunks."""
    case = Case({"name": "batchtopk", "k": 3.0}, widths=(16,), d_sae=2048, dtype="float32", rows=4096)
    sae, training = case.trainer(ALONE).sae, attrs.evolve(case.config.training, kernels="auto")
    gpu, cpu = (job_of(sae, training, device) for device in ("cuda", "cpu"))
    assert gpu.held(Mesh())["features of all rows"] == 4 * 4096 * 2048
    assert step_bytes(sae, training, "cuda") > 4 * 4096 * 2048
    assert "features of all rows" not in {**cpu.held(Mesh()), **gpu.held(Mesh(2, 1))}
    topk = attrs.evolve(gpu, competes="features")
    assert topk.step_bytes(Mesh()) < gpu.step_bytes(Mesh())


def test_a_first_look_in_int8_rounds_to_bytes() -> None:
    plain = Job.topk(512, 4096, rows=2048, k=8)
    held = {kind: attrs.evolve(plain, screened=kind).held(Mesh()) for kind in ("bfloat16", "int8")}
    assert held["bfloat16"]["the rounded encoder"] == 4096 * 2 * (512 + 8)
    assert held["int8"]["the rounded encoder"] == 4096 * (512 + 32)
    assert held["int8"]["features of a chunk"] == 5 * 1024 * 4096, "integers of 32 bits, and a mask"
    few = attrs.evolve(plain, screened="int8", rows=256)
    assert "the rounded encoder" not in few.held(Mesh()), "too few rows to be worth it"


def test_auxk_is_counted_where_it_takes_most() -> None:
    without = Job.topk(512, 4096, rows=1024, k=8)
    job = attrs.evolve(without, k_aux=2048)
    assert job.held(Mesh())["dead features"] == 4 * 2048 * (2 * 1024 + 3 * 1024)
    assert job.step_bytes(Mesh()) > without.step_bytes(Mesh())
    assert attrs.evolve(without, k_aux=1).held(Mesh()) == without.held(Mesh()), "one is little beside other gradients"


@pytest.mark.parametrize("k", [8, 64])
def test_what_is_told_of_largest_features_does_not_grow_with_processes_or_k(k: int) -> None:
    few, many = (
        sum(
            message.size
            for message in Job.topk(64, 2**16, rows=1024, k=k).messages(Mesh(1, parts))
            if "largest" in message.what
        )
        for parts in (2, 512)
    )
    assert few == 4 * 1024 * k
    assert many == 4 * 1024 * (counts_sent(32, 2) + 1)
    whole = attrs.evolve(Job.topk(64, 2**16, rows=1024, k=k), competes="all")
    sizes = {message.size for message in whole.messages(Mesh(16, 16)) if "largest" in message.what}
    assert sizes == {8 * counts_sent(32, 11)}


def test_small_gradients_go_with_counts() -> None:
    job = Job.topk(64, 2 * LARGE, rows=1024, k=8)
    sizes = {message.what: message.size for message in job.messages(Mesh(2, 1))}
    assert sizes["gradients"] == 4 * (2 * 64 + 1) * 2 * LARGE
    assert sizes["firing counts and small gradients"] == 8 * (2 * LARGE + 64)
    sizes = {message.what: message.size for message in job.messages(Mesh(2, 4))}
    assert sizes["gradients"] == 4 * 2 * 64 * LARGE / 2
    assert sizes["firing counts and small gradients"] == 8 * (LARGE / 2 + LARGE / 2 + 64)


def test_a_grid_is_advised_that_fits_and_sends_least() -> None:
    job = Job.topk(768, 2**20, rows=32_768, k=64)
    mesh = advised(job, 64, lambda mesh: True, 5e9)
    assert mesh is not None
    assert job.bytes(mesh) <= 5e9
    fitting = [one for one in meshes(64) if job.bytes(one) <= 5e9]
    assert job.sent_bytes(mesh) == min(map(job.sent_bytes, fitting))
    assert advised(job, 64, lambda mesh: True, 1e6) is None


def test_time_falls_with_processes_and_is_that_of_products_where_all_else_is_free() -> None:
    job, free = Job.topk(768, 2**14, rows=4096, k=32), Rates(1e12, float("inf"), float("inf"))
    assert job.seconds(Mesh(), free) == 2 * 4096 * 768 * 2**14 / 1e12
    assert job.seconds(Mesh(4, 2), free) == pytest.approx(job.seconds(Mesh(), free) / 8)
    slow = Rates(1e12, 1e11, 1e9)
    assert job.seconds(Mesh(2, 1), slow) > job.seconds(Mesh(), slow) / 2
