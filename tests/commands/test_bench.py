"""``saekit bench``: what is timed, by which way, and what it says of it and of the machine."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from rich.console import Console
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from support.command import cli

import saekit
from saekit import ConfigError
from saekit.commands.bench import bench, show_machine, size_of
from saekit.errors import UnknownKeyError
from saekit.runs import machine as machines
from saekit.runs import steady, timing
from saekit.runs.benching import Bench, Found, _rows
from saekit.runs.machine import this_machine
from saekit.runs.steady import Spread, seconds_in_turn
from saekit.testing import isolated_manager
from saekit.training import SAETrainer

SMALL: dict[str, Any] = {"sizes": ((16, 512), (8, 1024)), "seconds": 0.5, "rows": 256}


@pytest.fixture(scope="module")
def found(device: str) -> Found:
    return bench(Bench(device=device, **SMALL), verbose=False)


def shown(found: Found, busy: float | None = None) -> str:
    out, found = io.StringIO(), attrs.evolve(found, busy=busy)
    show_machine(found, Console(file=out, width=300))
    return out.getvalue()


def test_each_architecture_is_timed_in_each_size(found: Found) -> None:
    assert [(one.architecture, one.d_in, one.d_sae) for one in found.timed] == [
        (f"saekit:{name}", *size) for size in SMALL["sizes"] for name in ("standard", "topk", "batchtopk")
    ]
    for one in found.timed:
        times = [one.product, one.step, one.plain, *one.uses.values()]
        assert all(0 < seconds < 10 for seconds in times)
        assert list(one.uses) == ["sae(x)", "decode(encode(x))", "encode_sparse(x)"]
        assert one.microseconds(one.step) == pytest.approx(one.step * 1e6 / one.rows)
        assert one.flops_in(0.5) == 4 * one.rows * one.d_in * one.d_sae
        assert [*one.calls] == ["product", "step", *one.uses, *["plain"] * (one.why_plain is None)]
        assert one.step == one.calls["step"].low <= one.calls["step"].median


def test_as_many_features_are_active_as_late_in_training(found: Found) -> None:
    for one in found.timed:
        assert one.l0 == pytest.approx({"saekit:standard": 48}.get(one.architecture, 32), rel=0.06)


def test_features_that_begin_above_zero_are_left_active_too() -> None:
    asked = Bench(architectures=("jumprelu", "gated"), sizes=((64, 512),), seconds=0.3, rows=256, device="cpu")
    for one in bench(asked, verbose=False).timed:
        assert one.l0 == pytest.approx(48, rel=0.2)


def test_the_way_that_it_names_is_the_one_that_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, bool]] = []
    own_step, own_autograd = SAETrainer.train_on, StandardSAE.losses

    def train_on(trainer: SAETrainer, *given: Any) -> Any:
        made.append((trainer.sae.kernels, False))
        return own_step(trainer, *given)

    def losses(sae: Any, *given: Any) -> Any:
        made[-1] = (made[-1][0], True)
        return own_autograd(sae, *given)

    monkeypatch.setattr(SAETrainer, "train_on", train_on)
    monkeypatch.setattr(StandardSAE, "losses", losses)
    asked = Bench(architectures=("standard",), **{**SMALL, "sizes": ((16, 256),)}, device="cpu")
    (one,) = bench(asked, verbose=False).timed
    assert set(made) == {("auto", False), ("reference", True)}
    assert (one.path.partition(",")[0], one.why_plain, one.if_fast) == ("fast kernels", None, None)


class OwnSAE(StandardSAE):
    """Mathematics that no kernel knows."""

    def features_of(self, pre: torch.Tensor) -> torch.Tensor:
        return super().features_of(pre).clamp_max(3.0)


@attrs.frozen(kw_only=True)
class OwnConfig(StandardConfig):
    """A stranger's."""


class Stranger:
    """A plugin."""

    @saekit.hookimpl
    def saekit_register_sae_architectures(self) -> Iterable[saekit.Entry]:
        yield saekit.Entry("own", OwnConfig, OwnSAE, summary="a stranger's")


def test_an_architecture_of_a_stranger_says_why_it_is_in_plain_torch() -> None:
    plugins = isolated_manager(Stranger(), builtins=True)
    asked = Bench(architectures=("own", "topk"), sizes=((16, 256),), seconds=0.3, rows=256, device="cpu")
    result = bench(asked, plugins=plugins, verbose=False)
    own, topk = result.timed
    assert (own.architecture, own.why_plain) == ("test:own", "OwnSAE overrides features_of, and not step_kernels")
    assert own.plain == own.step
    text = shown(result)
    assert "own: plain torch: OwnSAE overrides features_of" in text
    assert "kernels=fast is refused: OwnSAE overrides features_of, and not step_kernels" in text
    assert [line.split()[4:6] for line in text.splitlines() if line.startswith("own ")] == [["the", "same"]]
    assert topk.why_plain is None


def test_a_table_for_people(found: Found) -> None:
    text = shown(found)
    lines = text.splitlines()
    assert lines[0] == found.machine.name
    assert lines[2].startswith("16 → 512, float32, batches of 256; mm1, one product with the encoder: ")
    assert [line.split()[0] for line in lines[4:7]] == ["standard", "topk", "batchtopk"]
    one = found.timed[0]
    assert f"({one.step / one.product:.2f})" in lines[4]
    product = statistics.median(each.product for each in found.timed[:3]) / 256 * 1e6
    assert float(lines[2].rpartition(": ")[2].split(" µs")[0]) == pytest.approx(product, rel=0.01)
    busy = shown(found, busy=0.5 * found.machine.cores).splitlines()
    assert busy[1].startswith("other programs were at work when it began (load ")
    assert [busy[0], *busy[2:]] == lines


def test_what_it_says_of_other_ways(found: Found) -> None:
    text = shown(found)
    fast = [attrs.evolve(one, path="fast", plain=one.step * (2 + i)) for i, one in enumerate(found.timed)]
    assert "training.kernels=reference takes plain torch: steps take 2.0 to 7.0 times as long" in shown(
        attrs.evolve(found, timed=fast)
    )
    assert "kernels=fast changes nothing here" in text
    looked = [attrs.evolve(one, path="fast", if_int8=None if one.d_sae > 600 else "few") for one in found.timed]
    text_of_int8 = shown(attrs.evolve(found, timed=looked))
    assert "training.kernels=int8 (8 → 1,024) takes a first look in 8-bit integers" in text_of_int8
    assert "training.kernels=int8 (16 → 512) is refused: few" in text_of_int8
    assert "not for fewer than 1024 features" in text or found.device != "cpu"
    if found.machine.triton is None:
        assert "not at work here: saekit:triton_topk needs triton, which is not installed" in text


def test_without_a_number_of_active_features(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    own_step = SAETrainer.train_on
    monkeypatch.setattr(SAETrainer, "train_on", lambda *given: {**own_step(*given), "metrics/l0": math.nan})
    asked = Bench(architectures=("topk",), sizes=((16, 128),), seconds=0.2, rows=256, device="cpu")
    result = bench(asked, verbose=False)
    assert [row["l0"] for row in json.loads(json.dumps(result.to_dict(), allow_nan=False))["rows"]] == [None]
    assert [line.split()[1] for line in shown(result).splitlines() if line.startswith("topk ")] == ["–"]


class BrokenSAE(StandardSAE):
    """Whose code has a mistake."""

    def shift_pre_activations(self, shift: torch.Tensor) -> None:
        self.no_such_name.add_(shift)


class Broken:
    """A plugin."""

    @saekit.hookimpl
    def saekit_register_sae_architectures(self) -> Iterable[saekit.Entry]:
        yield saekit.Entry("broken", OwnConfig, BrokenSAE, summary="a mistake")


def test_a_mistake_of_a_stranger_is_not_passed_over() -> None:
    plugins = isolated_manager(Broken(), builtins=True)
    asked = Bench(architectures=("broken",), sizes=((16, 256),), seconds=0.3, rows=256, device="cpu")
    with pytest.raises(saekit.SaekitError, match="no_such_name"):
        bench(asked, plugins=plugins, verbose=False)


def test_the_command_gives_json() -> None:
    words = ["bench", "--size", "16x128", "--architecture", "topk", "--seconds", "0.2", "--device", "cpu"]
    table = json.loads(cli(*words, "--rows", "300", "--json").stdout)
    assert table["machine"]["cpu"] == this_machine().cpu
    (row,) = table["rows"]
    assert (row["architecture"], row["d_in"], row["d_sae"], row["l0"]) == ("saekit:topk", 16, 128, 32)
    assert row["rows"] == 300
    assert set(row["calls"]["step"]) == {"low", "median", "high", "calls"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "nowhere"}, r"device: 'nowhere' cannot be used"),
        ({"seconds": 0.0}, r"seconds: must be above 0; found 0$"),
        ({"seconds": math.nan}, r"seconds: must be above 0; found nan$"),
        ({"rows": 0}, r"rows: "),
        ({"sizes": ((8, 0),)}, r"size: must be pairs of a width and a number of features, 1 or more; found"),
        ({"architectures": ("temporal",)}, r"architecture: saekit:temporal is for inference alone and has no steps"),
        ({"sizes": ((10**5, 10**6),)}, r"size: 100000x1000000 needs 3.21 TB, and .* are free on cpu; choose a smaller"),
    ],
)
def test_what_cannot_be_timed_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(Bench(**{"sizes": ((64, 1024),), "seconds": 0.1, "device": "cpu", **asked}), verbose=False)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnknownKeyError, match="Unknown SAE architecture 'topl'. Did you mean 'topk'"):
        bench(Bench(architectures=("topl",)), verbose=False)


@pytest.mark.parametrize("text", ["512", "512x", "x4096", "512x-1", "0x4096", "axb", "1x2x3"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--size: takes a width .* such as 512x4096; found '{text}'"):
        size_of(text)
    assert size_of("512x4096") == (512, 4096)


def test_the_least_of_the_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def taking(*seconds: float) -> Callable[[], None]:
        steps: Iterator[float] = iter(seconds)

        def work() -> None:
            nonlocal clock
            clock += next(steps)

        return work

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    assert timing.least_seconds(taking(1, 5, 3, 4), "cpu", most=4) == 3
    assert timing.least_seconds(taking(1), "cpu", most=1) == 1
    assert timing.least_seconds(taking(5), "cpu", most=9, budget=8) == 5  # a second would end after it
    assert timing.least_seconds(taking(9, 2, 3), "cpu", most=3, budget=18) == 2
    with pytest.raises(StopIteration):
        timing.least_seconds(taking(1, 1), "cpu", most=3, budget=3)


def test_small_batches_where_there_is_little_time() -> None:
    """Those of what takes the most time, as long as that is so."""

    def rows(**given: Any) -> list[int]:
        needed = {(512, 4096): 1e-3, (768, 24576): 9e-3}
        return [*_rows(Bench(**given), needed, "cpu").values()]

    assert rows(seconds=60) == [4096, 4096]
    assert rows(seconds=45) == [4096, 2048]
    assert rows(seconds=1) == [256, 256]
    assert rows(seconds=60, rows=1000) == [1000, 1000]


def a_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """What makes calls that take as many seconds as it is told, and at last always the same."""
    now = 0.0

    def taking(*seconds: float) -> Callable[[], None]:
        rest = list(seconds)

        def work() -> None:
            nonlocal now
            now += rest.pop(0) if len(rest) > 1 else rest[0]

        return work

    monkeypatch.setattr(steady.time, "perf_counter", lambda: now)
    return taking


def test_calls_in_turn_end_in_time_and_short_ones_are_made_often(monkeypatch: pytest.MonkeyPatch) -> None:
    taking = a_clock(monkeypatch)
    found = seconds_in_turn({"long": taking(8), "short": taking(5, 1), "tiny": taking(0.001)}, "cpu", 30)
    assert steady.time.perf_counter() == pytest.approx(30, abs=0.1)
    assert {name: round(spread.median, 9) for name, spread in found.items()} == {"long": 8, "short": 1, "tiny": 0.001}
    assert (found["long"].calls, found["short"].calls) == (1, 6)  # of 8 and of 5 + 6 seconds; its first does not count
    assert found["tiny"].calls > 8000
    assert [spread.unsteady for spread in found.values()] == [True, False, False]  # one call tells nothing
    late = seconds_in_turn({"long": taking(8)}, "cpu", 0)["long"]
    assert (late.calls, late.low) == (1, pytest.approx(8))


def test_the_first_of_some_short_calls_finds_the_caches_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    now = 0.0

    def work(name: str, warm: float, cold: float) -> None:
        nonlocal now
        now += warm if made[-1:] == [name] else cold
        made.append(name)

    monkeypatch.setattr(steady.time, "perf_counter", lambda: now)
    works = {"short": lambda: work("short", 0.006, 0.012), "long": lambda: work("long", 0.1, 0.1)}
    found = seconds_in_turn(works, "cpu", 3.0)
    assert found["short"].high == pytest.approx(0.006)
    assert found["short"].calls > 10


def test_how_far_calls_lie_apart() -> None:
    assert Spread.of([9, 4, 2, 3, 2, 3]) == Spread(low=2, median=2.5, high=3, calls=4)  # it was cold at 9 and 4
    assert Spread.of([9, 4, 3, 2]) == Spread(low=2, median=3, high=4, calls=3)
    assert Spread.of([9, 4]) == Spread(low=4, median=4, high=4, calls=1)
    quiet = [1.0, *[1.0, 1.02, 1.04, 1.01, 5.0, 6.0, 1.03] * 3]
    assert (Spread.of(quiet).unsteady, Spread.of(quiet).low) == (False, 1.01)  # what others did does not count
    assert Spread.of([1.0, 1.0, 1.3, 1.6, 1.0, 1.3, 1.4, 1.5]).unsteady


def test_what_is_not_steady_is_marked_with_what_to_do(found: Found) -> None:
    even, apart = Spread(low=1, median=1.1, high=2, calls=9), Spread(low=1, median=1.2, high=2, calls=9)
    steady_ones = [attrs.evolve(one, calls=dict.fromkeys(one.calls, even)) for one in found.timed]
    assert "~" not in shown(attrs.evolve(found, timed=steady_ones))
    first = attrs.evolve(steady_ones[0], calls={**steady_ones[0].calls, "sae(x)": apart})
    lines = shown(attrs.evolve(found, timed=[first, *steady_ones[1:]])).splitlines()
    (marked,) = [line for line in lines if "~" in line and not line.startswith("~: ")]
    assert marked.count("~") == 1
    assert f"~{first.microseconds(first.uses['sae(x)']):.3g}"[:4] in marked.replace(",", "")
    (told,) = [line for line in lines if line.startswith("~: ")]
    assert "close other programs, give it more time (--seconds)" in told
    product = attrs.evolve(steady_ones[0], calls={**steady_ones[0].calls, "product": apart})
    text = shown(attrs.evolve(found, timed=[product, *steady_ones[1:]]))
    (row,) = [line for line in text.splitlines() if line.startswith("standard ") and "~" in line]
    assert row.count("~") == 5  # all are told in its measure


def test_a_machine_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machines._LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machines, "_cpu", lambda: ("EPYC 1", {"avx512_vnni", "amx_tile"}))
    monkeypatch.setattr(machines, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert this_machine().instructions == "AVX-512 with VNNI, bfloat16, AMX"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(machines, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    held = attrs.evolve(this_machine(), cores=2, threads=1, torch="2.13.0")
    assert held.name == "2 cores of EPYC 1 with AVX2, held to ONEDNN_MAX_CPU_ISA=AVX2, 1 thread, torch 2.13.0"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    wholly = attrs.evolve(this_machine(), cores=2, threads=2, torch="2.13.0")
    assert wholly.name == "2 cores of EPYC 1 with AVX2, held to AVX2, torch 2.13.0"
    assert wholly.to_dict()["held_to"] == "AVX2"
    other = attrs.evolve(held, held={}, threads=2, gpu="NVIDIA H100")
    assert other.to_dict()["held_to"] is None
    assert other.name == "NVIDIA H100; 2 cores of EPYC 1 with AVX2, torch 2.13.0"
    assert other.to_dict()["name"] == other.name


def test_a_cpu_of_which_the_system_lists_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machines.platform, "processor", lambda: "arm")
    monkeypatch.setattr(machines, "Path", lambda name: tmp_path / "nowhere")
    assert machines._cpu() == ("arm", set())
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name : A  CPU\nflags : avx2 fma\n\nprocessor: 1\n")
    monkeypatch.setattr(machines, "Path", lambda name: tmp_path / "cpuinfo")
    assert machines._cpu() == ("A CPU", {"avx2", "fma"})
