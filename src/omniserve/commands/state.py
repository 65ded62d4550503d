"""`omniserve state check`: look over a state directory while no server uses it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXIT_PROBLEMS = 1


def add_parser(commands: Any) -> None:
    state = commands.add_parser("state", help="the directory that keeps files and batches")
    actions = state.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser("check", help="is everything there that was accepted? only reads")
    check.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from omniserve.batch.check import check_state

    report = check_state(options.state_dir)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(
        f"{options.state_dir}: version {report.version}, {report.num_files} files, "
        f"{report.num_batches} batches ({report.num_open} open), {len(report.problems)} problems"
    )
    return EXIT_PROBLEMS if report.problems else 0
