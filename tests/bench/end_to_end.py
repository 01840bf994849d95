"""A whole run, activations included, beside sae-lens's own runner on the same model and tokens; and four SAEs at once.

    python tests/bench/end_to_end.py [--only runs parts] [--shape topk-512 standard-128] [--tokens 262144] [--rounds 3]

An untrained HookedTransformer, contexts of 128 tokens, batches of 4096.  ``topk-512``: 4 layers of width 512, TopK SAEs
of 4096 features at ``blocks.2.hook_resid_post``; four that differ in ``k`` share forwards and batches, and are compared
with four runs of the peer.  ``standard-128``: 2 layers of width 128, a standard SAE of 1024 features.  "As advised" are
the lines that `saekit plan` writes for such a run: fused forwards, and none that training does not take.  ``parts`` are
what one run's processor time goes to: see ``parts.py``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import figures
import parts
from common import BATCH, CONTEXT, PEER, Times, language_model, random_contexts, settings
from peers import version

import saekit

K = 32
PROMPTS, BUFFER = 16, 16  # contexts of a forward, and forwards in the buffer


@attrs.frozen
class Shape:
    """A model, and the SAE that is trained in it."""

    layers: int
    d_model: int
    n_heads: int
    hook: str
    d_sae: int
    sae: Mapping[str, Any]
    """Its options, of both libraries."""
    four: bool
    """Whether four are trained at once, too."""

    @property
    def title(self) -> str:
        return f"{self.sae['name']} {self.d_model} → {self.d_sae:,}"


SHAPES = {
    "topk-512": Shape(4, 512, 8, "blocks.2.hook_resid_post", 4096, {"name": "topk", "k": K}, True),
    "standard-128": Shape(
        2, 128, 4, "blocks.1.hook_resid_post", 1024, {"name": "standard", "l1_coefficient": 1.0}, False
    ),
}


def own_config(shape: Shape, tokens: int, folder: str) -> dict[str, Any]:
    config = settings(shape.hook, {"store_batch_size_prompts": PROMPTS, "n_batches_in_buffer": BUFFER})
    config["sae"] = {**shape.sae, "d_sae": shape.d_sae}
    # As in sae-lens; by default it is a tenth of so short a run, in which AuxK would teach dead features from then on.
    config["training"] |= {"training_tokens": tokens, "verbose": False, "dead_feature_window": 1000}
    config["checkpoints"] = {"folder": folder, "keep_last": 0}
    return config


def own(
    shape: Shape, model: Any, dataset: Any, tokens: int, *, saes: int = 1, advised: bool = False
) -> Callable[[], int]:
    def run() -> int:
        folder = tempfile.mkdtemp(prefix="saekit-bench-")
        config = own_config(shape, tokens, folder)
        if advised:
            config["model"]["backend"] = {"name": "HookedTransformer", "fused": True}
            config["activations"]["source"]["refill"] = "needed"
        if saes == 1:
            saekit.train(config, model=model, dataset=dataset)
        else:
            grid = saekit.grid(config, {"sae.k": [K - number for number in range(saes)]})
            saekit.train(grid, model=model, dataset=dataset)
        shutil.rmtree(folder)
        return tokens

    return run


def peer(shape: Shape, model: Any, dataset: Any, tokens: int) -> Callable[[], int]:
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )

    size: dict[str, Any] = {"d_in": shape.d_model, "d_sae": shape.d_sae, "device": "cpu", "dtype": "float32"}
    kinds: dict[str, Any] = {"topk": TopKTrainingSAEConfig, "standard": StandardTrainingSAEConfig}

    def run() -> int:
        folder = tempfile.mkdtemp(prefix="saekit-bench-")
        sae = kinds[shape.sae["name"]](**size, **{name: value for name, value in shape.sae.items() if name != "name"})
        config: Any = LanguageModelSAERunnerConfig(
            sae=sae, model_name="in-memory", dataset_path="in-memory", hook_name=shape.hook, context_size=CONTEXT,
            is_dataset_tokenized=True, streaming=False, prepend_bos=False, training_tokens=tokens, device="cpu",
            train_batch_size_tokens=BATCH, store_batch_size_prompts=PROMPTS, n_batches_in_buffer=PROMPTS * BUFFER,
            checkpoint_path=folder, output_path=folder, logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0,
        )  # fmt: skip
        LanguageModelSAETrainingRunner(config, override_model=model, override_dataset=dataset).run()
        shutil.rmtree(folder)
        return tokens

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["runs", "parts"], default=["runs", "parts"])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if "runs" in asked.only:
        compare(asked)
    if "parts" in asked.only:
        parts.measure(asked.tokens)


def compare(asked: argparse.Namespace) -> None:
    """Whole runs, each beside the peer's."""
    warnings.simplefilter("ignore")
    if not PEER:
        figures.missing("sae-lens")
    for name in asked.shape:
        measure(SHAPES[name], asked.tokens, asked.rounds)


def measure(shape: Shape, tokens: int, rounds: int) -> None:
    """Print the figures of one shape."""
    from datasets import Dataset

    model, records = language_model(shape.layers, shape.d_model, shape.n_heads), random_contexts(4096)
    name = f"sae-lens {version('sae-lens')}"
    cases = {name: peer(shape, model, Dataset.from_list(records), tokens)} if PEER else {}
    beside = {}
    for saes, advised in ((1, False), (1, True), *[(4, True)] * shape.four):
        case = "saekit" + ", four SAEs" * (saes == 4) + ", as advised" * advised
        cases[case] = own(shape, model, records, tokens, saes=saes, advised=advised)
        beside[case] = saes
    times = Times(cases, rounds)
    title = f"{shape.title}, {tokens:,} tokens, from configuration to saved SAE"
    print(title)
    times.table("saekit", title)
    for case, runs in beside.items() if PEER else ():
        peers, ratio = ("four runs of " if runs == 4 else "") + name, runs * times.ratio(name, case)
        figures.row(title, case, {f"{peers} / it": ratio})
        print(f"  {peers} / {case} = {ratio:.2f}")


if __name__ == "__main__":
    main()
