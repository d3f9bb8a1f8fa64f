"""Reads what fields are declared with: their range in words, and what is wrong with a value.

A value is looked at twice: when a config is read, where it is also converted (3 to 3.0 for a float), and in
`Config.check`, for configs that a program made.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen

from megascale_moe.config.declare import Doc, Special, TextForm
from megascale_moe.config.errors import ConfigError

Choices = Mapping[str, Sequence[str]]
"""By "section.key", the values it may have, where the caller knows them better than the field's own type."""

AS_DECLARED: Choices = MappingProxyType({})
LIST = "list of int"
SHOWN = 100
"""Characters of a value in a refusal."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A key of the configuration.

    Attributes:
        kind: "int", "float", "bool", "str" or "list of int". choices: the texts it may be, if they are few.
        rules: ranges, lengths and forms, of the elements if it is a list.
        meaning: one sentence. also: names that it has elsewhere.
    """

    section: str
    key: str
    kind: str
    default: Any
    choices: tuple[str, ...]
    rules: tuple[Any, ...]
    special: Special | None
    meaning: str
    also: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name that overrides have for it: section.key."""
        return f"{self.section}.{self.key}"

    @cached_property
    def range(self) -> str:
        """Say in words what the field may be."""
        if self.choices:
            words = _listed(list(map(repr, self.choices)))
        elif self.kind == "bool":
            words = "true or false"
        elif self.kind == "str":
            words = self._form.words if self._form else "text" if self._may_be_empty else "text, not empty"
        else:
            words = ("each " if self.kind == LIST else "") + _range_words(self.rules)
        return f"{words}; {self.exception}" if self.special else words

    @cached_property
    def exception(self) -> str:
        """Say which value has a meaning of its own, and which; "" if none has."""
        return f"{_written(self.special.value)}: {self.special.means}" if self.special else ""

    def called(self, name: str) -> bool:
        """Return whether it has this name here or elsewhere, up to capitals, hyphens and blanks."""
        return plain(name) in map(plain, (self.key, self.name, *self.also))

    def problem(self, value: object) -> str:
        """Return what would be right, or "" if the value is."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(map(repr, self.choices))}"
        if self.kind == LIST:
            return self._problem_of_list(value)
        if type(value) not in _TYPES[self.kind]:
            return f"must be of type {self.kind}"
        if self.kind == "str":
            return self._problem_of_text(str(value))
        return self._problem_of_number(value) if self.kind != "bool" else ""

    def read(self, value: object, where: str = "") -> object:
        """Return a value that was read as the field holds it.

        Args:
            where: comes before the name of the field in a refusal.

        Raises:
            ConfigError: there is a problem with it.
        """
        held = self._converted(value)
        problem = self.problem(held)
        if problem:
            raise ConfigError(f"{where}{self.name} = {shown(value)}: {problem}")
        return held

    def _converted(self, value: object) -> object:
        """Make numbers those of the field's kind, tuples of lists, and the text of a number where a text is wanted."""
        if self.kind == "float" and type(value) is int and not self.problem(value):
            return float(value)
        if self.kind == "str" and not self.choices and type(value) is int and value.bit_length() < 64:
            return str(value)
        return tuple(value) if self.kind == LIST and isinstance(value, list) else value

    @cached_property
    def _form(self) -> TextForm | None:
        return next((rule for rule in self.rules if isinstance(rule, TextForm)), None)

    @cached_property
    def _may_be_empty(self) -> bool:
        return not any(isinstance(rule, MinLen) for rule in self.rules)

    def _problem_of_list(self, value: object) -> str:
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            return "must be a list of integers, such as [4, 4, 3]"
        problem = next(filter(None, map(self._problem_of_number, value)), "")
        return problem.replace("must", "each must", 1)

    def _problem_of_number(self, value: Any) -> str:
        hint = f" ({self.exception})" if self.special else ""
        if type(value) is float:
            if not math.isfinite(value):
                return f"must be a finite number{hint}"
            if value == 0 and math.copysign(1, value) < 0:
                return "must not be negative zero; write 0.0"
        broken = next((rule for rule in self.rules if not _holds(rule, value)), None)
        return f"must {_asked(broken, self.rules)}{hint}" if broken else ""

    def _problem_of_text(self, value: str) -> str:
        if "\0" in value:
            return "must not contain a NUL character"
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of a command line that are none
            return "must be text in UTF-8"
        for rule in self.rules:
            if isinstance(rule, MinLen) and len(value) < rule.min_length:
                return "must not be empty"
            if isinstance(rule, MaxLen) and len(value) > rule.max_length:
                return f"must have at most {rule.max_length:,} characters"
            if isinstance(rule, TextForm) and not rule.fits(value):
                return f"must be {rule.words}"
        return ""


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}


def fields_of(section: str, kind: type) -> Mapping[str, Field]:
    """Return the fields of a section's dataclass by key, in the order of their declaration."""
    return _fields_of(section, kind)  # type: ignore[arg-type]  # mypy does not take types for hashable


@cache
def _fields_of(section: str, kind: type) -> Mapping[str, Field]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {each.name: _field(section, each.name, hints[each.name], each.default) for each in dataclasses.fields(kind)}


def checked(section: str, values: Any, choices: Choices = AS_DECLARED) -> None:
    """Raise `ConfigError` if a value of a section's dataclass is not what its field takes."""
    for key, field in fields_of(section, type(values)).items():
        value = getattr(values, key)
        problem = chosen(field, choices).problem(value)
        if problem:
            raise ConfigError(f"{field.name} = {shown(value)}: {problem}")


def plain(name: str) -> str:
    """Return a name without what libraries, papers and people write differently."""
    return name.lower().replace("-", "_").replace(" ", "_").strip("_")


def chosen(field: Field, choices: Choices) -> Field:
    """Return the field with the choices that a caller handed in for it."""
    return dataclasses.replace(field, choices=tuple(choices[field.name])) if field.name in choices else field


def _field(section: str, key: str, hint: Any, default: Any) -> Field:
    kind, metadata = _split(hint)
    choices: tuple[str, ...] = ()
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    name = LIST if typing.get_origin(kind) is tuple else kind.__name__
    rules = metadata if name != LIST else _split(typing.get_args(kind)[0])[1]
    (doc,) = (item for item in metadata if isinstance(item, Doc))
    special = next((item for item in metadata if isinstance(item, Special)), None)
    return Field(
        section=section, key=key, kind=name, default=default, choices=choices, special=special,
        rules=tuple(rule for rule in rules if not isinstance(rule, Doc | Special)), meaning=doc.meaning, also=doc.also,
    )  # fmt: skip


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type and what it is annotated with."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    return hint.__origin__, tuple(_single(hint.__metadata__))


def _single(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, GroupedMetadata):
            yield from item
        else:
            yield item


def _holds(rule: Any, value: Any) -> bool:
    if isinstance(rule, Ge):
        return bool(value >= rule.ge)
    if isinstance(rule, Gt):
        return bool(value > rule.gt)
    if isinstance(rule, Le):
        return bool(value <= rule.le)
    assert isinstance(rule, Lt)
    return bool(value < rule.lt)


def _asked(broken: Any, rules: Sequence[Any]) -> str:
    """Return what is wanted where a bound is broken, to stand behind "must": both bounds if it is the upper one."""
    if isinstance(broken, Ge):
        return "not be negative" if broken.ge == 0 else f"be at least {_written(broken.ge)}"
    return f"be above {_written(broken.gt)}" if isinstance(broken, Gt) else f"be {_range_words(rules)}"


def _range_words(rules: Sequence[Any]) -> str:
    """Return bounds in words; a number always has both (a test sees to it)."""
    low, high = rules
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"{_written(low.ge)} to {_written(high.le)}"
    least = f"at least {_written(low.ge)}" if isinstance(low, Ge) else f"above {_written(low.gt)}"
    return f"{least} and " + (f"at most {_written(high.le)}" if isinstance(high, Le) else f"below {_written(high.lt)}")


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _written(value: Any) -> str:
    """Return a bound or a special value as a person reads it."""
    if type(value) is int:
        return f"{value:,}"
    if type(value) is float:
        return f"{value:g}"
    return repr(list(value) if isinstance(value, tuple) else value)


def shown(value: object) -> str:
    """Return a value as a refusal shows it: not all of it if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of 4,300 digits
        return "(too long to be shown)"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
