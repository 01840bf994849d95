"""An SAE spliced into a model, beside the model's forward and the SAE's, one after the other.

    python tests/bench/splice.py [--only HookedTransformer AutoModelForCausalLM] [--rounds 9] [--quick]

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from common import CONTEXT, VOCABULARY, Case, Times, language_model

import saekit

PROMPTS, LAYERS, WIDTH = 8, 4, 512


def causal_lm() -> Any:
    """An untrained GPT-2 of transformers with the sizes of the other model."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "HookedTransformer": (lambda: language_model(LAYERS, WIDTH), "blocks.2.hook_resid_post"),
    "AutoModelForCausalLM": (causal_lm, "transformer.h.2"),
}
SAES: dict[str, dict[str, Any]] = {
    "topk": {"name": "topk", "d_sae": 4096, "k": 32},
    "standard": {"name": "standard", "d_sae": 4096},
}


def compare(kind: str, architecture: str, rounds: int, forwards: int) -> None:
    """Print the figures of one SAE in one model."""
    make, hook = MODELS[kind]
    model = make()
    backend = saekit.load_model(model)
    sae = saekit.SAE.from_dict({"d_in": WIDTH, **SAES[architecture]})
    tokens = torch.randint(VOCABULARY, (PROMPTS, CONTEXT), generator=torch.Generator().manual_seed(0))
    activations = backend.run(tokens, read=[hook]).held[hook]

    def timed(one: Callable[[], object]) -> int:
        for _ in range(forwards):
            one()
        return forwards * tokens.numel()

    def apart() -> None:
        backend.run(tokens, want="logits")
        with torch.inference_mode():
            sae(activations)

    def spliced(call: Callable[[Any], object], **options: Any) -> Case:
        stack = ExitStack()

        def run() -> int:
            there = stack.enter_context(saekit.splice(backend, sae, sites=hook, **options))
            return timed(lambda: call(there))

        return Case(run, after=stack.close)

    def direct(there: Any) -> None:
        with torch.inference_mode():
            model(tokens)

    acts = f"{hook}.hook_sae_acts_post"
    base = "forward, then SAE"
    cases = {
        base: Case(lambda: timed(apart)),
        "spliced": spliced(lambda there: there.run(tokens, want="logits")),
        "spliced, error term": spliced(lambda there: there.run(tokens, want="logits"), use_error_term=True),
        "spliced, model(tokens)": spliced(direct),
        "spliced, a mask": spliced(lambda there: there.run(tokens, want="logits"), mask=lambda ids: ids > 9),
        "spliced, features read": spliced(lambda there: there.run(tokens, read=[acts], want="logits")),
    }
    title = f"{kind}, {architecture}: {PROMPTS} contexts of {CONTEXT}, {LAYERS} layers of {WIDTH}, 4,096 features"
    print(title)
    Times(cases, rounds).table(base, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--forwards", type=int, default=5, help="of a case in a round")
    parser.add_argument("--quick", action="store_true", help="two rounds of two forwards")
    options = parser.parse_args()
    rounds, forwards = (2, 2) if options.quick else (options.rounds, options.forwards)
    for kind in options.only:
        for architecture in SAES:
            compare(kind, architecture, rounds, forwards)


if __name__ == "__main__":
    main()
