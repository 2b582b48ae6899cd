"""Say whether a training job fits in memory, with what margin, and how much larger it could be.

Exit code 0: it fits; 3: it does not. MODEL and its options are those of `plan`; on one GPU, say
`fits hf:config.json --hardware 1x1xRTX4090`. Every answer is a plan that was made: the largest size reported was
planned and fits, the next one was planned and does not. --grid prints the peak over sequence x batch, with all
parameters trained and with LoRA; --fewest the fewest devices that hold the job, --hardware then names the kind of node.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import ExitCode, ShardwrightError
from . import _options

if TYPE_CHECKING:
    from ..api import Progress
    from ..probing import Prober
    from ..profiler.cluster import Cluster

NAME = "fits"
HELP = "say whether a training job fits, and how much larger it could be"
BATCHES = (1, 2, 4, 8, 16, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--hardware", metavar="NAME", help="cluster, or with --fewest the kind of node")
    _options.add_workload_options(parser, batch_required=False)
    _options.add_search_options(parser)
    asked = parser.add_argument_group("questions")
    asked.add_argument("--only-answer", action="store_true", help="look for no larger sizes")
    kind = asked.add_mutually_exclusive_group()
    kind.add_argument("--grid", action="store_true", help="peak over sequence x batch, all parameters and LoRA")
    kind.add_argument("--fewest", action="store_true", help="the fewest devices of a kind that hold the job")
    asked.add_argument(
        "--lengths", type=_options.positives, metavar="N,N,...", help="sequence lengths of --grid (default: around own)"
    )
    asked.add_argument(
        "--batches",
        type=_options.positives,
        default=list(BATCHES),
        metavar="N,N,...",
        help=f"sequences on each data rank of --grid (default: {','.join(map(str, BATCHES))})",
    )
    asked.add_argument(
        "--most", type=_options.positive, default=1024, metavar="N", help="devices that --fewest tries (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    if args.hardware is None:
        raise ShardwrightError("no hardware is named", change="--hardware", works="--hardware 1x1xRTX4090")
    from ..profiler.hardware import parse_hardware

    force = _options.parse_assignments(args.force, "--force")
    cluster = parse_hardware(args.hardware)
    with _options.progress_line() as progress:
        prober = _prober(args, force, progress)
        if args.grid:
            return _grid(prober, cluster, args)
        if args.fewest:
            return _fewest(prober, cluster, args)
        return _answer(prober, cluster, args)


def _prober(args: argparse.Namespace, force: dict[str, str], progress: Progress) -> Prober:
    """Each plan is a line on stderr, or where that is a terminal a line that changes with all that is done for it."""
    from ..probing import Prober

    def load(seq_len: int | None):  # type: ignore[no-untyped-def]
        """The global batch is each plan's own."""
        return _options.workload_from_args(argparse.Namespace(**{**vars(args), "seq_len": seq_len, "global_batch": 1}))

    def say(message: str) -> None:
        if sys.stderr.isatty():
            progress(message)
        else:
            print(f"shardwright fits: planning {message}", file=sys.stderr, flush=True)

    limits = {"memory_limit_bytes": args.memory_limit, "time_limit_s": args.time_limit}
    return Prober(load, force, **limits, say=say, tell=progress)


def _answer(prober: Prober, cluster: Cluster, args: argparse.Namespace) -> int:
    from ..fits import answer
    from ..render_fits import print_answer

    batch = cluster.num_devices if args.global_batch is None else args.global_batch
    found = answer(prober, cluster, batch, args.seq_len, search=not args.only_answer)
    if args.json:
        _options.print_json({"model": args.model, "hardware": cluster.name, **found.to_dict()})
    else:
        print_answer(found, args.model, cluster)
    return ExitCode.DONE if found.verdict.fits else ExitCode.DOES_NOT_FIT


def _grid(prober: Prober, cluster: Cluster, args: argparse.Namespace) -> int:
    from ..adapters import why_no_lora
    from ..fits import grid
    from ..render_fits import print_grids

    if prober.forced.microbatch is not None or prober.forced.global_microbatch is not None:
        raise ShardwrightError(
            "--force microbatch leaves --grid nothing to vary",
            means="each column of the grid is a microbatch",
            change="--force microbatch",
            works=f"--batches {prober.forced.microbatch or prober.forced.global_microbatch}",
        )
    workload = prober.workload(args.seq_len)
    own = workload.spec.get("seq_len")
    lengths = _lengths(args.lengths, own if isinstance(own, int) else None, args.seq_len)
    grids = [grid(prober, cluster, lengths, args.batches, lora=False)]
    without = why_no_lora(workload)
    if not without:
        grids.append(grid(prober, cluster, lengths, args.batches, lora=True))
    if args.json:
        tables = [one.to_dict() for one in grids]
        _options.print_json({"model": args.model, "hardware": cluster.name, "grids": tables, "no_lora": without})
    else:
        print_grids(grids, without, args.model, cluster)
    verdicts = [verdict for one in grids for row in one.verdicts for verdict in row if verdict is not None]
    if not verdicts:
        raise _nothing_in_time(args)
    return ExitCode.DONE if any(verdict.fits for verdict in verdicts) else ExitCode.DOES_NOT_FIT


def _lengths(given: list[int] | None, own: int | None, asked: int | None) -> list[int | None]:
    """Sequence lengths of a grid's rows; [None] where the model has none to change."""
    if own is None:
        return [None]
    if given is not None:
        return list(given)
    around = (own // 4, own // 2, own, 2 * own, 4 * own)
    return [asked if length == own else length for length in around if length > 0]


def _fewest(prober: Prober, cluster: Cluster, args: argparse.Namespace) -> int:
    from ..fits import fewest
    from ..render_fits import print_fewest

    found = fewest(prober, cluster, args.global_batch, args.seq_len, args.most)
    if not found.verdict and not found.without:
        raise _nothing_in_time(args)
    if args.json:
        _options.print_json({"model": args.model, **found.to_dict()})
    else:
        print_fewest(found, args.model)
    return ExitCode.DONE if found.verdict else ExitCode.DOES_NOT_FIT


def _nothing_in_time(args: argparse.Namespace) -> ShardwrightError:
    return ShardwrightError(
        f"the time limit of {args.time_limit:g} s passed before the first plan",
        means="nothing is known of any size yet",
        change="--time-limit",
        works=f"--time-limit {max(60, round(10 * args.time_limit))}",
        exit_code=ExitCode.TIME_LIMIT,
    )
