"""``params.npz`` in ``layer_{L}/width_{W}/average_l0_{N}``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import attrs

from saekit import Ports, PretrainedSAE, SAEFiles, Site, Sites
from saekit.errors import SAEFormatError
from saekit_plugins.loaders.gemma_scope import FED, GemmaScopeConfig
from saekit_plugins.loaders.reading import fed, found_files, named, one_file, options, path_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gemma2Loader", "Gemma2TranscoderLoader"]

_PATTERN = r"params\.npz"
_REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?=/|$)")
_WHOLE_NAME = re.compile(rf"(?:models--google--)?{_REPOSITORY.pattern}")
_LAYER = re.compile(r"/layer_(\d+)/(?:[^/]+/)*params\.npz$")
_EMBEDDING = re.compile(r"/embedding/width_[^/]+/(?:[^/]+/)?params\.npz$")
_OF_THE_LAYOUT = re.compile(r"layer_\d+|width_.*|average_l0_.*|canonical|params\.npz")
_THEIRS = re.compile(r"gemma[-_]scope[-_]", re.IGNORECASE)  # without "transcoder", likely the name of SAEs
_OF_SAES = re.compile(r"(?<![a-z])(?:res|att|mlp|saes?)(?![a-z])", re.IGNORECASE)
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


class Gemma2Loader:
    """JumpReLU; no bias is taken from the input, and the SAE of the embedding is for embeddings times √d_in."""

    _loader = "gemma_2"

    def __init__(self, config: GemmaScopeConfig) -> None:
        self._sae, self._repo = config.sae, config.repo

    def detects(self, files: SAEFiles) -> float:
        names = found_files(files, _PATTERN)
        if not names:
            return 0.0
        path = path_of(files, names[0]) if self._repo is None else f"/{self._repo}/"
        sure, likely = _is_transcoder(path)
        mine = self._loader == "gemma_2_transcoder"
        if sure is not None:
            return 0.95 if sure == mine else 0.0
        if likely is not None:
            return 0.7 if likely == mine else 0.5
        return self._unsaid

    _unsaid = 0.6
    """How sure it is where the path says no kind: most of this layout are SAEs."""

    def _said(self, path: str) -> re.Match[str] | None:
        found = [*_REPOSITORY.finditer(path if self._repo is None else f"/{self._repo}/")]
        return found[-1] if found else None  # the nearest

    def load(self, files: SAEFiles) -> PretrainedSAE:
        name = one_file(files, _PATTERN, self._sae, self._loader)
        path = path_of(files, name)
        tensors, renamed = self._tensors(files, name)
        said = self._said(path)
        layer = _LAYER.search(path)
        read = self._read(tensors, path, said, None if layer is None else int(layer[1]))
        return attrs.evolve(read, renamed=renamed, **_fed(said))

    def _tensors(self, files: SAEFiles, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """By saekit's names, and which these are for theirs."""
        state = files.tensors(name)
        # A few files have the matrices' names in lower case.
        theirs = {ours.lower() if ours.lower() in state else ours: ours for ours in _NAMES}
        if (factor := state.get("scaling_factor")) is not None and not bool((factor == 1).all()):
            theirs["scaling_factor"] = "scaling_factor"
        return named(state, theirs, f"{name} in {files.place}", unused=("scaling_factor",)), theirs

    def _read(
        self, tensors: dict[str, Tensor], path: str, said: re.Match[str] | None, layer: int | None
    ) -> PretrainedSAE:
        hook_name = None
        if layer is not None and said is not None:
            hook_name = f"blocks.{layer}.{_HOOKS[said[3]]}" if said[3] in _HOOKS else None
        elif _EMBEDDING.search(path):
            hook_name = "hook_embed"
            root = math.sqrt(tensors["W_enc"].shape[0])
            tensors |= {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root}
        return PretrainedSAE(
            architecture="saekit:jumprelu",
            options=options(tensors, apply_b_dec_to_input=False),
            tensors=tensors,
            site=None if hook_name is None else Site(hook_name=hook_name),
        )


def _is_transcoder(path: str) -> tuple[bool | None, bool | None]:
    """Whether ``path`` is that of a transcoder, whose files are like those of an SAE: for sure, and likely.

    None: it does not say.  The name of a repository of Gemma Scope is sure, wherever it stands in the path, unless a
    folder nearer to the file says otherwise.  Names that people give are guesses, and the nearest that says something
    counts: one that holds the layers, or the next above, or one that is called after Gemma Scope.
    """
    if _EMBEDDING.search(path):
        return False, False  # which no transcoder reads
    names = [name for name in path.split("/") if name and not _OF_THE_LAYOUT.fullmatch(name)]
    likely: bool | None = None
    for above, name in enumerate(reversed(names)):
        if (said := _WHOLE_NAME.fullmatch(name)) is not None:
            sure = said[3] == "transcoders"
            return (sure if likely in (None, sure) else None), (sure if likely is None else likely)
        if likely is None:
            likely = _guess(name, near=above < 2)
    return None, likely


def _guess(name: str, *, near: bool) -> bool | None:
    """What the name of a folder makes likely; ``near``: of one that holds the layers, or of the next one above."""
    theirs = bool(_THEIRS.search(name))
    if "transcoder" in name.lower() and (near or theirs):
        return True
    return False if theirs or (near and _OF_SAES.search(name)) else None


def _fed(said: re.Match[str] | None) -> dict[str, Any]:
    """What is the same for all of Gemma Scope, and the model, where the path names the repository."""
    model = None if said is None else f"gemma-2-{said[1]}" + ("-it" if said[2] == "it" else "")
    return fed({"model_name": model}, FED)


class Gemma2TranscoderLoader(Gemma2Loader):
    """From what an MLP reads, normalized, to what it writes."""

    _loader = "gemma_2_transcoder"
    _unsaid = 0.5

    def _read(
        self, tensors: dict[str, Tensor], path: str, said: re.Match[str] | None, layer: int | None
    ) -> PretrainedSAE:
        d_in, d_out = tensors["W_enc"].shape[0], tensors["W_dec"].shape[1]
        if d_in != d_out:
            raise SAEFormatError(
                f"{path} reads {d_in} numbers and writes {d_out}, expected equally many: those of the model's residual "
                "stream"
            )
        sites = None
        if layer is not None:
            hooks = ("ln2.hook_normalized", "hook_mlp_out")
            read, written = (Site(hook_name=f"blocks.{layer}.{hook}") for hook in hooks)
            sites = Sites((read,), (written,))
        names = ("input", "output") if sites is None else (sites.inputs[0].name, sites.targets[0].name)
        return PretrainedSAE(
            architecture="saekit:jumprelu_transcoder",
            options=options(tensors, apply_b_dec_to_input=False, skip_connection=False),
            tensors=tensors,
            sites=sites,
            ports=Ports({names[0]: d_in}, {names[1]: d_out}),
        )
