"""The model card of SAEs on the Hub: where they belong, how good they are, how they were trained, how to load them.

What is not known is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from saekit._version import __version__
from saekit.hub import is_path
from saekit.plugins.text import printable

__all__ = ["MADE_BY_SAEKIT", "CardSAE", "model_card"]

MADE_BY_SAEKIT = "<!-- Made by saekit. Without this line the card is yours, and a later push leaves it as it is. -->"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_MEASURED = {
    "L0": ("evals/l0", "metrics/l0", "l0"),
    "explained variance": ("evals/explained_variance", "metrics/explained_variance", "explained_variance"),
    "CE recovered": ("evals/ce_recovered", "ce_recovered"),
    "dead features": ("sparsity/dead_features", "dead_features", "num_dead_features"),
}
"""What a card says, and the metrics that each is taken from, the first that is there."""
_TOLD = ("l0", "num_dead_features")
"""Those that sae-lens writes into an SAE's metadata."""


@attrs.frozen(kw_only=True)
class CardSAE:
    """One SAE, as a card speaks of it."""

    folder: str
    """In the repository; empty for the repository itself."""
    config: Mapping[str, Any]
    """Its ``cfg.json``."""
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    """What was measured, by the names of metrics."""
    shows_all: bool = False
    """Whether what is not one of the main numbers is shown, too, by its name: somebody has chosen them."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """How it was trained, by dotted paths."""
    tokens: int | None = None
    """That it was trained on."""

    @property
    def own(self) -> Mapping[str, Any]:
        """saekit's part of ``cfg.json``."""
        return _table(self.config.get("saekit"))

    @property
    def about(self) -> Mapping[str, Any]:
        """What it is fed; sae-lens has all of it in one table before 6."""
        inner = self.config.get("metadata")
        return _table(inner) if inner is not None or self.own else self.config

    @property
    def made_by(self) -> str:
        """What has written its files, with a link."""
        version = self.about.get("sae_lens_version") or self.about.get("sae_lens_training_version")
        if self.own or not isinstance(version, str):
            return f"[saekit](https://pypi.org/project/saekit/) {__version__}"
        return f"[sae-lens](https://pypi.org/project/sae-lens/) {_cell(version)}"

    @property
    def model(self) -> str:
        """The name of the language model; empty where it is not known, or is the path of a folder."""
        names = (self.about.get("model_name"), self.options.get("model.name"))
        return next((name for name in names if isinstance(name, str) and name and not _is_local(name)), "")

    @property
    def architecture(self) -> str:
        """The key, without the name of saekit's own distribution."""
        key = str(self.own.get("architecture") or self.config.get("architecture") or "")
        distribution, _, name = key.partition(":")
        return name if distribution == "saekit" else key

    @property
    def sites(self) -> str:
        """The sites that it reads, and those that it writes where they are others."""
        if isinstance(site := self.own.get("site"), Mapping):
            return _name(site)
        if not self.own:  # of sae-lens
            read, written = (_site_of(self.about, end) for end in ("", "_out"))
            return f"{read} to {written}" if read and written else read
        read, written = (
            "+".join(_name(one) for one in self.own.get(key, ()) if isinstance(one, Mapping))
            for key in ("inputs", "targets")
        )
        return read if written in ("", read) else f"{read} to {written}"

    @property
    def facts(self) -> dict[str, str]:
        """What is known of it, in words."""
        metadata = self.about
        data = [self.options.get("dataset.path"), metadata.get("dataset_path")]
        found = {
            "site": self.sites,
            "model": self.model,
            "data": next((one for one in data if isinstance(one, str) and one and not _is_local(one)), ""),
            "architecture": self.architecture,
            "features": _number(self.config.get("d_sae")),
            "d_in": _number(self.config.get("d_in")),
            "d_out": _number(self.config.get("d_out")),
            "context size": _number(metadata.get("context_size", self.options.get("dataset.context_size"))),
            "trained on": f"{self.tokens:,} tokens" if self.tokens else "",
        }
        for name, text in self.measured.items():
            found[f"{name} (measured)" if name in found else name] = text
        return {name: text for name, text in found.items() if text}

    @property
    def configuration(self) -> Mapping[str, Any]:
        """How it was trained; where that is not known, those of the SAE's own options that are, as a configuration has
        them: of an SAE of another library what its files state."""
        options, provenance = _table(self.own.get("options")), _table(self.own.get("provenance"))
        unknown = provenance.get("not_stated", options if provenance else ())  # an older saekit did not tell them apart
        known = {name: value for name, value in options.items() if name not in unknown}
        return self.options or dict(_flat("sae", known))

    @property
    def measured(self) -> dict[str, str]:
        """The main numbers, and the others."""
        told = {**{one: self.about[one] for one in _TOLD if one in self.about}, **self.metrics}
        main = {
            name: _number(next((told[one] for one in sources if one in told), None))
            for name, sources in _MEASURED.items()
        }
        known = {one for sources in _MEASURED.values() for one in sources}
        others = [name for name in self.metrics if name not in known] if self.shows_all else []
        return main | {name: _number(self.metrics[name]) for name in others}

    @property
    def sae_lens_reads_it(self) -> bool:
        """What it does not have is called by a name that it cannot know."""
        name = self.config.get("architecture")
        return isinstance(name, str) and ":" not in name


def model_card(repo_id: str, saes: Sequence[CardSAE], columns: Sequence[str] = ()) -> str:
    """The card of a repository that holds ``saes``; ``columns`` are the options in which those of a sweep differ."""
    parts = [_front_matter(saes), MADE_BY_SAEKIT, "", f"# {_cell(repo_id.rpartition('/')[2])}", ""]
    parts += _one(saes[0]) if len(saes) == 1 else _several(saes, columns)
    parts += ["", "## How to load " + ("it" if len(saes) == 1 else "one"), "", *_loading(repo_id, saes)]
    shared = {path: value for path, value in saes[0].configuration.items() if _is_shared(path, value, saes)}
    if shared:
        parts += ["", "## Configuration", "", *_code("text", [f"{path} = {value!r}" for path, value in shared.items()])]
    return "\n".join([*parts, ""])


def _is_shared(path: str, value: Any, saes: Sequence[CardSAE]) -> bool:
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value) and value
    there = isinstance(value, bool | int | float) or (isinstance(value, str) and value and not _is_local(value))
    return bool(there or numbers) and all(one.configuration.get(path) == value for one in saes)


def _front_matter(saes: Sequence[CardSAE]) -> str:
    import yaml

    table: dict[str, Any] = {"library_name": "saekit", "tags": ["sparse-autoencoder", "saekit"]}
    models = sorted({one.model for one in saes if _HUB_ID.fullmatch(one.model)})
    if models:
        table["base_model"] = models[0] if len(models) == 1 else models
    return f"---\n{yaml.safe_dump(table, sort_keys=False, allow_unicode=True)}---"


def _one(sae: CardSAE) -> list[str]:
    return [
        f"A sparse autoencoder, saved by {sae.made_by}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(text)} |" for name, text in sae.facts.items()),
    ]


def _several(saes: Sequence[CardSAE], columns: Sequence[str]) -> list[str]:
    """What they have in common, and a table of the rest."""
    facts = [one.facts for one in saes]
    same = [name for name in facts[0] if all(other.get(name) == facts[0][name] for other in facts)]
    others = [name for name in dict.fromkeys(name for one in facts for name in one) if name not in same]
    columns = [path for path in columns if any(path in one.options for one in saes)]
    rows = []
    for one, its in zip(saes, facts, strict=True):
        changed = [str(one.options.get(path, "")) for path in columns]
        rows.append([f"`{_cell(one.folder)}`", *map(_cell, changed), *(_cell(its.get(name, "")) for name in others)])
    head = ["folder", *columns, *others]
    return [
        f"{len(saes)} sparse autoencoders, saved by {' and '.join(dict.fromkeys(one.made_by for one in saes))}.",
        *(["", "| | |", "|---|---|"] if same else []),
        *(f"| {_cell(name)} | {_cell(facts[0][name])} |" for name in same),
        "",
        f"| {' | '.join(_cell(name) for name in head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _loading(repo_id: str, saes: Sequence[CardSAE]) -> list[str]:
    one = saes[0]
    where = f'repo_id="{repo_id}"' + (f', folder="{one.folder}"' if one.folder else "")
    lines = _code("python", ["import saekit", "", f"sae = saekit.SAE.from_pretrained({where})"])
    read = next((sae for sae in saes if sae.sae_lens_reads_it), None)
    if read is None:
        return lines
    if read.folder:
        theirs = ["from sae_lens import SAE", "", f'sae = SAE.from_pretrained("{repo_id}", "{read.folder}")']
    else:
        theirs = ["from huggingface_hub import snapshot_download", "from sae_lens import SAE", "",
                  f'sae = SAE.load_from_disk(snapshot_download("{repo_id}"))']  # fmt: skip
    return [*lines, "", "In sae-lens 6:", "", *_code("python", theirs)]


def _code(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *(printable(line).replace("```", "'''") for line in lines), "```"]


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_local(name: str) -> bool:
    """Whether a text is the path of something on this machine, which is nobody's business."""
    return is_path(name) or "\\" in name


def _name(site: Mapping[str, Any]) -> str:
    head = site.get("hook_head_index")
    return f"{site.get('hook_name', '')}" + (f".head{head}" if isinstance(head, int) else "")


def _site_of(about: Mapping[str, Any], end: str) -> str:
    """By the names of sae-lens, of which those for what a transcoder writes end in ``_out``; empty: none is named."""
    hook = about.get(f"hook_name{end}", about.get(f"hook_point{end}"))
    head = about.get(f"hook_head_index{end}", about.get(f"hook_point_head_index{end}"))
    return _name({"hook_name": hook, "hook_head_index": head}) if isinstance(hook, str) else ""


def _flat(path: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by dotted paths."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{path}.{name}", value)
        else:
            yield f"{path}.{name}", value


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
