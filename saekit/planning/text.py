"""What ``saekit plan`` finds out about the text of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import attrs
import torch

from saekit.config import EvalsConfig, TrainConfig
from saekit.data import Contexts, ContextStream, Corpus, Documents, StreamContext, TokenPolicy
from saekit.data.activations import check_contexts
from saekit.data.documents import Conversation
from saekit.data.in_memory import is_one_text
from saekit.errors import SaekitError
from saekit.planning.findings import Findings, of_all
from saekit.planning.lanes import PlannedLane
from saekit.protocols import ModelBackend
from saekit.runs.counting import Counted, Used
from saekit.runs.first_loss import first_loss, first_loss_text
from saekit.runs.opening import repeated

__all__ = ["TextFindings", "counted_unread", "look_at_texts", "no_contexts", "text_length"]

T = TypeVar("T")
_LOOK_AT = 100_000  # tokens, at most, to estimate the text's length
_AT_THE_END = {"repeat": "it is read again", "stop": "training ends", "error": "the run fails"}
_PLAIN_TEXT = (".txt", ".text", ".md", ".py", ".jsonl", ".json")  # whose size on disk tells how much text there is


class _Unread(ContextStream):
    """Contexts of no text."""

    def tokenize_ahead(self, count: int, option: str) -> None:
        """Nothing is read, so nothing is tokenized."""


def no_contexts(backend: ModelBackend, corpus: Corpus) -> ContextStream:
    """What a source may be built on where no text is opened."""
    policy = TokenPolicy(context_size=corpus.context_size)
    return _Unread(Documents([]), backend.tokenize, policy, d_vocab=backend.d_vocab, repeat=False)


class _Attempt(Protocol):
    def __call__(self, work: Callable[[], T]) -> T | None:
        """``work()``, or None with its error among the problems."""


@attrs.frozen
class TextFindings:
    """For :class:`saekit.planning.plan.Plan`."""

    facts: dict[str, str] = attrs.field(factory=dict)
    warnings: list[str] = attrs.field(factory=list)
    numbers: dict[str, float] = attrs.field(factory=dict)


def look_at_text(
    config: TrainConfig,
    corpus: Corpus,
    backend: ModelBackend,
    attempt: _Attempt,
    stream: StreamContext,
    *,
    reads: bool,
) -> TextFindings:
    """The tokens that are put in, the first context, what is held out, and how often training ``reads`` the text."""
    found = TextFindings()
    policy = attempt(lambda: corpus.policy(backend.special_tokens))
    if policy is None:
        return found
    found.facts["contexts"] = _contexts_text(corpus.context_size, policy, backend)
    if policy.begin_batch is None and backend.special_tokens.get("bos") is not None:
        found.warnings.append(
            "contexts do not begin with BOS (dataset.prepend_bos); most models were trained with it, and their "
            "activations are out of the ordinary without"
        )
    used = (attempt(lambda: Used.of(config, corpus, backend, stream)) if reads else None) or Used()
    found.facts.update(used.facts)
    found.numbers.update(used.numbers)
    found.warnings.extend(used.doubts)
    contexts = attempt(lambda: _first_contexts(corpus, backend))
    if contexts is not None:
        found.facts["first context"] = f"{''.join(backend.token_texts(contexts.tokens[0, :16].tolist()))!r}..."
        if not config.model.compile and (text := _loss_text(backend, contexts)) is not None:
            found.facts["model loss"] = text
        if reads and (text := _repeated(config, corpus, backend, used)) is not None:
            found.warnings.append(text)
        found.warnings.extend(corpus.doubts(backend))
    evals = config.evals
    if (
        evals.reads_text
        and contexts is not None
        and (held := attempt(lambda: corpus.held_out(backend, seed=0))) is not None
    ):
        found.warnings.extend(corpus.held_out_doubts(len(held)))
    found.facts.update(_held_out_facts(evals, corpus))
    found.facts["when the text ends"] = _AT_THE_END[corpus.config.on_exhausted]
    return found


def _held_out_facts(evals: EvalsConfig, corpus: Corpus) -> dict[str, str]:
    """What evals measure on."""
    kept = f"split {evals.split!r}" if evals.split else f"one document in {evals.held_out_every}"
    if evals.split is None and is_one_text(corpus.dataset):
        kept = f"the last of {evals.held_out_every} parts of the text"
    if not evals.reads_text:
        return {"held out": "nothing"}
    return {
        "held out": f"{kept}, {evals.n_contexts} contexts",
        "dead features": (
            f"an eval counts those that fired on none of its {evals.n_contexts * corpus.context_size:,} tokens, nor in "
            "the last window of training"
        ),
    }


def look_at_texts(
    lanes: Sequence[PlannedLane], corpus: Corpus, backend: ModelBackend, findings: Findings
) -> TextFindings:
    """:func:`look_at_text` for the SAE that takes the most tokens and the evals that take the most contexts, with what
    differs for others; what is wrong goes to ``findings``."""
    lead = max(lanes, key=lambda lane: (lane.reads, lane.longest.config.training.total_tokens))
    members = [member for lane in lanes for member in lane.members]
    widest = max((one.config.evals for one in members), key=lambda evals: (evals.reads_text, evals.n_contexts))
    config = attrs.evolve(lead.longest.config, evals=widest)
    own = attrs.evolve(corpus, evals=widest, mask=config.tokens.mask_column)
    found = look_at_text(config, own, backend, findings.attempt, lead.stream, reads=lead.reads)
    findings.doubt(*found.warnings)
    if len(members) == 1:
        return found
    used = {config.tokens: {name: found.facts[name] for name in ("tokens",) if name in found.facts}}
    for lane in lanes:
        longest = lane.longest.config
        if lane.reads and longest.tokens not in used:
            given = longest, corpus, backend, lane.stream
            other = findings.attempt(partial(Used.of, *given), of=lane.names) or Used()
            findings.doubt(*other.doubts, of=lane.names)
            used[longest.tokens] = other.facts
    names = [member.name for member in members]
    facts = {
        member.name: used.get(member.config.tokens, {}) | _held_out_facts(member.config.evals, corpus)
        for member in members
    }
    for what in ("tokens", "held out", "dead features"):
        if texts := {name: told[what] for name, told in facts.items() if what in told}:
            found.facts[what] = of_all(texts, names)
    return found


def counted_unread(lanes: Sequence[PlannedLane], corpus: Corpus) -> str:
    """How many tokens count, as far as positions say it; empty where all do."""
    texts: dict[str, str] = {}
    for lane in lanes:
        stream, tokens = lane.stream, lane.longest.config.tokens
        if stream.has_model and not stream.counts_all:
            counted = Counted(stream.rows_per_context(corpus.context_size), corpus.context_size)
            by_text = stream.choice.exclude or tokens.mask_column is not None
            unread = f"at most {counted}: how many, the text says, and it was not read"
            texts |= dict.fromkeys(lane.names, unread if by_text else str(counted))
    return of_all(texts, [name for lane in lanes for name in lane.names]) if texts else ""


def _contexts_text(context_size: int, policy: TokenPolicy, backend: ModelBackend) -> str:
    def name(token: int) -> str:
        kinds = [kind.upper() for kind, known in backend.special_tokens.items() if known == token]
        return f"{kinds[0] if kinds else 'token'} {''.join(backend.token_texts([token]))!r} (id {token})"

    begin = "with no token put before them" if policy.begin_batch is None else f"from {name(policy.begin_batch)} on"
    between = "nothing" if policy.separator is None else name(policy.separator)
    first = "" if policy.begin_sequence is None else f"; before each document {name(policy.begin_sequence)}"
    return f"{context_size} tokens, {begin}; between documents {between}{first}"


def _first_contexts(corpus: Corpus, backend: ModelBackend) -> Contexts:
    contexts = corpus.contexts(backend).take(8)
    check_contexts(len(contexts), corpus.context_size)
    return contexts


def _loss_text(backend: ModelBackend, contexts: Contexts) -> str | None:
    if backend.n_ctx is not None and contexts.tokens.shape[1] > backend.n_ctx:
        return None  # a problem of its own
    return first_loss_text(backend, first_loss(backend, torch.from_numpy(contexts.tokens)))


def _repeated(config: TrainConfig, corpus: Corpus, backend: ModelBackend, used: Used) -> str | None:
    """In words, if the text is read very often."""
    if corpus.config.on_exhausted != "repeat":
        return None
    try:
        length = text_length(corpus, backend)
    except SaekitError:  # of a document further on; the run may not come to it
        return None
    if length is None or not length[0]:
        return None
    what = "the text has" if length[1] else "the text has about"
    share = 1.0 if used.tokens is None else used.tokens.share
    if not (tokens := int(length[0] * share)):
        return None
    return repeated(tokens, config.training.total_tokens, what=what)


def text_length(corpus: Corpus, backend: ModelBackend) -> tuple[int, bool] | None:
    """Tokens of the text that is trained on, and whether that is their exact number; None: it cannot be told.

    The text is read as far as its first hundred thousand tokens; the number of its documents, or the size of the file,
    says the rest.
    """
    documents = corpus.training_documents()
    reader, ids = documents.read(), corpus.tokenize(backend)
    tokens = read = size = 0
    for index, document in reader:
        tokens += len(ids(document) if isinstance(document, (str, Conversation)) else document)
        read, size = index + 1, size + (len(document.encode()) if isinstance(document, str) else 0)
        if tokens >= _LOOK_AT:
            break
    else:
        return tokens, True
    if next(iter(reader), None) is None:
        return tokens, True
    if documents.size is not None:
        return tokens * documents.size // read, False
    path = Path(corpus.config.path)
    if corpus.dataset is None and path.is_file() and size and path.suffix.lower() in _PLAIN_TEXT:
        kept = _kept(corpus)
        return int(tokens * path.stat().st_size * kept / size), False
    return None


def _kept(corpus: Corpus) -> float:
    """The part of the documents that is not held out."""
    every = corpus.evals.held_out_every if corpus.evals.split is None else 0
    return 1 - 1 / every if every else 1.0
