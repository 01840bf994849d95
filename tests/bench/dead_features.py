"""Features that learn, beside sae-lens: explained variance, CE recovered and dead features at equal budget.

    python tests/bench/dead_features.py [--seeds 3] [--batches 586] [--own-pipeline] [--workers 1]

The embedded model at ``blocks.0.hook_resid_post``, activations scaled to a mean norm of ``sqrt(d_in)``, SAEs of 1,024
features, batches of 1,024 rows, learning rate 1e-3, a dead-feature window of 100 steps in both.  Everything else is
each library's default.  Without ``--own-pipeline`` both see the very same rows in the same order; with it, each reads
the text, packs, runs the model, shuffles and scales by itself.  ``topk`` and ``batchtopk`` are compared at k,
``standard`` at the L0 that the peer reaches with its own coefficient, since a coefficient means another thing with
decoder rows of norm 1.

A difference counts when it is larger than two standard errors of the seeds' difference of means.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import attrs
import figures
import torch
from saekit_plugins.evals.reconstruction import ReconstructionConfig
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from torch import Tensor

import saekit
from saekit import SAE, PretrainedSAE
from saekit.config.files import load_config
from saekit.data import Corpus
from saekit.data.activations import ActivationStream
from saekit.data.normalize import activation_scale
from saekit.pretrained.load import build_sae
from saekit.runs.opening import open_backend, open_stream, seed_for
from saekit.runs.parts import make_schedule
from saekit.runs.setup import give_weights, make_trainer, sae_options

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
D_SAE, BATCH, LR, WINDOW, CONTEXT = 1024, 1024, 1e-3, 100, 128


@attrs.frozen
class Found:
    """What came of one training."""

    ev: float
    ce: float
    l0: float
    dead: float
    """Features that did not fire in the last ``WINDOW`` steps."""


class Bench:
    """The model, the text, and rows that all share."""

    def __init__(self, batches: int, hook_seed: int = 0) -> None:
        self.batches, self.plugins = batches, saekit.default_manager()
        self.config = load_config(self.table({"name": "topk"}, 0))
        self.corpus = Corpus.of(self.config.dataset, self.config.evals)
        self.backend = open_backend(self.config, self.corpus, self.plugins, None, [SITE])
        self.held_out = self.corpus.held_out(self.backend, seed_for(hook_seed, "held out"))
        self.measure = ReconstructionEval(ReconstructionConfig())

    def table(self, sae: Mapping[str, Any], seed: int, folder: str = "unused", **training: Any) -> dict[str, Any]:
        """A run's configuration."""
        return {
            "model": {"device": "cpu"},
            "dataset": {"context_size": CONTEXT},
            "site": {"hook_name": SITE.hook_name},
            "activations": {"normalize_activations": "expected_average_only_in"},
            "sae": {"d_sae": D_SAE, **sae},
            "training": {
                "training_tokens": self.batches * BATCH, "train_batch_size_tokens": BATCH, "lr": LR, "seed": seed,
                "dead_feature_window": WINDOW, "device": "cpu", "verbose": False, "log_frequency": 100, **training,
            },
            "evals": {"n_contexts": 128},
            "checkpoints": {"folder": folder, "keep_last": 0},
        }  # fmt: skip

    def rows(self, seed: int) -> tuple[Tensor, float]:
        """All rows of a training, in a random order, scaled; and the factor."""
        stream = open_stream(self.config, self.corpus, self.plugins, self.backend, [SITE])
        wanted, found = self.batches * BATCH, []
        for batch in ActivationStream(stream, 64):
            found.append(batch.activations[SITE])
            if sum(map(len, found)) >= wanted:
                break
        rows = torch.cat(found)[:wanted]
        scale = activation_scale(rows[: 1 << 16])
        rows *= scale
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))], scale

    def found(self, sae: SAE, dead: float) -> Found:
        """The numbers of an SAE for raw activations, on held-out text."""
        numbers = self.measure(sae, backend=self.backend, sites=saekit.Sites.one(SITE), contexts=self.held_out)
        return Found(numbers["explained_variance"], numbers["ce_recovered"], numbers["l0"], dead)

    # ---- saekit

    def own(self, sae: Mapping[str, Any], rows: Tensor, scale: float, seed: int) -> Found:
        """Train on ``rows``."""
        config = load_config(self.table(sae, seed))
        options, _ = sae_options(config, self.plugins)
        schedule, ports = make_schedule(config, self.plugins), saekit.Ports.one(rows.shape[1], SITE.name)
        trainer = make_trainer(config, self.plugins, self.backend, self.corpus, options, ports, schedule)
        give_weights(trainer, config, self.corpus, lambda: {SITE: rows[: 1 << 15] / scale})
        trainer.scale = 1.0  # the rows are scaled already
        for batch in rows.split(BATCH):
            trainer.train_on(batch)
        trainer.scale = scale
        return self.found(trainer.raw_sae(), float(trainer.firing.dead().sum()))

    def own_pipeline(self, sae: Mapping[str, Any], seed: int) -> Found:
        """Train from text."""
        with tempfile.TemporaryDirectory() as folder:
            result = saekit.train(self.table(sae, seed, folder))
            return self.found(result.sae, result.metrics["sparsity/dead_features"])

    # ---- sae-lens

    def peer(self, sae: Mapping[str, Any], rows: Tensor, scale: float, seed: int) -> Found:
        """Train on ``rows``."""
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)
        config = SAETrainerConfig(
            total_training_samples=len(rows), train_batch_size_samples=BATCH, lr=LR, lr_end=LR / 10, device="cpu",
            dead_feature_window=WINDOW, n_checkpoints=0,
        )  # fmt: skip
        trainer = SAETrainer(config, peer_sae(sae, rows.shape[1]), iter(rows.split(BATCH)))
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.fit()
        trainer.sae.fold_activation_norm_scaling_factor(scale)
        return self.found(converted(trainer.sae, sae["name"]), float(trainer.dead_neurons.sum()))

    def peer_pipeline(self, sae: Mapping[str, Any], seed: int) -> Found:
        """Train from text, by the peer's own runner."""
        from datasets import Dataset
        from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

        every = self.config.evals.held_out_every
        texts = [text for number, text in enumerate(stdlib_texts()) if number % every != every - 1]
        config: Any = LanguageModelSAERunnerConfig(
            sae=peer_config(sae, self.backend.model.cfg.d_model, normalize_activations="expected_average_only_in"),
            model_name="in-memory", dataset_path="in-memory", hook_name=SITE.hook_name, context_size=CONTEXT,
            is_dataset_tokenized=False, streaming=False, training_tokens=self.batches * BATCH, device="cpu", lr=LR,
            train_batch_size_tokens=BATCH, n_batches_in_buffer=64, store_batch_size_prompts=16, seed=seed,
            dead_feature_window=WINDOW, checkpoint_path=None, output_path=None, n_checkpoints=0,
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=20,
        )  # fmt: skip
        model = self.backend.model
        runner = LanguageModelSAETrainingRunner(
            config, override_model=model, override_dataset=Dataset.from_dict({"text": texts})
        )
        kept: list[Any] = []
        runner.run_trainer_with_interruption_handling, run = lambda t: (kept.append(t), run(t))[1], (
            runner.run_trainer_with_interruption_handling
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            trained = runner.run()
        return self.found(converted(trained, sae["name"]), float(kept[0].dead_neurons.sum()))


def stdlib_texts() -> Iterator[str]:
    from saekit.data.stdlib import stdlib_documents

    return (record["text"] for record in stdlib_documents("train"))


def peer_config(sae: Mapping[str, Any], d_in: int, **options: Any) -> Any:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    size: dict[str, Any] = {"d_in": d_in, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", **options}
    if sae["name"] == "standard":
        return StandardTrainingSAEConfig(**size, l1_coefficient=sae["l1_coefficient"])
    return (TopKTrainingSAEConfig if sae["name"] == "topk" else BatchTopKTrainingSAEConfig)(**size, k=sae["k"])


def peer_sae(sae: Mapping[str, Any], d_in: int) -> Any:
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.saes.standard_sae import StandardTrainingSAE
    from sae_lens.saes.topk_sae import TopKTrainingSAE

    kinds: dict[str, Any] = {
        "standard": StandardTrainingSAE,
        "topk": TopKTrainingSAE,
        "batchtopk": BatchTopKTrainingSAE,
    }
    return kinds[sae["name"]](peer_config(sae, d_in))


def converted(sae: Any, name: str) -> SAE:
    """A peer's SAE as the one of saekit with the same outputs."""
    tensors = {key: value.detach().clone() for key, value in sae.state_dict().items()}
    options: dict[str, Any] = {
        "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_sae_decoder": False,
    }  # fmt: skip
    if name != "standard":
        options |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": sae.cfg.rescale_acts_by_decoder_norm}
    if name == "batchtopk":
        threshold = tensors.pop("topk_threshold").float()
        tensors["threshold"] = threshold.expand(sae.cfg.d_sae).contiguous()
    read = PretrainedSAE(architecture=f"saekit:{name}", options=options, tensors=tensors)
    return build_sae(read, saekit.default_manager())


# ---- the table


def summary(runs: list[Found], field: str) -> tuple[float, float]:
    """Mean and standard error."""
    values = [getattr(run, field) for run in runs]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def line(name: str, own: list[Found], peer: list[Found]) -> bool:
    """Print both; whether saekit's are not worse by more than two standard errors."""
    fine, parts = True, []
    found: dict[str, figures.Figure] = {}
    for field, sign, digits in (("ev", 1, 4), ("ce", 1, 4), ("dead", -1, 1), ("l0", 0, 1)):
        (mean, error), (theirs, their_error) = summary(own, field), summary(peer, field)
        behind = sign * (theirs - mean) / max(math.hypot(error, their_error), 1e-12)
        worse = behind > 2 and abs(theirs - mean) > 10 ** -(digits + 1)
        fine &= not worse
        found[field.replace("_", " ")] = f"{mean:.{digits}f} | {theirs:.{digits}f}"
        parts.append(f"{field} {mean:.{digits}f} | {theirs:.{digits}f}{f' WORSE by {behind:.1f} se' if worse else ''}")
    print(f"{name:18} " + "   ".join(parts), flush=True)
    figures.row("saekit | sae-lens", name, {**found, "none worse by two standard errors": "yes" if fine else "no"})
    return fine


def at_l0(bench: Bench, wanted: float, rows: Tensor, scale: float, seed: int) -> Found:
    """The standard SAE of saekit whose L0 is ``wanted``, by bisection of the coefficient's logarithm."""
    low, high, found = math.log(1e-3), math.log(300.0), None
    for _ in range(9):
        middle = (low + high) / 2
        found = bench.own({"name": "standard", "l1_coefficient": math.exp(middle)}, rows, scale, seed)
        if abs(found.l0 / wanted - 1) < 0.02:
            break
        low, high = (middle, high) if found.l0 > wanted else (low, middle)
    assert found is not None
    return found


_bench: Bench


def _begin(batches: int, workers: int) -> None:
    """What each process needs."""
    global _bench
    warnings.simplefilter("ignore")
    if workers > 1:
        torch.set_num_threads(1)
    _bench = Bench(batches)


def _both(task: tuple[dict[str, Any], int, bool]) -> tuple[Found, Found]:
    """saekit's and the peer's, of one SAE and seed."""
    sae, seed, own_pipeline = task
    rows, scale = _bench.rows(seed)
    theirs = _bench.peer_pipeline(sae, seed) if own_pipeline else _bench.peer(sae, rows, scale, seed)
    if sae["name"] == "standard":
        return at_l0(_bench, theirs.l0, rows, scale, seed), theirs
    return _bench.own_pipeline(sae, seed) if own_pipeline else _bench.own(sae, rows, scale, seed), theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=586)
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--own-pipeline", action="store_true")
    parser.add_argument("--only", choices=["topk", "batchtopk", "standard"], action="append")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("sae_lens") is None:
        figures.missing("sae-lens")
        return
    chosen = asked.only or ["topk", "batchtopk", "standard"]
    wanted: list[dict[str, Any]] = [{"name": n, "k": k} for n in chosen if n != "standard" for k in (8, 16, 32)]
    wanted += [{"name": "standard", "l1_coefficient": x} for x in (2.0, 4.0, 8.0) if "standard" in chosen]
    tasks = [(sae, seed, asked.own_pipeline) for sae in wanted for seed in range(asked.seeds)]
    own: dict[str, list[Found]] = {}
    peer: dict[str, list[Found]] = {}
    with ProcessPoolExecutor(asked.workers, get_context("spawn"), _begin, (asked.batches, asked.workers)) as pool:
        for (sae, _, _), (mine, theirs) in zip(tasks, pool.map(_both, tasks), strict=True):
            name = " ".join(map(str, sae.values()))
            own.setdefault(name, []).append(mine)
            peer.setdefault(name, []).append(theirs)
    print(f"saekit | sae-lens, means of {asked.seeds} seeds, {asked.batches} batches")
    fine = [line(name, own[name], peer[name]) for name in own]
    print("none worse by more than two standard errors" if all(fine) else f"{fine.count(False)} worse")


if __name__ == "__main__":
    main()
