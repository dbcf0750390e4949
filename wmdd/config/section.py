"""What every section of the config has: strict fields, each of which says what it decides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from wmdd.errors import InputError, reason

SCOPES = ("data", "teacher", "statistics", "images", "labels", "students")
"""What keys decide, in the order of the work: a key decides its own scope and all that follow."""


@dataclass(frozen=True)
class Decides:
    """What depends on a key of the config: written at the field, or at its section for all fields without their own."""

    what: Literal["data", "teacher", "statistics", "images", "labels", "students", "selection", "arithmetic", "nothing"]
    """One of ``SCOPES``; or ``selection``: which students are trained, and how good none of them is; ``arithmetic``:
    how results are rounded (``wmdd.arithmetic``); ``nothing``: places, names, speed"""


class Strict(BaseModel):
    """A frozen table of a file that users write: it refuses unknown keys, and each field has its meaning under it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Section(Strict):
    """A part of the config; each field says what it decides."""

    _decides: ClassVar[dict[str, Decides | None]] = {}

    def replace(self, changes: Mapping[str, Any], source: str = "config") -> Self:
        """Return a copy with other values for some keys; the whole copy is validated.

        Args:
            changes: new value of each key, by its dotted name below this section, such as ``student.epochs``.
            source: where the values come from, named in an error.

        Raises:
            InputError: the config forbids a value; the message names the key.
        """
        values: dict[str, Any] = self.model_dump()
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = values
            for section in sections:
                place = place[section]
            place[last] = value
        try:
            return self.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or ", ".join(changes)
            raise InputError(f"{source}: {where} = {first['input']!r}: {reason(first)}") from None

    def __init_subclass__(cls, decides: Decides | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)

    @classmethod
    def __pydantic_init_subclass__(cls, decides: Decides | None = None, **options: Any) -> None:
        """Refuse a field that does not say what it decides.

        Raises:
            TypeError: such a field; the message names it.
        """
        super().__pydantic_init_subclass__(**options)
        cls._decides = {}
        for name, field in cls.model_fields.items():
            own = next((mark for mark in field.metadata if isinstance(mark, Decides)), decides)
            if own is None and not isinstance(field.default, Section):
                raise TypeError(f"{cls.__name__}.{name} does not say what it decides: Annotated[..., Decides(...)]")
            cls._decides[name] = own
