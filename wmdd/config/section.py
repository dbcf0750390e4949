"""Base classes of the config's sections: strict fields that declare which results they decide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from wmdd.errors import InputError, reason

SCOPES = ("data", "teacher", "statistics", "images", "labels", "students")
"""Steps of the work, in order.  A key decides the results of its own scope and of all later scopes."""


@dataclass(frozen=True)
class Decides:
    """Declares which results depend on a config key, for one field or as the default of a section."""

    what: Literal["data", "teacher", "statistics", "images", "labels", "students", "selection", "arithmetic", "nothing"]
    """One of ``SCOPES``, or ``selection`` (which students are trained, but not their accuracy), ``arithmetic`` (how
    results are rounded, see ``wmdd.runtime.arithmetic``) or ``nothing`` (folders, names, speed)"""


class Strict(BaseModel):
    """A frozen section of a TOML file.  It refuses unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Section(Strict):
    """A section of the config.  Each field declares which results it decides."""

    _decides: ClassVar[dict[str, Decides | None]] = {}

    def replace(self, changes: Mapping[str, Any], source: str = "config") -> Self:
        """Return a validated copy with new values for some keys.

        Args:
            changes: new value of each key, by its dotted name within this section, such as ``student.epochs``.
            source: origin of the values, for error messages.

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
        """Refuse a field that does not declare which results it decides.

        Raises:
            TypeError: a field has no ``Decides``; the message names the field.
        """
        super().__pydantic_init_subclass__(**options)
        cls._decides = {}
        for name, field in cls.model_fields.items():
            own = next((mark for mark in field.metadata if isinstance(mark, Decides)), decides)
            if own is None and not isinstance(field.default, Section):
                raise TypeError(
                    f"{cls.__name__}.{name} does not declare which results it decides: Annotated[..., Decides(...)]"
                )
            cls._decides[name] = own
