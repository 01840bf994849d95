"""What follows from a table of parameters, shown on an architecture that is a stranger's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import support.gated
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.standard.module import StandardSAE
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.topk.module import TopKSAE
from support.gated import GatedConfig, GatedSAE
from support.optimizers import adam_for
from support.runs import LIVE, contents, fake_config, manager, pressing, resume, train, without
from torch import Tensor

import saekit
from saekit import Batch, Ports, SAEInfo, StepInput
from saekit.config import TrainingConfig
from saekit.errors import SAEFormatError, TrainingInterrupted
from saekit.sae import Parameter, init
from saekit.sae.build import build_module, initialize
from saekit.testing import fake_plugin, isolated_manager
from saekit.training.firing import FiringStatistics
from saekit.training.trainer import SAETrainer

FIRST, SECOND, READ, WRITTEN = (saekit.Site(hook_name=name) for name in ("first", "second", "read", "written"))
TWO = Ports({"first": 7, "second": 5})
OTHER = Ports({"read": 12}, {"written": 8})
PLAIN = {"init_encoder_as_decoder_transpose": False, "normalize_sae_decoder": False}


def built(ports: Ports | int = 12, seed: int = 0, **options: Any) -> Any:
    plugins = isolated_manager(support.gated, builtins=True)
    config = GatedConfig(**{"d_sae": 40, "normalize_sae_decoder": False, **options})
    sae: Any = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
    return sae


def rows(n: int = 50, width: int = 12, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stepped(sae: Any, x: Tensor, way: str, **given: Any) -> tuple[Any, dict[str, Tensor]]:
    sae = copy.deepcopy(sae)
    sae.kernels = way
    result = sae.training_step(x, StepInput(step=0, generator=torch.Generator(), **given))
    return result, {name: value.grad for name, value in sae.named_parameters()}


# ---- a stranger's fast step


@pytest.mark.parametrize("ports", [12, OTHER], ids=["an SAE", "a transcoder"])
@pytest.mark.parametrize("bias", [-3.0, -1.0, 0.0, 2.0])
def test_a_strangers_fast_step_is_autograds(ports: Ports | int, bias: float) -> None:
    sae = built(ports, dtype="float64", d_sae=90, apply_b_dec_to_input=ports == 12)
    with torch.no_grad():
        sae.b_gate += bias
    x = rows(2500)
    target = None if ports == 12 else rows(2500, 8, seed=2)
    (fast, gradients), (plain, expected) = (stepped(sae, x, way, target=target) for way in ("fast", "reference"))
    assert sae.step_path() == "plain torch: the weights are float64"
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.metrics["details/open_gates"], plain.metrics["details/open_gates"])
    torch.testing.assert_close(fast.output, plain.output, rtol=1e-10, atol=1e-10)
    assert torch.equal(fast.fired, plain.fired)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_its_inference_is_fast_and_equal() -> None:
    sae, x = built(dtype="float64"), rows()
    with torch.no_grad():
        found = sae.encode(x), sae(x), sae.encode_sparse(x).dense()
        sae.kernels = "reference"
        features = sae.encode(x)
        for value, expected in zip(found, (features, sae(x), features), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert 0 < (features > 0).float().mean() < 1


def test_a_transcoder_made_of_standard_reads_one_site_and_writes_another() -> None:
    plugins = isolated_manager(builtins=True)
    config = StandardConfig(d_sae=40, dtype="float64", apply_b_dec_to_input=False, **PLAIN)
    sae = build_module(plugins.find("sae_architectures", config), config, OTHER, plugins)
    initialize(sae, torch.Generator().manual_seed(0))
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_dec.shape) == ((12, 40), (40, 8), (8,))
    x, target = rows(), rows(width=8)
    (fast, gradients), (plain, expected) = (stepped(sae, x, way, target=target) for way in ("fast", "reference"))
    torch.testing.assert_close(fast.loss, plain.loss)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-9)
    assert sae(rows(6).reshape(2, 3, 12)).shape == (2, 3, 8)
    sae.use_error_term = True
    with pytest.raises(ValueError, match="reads and writes the same sites"):
        sae(x)


def test_a_bias_of_other_sites_cannot_be_taken_from_inputs() -> None:
    with pytest.raises(saekit.ConfigError, match=r"sae.apply_b_dec_to_input.*these are other sites; set it to false"):
        built(OTHER)


# ---- the activation scale


def test_a_factor_for_each_port_folds_into_what_meets_it() -> None:
    sae, scale = built(TWO, dtype="float64"), torch.cat([torch.full((7,), 3.0), torch.full((5,), 0.5)]).double()
    x = rows()
    with torch.no_grad():
        features, output = sae.encode(x * scale), sae(x * scale)
        sae.fold_activation_scale(scale)
        torch.testing.assert_close(sae.encode(x), features, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sae(x), output / scale, rtol=1e-12, atol=1e-12)


def test_inputs_and_targets_have_scales_of_their_own() -> None:
    sae, x = built(OTHER, dtype="float64", apply_b_dec_to_input=False), rows()
    with pytest.raises(ValueError, match="give both"):
        sae.fold_activation_scale(2.0)
    with torch.no_grad():
        output = sae(x * 2)
        sae.fold_activation_scale(2.0, 0.25)
        torch.testing.assert_close(sae(x), output / 0.25, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("read", "written", "recorded"),
    [
        ([3.0] * 7 + [0.5] * 5, [2.0] * 4, {"a": 3.0, "b": 0.5, "c": 2.0}),
        (3.0, 2.0, {"a": 3.0, "b": 3.0, "c": 2.0}),
        ([3.0] * 12, 3.0, 3.0),
        ([3.0] * 11 + [4.0], 2.0, None),
    ],
    ids=["vectors", "two numbers", "one number", "no number of a site"],
)
def test_a_scale_that_was_unknown_is_not_once_it_is_folded_in(read: Any, written: Any, recorded: Any) -> None:
    config = StandardConfig(d_sae=9, apply_b_dec_to_input=False)
    ports, plugins = Ports({"a": 7, "b": 5}, {"c": 4}), saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    sae.info = sae.info.with_scale(None)
    assert sae.info.scale_is_unknown
    sae.fold_activation_scale(*(torch.tensor(one) if isinstance(one, list) else one for one in (read, written)))
    assert not sae.info.scale_is_unknown
    assert sae.info.metadata.get("activation_scale") == recorded


def test_a_scale_that_a_parameter_cannot_take_is_an_error() -> None:
    entry = Parameter("threshold", ("d_sae",), init=init.zeros, scale={"d_out": -1})
    value = torch.ones(3)
    entry.fold(value, {"d_out": torch.full((2,), 4.0)})
    assert value.tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="threshold has no dimension d_out.*the same for all ports"):
        entry.fold(value, {"d_out": torch.tensor([1.0, 2.0])})


# ---- ports


def test_ports_are_views_side_by_side() -> None:
    x = rows()
    assert (TWO.d_in, TWO.d_out, TWO.same, OTHER.d_out, OTHER.same) == (12, 12, True, 8, False)
    parts = TWO.split_input(x)
    assert [part.shape for part in parts.values()] == [(50, 7), (50, 5)]
    assert torch.equal(torch.cat([*parts.values()], dim=-1), x)
    assert parts["second"].data_ptr() == x[:, 7:].data_ptr()
    assert Ports.one(3) == Ports({"x": 3}) != Ports({"y": 3})
    assert Ports({"a": 1, "b": 2}) != Ports({"b": 2, "a": 1}), "columns have an order"
    with pytest.raises(ValueError, match=r"inputs must be widths of 1 or more.*found \{'a': 0\}"):
        Ports({"a": 0})


# ---- memory, types and starting values


def test_digits_are_kept_where_the_table_says_so() -> None:
    sae = built(dtype="bfloat16")
    assert {name: value.dtype for name, value in sae.named_parameters() if value.dtype != torch.bfloat16} == {
        "r_mag": torch.float32
    }
    assert sae.dtype == torch.bfloat16
    sae = built()
    sae.cast_weights(torch.bfloat16)
    assert (sae.r_mag.dtype, sae.b_mag.dtype) == (torch.float32, torch.bfloat16)
    assert sae.float().half().r_mag.dtype == torch.float32
    assert sae.double().r_mag.dtype == torch.float64


def test_starting_values_are_drawn_as_those_of_an_architecture_without_it() -> None:
    """What a stranger's table adds changes nobody's random numbers."""
    gated, plugins = built(dtype="float64"), isolated_manager(builtins=True)
    config = StandardConfig(d_sae=40, dtype="float64", **PLAIN)
    plain = build_module(plugins.find("sae_architectures", config), config, 12, plugins)
    for sae in (gated, plain):
        initialize(sae, torch.Generator().manual_seed(3))
    assert torch.equal(gated.W_enc, plain.W_enc)
    assert torch.equal(gated.W_dec, plain.W_dec)
    assert (gated.b_mag == 0.1).all()


def test_memory_is_laid_out_as_the_table_says() -> None:
    assert built().W_enc.T.is_contiguous()
    assert built().W_dec.is_contiguous()
    assert built(dtype="float64").W_enc.is_contiguous()


def test_the_table_says_along_what_features_may_be_split() -> None:
    found = {entry.name: entry.split for entry in GatedSAE.parameters_of(GatedConfig())}
    assert found.pop("b_dec") is None
    assert set(found.values()) == {"d_sae"}
    whole = Parameter("W", ("d_sae", "d_out"), init=init.zeros, split=None)
    assert (whole.split, attrs.evolve(whole, split="d_out").split) == (None, "d_out")
    with pytest.raises(ValueError, match=r"^W is to be split along d_in, and its dimensions are \('d_sae', 'd_out'\)$"):
        attrs.evolve(whole, split="d_in")


def test_the_size_counts_every_parameter() -> None:
    table = built().table
    assert table.count() == 2 * 12 * 40 + 3 * 40 + 12
    assert table.count(lambda entry: entry.dtype(torch.bfloat16).itemsize) == 2 * table.count() + 2 * 40


# ---- saving and loading


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    plugins = isolated_manager(support.gated, builtins=True)
    for ports in (Ports.one(12), TWO):
        sae = built(ports, apply_b_dec_to_input=True)
        again = GatedSAE.load(sae.save(tmp_path / "sae"), plugins=plugins)
        assert again.ports.inputs == (sae.ports.inputs if ports is TWO else {"x": 12})
        x = rows(dtype=torch.float32)
        assert torch.equal(again(x), sae(x))


def test_a_transcoders_folder_names_its_sites(tmp_path: Path) -> None:
    sae = built(OTHER, apply_b_dec_to_input=False)
    path = sae.save(tmp_path / "sae")
    own = json.loads((path / "cfg.json").read_text())["saekit"]
    assert own["inputs"] == [{"hook_name": "read", "hook_head_index": None, "width": 12}]
    assert own["targets"] == [{"hook_name": "written", "hook_head_index": None, "width": 8}]
    plugins = isolated_manager(support.gated, builtins=True)
    again = saekit.SAE.load(path, plugins=plugins)
    assert again.ports == OTHER
    assert torch.equal(again(rows(dtype=torch.float32)), sae(rows(dtype=torch.float32)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "saekit.targets in cfg.json .* found None, expected a list of sites, each with its width"),
        ([3], "saekit.targets in cfg.json .* expected a list of sites"),
        ([{"hook_name": "a"}], "saekit.targets.width .* found nothing, expected a whole number of 1 or more"),
        ([{"hook_name": "a", "width": "12"}], "saekit.targets.width .* found '12'"),
        ([{"width": 12}], "is not a site: .*hook_name: is missing"),
        ([{"hook_name": "first", "width": 12}], "found .*, expected the width of first that inputs say"),
        ([], "targets: must be one site or more"),
    ],
)
def test_targets_of_a_folder_that_are_none(tmp_path: Path, targets: object, message: str) -> None:
    path = built(TWO).save(tmp_path / "sae")
    table = json.loads((path / "cfg.json").read_text())
    table["saekit"]["targets"] = targets
    del table["saekit"]["seal"]
    (path / "cfg.json").write_text(json.dumps(table))
    with pytest.raises(SAEFormatError, match=message):
        saekit.SAE.load(path, plugins=isolated_manager(support.gated, builtins=True))


def test_tensors_are_compared_with_the_table() -> None:
    sae = built()
    sae.info = SAEInfo(architecture="test:gated")
    tensors = sae.public_tensors()
    tensors["r_mag"] = tensors["r_mag"][:-1]
    tensors["b_enc"] = tensors.pop("b_mag")
    with pytest.raises(
        SAEFormatError,
        match=r"do not fit test:gated: b_mag is missing; b_enc is not a tensor of this architecture; r_mag has shape "
        r"\[39\], expected \[40\]",
    ):
        sae.load_public_tensors(tensors)


class Counting(StandardSAE):
    """With state that is not in the table."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("seen", torch.full((2,), 3.5))
        self.register_buffer("made_again", torch.zeros(1), persistent=False)


def counting() -> Counting:
    config = StandardConfig(d_sae=20, **PLAIN)
    return Counting(config, ports=Ports.one(6), activation=torch.relu)


def test_buffers_are_saved_with_the_parameters() -> None:
    one, two = counting(), counting()
    tensors = one.public_tensors()
    assert tensors["seen"].tolist() == [3.5, 3.5]
    assert "made_again" not in tensors
    two.seen.zero_()
    two.load_public_tensors(tensors)
    assert torch.equal(two.seen, one.seen)
    with pytest.raises(SAEFormatError, match="seen is missing"):
        two.load_public_tensors({name: value for name, value in tensors.items() if name != "seen"})


def test_state_that_no_folder_can_hold_is_refused(tmp_path: Path) -> None:
    sae = counting()
    sae.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    with pytest.raises(SAEFormatError, match="steps .* holds numbers of type int64"):
        sae.save(tmp_path / "sae")
    with pytest.raises(SAEFormatError, match=r"loaded again: steps \(torch.int64\). Keep them in floating"):
        sae.check_state()

    class OfTopK(TopKSAE):
        def __init__(self, config: Any, **known: Any) -> None:
            super().__init__(config, **known)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    for normalize in (True, False):
        options = TopKConfig(d_sae=20, k=3, normalize_sae_decoder=normalize, decoder_heuristic_init=False)
        top = OfTopK(options, ports=Ports.one(6), activation=torch.relu)
        with torch.no_grad():
            for parameter in top.parameters():
                parameter.fill_(0.3)
        with pytest.raises(SAEFormatError, match=r"OfTopK has buffers .* steps \(torch.int64\)"):
            top.check_state()

    class Saving(OfTopK):
        def public_tensors(self) -> dict[str, torch.Tensor]:
            return {name: value.double() for name, value in super().public_tensors().items()}

    Saving(options, ports=Ports.one(6), activation=torch.relu).check_state()

    class Extra(Counting):
        def get_extra_state(self) -> Any:
            return {"anything": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    extra = Extra(StandardConfig(d_sae=20, **PLAIN), ports=Ports.one(6), activation=torch.relu)
    with pytest.raises(SAEFormatError, match="Extra has state that is no tensor .* register it as a buffer"):
        extra.save(tmp_path / "sae")
    with pytest.raises(SAEFormatError, match="Extra has state that is no tensor"):
        extra.check_state()
    assert not (tmp_path / "sae").exists()


# ---- training


def test_rows_of_norm_1_are_those_of_the_table() -> None:
    class Unit(StandardSAE):
        @classmethod
        def parameters_of(cls, config: Any) -> tuple[Parameter, ...]:
            own = Parameter("own", (3, "d_sae"), init=init.ones, unit_rows=True)
            return (*super().parameters_of(config), own)

    sae: Any = Unit(StandardConfig(d_sae=20, **PLAIN), ports=Ports.one(6), activation=torch.relu)
    initialize(sae, torch.Generator().manual_seed(0))
    sae.after_update()
    torch.testing.assert_close(sae.own.norm(dim=1), torch.ones(3))
    sae.own.grad = rows(3, 20, dtype=torch.float32)
    sae.before_update()
    torch.testing.assert_close((sae.own.grad * sae.own).sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    assert sae.W_dec.norm(dim=1).std() > 0


def gated_run(folder: Path, **sections: Any) -> dict[str, Any]:
    sections["sae"] = {"name": "test:gated", "d_sae": 16, "apply_b_dec_to_input": True} | sections.get("sae", {})
    config = fake_config(folder, LIVE, **sections)
    config["sae"] = sections["sae"]
    return config


def own_manager() -> Any:
    return manager(None, support.gated)


def test_a_run_of_it_learns_logs_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    tuned = {"finetuning_method": "scale"}
    whole = train(gated_run(tmp_path / "whole", training=tuned), plugins=own_manager())
    with pressing(5), pytest.raises(TrainingInterrupted):
        train(gated_run(tmp_path / "parts", training=tuned), plugins=own_manager())
    resume(tmp_path / "parts/run", plugins=own_manager())
    skipped = ("checkpoints/", "run.json", "config", "summary")
    assert without(contents(tmp_path / "parts/run"), *skipped) == without(contents(whole.folder), *skipped)
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("details/open_gates" in line for line in lines)
    assert any("weights/b_gate" in line for line in lines)
    assert isinstance(whole.sae, GatedSAE)
    again = saekit.SAE.load(whole.folder / "sae", plugins=own_manager())
    x = rows(20, whole.sae.d_in, dtype=torch.float32)
    torch.testing.assert_close(again(x), whole.sae(x))  # the factors are in W_dec there
    assert "scaling_factor" not in again.public_tensors()


def test_state_that_could_not_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    @attrs.frozen(kw_only=True)
    class Config(StandardConfig):
        """Of a class that counts in whole numbers."""

    class Whole(Counting):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def losses(self, x: Tensor, step: StepInput) -> Any:
            raise AssertionError("too late")

    config = gated_run(tmp_path, sae={"name": "whole", "d_sae": 16})
    plugins = manager(None, fake_plugin("sae_architectures", "whole", Whole, config=Config))
    with pytest.raises(SAEFormatError, match=r"Whole has buffers .* steps \(torch.int64\)"):
        train(config, plugins=plugins)


def trainer_of(sae: Any, **changes: Any) -> SAETrainer:
    training = TrainingConfig(training_tokens=10**6, lr=1e-3)
    return SAETrainer(
        name="sae", sae=sae, training=training, generator=torch.Generator(), device="cpu",
        optimizer=adam_for(sae.named_parameters(), lambda step: 1e-3),
        firing=FiringStatistics(sae.d_sae, dead_after=3, window=5, device="cpu"), **changes,
    )  # fmt: skip


def test_a_trainer_of_several_sites_has_a_scale_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = built(TWO, dtype="float64"), rows()
    trainer = trainer_of(sae, sites=saekit.Sites((FIRST, SECOND)), scale={"first": 2.0, "second": 0.25})
    seen: list[StepInput] = []
    steps = type(sae).training_step
    monkeypatch.setattr(type(sae), "training_step", lambda own, x, step: (seen.append(step), steps(own, x, step))[1])
    batch = Batch({SECOND: x[:, 7:], FIRST: x[:, :7]}, tokens=torch.arange(50))
    inputs, target = trainer.rows_of(batch)
    assert torch.equal(inputs, x)
    assert target is None
    metrics = trainer.train_on(inputs, target, batch)
    assert metrics["details/open_gates"] > 0
    (step,) = seen
    assert (step.step, step.steps, step.batch, step.target) == (0, trainer.training.steps, batch, None)
    scale = torch.cat([torch.full((7,), 2.0), torch.full((5,), 0.25)]).double()
    with torch.no_grad():
        torch.testing.assert_close(trainer.raw_sae()(x), trainer.sae(x * scale) / scale, rtol=1e-10, atol=1e-10)
    assert not trainer.as_saved


def test_a_trainer_of_a_transcoder_has_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x, y = built(OTHER, dtype="float64", apply_b_dec_to_input=False), rows(), rows(width=8)
    trainer = trainer_of(sae, sites=saekit.Sites((FIRST,), (SECOND,)), scale={"read": 2.0, "written": 0.5})
    inputs, target = trainer.rows_of(Batch({FIRST: x, SECOND: y}))
    assert torch.equal(target, y)
    with torch.no_grad():
        output = sae(2 * x)
    metrics = trainer.train_on(inputs, target)
    expected = 1 - (output - y / 2).pow(2).sum() / (y / 2 - (y / 2).mean(0)).pow(2).sum()
    assert metrics["metrics/explained_variance"] == pytest.approx(float(expected), rel=1e-6)


def test_rates_follow_the_table(tmp_path: Path) -> None:
    """Adam's first step is the rate itself, whatever the gradient."""
    training = {
        "training_tokens": 24, "train_batch_size_tokens": 24, "finetuning_tokens": 0, "finetuning_method": None,
        "lr": 1e-3, "lr_warm_up_steps": 0, "lr_decay_steps": 0,
    }  # fmt: skip
    config = gated_run(tmp_path, training=training, activations={"source": LIVE}, lr_schedule={"name": "constant"})
    sae: Any = train(config, plugins=own_manager()).sae
    moved = sae.r_mag.abs()[sae.r_mag != 0]
    assert len(moved)
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-4), rtol=1e-2, atol=0)
    moved = (sae.b_mag - 0.1).abs()[sae.b_mag != 0.1]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)
