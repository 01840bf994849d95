"""Pickles read without being run: their opcodes are followed, and what they would call is written down.

Nothing is imported and nothing of a stranger's is called.  A name stays a name (:class:`Name`), and an object of a
class becomes a :class:`Bag` of what it would have been made of.  A few names, which the caller gives, are made by
functions of ours.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import attrs

from saekit.errors import SAEFormatError

__all__ = ["Bag", "Name", "read_pickle"]

_MOST_OPCODES = 20_000_000


@attrs.frozen
class Name:
    """A function or class that a pickle names, as in ``collections.OrderedDict``."""

    full: str


@attrs.define(eq=False, slots=True)
class Bag:
    """What stands for an object of a class that is not made."""

    name: str
    args: tuple[Any, ...] = ()
    fields: dict[Any, Any] = attrs.field(factory=dict)
    """What it would have as attributes, and of a dictionary its entries."""
    items: list[Any] = attrs.field(factory=list)


Builder = Callable[..., Any]
_MARK = object()
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip


def read_pickle(
    file: BinaryIO, where: str, builders: Mapping[str, Builder], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """What the next pickle in ``file`` describes; afterwards ``file`` stands behind it.

    ``builders`` are called for the names that they are by, with what the pickle gives; ``persistent`` makes what stands
    for a persistent id.  :class:`SAEFormatError` for what is no pickle, or one that does what none of these files does.
    """
    machine = _Machine(builders, persistent)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number > _MOST_OPCODES:
                raise SAEFormatError(f"{where} has more than {_MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except SAEFormatError as error:
        raise SAEFormatError(f"{where}: {error}") from error
    except Exception as error:  # whatever comes of bytes that are no pickle
        raise SAEFormatError(f"{where} is no readable pickle: {type(error).__name__}: {str(error)[:200]}") from error
    raise SAEFormatError(f"{where} is cut off")


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self, builders: Mapping[str, Builder], persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._builders, self._persistent = builders, persistent

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif (method := getattr(self, f"_{name.lower()}", None)) is not None:
            method(argument)
        else:
            raise SAEFormatError(f"the opcode {name} is none that these files have")

    def _since_mark(self) -> list[Any]:
        place = max(index for index, value in enumerate(self.stack) if value is _MARK)
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    # ---- nothing, and the stack

    def _proto(self, argument: Any) -> None:
        pass

    _frame = _proto

    def _mark(self, argument: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, argument: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, argument: Any) -> None:
        self._since_mark()

    def _dup(self, argument: Any) -> None:
        self.stack.append(self.stack[-1])

    # ---- memory

    def _put(self, argument: Any) -> None:
        self._memory[argument] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, argument: Any) -> None:
        self._memory[len(self._memory)] = self.stack[-1]

    def _get(self, argument: Any) -> None:
        self.stack.append(self._memory[argument])

    _binget = _long_binget = _get

    # ---- what holds others

    def _tuple(self, argument: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, argument: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, argument: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, argument: Any) -> None:
        self._tuple_of(3)

    def _tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _list(self, argument: Any) -> None:
        self.stack.append(self._since_mark())

    _frozenset = _list

    def _append(self, argument: Any) -> None:
        value = self.stack.pop()
        self._add([value])

    def _appends(self, argument: Any) -> None:
        self._add(self._since_mark())

    _additems = _appends

    def _add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Bag) else _expect(target, list)).extend(values)

    def _dict(self, argument: Any) -> None:
        self.stack.append({})
        self._set(self._since_mark_below())

    def _since_mark_below(self) -> list[Any]:
        made = self.stack.pop()
        values = self._since_mark()
        self.stack.append(made)
        return values

    def _setitem(self, argument: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, argument: Any) -> None:
        self._set(self._since_mark())

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        table = target.fields if isinstance(target, Bag) else _expect(target, dict)
        table.update(zip(pairs[::2], pairs[1::2], strict=True))

    # ---- names, and what would be called

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(f"{module}.{name}"))

    def _stack_global(self, argument: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(f"{_expect(module, str)}.{_expect(name, str)}"))

    def _reduce(self, argument: Any) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        self._call(called, _expect(args, tuple))

    _newobj = _reduce

    def _newobj_ex(self, argument: Any) -> None:
        self.stack.pop()
        self._reduce(argument)

    def _inst(self, argument: Any) -> None:
        args = tuple(self._since_mark())
        self._global(argument)
        self._call(self.stack.pop(), args)

    def _obj(self, argument: Any) -> None:
        called, *args = self._since_mark()
        self._call(called, tuple(args))

    def _call(self, called: Any, args: tuple[Any, ...]) -> None:
        """By a builder of ours, if there is one; else what would be called is kept as a name."""
        name = called.full if isinstance(called, Name) else "something that was made"
        if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and args and isinstance(args[0], Name):
            self.stack.append(Bag(args[0].full))
        elif name in self._builders:
            self.stack.append(self._builders[name](*args))
        else:
            self.stack.append(Bag(name, args))

    def _build(self, argument: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Bag):
            return  # attributes of a dictionary or a tensor are of no use here
        for table in state if isinstance(state, tuple) else (state,):
            if isinstance(table, dict):
                target.fields.update(table)

    def _persid(self, argument: Any) -> None:
        if self._persistent is None:
            raise SAEFormatError("it refers to something outside of it")
        self.stack.append(self._persistent(argument))

    def _binpersid(self, argument: Any) -> None:
        self._persid(self.stack.pop())


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise SAEFormatError(f"there is {type(value).__name__} where {kind.__name__} should be")
    return value
