"""The shards of the long tests: all of them, none twice, none too long."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests.shards import SHARD_MINUTES, shards

pytest_plugins = ["pytester"]


@given(some.dictionaries(some.text(min_size=1), some.floats(0.5, 14), max_size=40))
def test_every_test_is_in_one_shard_and_no_shard_is_too_long(minutes: dict[str, float]) -> None:
    parts = shards(minutes)
    assert sorted(name for part in parts for name in part) == sorted(minutes)
    longest = max(minutes.values(), default=0)
    assert all(sum(minutes[name] for name in part) <= max(SHARD_MINUTES, longest) for part in parts)


def test_what_is_marked_stands_where_make_looks_for_it() -> None:
    """`make test` and `test-nightly` collect their marked tests from these folders alone."""
    folders = {
        "ray": ("contracts", "faults", "integration"),
        "nightly": ("docs", "faults", "integration"),
        "docs": ("docs",),
    }
    tests = Path(__file__).parents[1]
    for path in tests.rglob("test_*.py"):
        for mark in re.findall(r"pytest\.mark\.(ray|nightly|docs)\b", path.read_text()):
            in_string = path == Path(__file__)
            assert in_string or path.relative_to(tests).parts[0] in folders[mark], (path, mark)


def test_hashes_reach_every_shard(pytester: pytest.Pytester) -> None:
    (pytester.path / "conftest.py").write_text(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems"
    )
    pytester.makeini("[pytest]\nmarkers =\n    nightly(minutes)\n    docs(minutes)\n")
    for name in ("one", "two", "three"):
        (pytester.path / f"test_{name}.py").write_text(
            "import pytest\n\n@pytest.mark.nightly(minutes=10)\ndef test_it(): pass\n"
        )
    seen = set()
    for commit in ("a0", "a1", "a2"):
        done = pytester.runpytest_inprocess("--shard", commit, "-p", "no:xdist", "--collect-only", "-q")
        (name,) = (line for line in done.outlines if "::test_it" in line)
        done.stdout.fnmatch_lines(["shard * of 3, 10 minutes: test_*.py"])
        seen.add(name)
    assert len(seen) == 3


def test_a_long_test_that_says_no_minutes_is_an_error(pytester: pytest.Pytester) -> None:
    (pytester.path / "conftest.py").write_text(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems"
    )
    pytester.makepyfile("import pytest\n\n@pytest.mark.docs\ndef test_it(): pass\n")
    done = pytester.runpytest_inprocess("--shard", "a0", "-p", "no:xdist")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*mark it nightly(minutes=N) or docs(minutes=N)"])
