"""What processes that tokenize ahead gain a run that waits for a model elsewhere, as on a GPU.

    python tests/bench/tokenizing.py [--processes 1 2] [--contexts 2048] [--model 0 2 10]

Who takes contexts, 16 at once from a thread, then waits for as long as a model would take (``--model``, µs per
token): with 0 it shows how fast tokens come at all.  Texts go through the embedded tokenizer, which is Rust, and
conversations through a chat template, which is Python.  Starting is not counted.  Prints figures; it judges nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import partial
from typing import Any

from figures import row
from saekit_plugins.backends.hooked_transformer import EMBEDDED

from saekit.backends.texts import text_ids
from saekit.data import ContextStream, Prefetched, TokenPolicy
from saekit.data.chats import DocumentIds, chat_tokenizer
from saekit.data.documents import Conversation
from saekit.data.stdlib import stdlib_documents
from saekit.data.text import Documents

SIZE, AT_ONCE = 128, 16
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


class Taken:
    """Contexts of a text, as a stage that a thread runs: ``ahead`` by processes, if any."""

    def __init__(self, documents: list[Any], ids: DocumentIds, d_vocab: int, processes: int) -> None:
        first = documents[0] if isinstance(documents[0], str) else None
        policy = TokenPolicy(context_size=SIZE, begin_batch=0, separator=0)
        self.contexts = ContextStream(Documents(documents, first=first), ids, policy, d_vocab=d_vocab, repeat=True)
        if processes:
            self.contexts.tokenize_ahead(processes, "processes")

    def __next__(self) -> Any:
        return self.contexts.take(AT_ONCE)

    def state_dict(self) -> dict[str, Any]:
        return self.contexts.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.contexts.load_state_dict(state)


def seconds_per_token(taken: Taken, contexts: int, model: float) -> float:
    """Of a consumer that does nothing for ``model`` seconds per token."""
    ahead = Prefetched(taken, 2)
    for _ in range(4):
        next(ahead)  # processes and threads have started
    start = time.perf_counter()
    for _ in range(contexts // AT_ONCE):
        next(ahead)
        time.sleep(model * AT_ONCE * SIZE)
    found = (time.perf_counter() - start) / (contexts // AT_ONCE * AT_ONCE * SIZE)
    ahead.close()
    taken.contexts.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, default=2048)
    parser.add_argument("--model", type=float, nargs="+", default=[0, 2, 10], help="µs per token")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(EMBEDDED["saekit/tiny-python"])
    texts: list[Any] = [record["text"] for record in itertools.islice(stdlib_documents("train"), 60)]
    turns = [text[at : at + 400] for text in texts for at in range(0, min(len(text), 20_000), 400)]
    chats: list[Any] = [
        Conversation([{"role": "user", "content": one}, {"role": "assistant", "content": two}])
        for one, two in itertools.pairwise(turns)
    ]
    ids = DocumentIds(partial(text_ids, tokenizer), chat_tokenizer(tokenizer, TEMPLATE, "it"), elsewhere=True)
    for name, documents in (("texts", texts), ("conversations", chats)):
        for model in options.model:
            times: dict[int, list[float]] = {count: [] for count in (0, *options.processes)}
            for _, count in itertools.product(range(options.rounds), times):
                taken = Taken(documents, ids, len(tokenizer), count)
                times[count].append(seconds_per_token(taken, options.contexts, model * 1e-6) * 1e6)
            found = {count: statistics.median(each) for count, each in times.items()}
            figures = {
                f"{count} processes, µs per token" if count else "a thread, µs per token": found[count]
                for count in found
            }
            row("Tokenizing ahead", f"{name}, a model of {model:g} µs per token", figures)
            print(f"{name}, a model of {model:g} µs per token: a thread {found[0]:.2f} µs; " + ", ".join(
                f"{count} processes {found[count]:.2f} ({found[0] / found[count]:.2f} x)" for count in options.processes
            ), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
