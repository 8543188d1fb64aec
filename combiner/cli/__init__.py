# SPDX-License-Identifier: Apache-2.0
"""The command line: what each command takes, and how it ends.

A command returns what it found: an object that prints as text, and that `--json` prints as JSON. The exit code is 0, 2
for arguments that are no command's, 130 after Ctrl-C, and 1 for all else that goes wrong, with a line on standard
error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..pattern_arguments import written_pattern
from ..process import info, num_threads
from .bench import run_bench
from .commands import run_compare, run_info, run_plot

EXAMPLES = """examples:
  combiner info                                     this build, this machine
  combiner demo                                     train small models, see what the far part is for: a minute or two
  combiner compare "Fixed(32)" "LogSparse()"        errors, times and memory beside dense attention
  combiner compare --npz mine.npz "Fixed(64)"       the same for your arrays query, key and value
  combiner bench                                    from which length on is each pattern faster than dense?
  combiner plot "Fixed(8)" --length 64 --causal --out fixed.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, with the arguments of the process by default; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        _parser().print_help(sys.stderr)
        return 2
    if given[:1] == ["demo"]:
        return _demo(given[1:])
    args = _parser().parse_args(given)
    try:
        with num_threads(args.threads or info()["threads"]):
            report = args.run(args)
    except (ImportError, OSError, ValueError, TypeError, MemoryError) as error:
        print(f"combiner {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(report.as_dict(), indent=1) if args.json else report)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _demo(arguments: Sequence[str]) -> int:
    """Runs the demo in a process of its own, whose BLAS leaves the processors to the two models."""
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    return subprocess.run(
        [sys.executable, "-m", "combiner.cli.demo", *arguments], env=environment, check=False
    ).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="combiner",
        description="Combiner: full attention at sub-quadratic cost, for the CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"combiner {info()['version']}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], Any], says: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=says,
            description=f"{says[0].upper()}{says[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--threads", type=_positive, help="threads of a call (default: those that combiner chooses)")
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    command("info", run_info, "the build, the processor and the packages that combiner finds", "combiner info --json")
    commands.add_parser("demo", help="train small models, see what the far part is for, draw attention")

    each = command(
        "compare",
        run_compare,
        "errors, times, memory and pairs of patterns beside dense attention",
        'combiner compare "Fixed(32)" "Fixed(32, pooling=\'mean\', size_bias=True)" --length 2048 --causal',
    )
    each.add_argument("patterns", nargs="+", type=_pattern, metavar="PATTERN", help='such as "Fixed(64)"')
    each.add_argument(
        "--npz", metavar="FILE", help="an archive of NumPy's with arrays query, key and value, in place of random ones"
    )
    _sizes(each, length=1024, heads=2)
    _causal(each)
    each.add_argument("--sample", type=_positive, metavar="N", help="queries to compare (default: up to 2,048 all)")
    each.add_argument("--out", metavar="FILE", help="draw errors over times into a picture; needs matplotlib")

    each = command(
        "bench",
        run_bench,
        "times on this machine, of patterns and of the dense attention of PyTorch and JAX where they are installed",
        'combiner bench "Fixed(128)" "LogSparse()" --lengths 256 1024 4096 --backward',
    )
    each.add_argument(
        "patterns", nargs="*", type=_pattern, metavar="PATTERN", help="Dense, Fixed and LogSparse by default"
    )
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    says = f"positions (default {' '.join(map(str, lengths))})"
    each.add_argument("--lengths", nargs="+", type=_positive, default=lengths, metavar="L", help=says)
    _sizes(each, heads=8)
    _causal(each, default=True)
    each.add_argument("--backward", action="store_true", help="forward and backward together (default: forward)")
    each.add_argument(
        "--repeats", type=_positive, default=5, help="calls of each, of which the fastest counts (%(default)s)"
    )

    each = command(
        "plot",
        run_plot,
        "draw the keys that each query attends, or what patterns cost over the length; needs matplotlib",
        'combiner plot "Fixed(64)" "LogSparse()" --what pairs --out pairs.png',
    )
    each.add_argument("patterns", nargs="+", type=_pattern, metavar="PATTERN", help='such as "Fixed(8)"')
    each.add_argument(
        "--what",
        choices=("pattern", "pairs", "bytes", "seconds"),
        default="pattern",
        help="the keys of one pattern, or a cost over the length (default %(default)s)",
    )
    each.add_argument("--length", type=_positive, default=64, help="of a pattern's picture (default %(default)s)")
    _causal(each)
    each.add_argument("--out", metavar="FILE", required=True, help="the picture: .png, .svg or .pdf")
    return parser


def _sizes(parser: argparse.ArgumentParser, *, heads: int, length: int | None = None) -> None:
    if length:
        parser.add_argument("--length", type=_positive, default=length, help="positions (default %(default)s)")
    parser.add_argument("--heads", type=_positive, default=heads, help="heads (default %(default)s)")
    parser.add_argument("--dim", type=_positive, default=64, help="features of a head (default %(default)s)")


def _causal(parser: argparse.ArgumentParser, default: bool = False) -> None:
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=default,
        help=f"whether a query attends no later keys (default: {'yes' if default else 'no'})",
    )


def _pattern(text: str) -> Any:
    try:
        return written_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid integer: {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
