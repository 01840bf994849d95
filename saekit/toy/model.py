"""The toy model itself: a linear map into fewer dimensions and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saekit.config.converter import ConfigConverter
from saekit.config.files import plain_config
from saekit.errors import SAEFormatError
from saekit.files.paths import as_path
from saekit.files.storage import write_bytes
from saekit.plugins.manager import PluginManager, default_manager
from saekit.toy.config import ToyConfig
from saekit.toy.draws import FeatureDraws

__all__ = ["ToyModel"]

_CONFIG = "saekit_toy_model"


class ToyModel(nn.Module):
    """``h = W x`` and ``x̂ = ReLU(Wᵀ h + b)``: the ReLU output model (Elhage et al. 2022, "The ReLU output model").

    ``x [n, n_features]`` are true features, ``h [n, n_hidden]`` the hidden activations; column i of ``W [n_hidden,
    n_outputs]`` is the direction of feature i.  The loss is ``Σ_i I_i (x_i - x̂_i)²`` with the importances ``I``, its
    mean over rows.

    With ``loss = "cross_entropy"`` there is one more output, for "none fires"; nothing reads it, so it is no direction
    of a feature.  Outputs are then logits, without the ReLU, and the loss is the mean of ``I_y · -log softmax(Wᵀ h +
    b)_y``, where ``y`` is the largest feature of the row, or the last output, whose importance is 1.
    """

    def __init__(self, config: ToyConfig, generator: torch.Generator | None = None) -> None:
        """Starting weights are drawn from ``generator`` (Glorot and Bengio 2010, normal); left out: by the seed."""
        super().__init__()
        self.config, self._draws = config, FeatureDraws(config)
        self._classifies = config.loss == "cross_entropy"
        n_outputs = config.n_features + self._classifies
        generator = generator or torch.Generator().manual_seed(config.seed)
        drawn = torch.randn(config.n_hidden, n_outputs, generator=generator, dtype=self._draws.dtype)
        self.W = nn.Parameter(drawn * (2 / (config.n_hidden + n_outputs)) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_outputs, dtype=self._draws.dtype))
        importance = (*config.importances, *([1.0] if self._classifies else []))
        self.register_buffer("importance", torch.tensor(importance, dtype=self._draws.dtype), persistent=False)
        self.importance: Tensor

    def __repr__(self) -> str:
        about = self.config
        return f"ToyModel({about.n_features} features in {about.n_hidden} dimensions, loss {about.loss})"

    @classmethod
    def random(cls, config: ToyConfig) -> Self:
        """One that is not trained: each direction is a unit vector, drawn evenly from all by the seed."""
        model = cls(config)
        model.W.data = F.normalize(model.W.data, dim=0)
        return model

    @property
    def directions(self) -> Tensor:
        """The true directions, ``[n_features, n_hidden]``: what a feature of size 1 puts into the hidden layer."""
        return self.W.detach()[:, : self.config.n_features].T.contiguous()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows of true features, ``[n, n_features]``."""
        return self._draws.draw(n, generator).to(self.W.device)

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations ``[n, n_hidden]`` of true features ``[n, n_features]``."""
        hidden: Tensor = x @ self.W[:, : self.config.n_features].T
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, n_outputs]``: features given back, or logits where the loss is the cross-entropy."""
        outputs: Tensor = self.hidden(x) @ self.W + self.b
        return outputs if self._classifies else outputs.relu()

    def loss(self, x: Tensor) -> Tensor:
        """The loss on the rows ``x``, a scalar."""
        outputs: Tensor = self(x)
        if not self._classifies:
            errors: Tensor = (self.importance * (x - outputs).square()).sum(-1)
            return errors.mean()
        largest = torch.where((x > 0).any(-1), x.argmax(-1), self.config.n_features)
        return (self.importance[largest] * F.cross_entropy(outputs, largest, reduction="none")).mean()

    def save(self, path: str | Path, *, plugins: PluginManager | None = None) -> Path:
        """Write it to the file ``path`` (safetensors, with its configuration), all or nothing."""
        from safetensors.torch import save

        path, config = as_path(path), plain_config(self.config, plugins or default_manager())
        tensors = {"W": self.W.detach().cpu().contiguous(), "b": self.b.detach().cpu()}
        write_bytes(path, save(tensors, metadata={_CONFIG: json.dumps(config)}))
        return path

    @classmethod
    def load(cls, path: str | Path, *, plugins: PluginManager | None = None) -> Self:
        """Read what :meth:`save` wrote; :class:`saekit.errors.SAEFormatError` where ``path`` is something else."""
        from safetensors import SafetensorError, safe_open

        path = as_path(path)
        if not path.is_file():
            raise SAEFormatError(f"there is no toy model {path}; ToyModel.save writes one")
        try:
            with safe_open(path, "pt") as file:
                table = json.loads((file.metadata() or {}).get(_CONFIG, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, ValueError, OSError) as error:
            raise SAEFormatError(f"{path} is no toy model: {error}") from error
        if not isinstance(table, dict):
            raise SAEFormatError(f"{path} is no toy model: its header has no {_CONFIG}; ToyModel.save writes one")
        model = cls(ConfigConverter(plugins or default_manager()).structure(table, ToyConfig, str(path)))
        expected = {name: (list(value.shape), value.dtype) for name, value in model.state_dict().items()}
        found = {name: (list(value.shape), value.dtype) for name, value in tensors.items()}
        if found != expected:
            raise SAEFormatError(f"{path} holds {_shapes(found)}, and its configuration asks for {_shapes(expected)}")
        if odd := [name for name, value in tensors.items() if not bool(value.isfinite().all())]:
            raise SAEFormatError(f"{path} is damaged: {odd[0]} has values that are no finite numbers")
        model.load_state_dict(tensors)
        return model


def _shapes(found: dict[str, tuple[list[int], torch.dtype]]) -> str:
    return ", ".join(f"{name} {shape} of {dtype}" for name, (shape, dtype) in sorted(found.items())) or "nothing"
