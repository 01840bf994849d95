"""Models of transformer_lens by name, and from folders.  A helper of the backend's plugin, not a plugin."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit import ModelError
from saekit.devices import resolve_device
from saekit.for_sae_lens import BY_DEFAULT, NO_PROCESSING
from saekit.garbage import uncollected
from saekit.hub import is_path, within_reach
from saekit.reasons import reason
from saekit_plugins.backends.lens_versions import is_known, near_names
from saekit_plugins.backends.quiet_loading import without_bars

if TYPE_CHECKING:
    from saekit.config import ModelConfig, PretokenizeConfig, TrainConfig

EMBEDDED = {"saekit/tiny-python": Path(__file__).parent / "tiny_python"}
NATIVE_CONFIG, NATIVE_WEIGHTS = "hooked_transformer.json", "model.safetensors"
PROCESSING = tuple(NO_PROCESSING)


def load_model(model: ModelConfig, kwargs: Mapping[str, Any]) -> object:
    """By name: the embedded model, a folder of ours, a Hugging Face folder, or a name of transformer_lens."""
    device = resolve_device(model.device, "model.device", model.dtype)
    if (folder := model_folder(model.name, kwargs)) is not None:
        if (folder / NATIVE_CONFIG).is_file():
            return _load_native(folder, model.dtype, device)
        return _load_hf_folder(folder, model.dtype, device, kwargs)
    with uncollected():
        from transformer_lens import HookedTransformer

    with within_reach(), without_bars():
        try:
            loaded = HookedTransformer.from_pretrained(model.name, dtype=model.dtype, device=device, **kwargs)
        except Exception as error:  # of the library, of those below it, of the network, or of a damaged file
            raise ModelError(unknown_name(model.name, error)) from error
    return loaded.eval().requires_grad_(False)


def model_folder(name: str, kwargs: Mapping[str, Any]) -> Path | None:
    """The model folder that ``name`` means, checked; None for a name that transformer_lens may know."""
    folder = EMBEDDED.get(name, Path(name))
    if not folder.is_dir():
        if is_path(name):
            raise ModelError(f"there is no model folder {name!r} (model.name)")
        return None
    if (folder / NATIVE_CONFIG).is_file():
        # nothing is done to its weights as it is loaded, so that nothing is to be done is true of it
        if other := sorted(key for key, value in kwargs.items() if value is not False or key not in PROCESSING):
            raise ModelError(
                f"model.backend.from_pretrained_kwargs do not apply to {name!r}: {other}. Leave them out "
                "(model.backend.from_pretrained_kwargs={}); where it is an SAE that says them, say the backend without "
                '(--backend KEY; backend={"name": KEY, "from_pretrained_kwargs": {}}), or give a model that you have '
                "loaded"
            )
        return folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has neither config.json nor {NATIVE_CONFIG}")
    if unknown := sorted(set(kwargs) - set(PROCESSING)):
        raise ModelError(f"model.backend.from_pretrained_kwargs for a folder can be {PROCESSING}, found {unknown}")
    return folder


def is_native(name: str) -> bool:
    """A folder of a HookedTransformer, whose weights are as they were saved."""
    return name in EMBEDDED or os.path.isfile(os.path.join(name, NATIVE_CONFIG))  # noqa: PTH113, PTH118 - raises for none


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever the files of a model make the libraries stumble on is a :class:`ModelError` that names ``what``."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{what} cannot be loaded; a file may be damaged, missing, or of another model: {reason(error)}"
        ) from error


def unknown_name(name: str, error: Exception) -> str:
    if not is_known(name, *EMBEDDED):
        close = near_names(name, *EMBEDDED)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        return f"transformer_lens knows no model {name!r}, and there is no such folder.{hint}"
    return f"the model {name!r} cannot be loaded: {reason(error)}"


def load_tokenizer(name: str | Path, revision: str = "main") -> Any:
    """A Hugging Face tokenizer; no code that comes with one is run."""
    name = EMBEDDED.get(str(name), name)
    with uncollected():
        from transformers import AutoTokenizer
    with within_reach(unless=name), loading(f"the tokenizer {str(name)!r}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision)


def _load_native(folder: Path, dtype: str, device: str) -> object:
    """A folder with ``hooked_transformer.json``, ``model.safetensors`` and a tokenizer."""
    import torch
    from safetensors.torch import load_file

    with uncollected():
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    with loading(f"the configuration {folder / NATIVE_CONFIG}"):
        options = json.loads((folder / NATIVE_CONFIG).read_text(encoding="utf-8"))
        config = HookedTransformerConfig(**options, device=device, dtype=getattr(torch, dtype), init_weights=False)
    tokenizer = load_tokenizer(folder)
    with loading(f"the model in {folder}"):
        model = HookedTransformer(config, tokenizer)
        missing, unexpected = model.load_state_dict(load_file(folder / NATIVE_WEIGHTS), strict=False)
        # The masks and their constants are rebuilt from the configuration.
        missing = [name for name in missing if not name.endswith(("mask", "IGNORE"))]
        if missing or unexpected:
            raise ModelError(
                f"the weights in {folder} lack {missing or 'nothing'} and have the unknown {unexpected or 'nothing'}"
            )
        return ready(model, getattr(torch, dtype))


def _load_hf_folder(folder: Path, dtype: str, device: str, kwargs: Mapping[str, Any]) -> object:
    """A folder of a Hugging Face causal LM: ``config.json``, weights and a tokenizer."""
    import torch

    with uncollected():
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as conversion
    options = {name: True for name, done in BY_DEFAULT.items() if done} | dict(kwargs)
    torch_dtype = getattr(torch, dtype)
    tokenizer = load_tokenizer(folder)
    with loading(f"the model in {folder}"):
        module = hf_model(folder, torch_dtype, local_files_only=True)
        with config_folder(folder) as neutral:
            config = conversion.get_pretrained_model_config(
                neutral, fold_ln=options["fold_ln"], device=device, dtype=torch_dtype
            )
        state = conversion.get_pretrained_state_dict(str(folder), config, module, dtype=torch_dtype)
        del module  # each of its weights goes as soon as its processed one is there
        model = HookedTransformer(config, tokenizer, move_to_device=False)
        model.load_and_process_state_dict(state, **options)
        return ready(model, device)


def hf_model(place: str | Path, dtype: Any, **options: Any) -> Any:
    """The causal language model of transformers in a folder, or of that name on the Hub.

    The library would draw weights that are not there at random, with no more than a remark in its log.
    """
    with uncollected():
        from transformers import AutoModelForCausalLM
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    model, info = loaded
    for fault in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(fault) or ())):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            kind = "lack" if fault == "missing_keys" else "have another shape than config.json says in"
            raise ModelError(f"the weights in {place} {kind} {', '.join(names[:3])}{more}")
    return model


def check_folders(model: str, tokenizer: str) -> None:
    """What only a folder can be meant by must be there."""
    for name, what in ((model, "model folder {!r} (model.name)"),
                       (tokenizer, "tokenizer folder {!r} (model.backend.tokenizer)")):  # fmt: skip
        if is_path(name) and not Path(name).is_dir():
            raise ModelError(f"there is no {what.format(name)}")


def check_causal_lm(config: Any, whole: TrainConfig | PretokenizeConfig) -> None:
    """What can be seen of folders that transformers is to load from: the precheck of its backend."""
    check_folders(whole.model.name, config.tokenizer)
    check_causal_lm_folder(whole.model.name)


def check_causal_lm_folder(name: str) -> None:
    folder = model_folder(name, {})
    if folder is not None and (folder / NATIVE_CONFIG).is_file():
        raise ModelError(f"{name!r} is a model of transformer_lens; its backend is model.backend=HookedTransformer")


def load_causal_lm(model: ModelConfig, **options: Any) -> object:
    """A causal language model of transformers, from a folder or the Hub, to be read only."""
    import torch

    device = resolve_device(model.device, "model.device", model.dtype)
    check_causal_lm_folder(model.name)
    with within_reach(unless=model.name), loading(f"the model {model.name!r}"):
        return ready(_with_fused_gelu(hf_model(model.name, getattr(torch, model.dtype), **options)), device)


def _with_fused_gelu(model: Any) -> Any:
    """``model`` with torch's own GELU by tanh for transformers' `gelu_new`, which makes it in eight steps.

    In full precision they are the same but for rounding, and a GPT-2 of width 512 forwards in 15 % less time.  In half
    precision each step rounds, so there it stays.
    """
    import torch
    from transformers.activations import NewGELUActivation

    if next(model.parameters()).dtype in (torch.float32, torch.float64):
        for module in [*model.modules()]:
            for name, child in module.named_children():
                if type(child) is NewGELUActivation:
                    setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def ready(model: Any, target: Any) -> object:
    """``model`` in that type or on that device, to be read only."""
    import torch

    torch.nn.Module.to(model, target)  # HookedTransformer.to prints
    return model.eval().requires_grad_(False)


@contextmanager
def config_folder(folder: Path) -> Iterator[str]:
    """A folder with ``config.json`` alone, under a name that says nothing.

    transformer_lens guesses the architecture from words in the path, and reads ``n_ctx``, which transformers 5 no
    longer writes for GPT-2.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])
    with tempfile.TemporaryDirectory(prefix="saekit") as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield neutral
