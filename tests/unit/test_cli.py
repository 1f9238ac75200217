"""The CLI's surface is frozen (cli_surface.txt), and `--help` is cheap."""

import resource
import subprocess
import sys
from pathlib import Path

import typer

from escala.cli.main import app

SURFACE = Path(__file__).with_name("cli_surface.txt")


def surface() -> list[str]:
    """Every command with its parameters, one a line."""
    lines = []

    def walk(command, path: str) -> None:
        parameters = [
            "/".join(p.opts) if p.param_type_name == "option" else f"<{p.name}>"
            for p in command.params
            if p.name != "help"
        ]
        lines.append(" ".join([path, *parameters]))
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(app), "escala")
    return lines


def test_surface_is_frozen() -> None:
    """A change of the surface is a deliberate diff: write the new lines into cli_surface.txt, and CHANGELOG."""
    assert surface() == SURFACE.read_text().splitlines()


def test_help_imports_nothing_heavy_and_is_cheap() -> None:
    code = (
        "import sys, runpy; sys.argv = ['escala', '--help']\n"
        "try: runpy.run_module('escala.cli.main', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'pandas', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    costs = []
    for _ in range(3):  # the best of three: the bound is on the work, not on a busy machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < 0.5, f"{min(costs):.2f} s of CPU"


def test_a_mistake_exits_with_its_code_and_says_how_to_mend() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "escala.cli.main",
            "submit",
            "pretrain",
            "--dry-run",
            "--set",
            "model.n_layer=3",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown key model.n_layer" in done.stderr
    assert "did you mean n_layers?" in done.stderr
