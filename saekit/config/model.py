"""The language model."""

from __future__ import annotations

import attrs

from saekit.config.fields import CompileMode, Dtype, PluginChoice, not_empty, path_field, plugin_field
from saekit.config.showing import changed_repr
from saekit.defaults import DEFAULT_BACKEND
from saekit.kinds import MODEL_BACKENDS

__all__ = ["ModelConfig"]


@attrs.frozen(kw_only=True)
class ModelConfig:
    """The language model whose activations are studied."""

    name: str = path_field("saekit/tiny-python", validator=not_empty)
    """A name that the backend knows, or a folder.  `saekit/tiny-python` ships with saekit."""
    backend: PluginChoice = plugin_field(MODEL_BACKENDS, DEFAULT_BACKEND)
    """What loads and runs the model."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: a GPU if there is one."""
    dtype: Dtype = "float32"
    """The type of the model's weights and activations."""
    autocast: bool = False
    """Run the model's matrix products in bfloat16 (torch's autocast), whatever the type of its weights."""
    compile: bool = False
    """Compile the model with `torch.compile`: slow at the start, faster after."""
    compile_mode: CompileMode = "default"
    """torch's mode of compilation."""

    __repr__ = changed_repr
