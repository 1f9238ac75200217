"""`escala`: a noun a file, the daily verbs at top level. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer

from escala.cli import (
    cluster,
    compress,
    demo,
    forecasts,
    jobs,
    laws,
    planning,
    render,
    rollouts,
    runs,
    sweeps,
)
from escala.contract.errors import ClusterError, EscalaError
from escala.contract.files import no_room
from escala.contract.redaction import hide_in_tracebacks

app = typer.Typer(
    name="escala",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cluster.register(app)
jobs.register(app)
compress.register(app)
sweeps.register(app)
runs.register(app)
laws.register(app)
forecasts.register(app)
planning.register(app)
rollouts.register(app)
demo.register(app)


def _print_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        from importlib.metadata import version

        render.raw(f"escala {version('escala')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end."),
    ] = False,
) -> None:
    """LLM experiments on a Ray cluster, turned into scaling laws that decide the next experiment."""


class _Warnings(logging.Handler):
    """What the library warns of, as the CLI's own lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        render.warning(self.format(record))


WARNINGS = _Warnings(logging.WARNING)


def main() -> None:
    """Run one command; an EscalaError prints what, why and the fix, and sets the exit code."""
    hide_in_tracebacks()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may hold what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    library = logging.getLogger("escala")
    library.addHandler(WARNINGS)
    library.propagate = False
    try:
        app()
    except EscalaError as error:
        render.error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has gone, `head` for one
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else Python complains as it flushes
        sys.exit(141)
    except OSError as error:
        if error.filename is None and not no_room(error):
            raise
        render.error(_explained(error))
        sys.exit(ClusterError.exit_code)
    except KeyboardInterrupt:
        render.note("interrupted; nothing that was submitted is lost")
        sys.exit(130)


def _explained(error: OSError) -> EscalaError:
    """What a user reads of a full disk, or of a file that is not theirs."""
    if no_room(error):
        where = f" for {error.filename}" if error.filename else ""
        return ClusterError(f"there is no room on the disk{where}", "free some space, then try again")
    return ClusterError(f"{error.filename}: {error.strerror}", "check the path and its permissions")


if __name__ == "__main__":
    main()
