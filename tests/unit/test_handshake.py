"""The version check at a job's first line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from escala.contract import handshake
from escala.contract.errors import VersionError


def test_equal_versions_pass():
    handshake.check(handshake.versions())


def test_torch_may_differ():
    handshake.check(handshake.versions() | {"torch": "0.0"})


@pytest.mark.parametrize("name", handshake.MUST_BE_EQUAL)
def test_another_version_is_refused_with_both_numbers(name):
    here = handshake.versions()
    with pytest.raises(VersionError) as caught:
        handshake.check(here | {name: "0.0.1"})
    assert "0.0.1" in caught.value.message
    assert here[name] in caught.value.message
    assert "0.0.1" in caught.value.hint


def test_a_client_that_states_nothing_is_refused():
    with pytest.raises(VersionError, match="not stated"):
        handshake.check({})


def test_it_needs_the_standard_library_only():
    roots = "{m.split('.')[0] for m in sys.modules}"
    code = f"import sys, escala.contract.handshake; print(*{roots} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {m for m in done.stdout.split() if not m.startswith(("_", "sitecustomize", "distutils"))}
    assert foreign <= {"escala"}
