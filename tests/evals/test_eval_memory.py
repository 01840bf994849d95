"""What evals and examples need in memory does not grow with the number of contexts, nor with how many run at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from saekit_plugins.evals.reconstruction import ReconstructionConfig
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from torch import Tensor
from torch.overrides import TorchFunctionMode

import saekit
from saekit.analysis.choosing import striking_features
from saekit.analysis.examples import feature_peaks
from saekit.analysis.top_texts import find_top_texts
from saekit.evals import pieces, variance_metrics
from saekit.sae.build import build_module
from saekit.testing import FakeBackend

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
EVALS = (
    ReconstructionEval(ReconstructionConfig(batch_size_prompts=8, n_bootstrap=0)),
    DownstreamEval(DownstreamConfig(batch_size_prompts=8, n_bootstrap=0)),
)


class Largest(TorchFunctionMode):
    """Notes the largest tensor that anything returns."""

    elements = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim:
            self.elements = max(self.elements, result.numel())
        return result


def make_sae(d_sae: int = 512) -> saekit.SAE:
    plugins, config = saekit.default_manager(), StandardConfig(d_sae=d_sae)
    sae = build_module(plugins.find("sae_architectures", config), config, 8, plugins)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.b_enc -= 4
    return sae


def tokens(n: int) -> Tensor:
    return torch.randint(128, (n, 16), generator=torch.Generator().manual_seed(1))


def rows(contexts: Tensor) -> Tensor:
    return FakeBackend().run(contexts, read={SITE.hook_name}).held[SITE.hook_name].flatten(0, 1)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_largest_tensor_is_of_a_piece(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    sae, found = make_sae(), []
    sae.kernels = kernels
    monkeypatch.setattr(pieces, "_BYTES", 64 * 512 * 4)  # 64 rows, or 4 contexts
    for contexts in (tokens(16), tokens(40)):
        with Largest() as largest:
            variance_metrics(sae, [rows(contexts)])
            for measure in EVALS:
                measure(sae, backend=FakeBackend(), sites=saekit.Sites.one(SITE), contexts=contexts)
            feature_peaks(sae, backend=FakeBackend(), sites=SITE, contexts=contexts)
            find_top_texts(sae, backend=FakeBackend(), sites=saekit.Sites.one(SITE), contexts=contexts, features=[3])
        found.append(largest.elements)
    assert len(set(found)) == 1, found
    assert kernels == "auto" or found[0] <= 64 * 512, "the kernels have room of their own"


def test_pieces_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, contexts, backend = make_sae(), tokens(12), FakeBackend()

    def measured() -> dict[str, float]:
        found = variance_metrics(sae, rows(contexts).split(48))
        for measure in EVALS:
            found |= measure(sae, backend=backend, sites=saekit.Sites.one(SITE), contexts=contexts)
        return found

    whole = measured()
    monkeypatch.setattr(pieces, "_BYTES", 1)  # a row, a context
    assert measured() == pytest.approx(whole, rel=1e-6)


def test_peaks_are_those_of_all_activations() -> None:
    sae, contexts, backend = make_sae(64), tokens(50), FakeBackend()
    features = sae.encode(backend.run(contexts, read={SITE.hook_name}).held[SITE.hook_name]).detach()
    features[:, 0] = 0
    for batch_size in (7, 50):
        peaks = feature_peaks(sae, backend=backend, sites=SITE, contexts=contexts, n=5, batch_size=batch_size)
        assert torch.allclose(peaks.values, features.amax(1).topk(5, dim=0).values, rtol=1e-5)
        there = features[peaks.contexts, peaks.positions, torch.arange(64)]
        assert torch.allclose(there, peaks.values, rtol=1e-5)
        assert torch.equal(peaks.fired, (features > 0).sum((0, 1)))
        assert torch.equal(peaks.fired_contexts, (features.amax(1) > 0).sum(0))
        assert peaks.tokens == contexts.numel()
    chosen = striking_features(peaks, contexts, backend, 3)
    assert len(set(chosen)) == 3
    for found in find_top_texts(sae, backend=backend, sites=saekit.Sites.one(SITE), contexts=contexts, features=chosen):
        feature = found.feature
        assert found.frequency == pytest.approx(float((features[..., feature] > 0).float().mean()))
        values = [example.activation for example in found.examples]
        assert values == pytest.approx([value for value in peaks.values[:, feature].tolist() if value > 0])
        row, at = int(peaks.contexts[0, feature]), int(peaks.positions[0, feature])
        assert found.examples[0].token == chr(int(contexts[row, at])), "the same in all contexts: the model sees none"
