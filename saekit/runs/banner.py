"""What is trained, on what, where and how long: what a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from saekit.config import TrainConfig
from saekit.kinds import SAE_ARCHITECTURES
from saekit.runs.checks import has_model
from saekit.runs.session import Member, Session
from saekit.runs.sweep import changed_options, short_names, value_text

__all__ = ["banner"]

_MOST_SHOWN = 6  # values of an option that differs in a sweep


def banner(session: Session, folder: Path) -> list[str]:
    """The lines, of a run in ``folder``."""
    members = list(session.members.values())
    config = members[0].config
    with_model = has_model(config, session.plugins)
    facts = [
        ("text", _text(session, config, with_model)),
        *_used(session),
        ("steps", _steps(session, members)),
        *_changed(session, members),
        ("model", f"on {session.backend.device} in {_model_type(config)}" if with_model else "none"),
        ("SAE", _each(f"on {m.trainer.device} in {m.trainer.sae.config.dtype}" for m in members)),
        ("step", _each(m.trainer.step_path() for m in members)),
        *_processes(session),
        ("folder", str(folder)),
    ]
    width = max(len(name) for name, _ in facts)
    return [_headline(session, members, with_model), *(f"  {name:{width}}  {text}" for name, text in facts)]


def _headline(session: Session, members: Sequence[Member], with_model: bool) -> str:
    where = _each(member.config.sites.name for member in members)
    on = f"{where} of {session.backend.name}" if with_model else where
    sae = members[0].trainer.sae
    width = f"{sae.d_in:,}" if sae.ports.same else f"{sae.d_in:,} to {sae.d_out:,}"
    if len({member.trainer.sae.ports for member in members}) == 1:
        on += f" ({width} wide)"
    if len(members) > 1:
        return f"Training {len(members)} SAEs on {on}"
    kind = session.plugins.find(SAE_ARCHITECTURES, members[0].config.sae).entry.name
    return f"Training an SAE of {members[0].trainer.d_sae:,} features ({kind}) on {on}"


def _processes(session: Session) -> list[tuple[str, str]]:
    world = session.world
    if world.size == 1:
        return []
    parts = [f"batches in {world.data.size} parts"] if world.data.size > 1 else []
    parts += [f"features in {world.features.size} parts"] if world.features.size > 1 else []
    parts += [f"SAEs laid out in {world.saes.size} parts"] if world.saes.size > 1 else []
    return [("together", f"{world.size} processes: {', '.join(parts)}")]


def _text(session: Session, config: TrainConfig, with_model: bool) -> str:
    tokens = f"{session.total_tokens:,}"
    if not with_model:
        return f"{tokens} activations"
    source = session.corpus.config.path if session.corpus.dataset is None else "the dataset in memory"
    return f"{tokens} tokens of {source}, in contexts of {session.corpus.context_size:,}"


def _used(session: Session) -> list[tuple[str, str]]:
    """What of the text is used, where that is not all."""
    names = dict.fromkeys(name for used in session.used for name in used.facts)
    return [(name, _each(used.facts.get(name, "all count") for used in session.used)) for name in names]


def _steps(session: Session, members: Sequence[Member]) -> str:
    text = _each(f"{m.config.training.steps:,} of {m.config.training.batch_text}" for m in members)
    return f"{text}, going on after {session.tokens:,} tokens" if session.tokens else text


def _changed(session: Session, members: Sequence[Member]) -> list[tuple[str, str]]:
    """What differs between the SAEs of a sweep."""
    if len(members) == 1:
        return []
    options = changed_options([member.config for member in members], session.plugins)
    return [
        (short, _each(value_text(row[option]) for row in options)) for option, short in short_names(options[0]).items()
    ]


def _model_type(config: TrainConfig) -> str:
    return config.model.dtype + (" with products in bfloat16" if config.model.autocast else "")


def _each(texts: Iterable[str]) -> str:
    """What is said of several, each once."""
    once = list(dict.fromkeys(texts))
    more = f" and {len(once) - _MOST_SHOWN} more" if len(once) > _MOST_SHOWN else ""
    return ", ".join(once[:_MOST_SHOWN]) + more
