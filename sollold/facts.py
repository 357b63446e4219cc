"""`dataclass` whose classes share their generated methods: half the memory, the same behaviour.

With Python 3.11 a frozen class with slots takes 16 KB and keeps alive the class without slots that it was
made from; a daemon has some 270 of them.

mypy checks that no fact is modified, and so do the tests, which set `GUARD`: in a daemon the run-time check
would make setting each field ten times as expensive, a twelfth of the time of a short request.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, NoReturn

GUARD = "GUARD_SOLLOLD_FACTS"
"""Environment variable that makes frozen facts refuse changes at run time."""
_GUARDED = bool(os.environ.get(GUARD))

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool = False, slots: bool = False) -> Callable[[type], type]:
        """Replace `dataclasses.dataclass` with these parameters."""
        return lambda cls: _make(cls, frozen, slots)


def _make(cls: type, frozen: bool, slots: bool) -> Any:
    defined = {name for name, value in vars(cls).items() if value is not None}
    guarded = frozen and _GUARDED
    result: Any = dataclasses.dataclass(frozen=guarded, slots=slots, repr=False, eq=False)(cls)
    for name, shared in _SHARED.items():
        if name not in defined and (guarded or shared is not _refuse):
            # The versions that `dataclasses` generates to refuse changes hold a reference to `cls`.
            setattr(result, name, shared)
    if not frozen and "__hash__" not in defined:
        result.__hash__ = None
    return result


def _refuse(_self: Any, name: str, _value: Any = None) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot change field {name!r}")


@recursive_repr()
def _repr(self: Any) -> str:
    values = (
        f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr
    )
    return f"{type(self).__qualname__}({', '.join(values)})"


def _equal(self: Any, other: object) -> Any:
    """Generate the real comparison at the first use: most classes are never compared."""
    _compare(type(self))
    return self.__eq__(other)


def _hashed(self: Any) -> int:
    _compare(type(self))
    return hash(self)


def _compare(cls: Any) -> None:
    """Give a class the comparison that `dataclasses` generates for its fields, which is the fastest."""
    fields = [
        (field.name, Any, dataclasses.field(compare=field.compare, hash=field.hash))
        for field in dataclasses.fields(cls)
    ]
    written: Any = dataclasses.make_dataclass(cls.__name__, fields, frozen=True, repr=False)
    if cls.__eq__ is _equal:
        cls.__eq__ = written.__eq__
    if cls.__hash__ is _hashed:
        cls.__hash__ = written.__hash__


_SHARED: dict[str, Callable[..., Any]] = {
    "__setattr__": _refuse,
    "__delattr__": _refuse,
    "__repr__": _repr,
    "__eq__": _equal,
    "__hash__": _hashed,
}
