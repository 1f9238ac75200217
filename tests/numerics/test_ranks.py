"""The ranks themselves: one that fails or hangs is shown, takes the others with it, and hinders no later scenario."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.numerics.ranks import run_ranks


def pid_and_sum(directory: Path) -> tuple[int, float]:
    x = torch.tensor(1.0 + dist.get_rank())
    dist.all_reduce(x)
    return os.getpid(), x.item()


def leaves_its_mark(_: Path) -> bool:
    """Whether an earlier scenario is seen; leaves what one could see."""
    found = torch.get_default_dtype() == torch.float64 or "ESCALA_MARK" in os.environ
    torch.set_default_dtype(torch.float64)
    os.environ["ESCALA_MARK"] = "1"
    return found


def second_fails(directory: Path) -> None:
    (directory / str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 1:
        raise ValueError("this one is broken")
    dist.barrier()


def second_waits(directory: Path) -> None:
    (directory / str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(1000)


def second_dies(_: Path) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 9)
    dist.barrier()


def test_each_scenario_has_processes_and_a_group_of_its_own(tmp_path: Path) -> None:
    first, second = (
        run_ranks("test_ranks:pid_and_sum", 2, tmp_path),
        run_ranks("test_ranks:pid_and_sum", 1, tmp_path),
    )
    assert [total for _, total in first + second] == [3.0, 3.0, 1.0]
    assert len({os.getpid(), *(pid for pid, _ in first + second)}) == 4
    assert not any(tmp_path.iterdir())


def test_nothing_of_a_scenario_reaches_the_next(tmp_path: Path) -> None:
    assert (
        run_ranks("test_ranks:leaves_its_mark", 1, tmp_path)
        == run_ranks("test_ranks:leaves_its_mark", 1, tmp_path)
        == [False]
    )


def test_a_failure_shows_its_traceback_and_ends_the_other_rank(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 ---.*in second_fails.*ValueError: this one is broken"
    ):
        run_ranks("test_ranks:second_fails", 2, tmp_path)
    assert not any(psutil.pid_exists(int((tmp_path / name).read_text())) for name in "01")
    with pytest.raises(AssertionError, match=re.escape("exit codes by rank: {1: -9}")):
        run_ranks("test_ranks:second_dies", 2, tmp_path)
    assert len(run_ranks("test_ranks:pid_and_sum", 2, tmp_path)) == 2


def test_a_rank_that_hangs_shows_where(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)not over within 4 s.*rank 0.*barrier.*rank 1.*in second_waits"
    ):
        run_ranks("test_ranks:second_waits", 2, tmp_path, seconds=4)
    assert not any(psutil.pid_exists(int((tmp_path / name).read_text())) for name in "01")
