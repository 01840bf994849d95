"""The backend of transformers beside that of transformer_lens, fused or not: forwards of one folder that end at a site.

    python tests/bench/backends.py [--families gpt2 neox llama] [--widths 512 128] [--contexts 128 1024] [--quick]

Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import torch
from common import VOCABULARY, Case, Times

import saekit
from saekit.config import ModelConfig

LAYERS, SITE = 4, "blocks.2.hook_resid_post"
TOKENS = 2048  # in one forward
UNPROCESSED = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)


def backends(family: str, width: int, context: int) -> dict[str, Any]:
    """All, of one folder of an untrained model with heads of 64."""
    import transformers
    from saekit_plugins.backends.hooked_transformer import EMBEDDED, HookedTransformerOptions

    special: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    heads = max(width // 64, 2)
    if family == "gpt2":
        shape = {"n_embd": width, "n_layer": LAYERS, "n_head": heads, "n_positions": context}
        config: Any = transformers.GPT2Config(**shape | special)
    else:
        shape = {"hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
                 "intermediate_size": 4 * width, "max_position_embeddings": context}  # fmt: skip
        config = transformers.AutoConfig.for_model({"neox": "gpt_neox"}.get(family, family), **shape | special)
    torch.manual_seed(0)
    library: Any = transformers.AutoModelForCausalLM
    options = {
        "AutoModelForCausalLM": "AutoModelForCausalLM",
        "HookedTransformer": HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED),
        "HookedTransformer, fused": HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED, fused=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        library.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(EMBEDDED["saekit/tiny-python"]).save_pretrained(folder)
        model, plugins = ModelConfig(name=folder, device="cpu"), saekit.default_manager()
        return {key: plugins.build("model_backends", chosen, model=model, loaded=None)
                for key, chosen in options.items()}  # fmt: skip


def forward_case(backend: Any, tokens: torch.Tensor, forwards: int) -> Case:
    hook = backend.hook_like(SITE)

    def run() -> int:
        for _ in range(forwards):
            backend.run(tokens, read={hook})
        return forwards * tokens.numel()

    return Case(run, before=run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["gpt2", "neox", "llama"])
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one small model and one round, to see that it runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.quick:
        options.families, options.widths, options.contexts, options.rounds = ["gpt2"], [128], [128], 1
    for family in options.families:
        for context in options.contexts:
            for width in options.widths:
                every = backends(family, width, context)
                tokens = torch.randint(
                    VOCABULARY, (TOKENS // context, context), generator=torch.Generator().manual_seed(1)
                )
                held = [one.run(tokens, read={hook}).held[hook] for one in every.values()
                        for hook in [one.hook_like(SITE)]]  # fmt: skip
                difference = max(float((held[0] - other).abs().max()) for other in held[1:])
                title = f"{family}, d_model {width}, contexts of {context}"
                print(f"{title}: activations differ by {difference:.1e} at most")
                cases = {key: forward_case(one, tokens, 2 if width > 128 else 8) for key, one in every.items()}
                Times(cases, options.rounds).table("AutoModelForCausalLM", title)


if __name__ == "__main__":
    main()
