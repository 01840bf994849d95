"""What a configuration class says about itself: the docstring line under every field, types and defaults."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from saekit.config.annotations import is_enum, unwrapped
from saekit.config.fields import PLUGIN_KIND
from saekit.config.values import enum_value, plain

__all__ = ["FieldInfo", "describe_fields", "field_docs"]


@attrs.frozen
class FieldInfo:
    """One option: its name, type in words, default (``...`` when it is required) and explanation."""

    name: str
    type: str
    default: object
    doc: str


def field_docs(cls: type) -> dict[str, str]:
    """Field name to the string literal that follows it in the class body, base classes included."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not attrs.has(owner):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, SyntaxError, TypeError):  # a class made in a prompt has no source
            continue
        docs |= _attribute_docs(body)
    return docs


def _attribute_docs(body: ast.stmt) -> dict[str, str]:
    statements = body.body if isinstance(body, ast.ClassDef) else []
    found = {}
    for field, doc in itertools.pairwise(statements):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            text = doc.value.value if isinstance(doc.value, ast.Constant) else None
            if isinstance(text, str):
                found[field.target.id] = inspect.cleandoc(text)
    return found


def describe_fields(cls: type) -> list[FieldInfo]:
    """Every option of a configuration class, in order."""
    attrs.resolve_types(cls)
    docs = field_docs(cls)
    return [
        FieldInfo(field.name, _type_text(field), _default(field), docs.get(field.name, ""))
        for field in attrs.fields(cls)
        if field.init
    ]


def _default(field: attrs.Attribute[Any]) -> object:
    if field.default is attrs.NOTHING:
        return ...
    # attrs declares Factory as a function to type checkers, so isinstance cannot be used on it
    default: Any = field.default
    if type(default).__name__ == "Factory":
        return ... if default.takes_self else plain(default.factory())
    return plain(default)


def _type_text(field: attrs.Attribute[Any]) -> str:
    kind = field.metadata.get(PLUGIN_KIND)
    if kind:
        return f"list of {kind}" if isinstance(field.default, tuple) else kind
    return _words(field.type)


def _words(kind: Any) -> str:
    kind = unwrapped(kind)
    if get_origin(kind) is Literal or is_enum(kind):
        options = map(enum_value, kind) if is_enum(kind) else get_args(kind)
        return " or ".join(repr(option).replace("'", '"') for option in options)
    if kind is Path:
        return "path"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(member) for member in get_args(kind))
    if kind is type(None):
        return "none"
    if get_origin(kind) is not None:
        arguments = ", ".join(_words(argument) for argument in get_args(kind) if argument is not ...)
        return f"{get_origin(kind).__name__}[{arguments}]"
    return str(getattr(kind, "__name__", kind))
