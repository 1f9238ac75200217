"""The one door to a home: what the CLI, notebooks and a server call.

    from escala import Escala

    escala = Escala()
    job = escala.submit("pretrain", compute_flops=1e15)
    escala.predict_law("mine", {"n_active": 1e9, "tokens": 2e10})

Everything answers with a view (`escala.views`), which `--json` and a REST interface show too. What is heavy (ray,
mlflow, the database, laws) is imported by the method that needs it.
"""

from __future__ import annotations

from escala.client.cluster import ClusterMethods
from escala.client.forecasts import ForecastMethods
from escala.client.jobs import JobMethods
from escala.client.laws import LawMethods
from escala.client.plans import PlanMethods
from escala.client.run_records import RunMethods
from escala.client.sweeps import SweepMethods


class Escala(ClusterMethods, JobMethods, RunMethods, SweepMethods, LawMethods, PlanMethods, ForecastMethods):
    """A home with its cluster, its tracker, its jobs and its laws: a flat list of verbs, a module a noun.

    Args:
        settings: where all of it is; None: from the environment (ESCALA_*), read once.

    A `report` is told, line by line, what is being done. Every method raises EscalaError: what, why, how to fix it.
    """
