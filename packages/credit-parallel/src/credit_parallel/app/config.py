"""The configuration of a run: the YAML file that ``credit-parallel train`` reads, checked before anything starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from credit_mesh import ParallelismConfig

LONGEST = 1e8
"""The longest timeout, in seconds: three years."""

EMBEDDED = "rossby-haurwitz"
"""The data set that needs no file."""


@dataclass(frozen=True)
class DataConfig:
    """The ``data`` block: which fields, and which times of them.

    Attributes:
        source: A NetCDF or GRIB file, a pattern of such files, a Zarr store, ``tutorial:NAME`` for a data set of
            ``xarray.tutorial``, or ``rossby-haurwitz`` for the embedded one.
        variables: Names of variables; empty for all that lie on the grid.
        levels: Values of the vertical coordinate; empty for all.
        lead: Time between input and target: a number of steps of the file, or text such as ``6h``.
        history: How many states, one lead apart, the model sees.
        forcings: Fields that are known in advance: ``solar``, ``position``.
        train: Times to train on, from the first to before the second: text such as ``2019-03-24``, or fractions of
            all times; None for no bound.
        valid: Times to validate on; None for none.
        workers: Processes that read ahead, on each rank.
        options: For the embedded data, its arguments; otherwise those of ``xarray.open_dataset``.
    """

    source: str = EMBEDDED
    variables: tuple[str, ...] = ()
    levels: tuple[float, ...] = ()
    lead: int | str = 1
    history: int = 1
    forcings: tuple[str, ...] = ()
    train: tuple[Any, Any] = (0.0, 0.8)
    valid: tuple[Any, Any] | None = (0.8, 1.0)
    workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """The ``model`` block.

    Attributes:
        name: ``unet``, ``transformer``, or ``package.module:factory`` for a model of your own.
        options: What is passed to it, besides those of ``in_channels``, ``out_channels``, ``height``, ``width`` and
            ``periodic`` that it takes.
    """

    name: str = "unet"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerConfig:
    """The ``trainer`` block.

    Attributes:
        parallelism: How ranks are arranged; see :class:`credit_mesh.ParallelismConfig`.
        steps: Steps of the optimizer; None where ``epochs`` says.
        epochs: Passes through the samples; None where ``steps`` says.
        batch_size: Samples of one step, on all replicas together, so that it means the same on every layout.
        accumulate: Parts in which a replica works through its share of them.
        rollout: Steps of the model that a loss spans.
        lr: The largest learning rate.
        weight_decay: Of weights; biases, norms and tables have none.
        betas: Of AdamW.
        warmup: Steps in which the learning rate rises to ``lr``.
        final_lr: What it falls to along a cosine, as a fraction of ``lr``.
        clip: The largest norm of the gradients; None for any.
        latitude_weights: ``cos`` or ``cell``, see :func:`credit_parallel.losses.latitude_weights`; None for none.
        amp: Compute in bfloat16.
        activation_checkpoint: Recompute blocks in the backward in place of keeping their activations.
        fsdp2_blocks: Further classes and modules that are blocks.
        trial: Whether a model with code of its own is tried, whole and sharded, before it trains. False lets code that
            mixes rows train on wrong numbers; see :func:`credit_domain.convert.convert_to_domain_parallel`.
        find_unused_parameters: Taken, and not needed: parameters without a gradient are handled either way.
        compile: Compile the model with ``torch.compile``.
        device: ``cuda``, ``cpu``, or ``auto``.
        dtype: Of parameters and data: ``float32`` or ``float64``.
        seed: Of the weights and the order of samples.
        valid_every: Steps between validations; 0 for one at the end alone.
        checkpoint_every: Steps between checkpoints; 0 for one at the end alone.
        keep: Checkpoints to keep.
        log_every: Steps between lines of the log.
        tensorboard: Whether to write for TensorBoard too.
        timeout: Seconds that ranks wait for each other once training runs; a rank that is dead or stopped ends the run
            within them.
        startup_timeout: The same until the first step is done, while kernels compile and files are read for the first
            time; never less than ``timeout``.
    """

    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    rollout: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 0
    final_lr: float = 0.0
    clip: float | None = 1.0
    latitude_weights: str | None = "cos"
    amp: bool = False
    activation_checkpoint: bool = False
    fsdp2_blocks: tuple[str, ...] = ()
    find_unused_parameters: bool = False
    trial: bool = True
    compile: bool = False
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    valid_every: int = 0
    checkpoint_every: int = 0
    keep: int = 3
    log_every: int = 1
    tensorboard: bool = False
    timeout: float = 600.0
    startup_timeout: float = 1800.0

    @property
    def first_timeout(self) -> float:
        """Seconds that ranks wait for each other until the first step is done."""
        return max(self.timeout, self.startup_timeout)


@dataclass(frozen=True)
class RunConfig:
    """A whole configuration.

    Attributes:
        data: The ``data`` block.
        model: The ``model`` block.
        trainer: The ``trainer`` block.
        folder: Where checkpoints, metrics and statistics go.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    folder: str = "run"

    @classmethod
    def from_dict(cls, conf: Any) -> RunConfig:
        """Check a configuration, as YAML has it.

        Raises:
            ValueError: For a key that is unknown or a value that will not do; it names the key by its path.
        """
        top = _Block("", conf)
        run = cls(
            _data(top.block("data")),
            _model(top.block("model")),
            _trainer(top.block("trainer")),
            top.text("folder", "run"),
        )
        top.done()
        return run

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file.

        Args:
            path: The file.
            changes: Values in place of the file's, such as ``trainer.steps=10``; what follows ``=`` is YAML.

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
            return cls.from_dict(conf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as YAML would have it, every key present; :meth:`from_dict` takes it."""
        return cast(
            "dict[str, Any]",
            _plain(
                {
                    "folder": self.folder,
                    "data": asdict(self.data),
                    "model": {"name": self.model.name, **self.model.options},
                    "trainer": {**asdict(self.trainer), "parallelism": self.trainer.parallelism.to_dict()},
                }
            ),
        )

    def to_yaml(self) -> str:
        """The same as text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


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
    conf[key] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _data(block: _Block) -> DataConfig:
    lead = block.take("lead", 1)
    if isinstance(lead, bool) or not isinstance(lead, (int, str)) or (isinstance(lead, int) and lead < 1):
        raise block.problem("lead", lead, "a number of steps of the file, 1 or more, or text such as 6h")
    default = DataConfig()
    data = DataConfig(
        source=block.text("source", default.source),
        variables=block.list_of("variables", str),
        levels=tuple(map(float, block.list_of("levels", (int, float)))),
        lead=lead,
        history=block.integer("history", 1, least=1),
        forcings=block.list_of("forcings", str),
        train=_times(block, "train", default.train) or (None, None),
        valid=_times(block, "valid", default.valid),
        workers=block.integer("workers", 0, least=0),
        options=block.mapping("options"),
    )
    block.done()
    return data


def _times(block: _Block, key: str, default: Any) -> tuple[Any, Any] | None:
    value = block.take(key, default)
    if value is None:
        return None
    ends = list(value) if isinstance(value, (list, tuple)) else []
    # YAML reads 2019-03-24 as a date.
    ends = [end.isoformat() if hasattr(end, "isoformat") else end for end in ends]
    numbers = all(end is None or (_is_number(end) and 0 <= end <= 1) for end in ends)
    if len(ends) != 2 or not (numbers or all(end is None or isinstance(end, str) for end in ends)):
        raise block.problem(key, value, "two times such as ['2019-03-01', '2019-03-24'], or two fractions of all times")
    return ends[0], ends[1]


def _model(block: _Block) -> ModelConfig:
    name = block.text("name", "unet")
    return ModelConfig(name, block.rest())


def _trainer(block: _Block) -> TrainerConfig:
    given = block.take("parallelism", {})
    try:
        parallelism = ParallelismConfig.from_block(given)
    except ValueError as error:
        raise ValueError(f"trainer: {error}") from None
    default = TrainerConfig()
    steps, epochs = (block.take(key, None) for key in ("steps", "epochs"))
    for key, value in (("steps", steps), ("epochs", epochs)):
        if value is not None and (not _is_integer(value) or value < 1):
            raise block.problem(key, value, "a whole number, 1 or more")
    if (steps is None) == (epochs is None):
        raise ValueError(f"trainer: say either steps or epochs; got steps={steps!r} and epochs={epochs!r}")
    betas = block.list_of("betas", (int, float), default.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise block.problem("betas", betas, "two numbers from 0 to below 1")
    clip = block.take("clip", default.clip)
    if clip is not None and not (_is_number(clip) and clip > 0):
        raise block.problem("clip", clip, "a positive number, or null")
    trainer = TrainerConfig(
        parallelism=parallelism,
        steps=steps,
        epochs=epochs,
        batch_size=block.integer("batch_size", default.batch_size, least=1),
        accumulate=block.integer("accumulate", 1, least=1),
        rollout=block.integer("rollout", 1, least=1),
        lr=block.number("lr", default.lr, above=0),
        weight_decay=block.number("weight_decay", default.weight_decay, least=0),
        betas=(betas[0], betas[1]),
        warmup=block.integer("warmup", 0, least=0),
        final_lr=block.number("final_lr", 0.0, least=0),
        clip=None if clip is None else float(clip),
        latitude_weights=block.choice("latitude_weights", default.latitude_weights, ("cos", "cell", None)),
        amp=block.flag("amp"),
        activation_checkpoint=block.flag("activation_checkpoint"),
        fsdp2_blocks=block.list_of("fsdp2_blocks", str),
        find_unused_parameters=block.flag("find_unused_parameters"),
        trial=block.flag("trial", default.trial),
        compile=block.flag("compile"),
        device=block.choice("device", "auto", ("auto", "cpu", "cuda")) or "auto",
        dtype=block.choice("dtype", "float32", ("float32", "float64")) or "float32",
        seed=block.integer("seed", 0, least=0),
        valid_every=block.integer("valid_every", 0, least=0),
        checkpoint_every=block.integer("checkpoint_every", 0, least=0),
        keep=block.integer("keep", default.keep, least=1),
        log_every=block.integer("log_every", 1, least=1),
        tensorboard=block.flag("tensorboard"),
        timeout=_timeout(block, "timeout", default.timeout),
        startup_timeout=_timeout(block, "startup_timeout", default.startup_timeout),
    )
    block.done()
    if trainer.amp and trainer.dtype == "float64":
        raise ValueError("trainer.amp computes in bfloat16, which is of no use with trainer.dtype: float64")
    return trainer


def _timeout(block: _Block, key: str, default: float) -> float:
    value = block.take(key, default)
    # Longer than what a timer of torch holds would be taken for no time at all.
    if not _is_number(value) or not 0 < value <= LONGEST:
        raise block.problem(key, value, f"a number of seconds above 0, {LONGEST:.0e} at most")
    return float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Block:
    """One block of a configuration, whose keys are taken one by one."""

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{path or 'the configuration'} must be a block of keys and values; got {value!r}")
        self.left = dict(value)
        self.known: list[str] = []

    def problem(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.at(key)} must be {expected}; got {value!r}{_hint(value)}")

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def take(self, key: str, default: Any) -> Any:
        self.known.append(key)
        return self.left.pop(key, default)

    def block(self, key: str) -> _Block:
        value = self.take(key, {})
        return _Block(self.at(key), {} if value is None else value)

    def mapping(self, key: str) -> dict[str, Any]:
        return self.block(key).rest()

    def rest(self) -> dict[str, Any]:
        left, self.left = self.left, {}
        return left

    def text(self, key: str, default: str) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or not value:
            raise self.problem(key, value, "text")
        return value

    def integer(self, key: str, default: int, *, least: int) -> int:
        value = self.take(key, default)
        if not _is_integer(value) or value < least:
            raise self.problem(key, value, f"a whole number, {least} or more")
        return int(value)

    def number(self, key: str, default: float, *, least: float | None = None, above: float | None = None) -> float:
        value = self.take(key, default)
        bound = f"a number, {least} or more" if least is not None else f"a number above {above}"
        fits = _is_number(value) and (least is None or value >= least) and (above is None or value > above)
        if not fits:
            raise self.problem(key, value, bound)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.problem(key, value, "true or false")
        return value

    def choice(self, key: str, default: str | None, accepted: Sequence[str | None]) -> str | None:
        value = self.take(key, default)
        if value not in accepted:
            raise self.problem(key, value, "one of " + ", ".join("null" if one is None else one for one in accepted))
        return cast("str | None", value)

    def list_of(self, key: str, kind: Any, default: Sequence[Any] = ()) -> tuple[Any, ...]:
        value = self.take(key, default)
        values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
            raise self.problem(key, value, "a list of " + ("names" if kind is str else "numbers"))
        return tuple(values)

    def done(self) -> None:
        """Refuse what no key was asked for."""
        for key, value in self.left.items():
            near = difflib.get_close_matches(key, self.known, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(self.known)}"
            raise ValueError(f"unknown key {self.at(key)}: {value!r}{meant}")


def _hint(value: Any) -> str:
    """YAML 1.1 takes 1e-3 for text."""
    try:
        return f" (YAML reads {value} as text; write {float(value)!r})" if isinstance(value, str) else ""
    except ValueError:
        return ""
