"""The configuration of a run: the YAML file that ``credit-parallel train`` reads, checked before anything starts.

A field states its type, its bounds and its meaning once. The check, the messages, the JSON schema for editors and the
documentation follow from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetPydanticSchema, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from credit_mesh import ParallelismConfig
from credit_parallel.app import config_values as values
from credit_parallel.app.config_errors import FORMER, ConfigError, in_our_words, one_line_each

logger = logging.getLogger(__name__)

EMBEDDED = "rossby-haurwitz"
"""The data set that needs no file."""

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _model_block(value: Any) -> Any:
    """The ``model`` block of a file, in which options stand beside the name, as the arguments of the class."""
    value = values.mapping(value)
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) for key in value):
        raise ValueError(f"model must be a block of keys and values; got {value!r}")
    name = {"name": value.pop("name")} if "name" in value else {}
    return {**name, "options": value}


@in_our_words("data")
@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """The ``data`` block: which fields, and which times of them."""

    source: values.Text = EMBEDDED
    """A NetCDF or GRIB file, a pattern of such files, a Zarr store, ``tutorial:NAME`` for a data set of
    ``xarray.tutorial``, or ``rossby-haurwitz`` for the embedded one."""
    variables: values.Names = ()
    """Names of variables; empty for all that lie on the grid."""
    levels: values.Levels = ()
    """Values of the vertical coordinate; empty for all."""
    lead: values.Lead = 1
    """Time between input and target: a number of steps of the file, or text such as ``6h``."""
    history: values.Count = 1
    """How many states, one lead apart, the model sees."""
    forcings: values.Names = ()
    """Fields that are known in advance: ``solar``, ``position``."""
    train: values.Times = (0.0, 0.8)
    """Times to train on, from the first to before the second: text such as ``2019-03-24``, or fractions of all times;
    null for no bound."""
    valid: values.TimesOrNone = (0.8, 1.0)
    """Times to validate on; null for none."""
    workers: values.Whole = 0
    """Processes that read ahead, on each rank."""
    options: values.Options = field(default_factory=dict)
    """For the embedded data, its arguments; otherwise those of ``xarray.open_dataset``."""


@in_our_words("model")
@dataclass(frozen=True, config=CONFIG)
class ModelConfig:
    """The ``model`` block: which model, and its options beside the name."""

    name: values.Text = "unet"
    """``unet``, ``transformer``, or ``package.module:factory`` for a model of your own."""
    options: values.Options = field(default_factory=dict)
    """What is passed to it, besides those of ``in_channels``, ``out_channels``, ``height``, ``width`` and
    ``periodic`` that it takes."""


@dataclass(frozen=True, config=CONFIG)
class _Parallelism:
    """How ranks are arranged."""

    data: Annotated[Literal["fsdp2", "ddp", "none"], Field(title="one of fsdp2, ddp, none")] = "none"
    """How replicas are kept in step."""
    tensor: values.Count = 1
    """How many ranks share the channels of a layer."""
    domain: values.Count = 1
    """How many ranks share the latitude rows of a sample."""
    partition: Annotated[Literal["auto", "modules", "graph"], Field(title="one of auto, modules, graph")] = "auto"
    """How the model is made to work on rows: its modules are converted; it is partitioned operation by operation
    (``graph``); or the second where the first is not exact (``auto``)."""


def _parallelism_block(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ParallelismConfig) else values.mapping(value)


# Checked as the block, and kept as what the lower layers take.
_ParallelismField = Annotated[
    ParallelismConfig,
    GetPydanticSchema(lambda _, handler: handler(_Parallelism)),
    AfterValidator(lambda block: ParallelismConfig(**asdict(block))),
    BeforeValidator(_parallelism_block),
]


@in_our_words("trainer")
@dataclass(frozen=True, config=CONFIG)
class TrainerConfig:
    """The ``trainer`` block: either ``steps`` or ``epochs``, and how to train."""

    parallelism: _ParallelismField = field(default_factory=ParallelismConfig)
    """How ranks are arranged; see ``credit_mesh.ParallelismConfig``."""
    steps: values.CountOrNone = None
    """Steps of the optimizer; null where ``epochs`` says."""
    epochs: values.CountOrNone = None
    """Passes through the samples; null where ``steps`` says."""
    batch_size: values.Count = 4
    """Samples of one step, on all replicas together, so that it means the same on every layout."""
    grad_accum_steps: values.Count = 1
    """Micro-batches in which a replica works through its samples of a step."""
    rollout: values.Count = 1
    """Steps of the model that a loss spans."""
    lr: values.Positive = 1e-3
    """The largest learning rate."""
    weight_decay: values.Number = 0.01
    """Of weights; biases, norms and tables have none."""
    betas: values.Betas = (0.9, 0.95)
    """Of AdamW."""
    warmup: values.Whole = 0
    """Steps in which the learning rate rises to ``lr``."""
    final_lr: values.Number = 0.0
    """What it falls to along a cosine, as a fraction of ``lr``."""
    max_grad_norm: values.PositiveOrNone = 1.0
    """The norm to which gradients are clipped; null for any."""
    latitude_weights: Annotated[Literal["cos", "cell"] | None, Field(title="one of cos, cell, null")] = "cos"
    """``cos`` or ``cell``, see ``credit_parallel.losses.latitude_weights``; null for none."""
    amp: values.Flag = False
    """Compute in bfloat16."""
    activation_checkpoint: values.Flag = False
    """Recompute blocks in the backward in place of keeping their activations."""
    fsdp2_blocks: values.Names = ()
    """Further classes and modules that are blocks."""
    find_unused_parameters: values.Flag = False
    """Taken, and not needed: parameters without a gradient are handled either way."""
    trial: values.Flag = True
    """Whether a model with code of its own is tried, whole and sharded, before it trains. False lets code that mixes
    rows train on wrong numbers; see ``credit_domain.convert.convert_to_domain_parallel``."""
    compile: values.Flag = False
    """Compile the model with ``torch.compile``."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(title="one of auto, cpu, cuda")] = "auto"
    """``cuda``, ``cpu``, or ``auto``."""
    dtype: Annotated[Literal["float32", "float64"], Field(title="one of float32, float64")] = "float32"
    """Of parameters and data."""
    seed: values.Whole = 0
    """Of the weights and the order of samples."""
    valid_every: values.Whole = 0
    """Steps between validations; 0 for one at the end alone."""
    checkpoint_every: values.Whole = 0
    """Steps between checkpoints; 0 for one at the end alone."""
    keep: values.Count = 3
    """Checkpoints to keep."""
    log_every: values.Count = 1
    """Steps between lines of the log."""
    tensorboard: values.Flag = False
    """Whether to write for TensorBoard too."""
    timeout: values.Seconds = 600.0
    """Seconds that ranks wait for each other once training runs; a rank that is dead or stopped ends the run within
    them."""
    startup_timeout: values.Seconds = 1800.0
    """The same until the first step is done, while kernels compile and files are read for the first time; never less
    than ``timeout``."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"trainer: say either steps or epochs; got steps={self.steps!r} and epochs={self.epochs!r}"
            )
        if self.amp and self.dtype == "float64":
            raise ValueError("trainer.amp computes in bfloat16, which is of no use with trainer.dtype: float64")
        return self

    @property
    def first_timeout(self) -> float:
        """Seconds that ranks wait for each other until the first step is done."""
        return max(self.timeout, self.startup_timeout)


_DataField = Annotated[DataConfig, BeforeValidator(values.mapping)]
_ModelField = Annotated[ModelConfig, BeforeValidator(_model_block)]
_TrainerField = Annotated[
    TrainerConfig, BeforeValidator(values.mapping), Field(title="a block of keys and values, with steps or epochs")
]


@in_our_words("")
@dataclass(frozen=True, config=CONFIG)
class RunConfig:
    """A whole configuration.

    Raises:
        ConfigError: As for the blocks, where an argument will not do. It names all of them by their keys.
    """

    data: _DataField = field(default_factory=DataConfig)
    """The ``data`` block."""
    model: _ModelField = field(default_factory=ModelConfig)
    """The ``model`` block."""
    trainer: _TrainerField = Field(kw_only=True)
    """The ``trainer`` block."""
    folder: values.Text = Field("run", kw_only=True)
    """Where checkpoints, metrics and statistics go."""

    @classmethod
    def from_dict(cls, conf: Any, *, tell: bool = True) -> RunConfig:
        """Check a configuration, as YAML has it.

        Args:
            tell: Whether the log names the keys that are called otherwise now.

        Raises:
            ConfigError: For keys that are unknown and values that will not do; it names all of them by their path.
        """
        conf = present_keys(conf, tell=tell)
        with one_line_each(cls, "", conf):
            return TypeAdapter(cls).validate_python(values.mapping(conf))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], changes: Sequence[str] = (), *, tell: bool = True) -> RunConfig:
        """Read a YAML file.

        Args:
            changes: Values in place of the file's, such as ``trainer.steps=10``; what follows ``=`` is YAML.
            tell: As for :meth:`from_dict`.

        Raises:
            ValueError: If there is no such file, it is no YAML, or as :meth:`from_dict`.
        """
        try:
            conf = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        conf = {} if conf is None else conf
        for change in changes:
            _change(conf, change)
        try:
            return cls.from_dict(conf, tell=tell)
        except ConfigError as error:
            raise ConfigError(f"{path}: {mistake}" for mistake in error.mistakes) from None

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of the file, for editors."""
        schema = TypeAdapter(cls).json_schema()
        model, trainer = (schema["$defs"][name] for name in ("ModelConfig", "TrainerConfig"))
        del model["properties"]["options"]
        model["additionalProperties"] = True  # options stand beside the name
        for old, new in FORMER.items():
            words = {"description": f"The former name of {new}.", "deprecated": True}
            trainer["properties"][old] = {**trainer["properties"][new], **words}
        lengths = [{"required": [key], "properties": {key: {"type": "integer"}}} for key in ("steps", "epochs")]
        trainer["oneOf"] = lengths
        for block, key in ((schema, "data"), (schema, "model"), (trainer, "parallelism")):  # may be empty
            block["properties"][key] = {"anyOf": [block["properties"][key], {"type": "null"}]}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as YAML would have it, every key present; :meth:`from_dict` takes it."""
        whole = {"folder": self.folder, **asdict(self)}
        return cast("dict[str, Any]", _plain({**whole, "model": {"name": self.model.name, **self.model.options}}))

    def to_yaml(self) -> str:
        """The same as text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def present_keys(conf: Any, *, tell: bool = False) -> Any:
    """A configuration with keys of former versions under their present names.

    Args:
        conf: What YAML or a checkpoint has. Where it has a key under both names, it keeps both.
        tell: Whether the log names them.
    """
    trainer = conf.get("trainer") if isinstance(conf, Mapping) else None
    if not isinstance(trainer, Mapping):
        return conf
    names = {old: new for old, new in FORMER.items() if old in trainer and new not in trainer}
    for old, new in names.items() if tell else ():
        logger.warning("trainer.%s is now called trainer.%s; the former name is still read", old, new)
    return {**conf, "trainer": {names.get(key, key): value for key, value in trainer.items()}}


def _change(conf: Any, change: str) -> None:
    """Put a value in its place, which is made where it is missing."""
    path, equals, text = change.partition("=")
    *blocks, key = path.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{change!r}: what follows = is no YAML: {' '.join(str(error).split())}") from None
    if not equals or not all((*blocks, key)):
        raise ValueError(f"expected a key and its value, such as trainer.steps=10; got {change!r}")
    for block in blocks:
        inner = conf.get(block) if isinstance(conf, dict) else None
        if not isinstance(conf, dict) or not isinstance(inner, (dict, type(None))):
            raise ValueError(f"{change!r}: {block} is no block of keys and values")
        if inner is None:
            inner = conf[block] = {}
        conf = inner
    if blocks == ["trainer"]:  # in place of what the file has, under either name
        for pair in FORMER.items():
            for name in pair if key in pair else ():
                conf.pop(name, None)
    conf[key] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
