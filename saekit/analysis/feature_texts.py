"""Features with the texts that they fire on most, as people read them: lines for terminals, HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TypeAlias, overload

import attrs
from rich.text import Text

from saekit.analysis.examples import Example
from saekit.plugins.text import printable

__all__ = ["FeatureTexts", "Promoted", "TopTexts", "as_html", "as_page", "as_text", "one_line"]

Promoted: TypeAlias = tuple[tuple[str, float], ...]
"""Tokens, each with by how much its logit is raised."""
_BEFORE, _AFTER = 40, 36  # characters
_TOKENS_SHOWN = 8


@attrs.frozen(repr=False)
class FeatureTexts:
    """A feature and the places where it fires most, the strongest first."""

    feature: int
    frequency: float
    """The fraction of tokens on which it fires."""
    examples: Sequence[Example]
    promotes: Promoted | None = None
    """The tokens whose logits it raises most, each with by how much more than the mean of all, for an activation of 1.
    None: nothing can be said of them (:attr:`TopTexts.why_no_logits`)."""
    suppresses: Promoted | None = None
    """Likewise those that it lowers most."""

    def __repr__(self) -> str:
        return as_text(self).plain.rstrip("\n")

    def _repr_html_(self) -> str:
        return as_html([self])


@attrs.frozen(repr=False)
class TopTexts(Sequence[FeatureTexts]):
    """Features with their texts.  As a text, and as HTML in notebooks, it is what people read."""

    features: tuple[FeatureTexts, ...]
    tokens: int
    """Tokens that were looked at."""
    why_no_logits: str | None = None
    """Why nothing is said of what the features promote."""

    def __len__(self) -> int:
        return len(self.features)

    @overload
    def __getitem__(self, index: int) -> FeatureTexts: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[FeatureTexts, ...]: ...

    def __getitem__(self, index: int | slice) -> FeatureTexts | tuple[FeatureTexts, ...]:
        return self.features[index]

    def __iter__(self) -> Iterator[FeatureTexts]:
        return iter(self.features)

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.features)) or f"no features fired on {self.tokens:,} tokens"

    def _repr_html_(self) -> str:
        return as_html(self.features)


def as_text(found: FeatureTexts) -> Text:
    """A line that says which feature it is, one for what it promotes, and one for each text."""
    text = Text(_headline(found) + "\n", style="bold")
    if found.promotes:
        text.append(f"  promotes  {_listed(found.promotes)}\n", style="not bold italic")
    for example in found.examples:
        text.append(f"  {example.activation:6.1f}  ", style="not bold dim")
        text.append(one_line(example.before)[-_BEFORE:].rjust(_BEFORE), style="not bold")
        text.append(f"«{one_line(example.token)}»", style="bold black on yellow")
        text.append(one_line(example.after)[:_AFTER] + "\n", style="not bold")
    return text


def _headline(found: FeatureTexts) -> str:
    return f"Feature {found.feature}, firing on {found.frequency:.2%} of tokens"


def _listed(tokens: Promoted) -> str:
    return " · ".join(_token(token) for token, _ in tokens[:_TOKENS_SHOWN])


def _token(token: str) -> str:
    """A token by itself.  That a word begins with its space need not be seen; other spaces must be."""
    shown = one_line(token.removeprefix(" "))
    return shown if shown and shown.strip() == shown else f"'{one_line(token)}'"


def one_line(text: str) -> str:
    """``text`` with signs for what would break a line, and for what a terminal would obey."""
    return printable(text.replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥"))


def as_html(features: Sequence[FeatureTexts]) -> str:
    """A block for each feature, self-contained; colors are those of the page, and activations a tint behind them."""
    return f'<div style="color:inherit;font-size:0.95em">{"".join(map(_block, features))}</div>'


def as_page(features: Sequence[FeatureTexts], title: str) -> str:
    """The same as a page of its own, light or dark as whoever looks at it likes."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title></head>'
        f'<body style="font-family:sans-serif;margin:1.5em"><h1 style="font-size:1.3em">{escape(title)}</h1>'
        f"{as_html(features)}</body></html>\n"
    )


def _block(found: FeatureTexts) -> str:
    most = max((abs(example.activation) for example in found.examples), default=1.0)
    promotes = f'<div style="opacity:.75">promotes {escape(_listed(found.promotes))}</div>' if found.promotes else ""
    lines = "".join(
        f'<div style="white-space:pre-wrap;font-family:monospace;padding:.1em 0">'
        f'<span style="opacity:.6">{example.activation:7.1f}</span>  {"".join(_tokens(example, most))}</div>'
        for example in found.examples
    )
    title = f'<div style="font-weight:600">{escape(_headline(found))}</div>'
    return f'<div style="margin:.6em 0">{title}{promotes}{lines}</div>'


def _tokens(example: Example, most: float) -> Iterator[str]:
    for index, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
        shown = escape(one_line(token))
        strength = min(abs(value) / most, 1.0) if most > 0 else 0.0
        if strength <= 0:
            yield shown
            continue
        peak = ";text-decoration:underline" if index == example.at else ""
        style = f"background:rgba(240,150,0,{0.1 + 0.6 * strength:.2f});border-radius:2px{peak}"
        yield f'<span style="{style}" title="{value:.3g}">{shown}</span>'
