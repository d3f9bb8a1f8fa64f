"""The keys of the configuration as they are declared: range in words, problems of a value, JSON schema.

A value is looked at twice: when a config is read, where it is also converted (3 to 3.0 for a float), and in
`Section.check`, for configs that a program made.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len

from megascale_moe.config.declare import TextForm

Choices = Mapping[str, Sequence[str]]
"""By "section.key", the values it may have, where the caller knows them better than the field's own type."""

AS_DECLARED: Choices = MappingProxyType({})
LIST = "list of int"
SHOWN = 100
"""Characters of a value in a refusal."""
TYPES: dict[str, tuple[tuple[type, ...], Any]] = {
    "int": ((int,), "integer"),
    "float": ((float, int), "number"),
    "bool": ((bool,), "boolean"),
    "str": ((str,), ["string", "integer"]),
}
"""Types in Python and in a JSON schema. A whole number is taken for a text that looks like one: split = 4."""
BOUNDS = (
    ("ge", operator.ge, "at least", "minimum"),
    ("gt", operator.gt, "above", "exclusiveMinimum"),
    ("le", operator.le, "at most", "maximum"),
    ("lt", operator.lt, "below", "exclusiveMaximum"),
)
"""The attributes of an `Interval`, when a bound holds, and what it is called in refusals and in a JSON schema."""


class ConfigError(ValueError):
    """The user's input is wrong: one line naming what, where and what would be right (exit status 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a key or a path may have a line break in it


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A key of the configuration.

    Attributes:
        kind: "int", "float", "bool", "str" or "list of int". choices: the texts it may be, if they are few.
        rule: an `Interval` of numbers (of the elements if it is a list), the `Len` or the `TextForm` of a text.
        meaning, also, least: see `key`.
    """

    section: str
    key: str
    kind: str
    default: Any
    choices: tuple[str, ...]
    rule: Any
    meaning: str
    also: tuple[str, ...]
    least: str

    @classmethod
    def of(cls, section: str, declared: dataclasses.Field[Any], hint: Any) -> Field:
        """Return the field of a section that a dataclass declares, `hint` being its type."""
        kind, rule = _split(hint)
        name, choices = getattr(kind, "__name__", ""), ()
        if typing.get_origin(kind) is Literal:
            name, choices = "str", typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            name, (_, rule) = LIST, _split(typing.get_args(kind)[0])
        return cls(
            section=section, key=declared.name, kind=name, default=declared.default, choices=choices, rule=rule,
            **declared.metadata,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Return the name that overrides have for it: section.key."""
        return f"{self.section}.{self.key}"

    @cached_property
    def bounds(self) -> list[tuple[Any, Any, str, str]]:
        """Return the lower and the upper bound of a number, each with the rest of its line in `BOUNDS`."""
        bounds = ((getattr(self.rule, attribute, None), *words) for attribute, *words in BOUNDS)
        return [bound for bound in bounds if bound[0] is not None]  # type: ignore[misc]

    @cached_property
    def range(self) -> str:
        """Say in words what the field may be."""
        if self.choices:
            words = " or ".join(filter(None, (", ".join(map(repr, self.choices[:-1])), repr(self.choices[-1]))))
        elif self.kind == "bool":
            words = "true or false"
        elif self.kind == "str":
            words = self.rule.words if isinstance(self.rule, TextForm) else "text"
            words += ", not empty" if isinstance(self.rule, Len) and self.rule.min_length else ""
        else:
            words = ("each " if self.kind == LIST else "") + self._interval
        return "; ".join(filter(None, (words, self.exception)))

    @property
    def least_value(self) -> Any:
        """Return the least value of its range, or the empty one."""
        lowest = (self.rule.ge,) if self.kind in ("int", "float") else ()
        return type(self.default)(*lowest)

    @cached_property
    def exception(self) -> str:
        """Say what the least value stands for if that has a meaning of its own; else ""."""
        return f"{_written(self.least_value)}: {self.least}" if self.least else ""

    @cached_property
    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the field."""
        default = list(self.default) if self.kind == LIST else self.default
        description = self.meaning + self._hint
        about = {"description": description, "default": default}
        if self.choices:
            return {"enum": list(self.choices), **about}
        rules = {keyword: bound for bound, _, _, keyword in self.bounds}
        if isinstance(self.rule, TextForm):
            rules = {"pattern": f"^({self.rule.pattern})$"}
        elif isinstance(self.rule, Len):
            rules = {"minLength": self.rule.min_length} if self.rule.min_length else {}
            rules["maxLength"] = self.rule.max_length
        if self.kind == LIST:
            return {"type": "array", "items": {"type": "integer", **rules}, **about}
        return {"type": TYPES[self.kind][1], **rules, **about}

    @property
    def _hint(self) -> str:
        return f" ({self.exception})" if self.least else ""

    def called(self, name: str) -> bool:
        """Return whether it has this name here or elsewhere, up to capitals, hyphens and blanks."""
        return plain(name) in map(plain, (self.key, self.name, *self.also))

    def problem(self, value: object) -> str:
        """Return what would be right, or "" if the value is."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(map(repr, self.choices))}"
        if self.kind == LIST:
            if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
                return "must be a list of integers, such as [4, 4, 3]"
            return next(filter(None, map(self._problem_of_number, value)), "").replace("must", "each must", 1)
        if type(value) not in TYPES[self.kind][0]:
            return f"must be of type {self.kind}"
        if self.kind == "str":
            return self._problem_of_text(str(value))
        return self._problem_of_number(value) if self.kind != "bool" else ""

    def read(self, value: object, where: str = "") -> object:
        """Return a value that was read as the field holds it.

        Numbers become those of the field's kind, lists tuples, and a number a text where a text is wanted.

        Args:
            where: comes before the name of the field in a refusal.

        Raises:
            ConfigError: there is a problem with it.
        """
        held = value
        if self.kind == "float" and type(value) is int and not self.problem(value):
            held = float(value)
        elif self.kind == "str" and not self.choices and type(value) is int and value.bit_length() < 64:
            held = str(value)
        elif self.kind == LIST and isinstance(value, list):
            held = tuple(value)
        problem = self.problem(held)
        require(not problem, f"{where}{self.name} = {shown(value)}: {problem}")
        return held

    @property
    def _interval(self) -> str:
        """Return the bounds of a number in words; it always has both (a test sees to it)."""
        (low, _, least, _), (high, _, most, _) = self.bounds
        if (least, most) == ("at least", "at most"):
            return f"{_written(low)} to {_written(high)}"
        return f"{least} {_written(low)} and {most} {_written(high)}"

    def _problem_of_number(self, value: Any) -> str:
        (low, above, least, _), (high, below, _, _) = self.bounds
        if type(value) is float and not math.isfinite(value):
            return f"must be a finite number{self._hint}"
        if type(value) is float and value == 0 and math.copysign(1, value) < 0:
            return "must not be negative zero; write 0.0"
        if not above(value, low):
            negative = least == "at least" and low == 0
            return f"must {'not be negative' if negative else f'be {least} {_written(low)}'}{self._hint}"
        return "" if below(value, high) else f"must be {self._interval}{self._hint}"

    def _problem_of_text(self, value: str) -> str:
        if "\0" in value:
            return "must not contain a NUL character"
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of a command line that are none
            return "must be text in UTF-8"
        if isinstance(self.rule, TextForm):
            return "" if re.fullmatch(self.rule.pattern, value) else f"must be {self.rule.words}"
        if len(value) < self.rule.min_length:
            return "must not be empty"
        too_long = len(value) > self.rule.max_length
        return f"must have at most {self.rule.max_length:,} characters" if too_long else ""


class Section:
    """A section of the configuration: a dataclass whose fields are declared by `key`."""

    section: ClassVar[str]

    @classmethod
    def fields(cls, choices: Choices = AS_DECLARED) -> dict[str, Field]:
        """Return the fields by key, in the order of their declaration, with the choices that a caller knows better."""
        return {
            key: dataclasses.replace(field, choices=tuple(choices[field.name])) if field.name in choices else field
            for key, field in _declared(cls).items()  # type: ignore[arg-type]  # mypy does not take types for hashable
        }

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` if a value is not what its field takes, or if values contradict each other."""
        for key, field in self.fields(choices).items():
            value = getattr(self, key)
            problem = field.problem(value)
            require(not problem, f"{field.name} = {shown(value)}: {problem}")


@cache
def _declared(section: Any) -> dict[str, Field]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {each.name: Field.of(section.section, each, hints[each.name]) for each in dataclasses.fields(section)}


def plain(name: str) -> str:
    """Return a name without what libraries, papers and people write differently."""
    return name.lower().replace("-", "_").replace(" ", "_").strip("_")


def _split(hint: Any) -> tuple[Any, Any]:
    """Return a type and the rule that it is annotated with, None if there is none."""
    return typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint, None)  # type: ignore[return-value]


def _written(value: Any) -> str:
    """Return a bound or a special value as a person reads it."""
    if type(value) in (int, float):
        return format(value, "," if type(value) is int else "g")
    return repr(list(value) if isinstance(value, tuple) else value)


def shown(value: object) -> str:
    """Return a value as a refusal shows it: not all of it if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of 4,300 digits
        return "(too long to be shown)"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
