"""Tokens are shown as they read within a text, whatever the tokenizer makes of one alone."""

from __future__ import annotations

from typing import Any

import pytest
from support.causal_lms import make_causal_lm
from support.spliced import bridge
from support.tiny import hooked_transformer, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import saekit
from saekit.backends.texts import texts_of

TEXT = "the cat sat,  the\n\tcatsé on a mat."
TWO_BYTES = "\ufffd\ufffd"  # those of é, which are two tokens
PIECES = ["▁", "▁the", "▁cat", "▁sat", "▁on", "▁a", "▁m", "s", "at", "t", "h", "e", "c", "a", "o", "n", "m", ",", "."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
IDS = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "c"), ("▁c", "at"), ("▁", "s"), ("▁s", "at"),
          ("▁", "a"), ("▁", "m"), ("o", "n"), ("▁", "on")]  # fmt: skip


def wrapped(made: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    found.add_tokens(["    "])
    return found


def llama() -> Any:
    """As those of Llama 2 are: BPE, bytes where nothing else fits, the first space taken away."""
    ids = dict(IDS)
    for pair in MERGES:
        for piece in (*pair, "".join(pair)):
            ids.setdefault(piece, len(ids))
    made = Tokenizer(models.BPE(vocab=ids, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return wrapped(made)


def t5() -> Any:
    """As those of SentencePiece's Unigram are."""
    made = Tokenizer(models.Unigram([(token, -1.0 - len(IDS) % 3) for token in IDS], unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return wrapped(made)


@pytest.mark.parametrize("make", [llama, t5])
def test_leading_spaces_and_bytes_of_pieces_are_kept(make: Any) -> None:
    found = make()
    ids = found(TEXT, add_special_tokens=False)["input_ids"]
    texts = texts_of(found, ids)
    assert "".join(texts).replace(TWO_BYTES, "é") == f" {TEXT}"
    assert "".join(texts_of(found, [1, *ids])).replace(TWO_BYTES, "é") == found.decode([1, *ids])
    number = found.convert_tokens_to_ids
    shown = {"▁the": " the", "▁": " ", "at": "at", "<0x0A>": "\n", "<0x41>": "A", "<0xC3>": "\ufffd", "<s>": "<s>"}
    shown["    "] = "    "
    assert dict(zip(shown, texts_of(found, number([*shown])), strict=True)) == shown


@pytest.mark.parametrize("backend", ["AutoModelForCausalLM", "TransformerBridge", "HookedTransformer"])
def test_every_backend_shows_them(backend: str) -> None:
    model: Any = hooked_transformer() if backend == "HookedTransformer" else make_causal_lm("gpt2", n_layer=1)
    loaded: Any = saekit.load_model(bridge() if backend == "TransformerBridge" else model, backend=backend)
    loaded.tokenizer = found = llama()
    ids = found("the cat", add_special_tokens=False)["input_ids"]
    assert loaded.token_texts([1, *ids]) == ["<s>", " the", " cat"]


def test_a_tokenizer_of_bytes_says_what_it_decodes() -> None:
    found = tokenizer()
    ids = found(TEXT)["input_ids"]
    assert "".join(texts_of(found, ids)).replace(TWO_BYTES, "é") == found.decode(ids)
    every = range(len(found))
    assert texts_of(found, every) == [found.decode([token]) for token in every]
