"""Toy models against closed forms, finite differences, and what the paper found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import DivergedError, SAEFormatError
from saekit.toy import ToyConfig, ToyModel, animate_directions, plot_directions, train_toy_model

IMPORTANCE = (1.0, 0.5, 0.25)


def small(**options: object) -> ToyModel:
    options = {"n_features": 3, "importance": IMPORTANCE, "dtype": "float64"} | options
    return ToyModel(ToyConfig(**options))  # type: ignore[arg-type]


def by_hand(model: ToyModel, rows: list[list[float]]) -> float:
    """The loss with loops, from the formulas of the paper."""
    W, b, total = model.W.tolist(), model.b.tolist(), 0.0
    for x in rows:
        h = [sum(W[m][i] * x[i] for i in range(3)) for m in range(2)]
        out = [sum(W[m][i] * h[m] for m in range(2)) + b[i] for i in range(len(b))]
        if model.config.loss == "mse":
            total += sum(IMPORTANCE[i] * (x[i] - max(out[i], 0)) ** 2 for i in range(3))
        else:
            y = max(range(3), key=lambda i: x[i]) if any(x) else 3
            total += (*IMPORTANCE, 1.0)[y] * (math.log(sum(map(math.exp, out))) - out[y])
    return total / len(rows)


ROWS = [[0.5, 0.0, 0.0], [0.2, 0.9, 0.0], [0.0, 0.0, 0.0], [0.1, 0.2, 0.8]]


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_loss_and_its_gradient_are_those_of_the_formula(loss: str) -> None:
    model, x = small(loss=loss), torch.tensor(ROWS, dtype=torch.float64)
    with torch.no_grad():
        model.b += torch.linspace(-0.2, 0.3, len(model.b), dtype=torch.float64)
    value = model.loss(x)
    assert value.item() == pytest.approx(by_hand(model, ROWS), rel=1e-12)
    value.backward()
    for parameter in (model.W, model.b):
        assert parameter.grad is not None
        found = torch.zeros_like(parameter)
        for place in range(parameter.numel()):
            ends = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                ends.append(by_hand(model, ROWS))
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-6
            found.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        assert torch.allclose(parameter.grad, found, atol=1e-8)


def test_the_class_that_none_fires_is_no_direction() -> None:
    model = small(loss="cross_entropy")
    assert model.W.shape == (2, 4)
    assert model.directions.shape == (3, 2)
    assert torch.equal(model.directions, model.W.detach()[:, :3].T)
    hot = torch.eye(3, dtype=torch.float64)
    assert torch.equal(model.hidden(hot).detach(), model.directions)


def replayed(config: ToyConfig, rates: list[float]) -> tuple[Tensor, Tensor]:
    """Training written out: a new batch for each step, Adam (Kingma and Ba 2015) by its formulas."""
    generator = torch.Generator().manual_seed(config.seed)
    model = ToyModel(config, generator)
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in model.parameters()]
    losses = []
    for t, lr in enumerate(rates, 1):
        loss = model.loss(model.draw(config.batch_size, generator))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient, (mean, square) in zip(model.parameters(), gradients, moments, strict=True):
            mean.mul_(config.beta1).add_(gradient * (1 - config.beta1))
            square.mul_(config.beta2).add_(gradient**2 * (1 - config.beta2))
            step = mean / (1 - config.beta1**t) / ((square / (1 - config.beta2**t)).sqrt() + 1e-8)
            parameter.data -= lr * step
    return model.W.detach(), torch.tensor(losses, dtype=torch.float64)


SCHEDULES = {
    "constant": ({}, lambda t: 1.0),
    "linear": ({"lr_decay_steps": 12}, lambda t: 1 - t / 12),
    "cosine": ({"lr_schedule": "cosine"}, lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / 12)) / 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_fault_25_every_batch_is_used_at_the_rate_of_its_step(name: str) -> None:
    options, factor = SCHEDULES[name]
    config = ToyConfig(steps=12, batch_size=64, dtype="float64", lr=0.03, seed=3, **options)  # type: ignore[arg-type]
    found = train_toy_model(config)
    assert len(found.losses) == 12
    rates = [0.03 * factor(t) for t in range(12)]
    assert found.rates.tolist() == pytest.approx(rates, rel=1e-9), found.rates
    W, losses = replayed(config, rates)
    assert torch.allclose(found.losses, losses, rtol=1e-9)
    assert torch.allclose(found.model.W, W, rtol=1e-7)


def test_fault_30_whole_numbers_are_betas() -> None:
    config = {"steps": 5, "batch_size": 32, "dtype": "float64"}
    whole = train_toy_model(ToyConfig(beta1=0, beta2=0, **config))  # type: ignore[arg-type]
    same = train_toy_model(ToyConfig(beta1=0.0, beta2=0.0, **config))  # type: ignore[arg-type]
    assert torch.equal(whole.model.W, same.model.W)
    assert not torch.equal(whole.model.W, train_toy_model(ToyConfig(**config)).model.W)  # type: ignore[arg-type]


def angles(directions: Tensor) -> Tensor:
    """Between neighbors, in degrees."""
    turned = torch.atan2(directions[:, 1], directions[:, 0]).rad2deg().sort().values
    return torch.cat([turned, turned[:1] + 360]).diff()


def test_five_sparse_features_in_two_dimensions_are_a_pentagon() -> None:
    """The paper's first surprise."""
    trained = train_toy_model(ToyConfig(steps=500, batch_size=512, lr=0.03, lr_decay_steps=250))
    assert trained.losses[-20:].mean() < 0.3 * trained.losses[0]
    assert angles(trained.model.directions).tolist() == pytest.approx([72] * 5, abs=8)


@torch.no_grad()
def test_the_cross_entropy_model_learns_which_feature_is_the_largest() -> None:
    model = train_toy_model(ToyConfig(loss="cross_entropy", steps=300, batch_size=256, lr=0.03)).model
    x = model.draw(2000, torch.Generator().manual_seed(9))
    largest = torch.where((x > 0).any(1), x.argmax(1), 5)
    right = model(x).argmax(1) == largest
    assert right.float().mean() > 0.93, "77 % by always saying that none fires"
    assert right[x.amax(1) > 0.5].float().mean() > 0.9


def test_dense_features_that_matter_most_have_the_dimensions_for_themselves() -> None:
    """Without sparsity there is no superposition (the paper's first picture)."""
    importance = (1.0, 0.9, 0.3, 0.2, 0.1)
    config = ToyConfig(feature_probability=1.0, importance=importance, steps=400, batch_size=256, lr=0.03)
    norms = train_toy_model(config).model.directions.norm(dim=1)
    assert norms[:2].min() > 0.8
    assert norms[2:].max() < 0.3


def test_one_that_diverges_says_so() -> None:
    with pytest.raises(DivergedError, match="the toy model's loss is (nan|inf) after .* steps; lower lr"):
        train_toy_model(ToyConfig(lr=1e30, steps=20, batch_size=16))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = ToyModel(
        ToyConfig(lr_schedule="cosine", feature_probability=(0.1, 0.2, 0.3, 0.4, 0.5), loss="cross_entropy")
    )
    loaded = ToyModel.load(model.save(tmp_path / "toy.safetensors"))
    assert torch.equal(loaded.W, model.W)
    assert loaded.config.probabilities == model.config.probabilities
    assert loaded.config.lr_schedule.key == "saekit:cosine"
    x = model.draw(10, torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), model(x))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    with pytest.raises(SAEFormatError, match="there is no toy model .*toy.safetensors; ToyModel.save writes one"):
        ToyModel.load(path)
    path.write_bytes(b"x")
    with pytest.raises(SAEFormatError, match="toy.safetensors is no toy model: "):
        ToyModel.load(path)
    save_file({"W": torch.zeros(2, 5)}, path)
    with pytest.raises(SAEFormatError, match="is no toy model: its header has no saekit_toy_model"):
        ToyModel.load(path)
    save_file({"W": torch.zeros(2, 4), "b": torch.zeros(5)}, path, metadata={"saekit_toy_model": json.dumps({})})
    with pytest.raises(SAEFormatError, match=r"holds W \[2, 4\] of torch.float32, b \[5\].*asks for W \[2, 5\]"):
        ToyModel.load(path)


def test_pictures_and_animations(tmp_path: Path) -> None:
    from PIL import Image

    trained = train_toy_model(ToyConfig(steps=20, batch_size=16), frames=4)
    assert trained.frame_steps == (0, 2, 9, 20)
    assert torch.equal(trained.frames[-1], trained.model.directions)
    with Image.open(animate_directions(trained, tmp_path / "a.gif")) as moving:
        assert moving.n_frames == 4
    figure = plot_directions(trained.model, tmp_path / "a.png")
    drawn = torch.tensor([note.xy for note in figure.axes[0].texts if hasattr(note, "xy")])
    assert torch.allclose(drawn, trained.model.directions, atol=1e-6)
    with Image.open(tmp_path / "a.png") as still:
        assert still.format == "PNG"


def test_pictures_say_what_they_cannot_show(tmp_path: Path) -> None:
    deep = train_toy_model(ToyConfig(n_hidden=3, steps=2, batch_size=4))
    with pytest.raises(ValueError, match="the picture has 2 dimensions, and the hidden layer of this toy model 3"):
        plot_directions(deep.model)
    with pytest.raises(ValueError, match="must end in .gif, found 'a.png'"):
        animate_directions(deep, "a.png")
    with pytest.raises(ValueError, match="frames must be 2 or more"):
        train_toy_model(ToyConfig(steps=2), frames=1)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = ToyModel(ToyConfig())
    model.W.data[0, 0] = math.nan
    with pytest.raises(SAEFormatError, match="is damaged: W has values that are no finite numbers"):
        ToyModel.load(model.save(tmp_path / "toy.safetensors"))
