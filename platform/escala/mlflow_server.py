"""The MLflow server: `python -m escala.mlflow_server OPTIONS`, with those of `mlflow server`; a process of `escala up`.

`mlflow server` brings its database up to date, starts uvicorn, and waits for it with all that it has imported (280 MB).
Here uvicorn takes its place, under the same process id.

Private name of MLflow, for which pyproject.toml holds it at 3.17: server._exec_cmd.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def become(command: Sequence[str], *, extra_env: Mapping[str, str], **_: object) -> NoReturn:
    """Run `command` in this process's place. Raises OSError where it cannot be."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), {**os.environ, **extra_env})


def main() -> None:
    """The process. Does not return."""
    import mlflow.server
    from mlflow.cli import cli

    if not callable(getattr(mlflow.server, "_exec_cmd", None)):
        raise SystemExit(
            f"MLflow {mlflow.__version__} starts its server in another way: pip install 'mlflow<3.18'"
        )
    mlflow.server._exec_cmd = become
    cli(["server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
