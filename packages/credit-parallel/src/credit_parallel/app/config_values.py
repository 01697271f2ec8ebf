"""What a value of a configuration may be: type and bounds, and as title the words of messages and editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, Field, Strict

LONGEST = 1e8
"""The longest timeout, in seconds: three years. A timer of torch takes more for no time at all."""


def mapping(value: Any) -> Any:
    """Nothing is an empty block, and any mapping a dict."""
    return {} if value is None else dict(value) if isinstance(value, Mapping) else value


def _listed(value: Any) -> Any:
    """Nothing is an empty list, and a value alone a list of one."""
    return [] if value is None else value if isinstance(value, (list, tuple)) else [value]


def _ends(value: Any) -> Any:
    """A list as the tuple that is checked; YAML reads 2019-03-24 as a date."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(end.isoformat() if hasattr(end, "isoformat") else end for end in value)


# Strict: pydantic would take "1" and 1.0 for a whole number, and "yes" for true.
Word = Annotated[str, Strict()]
Text = Annotated[str, Strict(), MinLen(1), Field(title="text")]
Flag = Annotated[bool, Strict(), Field(title="true or false")]
Whole = Annotated[int, Strict(), Ge(0), Field(title="a whole number, 0 or more")]
Count = Annotated[int, Strict(), Ge(1), Field(title="a whole number, 1 or more")]
CountOrNone = Annotated[int | None, Strict(), Ge(1), Field(title="a whole number, 1 or more")]
Number = Annotated[float, Strict(), Ge(0), Field(title="a number, 0 or more", allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Gt(0), Field(title="a number above 0", allow_inf_nan=False)]
PositiveOrNone = Annotated[
    Annotated[float, Field(allow_inf_nan=False)] | None, Strict(), Gt(0), Field(title="a positive number, or null")
]
Seconds = Annotated[
    float, Strict(), Gt(0), Le(LONGEST), Field(title=f"a number of seconds above 0, {LONGEST:.0e} at most")
]
_Beta = Annotated[float, Strict(), Ge(0), Lt(1)]
Betas = Annotated[tuple[_Beta, _Beta], BeforeValidator(_listed), Field(title="two numbers from 0 to below 1")]
Names = Annotated[
    tuple[Word, ...],
    BeforeValidator(_listed, json_schema_input_type=list[Word] | Word | None),
    Field(title="a list of names"),
]
_Level = Annotated[float, Strict()]
Levels = Annotated[
    tuple[_Level, ...],
    BeforeValidator(_listed, json_schema_input_type=list[_Level] | _Level | None),
    Field(title="a list of numbers"),
]
Options = Annotated[
    Mapping[Word, Any],
    BeforeValidator(mapping, json_schema_input_type=dict[Word, Any] | None),
    Field(title="a block of keys and values"),
]
Lead = Annotated[
    Annotated[int, Strict(), Ge(1)] | Word, Field(title="a number of steps of the file, 1 or more, or text such as 6h")
]
_Fraction = Annotated[float | None, Strict(), Ge(0), Le(1)]
_Moment = Annotated[str | None, Strict()]
_Ends = Annotated[tuple[_Fraction, _Fraction], Strict()] | Annotated[tuple[_Moment, _Moment], Strict()]
_TIMES = Field(title="two times such as ['2019-03-01', '2019-03-24'], or two fractions of all times")
Times = Annotated[
    _Ends,
    BeforeValidator(lambda value: (None, None) if value is None else _ends(value), json_schema_input_type=_Ends | None),
    _TIMES,
]
TimesOrNone = Annotated[_Ends | None, BeforeValidator(_ends), _TIMES]
