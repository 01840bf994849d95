"""A corpus of files that are no SAE: every format that is read, with every fault that its kind of file can have.

Made when it is asked for, from the small fixtures: :data:`CORPUS` names what there is, and :func:`make` writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
from support.bad_configs import JSON, YAML, field
from support.bad_forms import FORMS, Form, good
from support.bad_weights import LEGACY, NPZ, PICKLED, PICKLES, PLACES, SAFETENSORS, TENSORS, Fault, Faults, gz_bomb


@attrs.frozen
class Bad:
    """One of the corpus."""

    form: Form
    fault: Fault
    """Is given the file that is to be made bad: the weights, or the configuration."""
    told: str
    """What is said of it, as a pattern."""
    of: str = "weights"

    def file(self) -> str:
        """The file that is bad, in the folder."""
        return self.form.config if self.of == "config" else self.form.weights


def make(name: str, folder: Path) -> Bad:
    """Write the corpus's ``name`` into ``folder``."""
    bad = CORPUS[name]
    bad.fault(good(bad.form, folder) / bad.file(), bad.form)
    return bad


UNKNOWN: Mapping[str, Fault] = {
    "saekit": field("saekit", "architecture"),
    "sae_lens": field("architecture"),
    "sae_lens 2": field("activation_fn"),
    "gemma_3": field("architecture"),
    "llama_scope": field("act_fn"),
    "llama_scope_r1_distill": field("act_fn"),
    "sparsify": field("activation"),
    "dictionary_learning": field("trainer", "dict_class"),
    "matching_pursuit": field("architecture"),
    "skip_transcoder": field("architecture"),
    "transcoder of sparsify": field("activation"),
}
"""Where a format says what is computed."""
WHOLE = ("sae_lens", "dictionary_learning", "mwhanna", "gemma_2", "sae_lens_legacy pt", "sae_lens_legacy gz")
"""Of these forms every fault; of the others, read by the same code, those that loaders meet, and one of each kind."""
OPTIONAL = ("gemma_3",)
"""Without their configuration they are read, too."""
_EVERY = ("cut in half", "code", "no JSON", "nothing in it", "lists for every field", "no YAML", "lists for texts")


def _faults(name: str, form: Form) -> Faults:
    kind = Path(form.weights).suffix
    if name.startswith("sae_lens_legacy"):
        return dict(LEGACY)
    return {".safetensors": TENSORS | SAFETENSORS, ".npz": TENSORS | NPZ}.get(kind, TENSORS | PICKLES | PICKLED)


def _corpus() -> dict[str, Bad]:
    found: dict[str, Bad] = {}

    def add(form: str, faults: Faults, of: str = "weights") -> None:
        for name, (fault, told) in faults.items():
            if form not in WHOLE and name not in (*TENSORS, *_EVERY):
                continue
            key = f"{form}: {'' if of == 'weights' else 'config, '}{name}"
            told = told.replace("{matrix}", FORMS[form].matrix).replace("{bias}", FORMS[form].bias)
            found[key] = Bad(FORMS[form], fault, told, of)

    for name, form in FORMS.items():
        add(name, _faults(name, form) | PLACES)
        if form.config and name not in OPTIONAL:
            add(name, (YAML if form.config.endswith(".yaml") else JSON | PLACES), "config")
    for name, fault in UNKNOWN.items():
        found[f"{name}: an unknown architecture"] = Bad(FORMS[name], fault, "made-up-of-nothing", "config")
    found["sae_lens_legacy gz: a bomb"] = Bad(
        FORMS["sae_lens_legacy gz"], gz_bomb, "unpacks to more than .*no weights can be packed like that"
    )
    del found["mntss: a column too few"]  # which is a layer of another width
    del found["gated of dictionary_learning: config, nothing in it"]  # the names of tensors say what it is
    return found


CORPUS: dict[str, Bad] = _corpus()
"""By name, as in ``sparsify: config, nested deep``."""
