"""Sphinx's settings: `nox -s docs` builds the pages into docs/_build/html."""

import inspect
import typing

from credit_parallel.app import config

project = "credit-parallel"
author = "The credit-parallel contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "credit-parallel"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # autodoc lists the fields of a NamedTuple already

# Names that are documented elsewhere. Looking them up there (intersphinx) needs a network; the build does not.
nitpick_ignore_regex = [
    (r"py:.*", r"torch(\..*)?"),
    (r"py:.*", r"(collections|contextlib|datetime|os|pathlib|typing)\..*"),
    (r"py:.*", r"c10d::Work|timedelta|Path|RankWriter|Tensor|Dataset|ProcessGroup|DeviceMesh|nn\..*"),
    (r"py:class", r"credit_\w+(\.\w+)*\._\w+"),  # what classes share is private
    (r"py:class", r"credit_domain\.engine\.driver\.Result|credit_parallel\.checkpoint\.together\.Context"),
]


def keep_colon(app, what, name, obj, options, lines):
    """Keep napoleon from reading "Process group: the ranks that ..." on a property as "type: description"."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def plain_types(cls):
    """Show the type of a field without its bounds: int, not Annotated[int, Ge(1), ...]."""
    cls.__annotations__ = types = typing.get_type_hints(cls)
    signature = inspect.signature(cls)
    parameters = [each.replace(annotation=types[each.name]) for each in signature.parameters.values()]
    cls.__signature__ = signature.replace(parameters=parameters, return_annotation=signature.empty)


def setup(app):
    for block in (config.DataConfig, config.ModelConfig, config.TrainerConfig, config.RunConfig):
        plain_types(block)
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # before napoleon, at 500
