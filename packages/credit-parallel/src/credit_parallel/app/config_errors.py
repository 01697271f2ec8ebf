"""What is wrong with a configuration, each mistake in one line with its key, what was expected and what came."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

FORMER = {"accumulate": "grad_accum_steps", "clip": "max_grad_norm"}
"""Keys of the ``trainer`` block in former versions, which are still read, and what they are called now."""

Class = TypeVar("Class", bound=type)


class ConfigError(ValueError):
    """A configuration that will not do.

    Attributes:
        mistakes: All that is wrong with it, each in one line.
    """

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


@contextmanager
def one_line_each(block: type, path: str, given: Any) -> Iterator[None]:
    """Turn the errors of pydantic into a :class:`ConfigError`.

    The titles in the JSON schema of ``block``, the class that is checked, say what is expected; ``path`` is its key
    within the whole configuration.
    """
    try:
        yield
    except ValidationError as error:
        schema, errors = TypeAdapter(block).json_schema(), error.errors(include_url=False)
        unknown = {
            each["loc"][:-1] for each in errors if each["type"] in ("unexpected_keyword_argument", "invalid_key")
        }
        # A key that is missing beside one that is unknown is the same mistake.
        errors = [each for each in errors if each["type"] != "missing" or each["loc"][:-1] not in unknown]
        lines = [_line(schema, path, given, each) for each in errors]
        raise ConfigError(dict.fromkeys(lines)) from None  # a value that is none of several types has several errors


def in_our_words(path: str) -> Callable[[Class], Class]:
    """Make a class say of its arguments what is said of its block in a file, whose key is ``path``."""

    def decorate(cls: Class) -> Class:
        block: Any = cls
        checked, signature = block.__init__, inspect.signature(block)

        @functools.wraps(checked)
        def init(self: Any, /, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(*args, **kwargs).arguments
            with one_line_each(block, path, given):
                checked(self, **given)

        block.__init__ = init
        return cls

    return decorate


_BLOCK = "a block of keys and values"


def _line(schema: Mapping[str, Any], path: str, value: Any, error: Mapping[str, Any]) -> str:
    keys, title = _keys(schema, schema), _BLOCK
    for key in error["loc"]:
        if not keys:  # what follows is within a value
            break
        value = value.get(key) if isinstance(value, Mapping) else None
        if key not in keys:
            return _unknown(schema, keys, path, key, value)
        entry = keys[key]
        path, keys = _joined(path, key), _keys(schema, entry)
        title = entry.get("title", _BLOCK if keys else title)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    came = f"got {value!r}{_as_number(value, title)}" if error["type"] != "missing" or not keys else "it is missing"
    return f"{path or 'the configuration'} must be {title}; {came}"


def _keys(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a block; none of a value."""
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            node = schema["$defs"][option["$ref"].rpartition("/")[2]]
    keys: Mapping[str, Any] = node.get("properties", {})
    return keys


def _unknown(schema: Mapping[str, Any], keys: Mapping[str, Any], path: str, key: Any, value: Any) -> str:
    at = _joined(path, key)
    former = {old: new for old, new in FORMER.items() if new in keys}
    if key in former:
        return f"{at} is the former name of {_joined(path, former[key])}; give one of them, not both"
    near = difflib.get_close_matches(str(key), [*keys, *former], 1)
    meant = [former.get(name, name) for name in near]
    meant += [found for found in _paths(schema, schema, "") if found.endswith(f".{key}")]  # of another block
    hint = f"did you mean {meant[0]}?" if meant else f"the keys are {', '.join(keys)}"
    return f"unknown key {at}: {value!r}; {hint}"


def _paths(schema: Mapping[str, Any], node: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, inner in _keys(schema, node).items():
        yield _joined(path, key)
        yield from _paths(schema, inner, _joined(path, key))


def _joined(path: str, key: Any) -> str:
    text = str(key) if str(key).isprintable() else repr(key)
    return f"{path}.{text}" if path else text


def _as_number(value: Any, title: str) -> str:
    """YAML 1.1 takes 1e-3 for text."""
    if not isinstance(value, str) or "number" not in title:
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    written = yaml.safe_dump(int(number) if number.is_integer() and abs(number) < 1e15 else number).split()[0]
    return f" (YAML reads {value} as text; write {written})"
