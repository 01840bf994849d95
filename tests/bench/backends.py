"""The backend of transformers beside that of transformer_lens: forwards of the same folder that end at the same site.

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


SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def gpt2_folder(
    folder: str, width: int, context: int, *, layers: int = LAYERS, heads: int | None = None, gelu: str = "gelu_new"
) -> None:
    """Write an untrained GPT-2 there, with heads of 64 unless told how many."""
    import transformers

    heads = heads or max(width // 64, 2)
    shape: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context,
                             "activation_function": gelu}  # fmt: skip
    model_folder(folder, transformers.GPT2Config(**shape | SPECIAL))


def model_folder(folder: str, config: Any) -> None:
    """Write an untrained model there, with the embedded model's tokenizer."""
    import transformers
    from saekit_plugins.backends.hooked_transformer import EMBEDDED

    torch.manual_seed(0)
    library: Any = transformers.AutoModelForCausalLM
    library.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(EMBEDDED["saekit/tiny-python"]).save_pretrained(folder)


def as_hooked_transformer(folder: str) -> Any:
    """The backend of the model in ``folder``, with its weights as they are."""
    from saekit_plugins.backends.hooked_transformer import HookedTransformerOptions

    return backend(folder, HookedTransformerOptions(from_pretrained_kwargs=UNPROCESSED))


def backend(folder: str, options: Any) -> Any:
    model = ModelConfig(name=folder, device="cpu")
    return saekit.default_manager().build("model_backends", options, model=model, loaded=None)


def backends(family: str, width: int, context: int) -> dict[str, Any]:
    """Both, of one folder of an untrained model with heads of 64."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        if family == "gpt2":
            gpt2_folder(folder, width, context)
        else:
            shape = {"hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": max(width // 64, 2),
                     "intermediate_size": 4 * width, "max_position_embeddings": context}  # fmt: skip
            kind = {"neox": "gpt_neox"}.get(family, family)
            model_folder(folder, transformers.AutoConfig.for_model(kind, **shape | SPECIAL))
        return {
            "AutoModelForCausalLM": backend(folder, "AutoModelForCausalLM"),
            "HookedTransformer": as_hooked_transformer(folder),
        }


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
                both = backends(family, width, context)
                tokens = torch.randint(
                    VOCABULARY, (TOKENS // context, context), generator=torch.Generator().manual_seed(1)
                )
                held = [one.run(tokens, read={hook}).held[hook] for one in both.values()
                        for hook in [one.hook_like(SITE)]]  # fmt: skip
                difference = float((held[0] - held[1]).abs().max())
                title = f"{family}, d_model {width}, contexts of {context}"
                print(f"{title}: activations differ by {difference:.1e} at most")
                cases = {key: forward_case(one, tokens, 2 if width > 128 else 8) for key, one in both.items()}
                Times(cases, options.rounds).table("AutoModelForCausalLM", title)


if __name__ == "__main__":
    main()
