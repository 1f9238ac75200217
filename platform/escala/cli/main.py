"""`escala`: a noun a file, the daily verbs at top level. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import sys

import typer

from escala.cli import cluster, demo, jobs, laws, planning, render, rollouts, runs, sweeps
from escala.errors import EscalaError

app = typer.Typer(
    name="escala",
    help="LLM experiments on a Ray cluster, turned into scaling laws that decide the next experiment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster.register(app)
jobs.register(app)
sweeps.register(app)
runs.register(app)
laws.register(app)
planning.register(app)
rollouts.register(app)
demo.register(app)


class _Warnings(logging.Handler):
    """What the library warns of, as the CLI's own lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        render.warning(self.format(record))


def main() -> None:
    """Run one command; an EscalaError prints what, why and the fix, and sets the exit code."""
    warnings = logging.getLogger("escala")
    warnings.addHandler(_Warnings(logging.WARNING))
    warnings.propagate = False
    try:
        app()
    except EscalaError as error:
        render.error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        render.note("interrupted; nothing that was submitted is lost")
        sys.exit(130)


if __name__ == "__main__":
    main()
