"""The version check at a job's first line. Standard library only: it runs before anything can go wrong.

Client and cluster share files, checkpoints and pickles: escala and Ray must be equal, Python equal up to
its minor number (Ray refuses anything else later, with a stack trace).
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping

from escala.contract.errors import VersionError

MUST_BE_EQUAL = ("escala", "python", "ray")
PACKAGES = ("escala", "ray", "torch", "deepspeed")


def versions() -> dict[str, str]:
    """This process's versions: "python" as MAJOR.MINOR, and of each of PACKAGES that is installed."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a control plane without torch; what a job needs, its own imports demand
    return found


def check(client: Mapping[str, str]) -> None:
    """Compare the versions that submitted a job with this process's.

    Raises VersionError, with the numbers and how to fix it.
    """
    here = versions()
    differing = [name for name in MUST_BE_EQUAL if client.get(name) != here.get(name)]
    if not differing:
        return
    said = "; ".join(
        f"{name} is {client.get(name, 'not stated')} where the job was submitted and "
        f"{here.get(name, 'not installed')} where it runs"
        for name in differing
    )
    wanted = [f"{name}=={client[name]}" for name in differing if name != "python" and name in client]
    fixes = [f"install {' '.join(wanted)} on the cluster"] if wanted else []
    if "python" in differing and "python" in client:
        fixes.append(f"run the cluster with Python {client['python']}")
    raise VersionError(said, " and ".join([*fixes, "or submit from an environment equal to the cluster's"]))
