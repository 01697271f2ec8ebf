"""``credit-parallel forecast``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import ExitStack
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from credit_mesh import ParallelismConfig
from credit_parallel._version import __version__
from credit_parallel.app.cli.launch import is_rank, run_ranks
from credit_parallel.app.config import RunConfig
from credit_parallel.app.data.checks import closest
from credit_parallel.checkpoint import CheckpointError
from credit_parallel.checkpoint.together import together

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from credit_parallel.app.data.source import Source
    from credit_parallel.app.training.experiment import Checked, Experiment

MOST_FIELDS, MOST_LEADS = 8, 4
"""Fields and leads of the table of scores; --json tells all."""

EPILOG = """\
Configuration, weights and statistics are those of the checkpoint. Forecasts start from each validation time whose truth
is in the data, or from the times of --start, in the data of the training or in others (--data), where the truth may be
missing. Scores are those of forecasts and of persistence, weighted by latitude as in the training.

The ranks may be arranged in another way than in the training: --domain ranks share the latitude rows of a sample, and
what is left are replicas, which forecast from different starts. Each rank writes its own rows of the file.

Examples:
  credit-parallel forecast runs/first --steps 8                           scores of forecasts of 8 leads
  credit-parallel forecast runs/first --steps 40 --out f.zarr --ranks 4   written by four ranks
  credit-parallel forecast runs/first --start 2019-03-24T00:00 --plot f.png --field t2m
  torchrun --nproc-per-node 8 -m credit_parallel forecast runs/first --steps 40 --out f.zarr
"""

CODE = """\
A folder may come from someone else. By itself it names the models of this package and data files that run nothing;
any other model, options of the reader and addresses of data must be named here too, or the folder trusted.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "forecast",
        help="step a trained model forward, write the fields, and score them",
        description="Step a trained model forward on its own output, write the fields, and score them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN", help="the folder of a training, or one checkpoint in it")
    parser.add_argument("--steps", type=int, metavar="N", help="leads to forecast (default: as in the training's loss)")
    parser.add_argument(
        "--start", nargs="+", default=[], metavar="TIME", help="times to start from (default: those to validate on)"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth of the starts")
    parser.add_argument("--data", metavar="SOURCE", help="data to start from, in place of those of the training")
    code = parser.add_argument_group("code", CODE)
    code.add_argument("--model", metavar="NAME", help="the model, as package.module:factory, in place of RUN's word")
    code.add_argument("--trust", action="store_true", help="import and open whatever RUN names")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="write the fields: a NetCDF file (.nc) or a Zarr store (.zarr)")
    output.add_argument("--compression", type=int, default=0, metavar="N", help="level of zlib, 1 to 9; 0 for none")
    output.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    output.add_argument("--plot", metavar="PNG", help="draw the first forecast at its last lead, and the truth")
    output.add_argument("--field", metavar="NAME", help="the field to draw, such as t2m or u_500 (default: the first)")
    output.add_argument("--json", action="store_true", help="print the scores as JSON, for programs")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to start on this machine")
    ranks.add_argument("--domain", type=int, metavar="N", help="ranks that share a sample (default: as in training)")
    ranks.add_argument("--tensor", type=int, metavar="N", help="tensor-parallel ranks (default: as in training)")
    ranks.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: as in training)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, and start the ranks, or be one of them; returns the exit status."""
    from credit_parallel.app.forecast.stores import check_target
    from credit_parallel.app.plots.figures import new_figure
    from credit_parallel.app.training.distributed import device_named, joined, place
    from credit_parallel.app.training.experiment import check
    from credit_parallel.app.trust import restricted

    if args.ranks < 1 or args.every < 1:
        raise ValueError(f"--ranks and --every must be 1 or more; got {args.ranks} and {args.every}")
    if args.out:
        check_target(Path(args.out), args.overwrite)
    if args.plot:
        new_figure(1, 1)  # says if matplotlib is missing
    saved = _saved(Path(args.folder))
    at = place()
    world_size = at.world_size if is_rank() else args.ranks
    config, make = restricted(saved.config, saved.folder, model=args.model, data=args.data, trust=args.trust)
    config = _configuration(config, args, world_size)
    checked = check(config, world_size, training=False, make=make)
    steps = config.trainer.rollout if args.steps is None else args.steps
    starts = _starts(checked, args, steps)
    picture = _picture(checked, args, starts[0], steps) if args.plot else None
    if not is_rank() and args.ranks > 1:
        return run_ranks(args.arguments, args.ranks)
    device = device_named(config.trainer.device, at.local_rank)
    with joined(device, config.trainer.first_timeout):
        _forecast(checked, saved, device, starts, steps, args, picture, first=at.rank == 0)
    return 0


class _Saved(NamedTuple):
    """What a checkpoint says of its training."""

    folder: Path
    step: int
    config: RunConfig
    statistics: dict[str, Any]


class _Picture(NamedTuple):
    """What to draw."""

    channel: int
    time: int
    step: int
    title: str


def _saved(folder: Path) -> _Saved:
    from credit_parallel.app.training.loop import CHECKPOINTS
    from credit_parallel.checkpoint.json_values import unpack
    from credit_parallel.checkpoint.load import open_checkpoint

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a training, nor one of its checkpoints")
    inner = folder / CHECKPOINTS
    opened = open_checkpoint(inner if inner.is_dir() else folder, verify=False)
    extra = unpack(opened.values["extra"], opened.small)
    if not isinstance(extra, dict) or not {"config", "statistics"} <= extra.keys():
        raise ValueError(f"{opened.folder} was not saved by credit-parallel train: it has no configuration")
    statistics = extra["statistics"]
    if not (isinstance(statistics, dict) and all(isinstance(each, list) for each in statistics.values())):
        raise CheckpointError(f"{opened.folder} is damaged: values.extra.statistics must be lists by their names")
    if not all(isinstance(each, (str, float, int)) for each in chain.from_iterable(statistics.values())):
        raise CheckpointError(
            f"{opened.folder} is damaged: values.extra.statistics must be numbers and names of fields"
        )
    return _Saved(opened.folder, opened.values["step"], RunConfig.from_dict(extra["config"], tell=False), statistics)


def _configuration(config: RunConfig, args: argparse.Namespace, world_size: int) -> RunConfig:
    """That of the training, with other ranks and device where arguments say so."""
    trainer, before = config.trainer, config.trainer.parallelism
    domain = args.domain or (before.domain if world_size > 1 else 1)
    tensor = args.tensor or (before.tensor if world_size > 1 else 1)
    if world_size % (tensor * domain):
        raise ValueError(
            f"{world_size} rank(s) do not divide into groups of tensor x domain = {tensor} x {domain}"
            f"{'' if args.domain or args.tensor else ', as in training'}: say --domain and --tensor, or other --ranks"
        )
    # Replicas of a forecast have nothing to keep in step.
    mode = "ddp" if before.data == "none" and world_size > tensor * domain else before.data
    parallelism = ParallelismConfig(mode, tensor, domain, before.partition)
    trainer = dataclasses.replace(trainer, parallelism=parallelism, device=args.device or trainer.device)
    return dataclasses.replace(config, trainer=trainer)


def _starts(checked: Checked, args: argparse.Namespace, steps: int) -> list[int]:
    from credit_parallel.app.data.samples import sample_starts

    source, history = checked.source, checked.config.data.history
    if steps < 1:
        raise ValueError(f"--steps must be 1 or more; got {steps}")
    if args.start:
        starts = list(dict.fromkeys(_time_named(source, text) for text in args.start))
    else:
        options = {"lead_steps": checked.lead_steps, "history": history, "steps": steps}
        starts = sample_starts(source, times=checked.valid or None, **options)
        if not starts:
            raise ValueError(
                f"no validation time of {source.name} is followed by the truth for {steps} step(s); take fewer "
                "--steps, or say where to --start"
            )
    return starts[:: args.every]


def _time_named(source: Source, text: str) -> int:
    labels = list(source.labels)
    for label in (text, f"{text}T00:00", f"{text}:00"):
        if label in labels:
            return labels.index(label)
    raise ValueError(
        f"--start {text}: {source.name} has no such time; it has {labels[0]} to {labels[-1]}{closest(text, labels)}"
    )


def _picture(checked: Checked, args: argparse.Namespace, start: int, steps: int) -> _Picture:
    """The last lead of the first forecast for which the truth is there."""
    from credit_parallel.app.plots.forecast_picture import name_of

    source, lead = checked.source, checked.lead_steps
    labels = [channel.label for channel in source.channels]
    field = args.field or labels[0]
    if field not in labels:
        raise ValueError(f"--field {field}: there is none; there are {', '.join(labels)}{closest(field, labels)}")
    last = next(segment.stop - 1 for segment in source.segments if start in segment)
    step = min(steps, (last - start) // lead)
    if step < 1:
        raise ValueError(f"--plot: {source.name} has no truth after {source.labels[start]}; choose another --start")
    channel = labels.index(field)
    ahead = f"{step} step(s)" if source.step is None else f"{source.step * lead * step / 3600:g} h"
    title = f"{name_of(source.channels[channel])}: forecast of {ahead} from {source.labels[start]}"
    return _Picture(channel, start + step * lead, step - 1, title)


def _forecast(
    checked: Checked,
    saved: _Saved,
    device: torch.device,
    starts: list[int],
    steps: int,
    args: argparse.Namespace,
    picture: _Picture | None,
    *,
    first: bool,
) -> None:
    from tqdm import tqdm

    from credit_parallel.app.data.statistics import Statistics
    from credit_parallel.app.forecast import open_writer, run_forecast
    from credit_parallel.app.training.experiment import prepare

    labels = [channel.label for channel in checked.source.channels]
    experiment = prepare(checked, device, Statistics.from_dict(saved.statistics, labels))
    experiment.context.load(saved.folder)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    attributes = {
        "title": f"Forecasts by {args.folder}, {saved.folder.name}",
        "source": f"{checked.config.model.name}, trained for {saved.step} steps, from {checked.source.name}",
        "history": f"{now} credit-parallel {__version__} {' '.join(args.arguments)}",
    }
    drawn: list[Tensor] = []

    def keep(start: int, step: int, fields: Tensor) -> None:
        if picture is not None and start == 0 and step == picture.step:
            drawn.append(fields[picture.channel : picture.channel + 1])

    quiet = args.quiet or not first
    every = 0.1 if sys.stderr.isatty() else 10.0
    with (
        tqdm(total=len(starts), unit="forecast", disable=quiet, mininterval=every, dynamic_ncols=True) as bar,
        ExitStack() as stack,
    ):
        writer = None
        if args.out:
            options = {"compression": args.compression, "overwrite": args.overwrite, "attributes": attributes}
            writer = stack.enter_context(open_writer(experiment, args.out, starts, steps, **options))
        found = run_forecast(
            experiment, starts, steps, writer=writer, seen=keep, progress=lambda done: bar.update(done - bar.n) and None
        )
    if picture is not None:
        with together("--plot"):
            _draw(experiment, picture, drawn, args.plot, first)
    if first:
        files = {key: value for key, value in (("out", args.out), ("plot", args.plot)) if value}
        if args.json:
            print(json.dumps({"checkpoint": str(saved.folder), **files, **found}))
        else:
            print("\n".join([*_table(found), *(f"wrote {file}" for file in files.values())]))


def _draw(experiment: Experiment, picture: _Picture, drawn: list[Tensor], path: str, first: bool) -> None:
    """One field of the first forecast, of which each rank of a replica has its rows, on the first rank."""
    from credit_parallel.app.plots import plot_forecast

    if not drawn:
        return  # of another replica
    field = experiment.context.gather(drawn[0])[0]
    if first:
        source = experiment.checked.source
        channel = source.channels[picture.channel]
        truth = source.read([picture.time], range(source.grid.height))[0, picture.channel]
        plot_forecast(path, truth, field, source.grid, channel, experiment.checked.partition, title=picture.title)


def _table(found: dict[str, Any]) -> list[str]:
    """Scores of some fields at some leads."""
    scored = [step for step, count in enumerate(found["scored"]) if count]
    head = f"{len(found['starts'])} forecast(s) from {found['starts'][0]} to {found['starts'][-1]}"
    if not scored:
        return [f"{head}; none is scored, since the truth is not in the data"]
    shown = sorted({scored[round(i * (len(scored) - 1) / (MOST_LEADS - 1))] for i in range(MOST_LEADS)})
    labels = list(found["rmse"])
    lines = [head, f"{'field':>16} {'lead':>9} {'RMSE':>10} {'persistence':>11} {'bias':>10} {'ACC':>6} {'scored':>6}"]
    for label in labels[:MOST_FIELDS]:
        for step in shown:
            rmse, persistence, bias, acc = (
                found[name][label][step] for name in ("rmse", "persistence_rmse", "bias", "acc")
            )
            lead = f"{step + 1}" if found["lead_seconds"] is None else f"{found['lead_seconds'][step] / 3600:g} h"
            numbers = f"{rmse:10.4g} {persistence:11.4g} {bias:10.3g} {acc:6.3f} {found['scored'][step]:6}"
            lines.append(f"{label:>16} {lead:>9} {numbers}")
    if len(labels) > MOST_FIELDS:
        lines.append(f"and {len(labels) - MOST_FIELDS} more fields; --json has them all")
    return lines
