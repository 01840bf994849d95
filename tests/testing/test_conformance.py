"""Every built-in plugin keeps what its kind promises."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.abstopk import AbsTopKConfig
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.crosscoder import BatchTopKCrosscoderConfig, CrosscoderConfig
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.matching_pursuit import MatchingPursuitConfig
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.temporal import TemporalConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import (
    GroupMaxTranscoderConfig,
    JumpReLUTranscoderConfig,
    TopKTranscoderConfig,
    TranscoderConfig,
)
from saekit_plugins.backends.lens_versions import has_hooked_transformer
from saekit_plugins.loaders.llama_scope import LlamaScopeR1Config
from saekit_plugins.loaders.qwen_scope import QwenScopeConfig
from saekit_plugins.schedules.cosine_restarts import CosineRestartsConfig
from saekit_plugins.sources.cached import CachedConfig
from saekit_plugins.sources.live import LiveConfig
from saekit_plugins.sources.toy import ToySourceConfig
from saekit_plugins.trackers.wandb import WandbConfig
from support import caches, foreign, formats, gated, warm
from support.causal_lms import KINDS as FAMILIES
from support.causal_lms import causal_lm_folder
from support.tiny import hooked_mamba, hooked_transformer, tokenizer

from saekit.config import ModelConfig
from saekit.kinds import KINDS
from saekit.testing import FakeBackend, check_plugin, fake_plugin
from saekit.testing.checks import every_kind
from saekit.testing.checks.check import Fault

AS_SPARSIFY: dict[str, Any] = {
    "decoder_heuristic_init": False,
    "decoder_zero_init": True,
    "b_enc_init_method": "centered",
    "rescale_acts_by_decoder_norm": False,
    "mse_loss_normalization": "variance",
    "aux_loss_normalization": "none",
    "aux_loss_trains_encoder": False,
}
BUILT_IN = {point.name: point.value for point in distribution("saekit").entry_points.select(group="saekit")}


def abstopk(folder: Path) -> dict[str, Any]:
    return {
        "configs": {
            "abstopk": [
                AbsTopKConfig(k=3, k_start=6, k_warm_up_steps=5),
                AbsTopKConfig(k=3, aux_loss_trains_encoder=False, rescale_acts_by_decoder_norm=False),
            ]
        }
    }


def batchtopk(folder: Path) -> dict[str, Any]:
    return {
        "configs": {
            "batchtopk": [
                BatchTopKConfig(k=2.5, k_start=4, k_warm_up_steps=5),
                BatchTopKConfig(k=2, rescale_acts_by_decoder_norm=False, mse_loss_normalization="variance"),
            ]
        }
    }


def cached(folder: Path) -> dict[str, Any]:
    caches.write(folder / "cache", 60)
    every = CachedConfig(folder=str(folder / "cache"))
    return {"configs": {"cached": [every, attrs.evolve(every, prefetch=False, block_rows=4)]}}


def connor_rob_hook_z(folder: Path) -> dict[str, Any]:
    return {"folders": {"connor_rob_hook_z": foreign.write_connor(folder / "connor", foreign.tensors())}}


def crosscoder(folder: Path) -> dict[str, Any]:
    l2 = CrosscoderConfig(decoder_norm="l2", l1_warm_up_steps=2, l1_decay_steps=6, l1_end=0.1, activation="tanh-relu")
    return {"configs": {"crosscoder": [CrosscoderConfig(), l2], "batchtopk_crosscoder": BatchTopKCrosscoderConfig(k=3)}}


def deepseek_r1(folder: Path) -> dict[str, Any]:
    return {"folders": {"deepseek_r1": formats.copied("deepseek_r1", folder / "a")}}


def dictionary_learning(folder: Path) -> dict[str, Any]:
    names = [path.name for path in formats.FIXTURES.glob("dictionary_learning*")]
    return {"folders": {"dictionary_learning": [formats.copied(name, folder / name) for name in names]}}


def built_in_gated(folder: Path) -> dict[str, Any]:
    of_sae_lens = GatedConfig(
        aux_loss_trains_decoder=True, l1_warm_up_steps=5, scale_sparsity_penalty_by_decoder_norm=True,
        normalize_sae_decoder=False,
    )  # fmt: skip
    return {"configs": {"gated": [GatedConfig(), of_sae_lens]}}


def gemma_scope(folder: Path) -> dict[str, Any]:
    names = {"gemma_2": "gemma_scope_2_npz", "gemma_2_transcoder": "gemma_2_transcoder", "gemma_3": "gemma_scope_3"}
    return {"folders": {key: formats.copied(name, folder / key) for key, name in names.items()}}


def goodfire(folder: Path) -> dict[str, Any]:
    return {"folders": {"goodfire": formats.copied("goodfire", folder / "a")}}


def groupmax(folder: Path) -> dict[str, Any]:
    return {"configs": {"groupmax": [GroupMaxConfig(k=4), GroupMaxConfig(k=3, rescale_acts_by_decoder_norm=False)]}}


def llama_scope(folder: Path) -> dict[str, Any]:
    folders = {name: formats.copied(name, folder / name) for name in ("llama_scope", "llama_scope_r1_distill")}
    return {"folders": folders, "configs": {"llama_scope_r1_distill": LlamaScopeR1Config(activation_scale=0.5)}}


def matching_pursuit(folder: Path) -> dict[str, Any]:
    every = MatchingPursuitConfig(residual_threshold=0.3)
    others = [
        MatchingPursuitConfig(residual_threshold=0, max_iterations=4, apply_b_dec_to_input=False),
        MatchingPursuitConfig(residual_threshold=0, max_iterations=9, stop_on_duplicate_support=False),
    ]
    return {"configs": {"matching_pursuit": [every, *others]}}


def matryoshka(folder: Path) -> dict[str, Any]:
    sae_lens_6 = {"aux_loss_coefficient": 1.0, "aux_loss_normalization": "none"}
    dictionary = {
        "aux_loss_normalization": "share",
        "aux_loss_levels": "whole",
        "level_loss": "mean",
        "rescale_acts_by_decoder_norm": False,
    }
    moving = {"k_start": 4.0, "k_warm_up_steps": 3, "mse_loss_normalization": "variance",
              "aux_loss_trains_encoder": False}  # fmt: skip
    configs = [
        MatryoshkaConfig(k=2.5, **sae_lens_6),
        MatryoshkaConfig(k=2, widths=(4, 0.5), **dictionary),
        MatryoshkaConfig(k=2, widths=(4, 0.5), **moving),
    ]
    return {"configs": {"matryoshka": configs}}


def mntss(folder: Path) -> dict[str, Any]:
    return {"folders": {"mntss": formats.copied("mntss_clt_layer", folder / "a")}}


def mwhanna(folder: Path) -> dict[str, Any]:
    return {"folders": {"mwhanna": formats.copied("mwhanna_transcoder", folder / "a")}}


def openai(folder: Path) -> dict[str, Any]:
    names = ("openai_v1_relu", "openai_v5_topk")
    return {"folders": {"openai": [formats.copied(name, folder / name) for name in names]}}


def qwen_scope(folder: Path) -> dict[str, Any]:
    given = {"qwen_scope": QwenScopeConfig(k=9)}
    return {"folders": {"qwen_scope": formats.copied("qwen_scope", folder / "a")}, "configs": given}


def sparsify(folder: Path) -> dict[str, Any]:
    names = ("sparsify_1.3.3_topk", "sparsify_1.3.3_skip_transcoder")
    return {"folders": {"sparsify": [formats.copied(name, folder / name) for name in names]}}


def sae_lens_legacy(folder: Path) -> dict[str, Any]:
    names = ("sae_lens_2.1.3_legacy_pt", "sae_lens_2.1.3_legacy_pkl_gz")
    return {"folders": {"sae_lens_legacy": [formats.copied(name, folder / name) for name in names]}}


def cosine_restarts(folder: Path) -> dict[str, Any]:
    several = [CosineRestartsConfig(), CosineRestartsConfig(n_restart_cycles=3, end=0.0, fill=True)]
    return {"configs": {"cosineannealingwarmrestarts": several}}


def hooked(name: str, model: Callable[[], Any]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"models": {name: model()}}


def unnamed(folder: Path) -> dict[str, Any]:
    return {}


def gpt2() -> Any:
    """With dropout, so that a forward in training mode would show."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=64, n_embd=16, n_layer=3, n_head=2, **special))
    model.tokenizer = tokenizer()
    return model.train()


def jumprelu(folder: Path) -> dict[str, Any]:
    other = JumpReLUConfig(sparsity_loss="tanh", pre_act_loss_coefficient=0.1, ste_to_input=True, l0_warm_up_steps=5)
    return {"configs": {"jumprelu": [JumpReLUConfig(initial_threshold=0.2), other]}}


def live(folder: Path) -> dict[str, Any]:
    small = LiveConfig(store_batch_size_prompts=4, n_batches_in_buffer=4)
    return {"configs": {"live": [small, attrs.evolve(small, prefetch=False, dtype="bfloat16")]}}


def sae_lens(folder: Path) -> dict[str, Any]:
    old = foreign.write(folder / "old", foreign.OLD, foreign.tensors())
    return {"folders": {"sae_lens": [old, foreign.write(folder / "new", foreign.NEW, foreign.tensors())]}}


def standard(folder: Path) -> dict[str, Any]:
    other = StandardConfig(
        normalize_sae_decoder=False, scale_sparsity_penalty_by_decoder_norm=True, lp_norm=0.5, noise_scale=0.1,
        l1_warm_up_steps=5, mse_loss_normalization="dense_batch",
    )  # fmt: skip
    return {"configs": {"standard": [StandardConfig(use_ghost_grads=True), other]}}


def temporal(folder: Path) -> dict[str, Any]:
    every = TemporalConfig(n_heads=2, bottleneck_factor=4, kval_topk=5, input_scale=0.3)
    other = TemporalConfig(
        n_heads=3, bottleneck_factor=2, n_attn_layers=2, sae_diff_type="relu", tied_weights=False,
        apply_b_dec_to_input=False,
    )  # fmt: skip
    return {"configs": {"temporal": [every, other]}}


def temporal_loader(folder: Path) -> dict[str, Any]:
    return {"folders": {"temporal": formats.copied("temporal", folder / "a")}}


def topk(folder: Path) -> dict[str, Any]:
    several = [TopKConfig(k=3, k_start=5, k_warm_up_steps=6), TopKConfig(k=3, rescale_acts_by_decoder_norm=False)]
    return {"configs": {"topk": several}}


def toy(folder: Path) -> dict[str, Any]:
    """As wide as the site of the fake model that it is asked for."""
    learned = ToySourceConfig(n_features=12, n_hidden=8, steps=20, batch_size=64, n_correlated_pairs=2)
    drawn = ToySourceConfig(n_features=12, n_hidden=8, directions="random", n_anticorrelated_pairs=3)
    return {"configs": {"toy": [learned, drawn]}}


def transcoder(folder: Path) -> dict[str, Any]:
    return {
        "configs": {
            "transcoder": TranscoderConfig(skip_connection=True),
            "jumprelu_transcoder": JumpReLUTranscoderConfig(initial_threshold=0.2),
            "topk_transcoder": [
                TopKTranscoderConfig(k=3, skip_connection=True),
                TopKTranscoderConfig(k=3, skip_connection=True, **AS_SPARSIFY),
            ],
            "groupmax_transcoder": [
                GroupMaxTranscoderConfig(k=3, skip_connection=True),
                GroupMaxTranscoderConfig(k=3, skip_connection=True, **AS_SPARSIFY),
            ],
        }
    }


def wandb(folder: Path) -> dict[str, Any]:
    return {"configs": {"wandb": WandbConfig(mode="offline", log_checkpoints=True)}}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "abstopk": abstopk,
    "batchtopk": batchtopk,
    "cached": cached,
    "connor_rob_hook_z": connor_rob_hook_z,
    "cosine_restarts": cosine_restarts,
    "crosscoder": crosscoder,
    "deepseek_r1": deepseek_r1,
    "dictionary_learning": dictionary_learning,
    "gated": built_in_gated,
    "gemma_scope": gemma_scope,
    "goodfire": goodfire,
    "groupmax": groupmax,
    "hooked_mamba": hooked("HookedMamba", hooked_mamba),
    # With transformer_lens 4 it is tried on the embedded model, which is a bridge there.
    "hooked_transformer": hooked("HookedTransformer", hooked_transformer) if has_hooked_transformer() else unnamed,
    "huggingface": hooked("AutoModelForCausalLM", gpt2),
    "jumprelu": jumprelu,
    "live": live,
    "llama_scope": llama_scope,
    "matching_pursuit": matching_pursuit,
    "matryoshka": matryoshka,
    "mntss": mntss,
    "mwhanna": mwhanna,
    "openai": openai,
    "qwen_scope": qwen_scope,
    "sae_lens": sae_lens,
    "sae_lens_legacy": sae_lens_legacy,
    "sparsify": sparsify,
    "standard": standard,
    "temporal": temporal,
    "temporal_loader": temporal_loader,
    "topk": topk,
    "toy": toy,
    "transcoder": transcoder,
    "wandb": wandb,
}
"""What the checks of a built-in need beside its defaults."""
SKIPPED = {
    "none": {"skip": {"none": "it stands for no model"}},
    "dictionary_learning": {"skip": {"dictionary_learning_1": "it is another name"}},
    "mwhanna": {"skip": {"mwhanna_transcoder": "it is another name"}},
    "mntss": {"skip": {"mntss_clt_layer_transcoder": "it is another name"}},
}
SILENT = {
    "other forwards": "it has one way of forwards",
    "other names": "it is another name",
    "no model": "it stands for no model",
    "widths": "it states none",
    "one that declares no sparse support": "it declares no sparse support",
    "no checkpoints": "it has none",
    "text": "its entry says that it needs text",
    "end": "it is not told how a run ends",
    "endless": "it has no end, and reads no text",
    "ghost": "use_ghost_grads has no fast path",
    "map": "it takes no map: no matrix can be folded into W_dec [d_sae, d_out], which does not change with d_out as a "
    "matrix of one layer does",
    "no Triton": "needs triton, not installed here",
    "no GPU": "there is no cuda here",
    "row-wise": "it is not row-wise",
    "hook points": "its library is told of no hook points",
    "not row-wise": "it is row-wise",
    "no training": "it reads SAEs that other libraries have trained",
    "entry": "it begins every forward at the tokens",
    "passed on": "it has no options that are passed on",
    "paths": "it knows no weights that lead to the residual stream of this model",  # such as a Mamba
    "types": "give models= a model or a saekit.config.ModelConfig",
    "outline": "an outline is of a model that is named: give models= a saekit.config.ModelConfig",
}
"""Why a check may say nothing of a built-in."""


IMPORTED = (
    "attrs", "numpy", "saekit", "saekit.config", "saekit.errors", "saekit.plugins.manager", "saekit.protocols",
    "saekit.site", "saekit.values",
)  # fmt: skip
"""What a plugin may count on when its import is checked."""


@pytest.fixture(scope="module")
def imported_in_forks() -> Iterator[None]:
    """Modules are imported alone in forks of a process that has imported only what the check itself imports before."""

    def run(command: list[str], *, env: dict[str, str], **options: bool) -> subprocess.CompletedProcess[str]:
        assert (command[0], options) == (sys.executable, {"capture_output": True, "text": True})
        return warm.python(*command[1:], env=env, imports=IMPORTED)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_kind, "subprocess", SimpleNamespace(run=run))
        yield


def test_a_fork_tells_of_an_import(tmp_path: Path, imported_in_forks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports, that it fails, and what it changes."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, said in (
        ("imports_torch", "import sys; sys.modules['torch'] = sys", "importing imports_torch imports torch"),
        ("not_there", "import nowhere_to_be_found", "importing not_there alone fails: ModuleNotFoundError"),
        ("built_in", "import sys; assert not [x for x in sys.modules if x.startswith('saekit_plugins')]; print(5)",
         "importing built_in prints '5'"),
        ("changing", "import os; os.environ['X_OF_THIS'] = '1'", "importing changing changes the environment"),
        ("slow", "import time\nend = time.process_time() + 0.7\nwhile time.process_time() < end: pass", "takes 0.7 s"),
    ):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(Fault, match=said):
            every_kind.check_import(name, tmp_path)


@pytest.mark.usefixtures("one_thread", "imported_in_forks")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "wandb")) for name in BUILT_IN]
)
def test_every_built_in_keeps_its_promises(name: str, tmp_path: Path) -> None:
    given = GIVEN.get(name, lambda folder: {})(tmp_path)
    report = check_plugin(importlib.import_module(BUILT_IN[name]), **given, **SKIPPED.get(name, {}))
    reasons = [str(outcome.not_tried) for outcome in report.not_tried]
    assert [reason for reason in reasons if not any(reason.endswith(known) for known in SILENT.values())] == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])  # which is checked above
def test_backends_of_folders_keep_their_promises(family: str) -> None:
    """In every family there is something that a check does not meet in the others."""
    model = ModelConfig(name=str(causal_lm_folder(family)), device="cpu")
    checks = [check.name for check in importlib.import_module("saekit.testing.checks.model_backends").CHECKS]
    for name, key in (("huggingface", "AutoModelForCausalLM"), ("hooked_transformer", "HookedTransformer")):
        if name == "huggingface" or family == "neox":  # of transformer_lens, one with parallel blocks is enough
            report = check_plugin(importlib.import_module(BUILT_IN[name]), models={key: model}, only=checks)
            silent = [str(outcome) for outcome in report.not_tried]
            known = (SILENT["hook points"], SILENT["other forwards"])
            assert [reason for reason in silent if not reason.endswith(known)] == []
            # transformers has no hook points of its own, and one way of forwards; so has transformer_lens 4.
            n_silent = 2 if name == "huggingface" else int(not has_hooked_transformer())
            assert len(silent) == n_silent


@pytest.mark.usefixtures("one_thread")
def test_the_fake_backend_keeps_its_promises() -> None:
    check_plugin(fake_plugin("model_backends", build=lambda config, **services: FakeBackend()))


@pytest.mark.usefixtures("one_thread")
def test_a_strangers_architecture_keeps_its_promises() -> None:
    """One with parameters of its own, and a fast step made of public parts."""
    checks = [check.name for check in importlib.import_module("saekit.testing.checks.sae_architectures").CHECKS]
    assert [outcome.check for outcome in check_plugin(gated, only=checks).outcomes] == checks


def test_every_kind_has_its_checks() -> None:
    for kind in KINDS:
        checks = [check.name for check in importlib.import_module(f"saekit.testing.checks.{kind}").CHECKS]
        assert checks[0] == "build"
        assert len(checks) == len(set(checks)) > 4
