"""Make the embedded model ``saekit/tiny-python``: a small causal LM trained on Python's own standard library.

    python examples/embedded_lm/train.py            # about 12 minutes on two cores; writes the shipped folder

It needs transformer_lens 3, whose HookedTransformer it trains; what it writes is read with transformer_lens 4, too.
The tokenizer is a byte-level BPE trained on the same files.  One file in twenty is held out (saekit's
``heldout`` split); the model card states the loss there beside the unigram and bigram cross-entropies.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from saekit.data.stdlib import stdlib_documents

OUT = Path(__file__).parents[2] / "plugins/saekit_plugins/backends/tiny_python"
BOS = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents end to end, each preceded by BOS."""
    bos = tokenizer.token_to_id(BOS)
    ids = [[bos, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])


def contexts(stream: np.ndarray, length: int, bos: int) -> torch.Tensor:
    """``[n, length]`` contexts, each BOS followed by the next ``length - 1`` tokens of the stream."""
    body = length - 1
    rows = torch.from_numpy(stream[: len(stream) // body * body].reshape(-1, body).copy())
    return torch.cat([torch.full((len(rows), 1), bos), rows], dim=1)


def ngram_entropies(train: np.ndarray, held: np.ndarray, vocab: int) -> tuple[float, float]:
    """Held-out cross-entropy, in nats per token, of add-one unigrams and of bigrams interpolated with them."""
    unigram = np.bincount(train, minlength=vocab) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab).reshape(vocab, vocab)
    mass = 10.0  # Dirichlet prior towards the unigram: Mackay and Peto (1995)
    seen = pairs.sum(1)
    probability = (pairs[held[:-1], held[1:]] + mass * unigram[held[1:]]) / (seen[held[:-1]] + mass)
    return float(-np.log(unigram[held[1:]]).mean()), float(-np.log(probability).mean())


@torch.no_grad()
def held_out_loss(model: HookedTransformer, rows: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats."""
    model.eval()
    total = sum(float(model(part, return_type="loss")) * len(part) for part in rows.split(64))
    model.train()
    return total / len(rows)


def train(model: HookedTransformer, rows: torch.Tensor, steps: int, batch: int, lr: float, seed: int) -> None:
    """AdamW with a 2 % warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    start, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        done = step / steps
        if len(order) < batch:
            order = torch.randperm(len(rows), generator=generator)
        picked, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(done / 0.02, 0.5 * (1 + math.cos(math.pi * done))) + 1e-6
        loss = model(rows[picked], return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            rate = (step + 1) * batch * rows.shape[1] / (time.monotonic() - start)
            print(f"step {step:5d}  {done:5.1%}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)


def save(model: HookedTransformer, tokenizer: Tokenizer, out: Path, card: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.half().contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith(("mask", "IGNORE"))
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    fields = ["n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn"]
    config = {name: getattr(model.cfg, name) for name in fields}
    config |= {"normalization_type": model.cfg.normalization_type, "model_name": "saekit/tiny-python"}
    (out / "hooked_transformer.json").write_text(json.dumps(config, indent=2) + "\n")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)
    fast.save_pretrained(out)
    written = out / "tokenizer_config.json"
    settings = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    written.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "README.md").write_text(card)


CARD = """# saekit/tiny-python

A {layers}-layer causal transformer (d_model {d_model}, {heads} heads, context {n_ctx}, {params:,} parameters) that ships
with saekit so that everything can be tried without a download. It was trained by `examples/embedded_lm/train.py`
on the sources of the standard library of Python {python}, without its tests ({train_tokens:,} tokens; {steps:,} steps of
{batch} contexts, seed {seed}), with a byte-level BPE of {vocab:,} tokens trained on the same text.

| held-out text (one file in twenty, {held_tokens:,} tokens) | nats per token |
|---|---|
| unigram cross-entropy | {unigram:.3f} |
| bigram cross-entropy (Dirichlet-smoothed) | {bigram:.3f} |
| **this model** | **{loss:.3f}** |

That is {bits:.3f} bits per byte. Weights are stored in float16 with the layer norms folded in (`LNPre`).
Its purpose is to be small and real: it has learned Python's tokens, indentation, keywords, docstrings and names, and
little else. Trained on, and licensed like, Python's standard library (PSF license); see `LICENSE` for saekit itself.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocab": 2048,
        "layers": 3,
        "d-model": 128,
        "n-ctx": 128,
        "batch": 32,
        "steps": 2600,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*HookedTransformer.*deprecated.*")
    torch.manual_seed(args.seed)
    texts = {split: [d["text"] for d in stdlib_documents(split)] for split in ("train", "heldout")}
    tokenizer = train_tokenizer(texts["train"], args.vocab)
    stream = {split: token_stream(tokenizer, documents) for split, documents in texts.items()}
    bos = tokenizer.token_to_id(BOS)
    rows = {split: contexts(tokens, args.n_ctx, bos) for split, tokens in stream.items()}
    unigram, bigram = ngram_entropies(stream["train"], stream["heldout"], args.vocab)
    print(f"{len(stream['train']):,} tokens; unigram {unigram:.3f}, bigram {bigram:.3f} nats", flush=True)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=args.layers, d_model=args.d_model, n_ctx=args.n_ctx, d_head=32, n_heads=args.d_model // 32,
            d_mlp=4 * args.d_model, d_vocab=args.vocab, act_fn="gelu_new", normalization_type="LN",
            seed=args.seed, device="cpu",
        )
    )  # fmt: skip
    train(model, rows["train"], args.steps, args.batch, args.lr, args.seed)
    model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    model.load_state_dict({name: tensor.half().to(tensor.dtype) for name, tensor in model.state_dict().items()})
    loss = held_out_loss(model, rows["heldout"])
    held_bytes = sum(len(text.encode()) for text in texts["heldout"])
    card = CARD.format(
        layers=args.layers, d_model=args.d_model, heads=args.d_model // 32, n_ctx=args.n_ctx, steps=args.steps,
        params=sum(p.numel() for p in model.parameters()), python=platform.python_version(), batch=args.batch,
        train_tokens=len(stream["train"]), held_tokens=len(stream["heldout"]), vocab=args.vocab, seed=args.seed,
        unigram=unigram, bigram=bigram, loss=loss, bits=loss / math.log(2) * len(stream["heldout"]) / held_bytes,
    )  # fmt: skip
    save(model, tokenizer, args.out, card)
    print(card)


if __name__ == "__main__":
    main()
