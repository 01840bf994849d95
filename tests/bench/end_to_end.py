"""A whole run, activations included, beside sae-lens's own runner on the same model and tokens; and four SAEs at once.

    python tests/bench/end_to_end.py [--only runs parts] [--tokens 262144] [--rounds 3]

An untrained HookedTransformer of 4 layers and width 512, contexts of 128 tokens, TopK SAEs of 4096 features at
``blocks.2.hook_resid_post``, batches of 4096.  Four SAEs that differ in ``k`` share forwards and batches; they
are compared with four runs of the peer.  ``parts`` are what one run's processor time goes to: see ``parts.py``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import figures
import parts
from common import BATCH, CONTEXT, PEER, Times, language_model, random_contexts, settings
from peers import version

import saekit

HOOK, D_IN, D_SAE, K = "blocks.2.hook_resid_post", 512, 4096, 32
PROMPTS, BUFFER = 16, 16  # contexts of a forward, and forwards in the buffer


def own_config(tokens: int, folder: str) -> dict[str, Any]:
    config = settings(HOOK, {"store_batch_size_prompts": PROMPTS, "n_batches_in_buffer": BUFFER})
    config["sae"] = {"name": "topk", "d_sae": D_SAE, "k": K}
    config["training"] |= {"training_tokens": tokens, "verbose": False}
    config["checkpoints"] = {"folder": folder, "keep_last": 0}
    return config


def own(model: Any, dataset: Any, tokens: int, saes: int = 1) -> Callable[[], int]:
    def run() -> int:
        folder = tempfile.mkdtemp(prefix="saekit-bench-")
        config = own_config(tokens, folder)
        if saes == 1:
            saekit.train(config, model=model, dataset=dataset)
        else:
            grid = saekit.grid(config, {"sae.k": [K - number for number in range(saes)]})
            saekit.train(grid, model=model, dataset=dataset)
        shutil.rmtree(folder)
        return tokens

    return run


def peer(model: Any, dataset: Any, tokens: int) -> Callable[[], int]:
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    size: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}

    def run() -> int:
        folder = tempfile.mkdtemp(prefix="saekit-bench-")
        sae = TopKTrainingSAEConfig(**size, k=K)
        config: Any = LanguageModelSAERunnerConfig(
            sae=sae, model_name="in-memory", dataset_path="in-memory", hook_name=HOOK, context_size=CONTEXT,
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
    from datasets import Dataset

    model, records = language_model(), random_contexts(4096)
    dataset = Dataset.from_list(records)
    cases = {
        "saekit": own(model, records, asked.tokens),
        "saekit, four SAEs": own(model, records, asked.tokens, saes=4),
    }
    name = f"sae-lens {version('sae-lens')}"
    if PEER:
        cases[name] = peer(model, dataset, asked.tokens)
    else:
        figures.missing("sae-lens")
    times = Times(cases, asked.rounds)
    title = f"TopK {D_IN} → {D_SAE:,}, {asked.tokens:,} tokens, from configuration to saved SAE"
    times.table("saekit", title)
    if PEER:
        four = {f"four runs of {name} / it": 4 * times.ratio(name, "saekit, four SAEs")}
        figures.row(title, "saekit", {f"{name} / it": times.ratio(name, "saekit")})
        figures.row(title, "saekit, four SAEs", four)
        print(f"  {name} / saekit = {times.ratio(name, 'saekit'):.2f}")
        print(f"  4 x {name} / saekit, four SAEs = {4 * times.ratio(name, 'saekit, four SAEs'):.2f}")


if __name__ == "__main__":
    main()
