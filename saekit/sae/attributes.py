"""The names of an SAE: which are shown to people, what others are called here, and none that is set to no effect."""

from __future__ import annotations

import difflib
import inspect
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from saekit.config.sae_lens_names import FACTORIES, OF_SAES
from saekit.values import SAEInfo

__all__ = ["CalledOtherwise", "Named"]

FOR_USERS = frozenset(
    {
        "activation", "add_scaling_factor", "cfg", "config", "d_in", "d_out", "d_sae", "decode", "decoder_norms",
        "device", "dtype", "encode",
        "encode_sparse", "encode_topk", "export", "fold_W_dec_norm", "fold_activation_scale", "forward", "from_dict",
        "from_hub", "from_pretrained", "from_release", "get_name", "info", "input_transform", "kernels", "load",
        "log_sparsity", "losses", "ports", "pre_activations", "push_to_hub", "read_from", "reconstruction", "save",
        "site", "sites", "step_path", "to_dict", "training_step", "use_error_term",
    }
)  # fmt: skip
"""What the documentation is about; the rest is for those who write architectures."""
_SETTINGS = ("info", "kernels", "log_sparsity", "site", "sites", "use_error_term")
"""What users set."""
_OF_INFO = frozenset(field.name for field in attrs.fields(SAEInfo))


class CalledOtherwise:
    """In the place of a class's attribute that is another one here: an :class:`AttributeError` that says which."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(_called(owner, self._name), name=self._name, obj=owner)


def _called(kind: type, name: str) -> str:
    return f"{kind.__name__} has no {name!r}, as other libraries have it: here it is {OF_SAES[name]}"


def _in_method_of(kind: type) -> bool:
    """Whether what sets an attribute is a method of this class, or a function in one, or was called by these."""
    theirs = [(one.__module__, f"{one.__qualname__}.") for one in kind.__mro__ if one not in nn.Module.__mro__]
    # Names alone: to look at the local variables of a frame would keep them, and large tensors may be among them.
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_qualname
        if any(module == where and name.startswith(prefix) for where, prefix in theirs):
            return True
        frame = frame.f_back
    return False


class Named(nn.Module):
    """What :class:`saekit.sae.SAEModule` has of it."""

    if TYPE_CHECKING:  # architectures have attributes of their own

        def __getattr__(self, name: str) -> Any: ...

    else:
        locals().update({name: CalledOtherwise() for name in FACTORIES})

        def __getattr__(self, name):
            """Of parameters, buffers and modules, as torch has it; the error knows names of other libraries.

            A property that raises an :class:`AttributeError` leads here, too: it is asked again, for its own words.
            """
            try:
                return super().__getattr__(name)
            except AttributeError:
                if isinstance(found := inspect.getattr_static(type(self), name, None), property):
                    return found.__get__(self)
                if name in OF_SAES:
                    raise AttributeError(_called(type(self), name), name=name, obj=self) from None
                raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self) and not name.startswith("_") and not hasattr(type(self), name):
            self._check_setting(name)
        super().__setattr__(name, value)

    def _check_setting(self, name: str) -> None:
        """:class:`AttributeError` for a new attribute that looks like a setting and would have no effect.

        The code of architectures may set attributes of any name: whatever does so before it is known what the SAE is,
        the methods of the SAE, and all that they call.
        """
        info = vars(self).get("info")
        if not getattr(info, "architecture", "") or any(name in self.__dict__[kind] for kind in _OF_TORCH):
            return
        if name in _OF_INFO:
            why = f"it is a part of sae.info: sae.info = attrs.evolve(sae.info, {name}=...)"
        elif name in (options := {field.name for field in attrs.fields(type(self.config))}):
            why = f"it is an option that the SAE was made with (sae.config.{name}); saekit.SAE.from_dict makes another"
        elif name in OF_SAES:
            why = f"it is a name of other libraries, and here it is {OF_SAES[name]}"
        elif close := difflib.get_close_matches(name, {*_SETTINGS, *options}, n=1, cutoff=0.85):
            why = f"did you mean {close[0]!r}?"
        else:
            return
        if not _in_method_of(type(self)):
            raise AttributeError(
                f"to set {name!r} of {type(self).__name__} would do nothing: {why}", name=name, obj=self
            )

    def __dir__(self) -> list[str]:
        """What people use: torch's own names, the parameters and hook points, what architectures add and users set."""
        torch_has = nn.Module.__mro__
        ours, theirs = set[str](), {*vars(self)}
        for kind in type(self).__mro__:
            if kind not in torch_has:
                (ours if kind.__module__.startswith("saekit.") else theirs).update(vars(kind))
        inner = {name for kind in _OF_TORCH for name in self.__dict__[kind]}
        shown = {name for name in theirs - ours if not name.startswith("_")}
        return sorted({*FOR_USERS, *inner, *dir(nn.Module), *shown})


_OF_TORCH = ("_parameters", "_buffers", "_modules")
