"""Making a model from its name and options, as a configuration or a command line gives them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml
from torch import nn

from credit_parallel.app.config import ModelConfig

logger = logging.getLogger(__name__)

EXAMPLES = {
    "unet": "credit_parallel.app.examples.unet:UNet",
    "transformer": "credit_parallel.app.examples.transformer:Transformer",
}
"""Models that have a short name."""

_SIZES = ("in_channels", "out_channels", "height", "width", "periodic")


def build_model(
    config: ModelConfig,
    *,
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    periodic: bool,
    make: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Make the model of a configuration.

    Its factory gets those of the sizes below that it has parameters for; ``height`` and ``width`` only where it has
    both, since a ``width`` alone is a number of channels to many models. The options come on top.

    Args:
        config: Its name and options.
        height: Rows of the whole grid.
        width: Columns of the grid.
        periodic: Whether the column after the last one is the first one; an option of this name overrules it.
        make: What makes the model; None for what :func:`factory` finds under the name, which must be the user's word
            then: a name that only a checkpoint has goes through ``credit_parallel.app.trust.restricted``.

    Raises:
        ValueError: As :func:`factory`; if the factory does not take an option, needs one that is missing, raises, or
            returns no module.
    """
    make = factory(config.name) if make is None else make
    known = _parameters(make)
    sizes = dict(zip(_SIZES, (in_channels, out_channels, height, width, periodic), strict=True))
    if not {"height", "width"} <= set(known):
        del sizes["height"], sizes["width"]
    given = {name: value for name, value in sizes.items() if name in known}
    _check_options(config, known, given)
    try:
        model = make(**{**given, **config.options})
    except Exception as error:
        raise ValueError(f"model {config.name} could not be made: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {config.name} must be a torch.nn.Module; {config.name} returned {model!r}")
    return model


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options as a command line gives them: ``width=64``, ``heads=[4, 8]``; what follows ``=`` is YAML.

    Raises:
        ValueError: If one has no name or no ``=``, is no YAML, or comes twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or name in options:
            raise ValueError(f"an option must be given once, as name=value; got {text!r}")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"option {name}: {value!r} is no YAML: {' '.join(str(error).split())}") from None
    return options


def is_shipped(name: str) -> bool:
    """Whether a name is that of a model of this package."""
    return name in EXAMPLES or _present(name) in EXAMPLES.values()


def _present(name: str) -> str:
    """The name today: the examples were in `credit_parallel` itself before they moved to its `app`."""
    return re.sub(r"^credit_parallel\.(?=examples\.)", "credit_parallel.app.", name)


def factory(name: str) -> Callable[..., nn.Module]:
    """The class or function that makes the models of a name that the user gives.

    Args:
        name: ``unet``, ``transformer``, or ``package.module:attribute``. Modules of the working directory are found
            too, after installed ones.

    Raises:
        ValueError: If there is no such module or attribute, the module cannot be imported, or the attribute is neither
            a subclass of ``torch.nn.Module`` nor a function. Nothing was called then.
    """
    found = _found(name, here=not is_shipped(name))
    if isinstance(found, type) and not issubclass(found, nn.Module):
        raise ValueError(f"model {name} must be a subclass of torch.nn.Module; got the class {found.__qualname__}")
    if not callable(found) or isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ValueError(f"model {name} must be a class, or a function that makes a model; got an object of {kind}")
    make: Callable[..., nn.Module] = found
    return make


def module_class(name: str) -> type[nn.Module]:
    """The class of the models of a name, and never a function; the working directory is not searched.

    Raises:
        ValueError: As :func:`factory`, and for anything but a subclass of ``torch.nn.Module``. Nothing was called then.
    """
    found = _found(name, here=False)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"model {name}, which a checkpoint names, must be a subclass of torch.nn.Module; got an object of "
            f"{type(found).__name__}: what makes models in another way you must name yourself, as --model {name}"
        )
    return found


def _found(name: str, *, here: bool) -> Any:
    given = EXAMPLES.get(name, name)
    if _present(given) != given:
        logger.warning("the model %s is %s today: it is read all the same", name, _present(given))
    module_name, colon, attribute = _present(given).partition(":")
    if not (colon and module_name and attribute):
        listed = f"{', '.join(EXAMPLES)}, or package.module:factory"
        raise ValueError(f"model must be one of {listed}; got {name!r}{_meant(name, EXAMPLES)}")
    found: Any = _module(module_name, here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model {name}: {module_name} has no {attribute!r}{_meant(part, dir(found))}")
        found = getattr(found, part)
    return found


def _module(name: str, here: bool) -> Any:
    folder = os.getcwd()
    if here and folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)  # for good: the module may import others later
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            where = f"neither installed nor in {folder}" if here else "among the installed ones"
            raise ValueError(f"there is no module {error.name!r}, {where}") from None
        raise ValueError(f"module {name} could not be imported: {_told(error)}") from error
    except Exception as error:
        raise ValueError(f"module {name} could not be imported: {_told(error)}") from error


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What can be passed by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        raise ValueError(f"{make!r} does not say what it takes: wrap it in a function with named parameters") from None
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _check_options(config: ModelConfig, known: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    names = [name for name, parameter in known.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    free = [name for name in names if name not in given or name == "periodic"]
    for option, value in config.options.items():
        if option in given and option != "periodic":
            raise ValueError(f"model {config.name}: {option} follows from the data ({given[option]}); got {value!r}")
        if option not in names and not anything:
            said = f"model {config.name} has no option {option!r} (its options: {', '.join(free) or 'none'})"
            raise ValueError(f"{said}{_meant(option, free)}")
    empty = inspect.Parameter.empty
    missing = [n for n in names if known[n].default is empty and n not in given and n not in config.options]
    if missing:
        raise ValueError(f"model {config.name} needs the option {' and '.join(missing)}")


def _meant(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _told(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
