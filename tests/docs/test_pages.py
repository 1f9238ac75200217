"""README and the pages of docs/ as a newcomer follows them: every command in its order, word for word, in an empty
home; every output as shown.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import free_ports
from tests.docs.pages import Block, misfit, read_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MINUTES = {
    "README.md": 1,
    "docs/how-to/compress.md": 3,
    "docs/how-to/existing-ray-cluster.md": 3,
    "docs/how-to/law-from-a-table.md": 2,
    "docs/how-to/laws-findings.md": 1,
    "docs/how-to/mixtures-of-experts.md": 1,
    "docs/how-to/mlflow-run.md": 3,
    "docs/how-to/operations.md": 2,
    "docs/how-to/own-data.md": 3,
    "docs/how-to/own-reward.md": 5,
    "docs/how-to/own-space.md": 5,
    "docs/how-to/plans-and-proposals.md": 3,
    "docs/how-to/postgresql.md": 2,
    "docs/how-to/serve.md": 5,
    "docs/how-to/start-from-a-model.md": 8,
    "docs/how-to/submit-jobs.md": 4,
    "docs/tutorials/from-nothing-to-a-law.md": 9,
    "docs/tutorials/rlhf.md": 9,
}
"""Of each page with commands that run, on two quiet cores, rounded up."""
PATIENCE = 4  # a machine that is shared takes up to so many times as long
OURS = ("ESCALA_", "RAY_", "MLFLOW_", "OMP_")  # variables that a newcomer's shell does not have


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that are run."""
    return [block for block in read_page(page) if not block.untested]


@dataclass(frozen=True)
class Shell:
    """A newcomer's shell: an empty directory that is HOME, too, and a cluster's ports that nobody uses."""

    directory: Path
    environment: dict[str, str]
    deadline: float

    def run(self, script: str) -> tuple[int | None, str, str]:
        """Exit status (None: the page's time was over, and what it had started was ended), stdout, stderr."""
        out, err = self.directory.parent / "out", self.directory.parent / "err"
        with (
            out.open("wb") as stdout,
            err.open("wb") as stderr,
        ):  # files: a pipe stays open in what is left running
            bash = subprocess.Popen(
                ["bash", "-ec", script],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status: int | None = bash.wait(max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(bash.pid, signal.SIGKILL)
                bash.wait()
                status = None
        return status, out.read_text(errors="replace"), err.read_text(errors="replace")


@pytest.fixture
def shell(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Shell]:
    """A shell whose cluster, if a page starts one, is taken down afterwards."""
    directory = tmp_path / "home"
    directory.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    ports = zip(("RAY_PORT", "RAY_DASHBOARD_PORT", "MLFLOW_PORT"), free_ports(3), strict=True)
    own = {f"ESCALA_{name}": str(port) for name, port in ports}
    own |= {"HOME": str(directory), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    made = Shell(directory, kept | own, time.monotonic() + 60 * PATIENCE * minutes_of(request.node))
    yield made
    status, out, err = Shell(directory, made.environment, time.monotonic() + 120).run("escala down")
    assert status == 0, f"escala down: {out}{err}"


def minutes_of(test: pytest.Item) -> int:
    """What the test's `docs` marker says."""
    marker = test.get_closest_marker("docs")
    assert marker
    return int(marker.kwargs["minutes"])


def test_every_block_of_commands_is_run_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(name_of(page), block) for page in PAGES for block in read_page(page)]
    untested = [(name, block) for name, block in found if block.untested]
    with capsys.disabled():
        print(
            f"\n{len(found)} blocks of commands, {len(found) - len(untested)} run, {len(untested)} untested:"
        )
        for name, block in untested:
            print(f"  {name}:{block.line} {block.untested}")
    assert found
    run = {name for name, block in found if not block.untested}
    assert run == set(MINUTES), "state the minutes of each page that runs, in MINUTES above, and of no other"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=name_of(page),
            marks=[
                pytest.mark.docs(minutes=MINUTES[name_of(page)]),
                pytest.mark.timeout(60 * PATIENCE * MINUTES[name_of(page)] + 180),
            ],
        )
        for page in PAGES
        if name_of(page) in MINUTES
    ],
)
def test_a_page_does_what_it_says(page: Path, shell: Shell) -> None:
    for block in runnable(page):
        for name, text in block.files.items():
            file = shell.directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        status, out, err = shell.run(block.script)
        said = f"{block.script}--- it printed\n{out}--- and on stderr\n{err}"
        assert status == 0, f"{name_of(page)}:{block.line} exit status {status} (None: out of time)\n{said}"
        if block.output is not None and (why := misfit(block.output, out)):
            pytest.fail(f"{name_of(page)}:{block.output.line} {why}\n{block.output.text}--- of\n{said}")
