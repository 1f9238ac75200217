"""Laws as `name@version` in MLflow: append-only, with provenance, the champion under the alias `champion`.

One run per version holds parameters, intervals and health, law.json, the points, plots and a pyfunc model; the
registered model's version points at that run. MLflow begins every run as RUNNING; a law's is set to KILLED at once, and
to FINISHED when all of it is there, so that a client that dies leaves no run RUNNING (`close_abandoned` ends those of
the moment between). The first healthy version becomes champion by itself; after that the champion changes only by
`promote`, so that nobody's answers change because somebody else fitted a law.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from escala.contract.errors import LawError, NotFoundError
from escala.laws import note
from escala.laws.audit import AuditedPoint, plain
from escala.laws.files import ATTENTION
from escala.laws.law import Law
from escala.laws.provenance import FORMAT, upgraded
from escala.laws.reference import Cache, Stored, parse
from escala.laws.report import html
from escala.settings import Settings
from escala.tracking.lineage import code_fingerprint, fingerprint
from escala.tracking.mlflow_tracker import KEY_TAG, MlflowTracker, open_client, tracker_error
from escala.tracking.pages import has_running_run

if TYPE_CHECKING:
    from escala.tracking.tracker import Tracker

ALIAS = "champion"
KEY = "law"  # a law's run has the key law:HOST:PID:RANDOM, of the client that writes it
ABANDONED_SECONDS = 60.0  # a law's run is RUNNING for a moment; one that is so for longer has lost its client
KIND, OUR_KIND = "escala.kind", "law"
SUMMARY = "escala.summary"  # of a version, JSON
FINGERPRINTS = ("tokenizer_fingerprint", "evaluation_fingerprint")


@dataclass(frozen=True)
class LawVersion:
    """One row of the registry."""

    name: str
    version: int
    champion: bool
    healthy: bool
    form: str
    size: str
    points: int
    by: str
    created_at: float  # Unix seconds
    run_id: str  # of the law's own run

    @property
    def reference(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"


class Registry:
    """The laws of one tracker, with the cache of one home."""

    def __init__(self, tracker_uri: str, home: Path) -> None:
        self._uri = tracker_uri
        self._cache = Cache(home, tracker_uri)

    def save(
        self,
        law: Law,
        name: str,
        *,
        experiment: str,
        by: str,
        sources: Sequence[str] = (),
        configuration: Mapping[str, Any] | None = None,
        audited: Sequence[AuditedPoint] = (),
        stated: Sequence[str] = (),
    ) -> int:
        """Store a law as the next version of `name`; see the module for what that holds.

        Args:
            experiment: where the law's run goes.
            by: who fitted it.
            sources: where the points came from, in words (a file with its fingerprint, a sweep's id). The ids of
                the measured runs are read from the points' column run_id.
            configuration: what all measured runs have in common, nested; None: not known.
            audited: where the recipe was audited.
            stated: the dotted keys of it that a sweep's space states.

        Raises LawError for a bad name, ClusterError where the tracker does not answer.
        """
        if parse(name).version is not None:
            raise LawError(f"'{name}' states a version.", "The registry counts them; give the name alone.")
        provenance = _provenance(law, by, sources, configuration, stated)
        provenance |= {"audit": plain(audited)} if audited else {}
        with self._client() as client, tempfile.TemporaryDirectory(prefix="escala-law-") as directory:
            _ensure_model(client, name)
            tracker = MlflowTracker(self._uri)
            tags = {KIND: OUR_KIND, "escala.law": name, **_tags(law, provenance)}
            _close_abandoned(client, experiment)
            key, title = f"{KEY}:{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}", f"law {name}"
            run_id = tracker.start(key, experiment, title, {}, {})
            tracker.finish(run_id, "KILLED")  # until all of it is there
            provenance["law_run_id"] = run_id
            status = "FAILED"
            try:
                tracker.start(key, experiment, title, tags, _params(law))
                _write_artifacts(law, provenance, Path(directory))
                client.log_artifacts(run_id, directory)
                client.log_inputs(run_id, datasets=[note.dataset(law, provenance)])
                _log_metrics(tracker, run_id, law)
                status = "FINISHED"
            finally:
                tracker.finish(run_id, status)
            source = f"{client.get_run(run_id).info.artifact_uri}/model"
            made = client.create_model_version(
                name, source, run_id, tags=_summary(law, provenance), await_creation_for=None
            )
            version = int(made.version)
            _name(client, run_id, law, f"{name}@{version}", provenance)
            pngs = {path.stem: path.read_bytes() for path in sorted(Path(directory).glob("plots/*.png"))}
            client.log_text(run_id, html(law, f"{name}@{version}", provenance, pngs=pngs), note.REPORT)
            champion = _champion(client, name)
            if law.healthy and champion is None:
                client.set_registered_model_alias(name, ALIAS, str(version))
                champion = version
        self._cache.put(Stored(name, version, law, provenance))
        self._cache.set_champion(name, champion)
        return version

    def load(self, text: str, *, refresh: bool = False) -> Stored:
        """The law NAME@VERSION, or NAME's champion. From this home's cache where it has it; `refresh` asks the
        tracker which version is champion now.

        Raises NotFoundError for an unknown name or version, or where there is no champion.
        """
        asked = parse(text)
        if not refresh and (known := self._cache.find(asked)) is not None:
            return known
        version = asked.version or self._read_champion(asked.name)
        return self._cache.get(asked.name, version) or self._download(asked.name, version)

    def champion(self, name: str) -> int | None:
        """The version that is champion, as this home last read it."""
        return self._cache.champion(name)

    def versions(self, name: str | None = None) -> list[LawVersion]:
        """Every version of every law (or of `name`), by name, newest first; champions are remembered here."""
        with self._client(name) as client:
            models = [client.get_registered_model(name)] if name else _all_models(client)
            found = []
            for model in models:
                champion = _alias(model)
                self._cache.set_champion(model.name, champion)
                rows = client.search_model_versions(f"name='{model.name}'", max_results=1000)
                found += [_row(row, champion) for row in rows if KIND in row.tags]
        return sorted(found, key=lambda row: (row.name, -row.version))

    def close_abandoned(self, experiment: str) -> None:
        """End the laws' runs that a client which died left RUNNING. Raises ClusterError. Where there is none, as nearly
        always, MLflow's client is not imported.
        """
        try:
            running = has_running_run(self._uri, experiment, KEY_TAG, f"{KEY}:")
        except OSError:  # MLflow's client may get through: it knows proxies and certificates
            running = None
        if running is False:
            return
        with self._client() as client:
            _close_abandoned(client, experiment)

    def promote(self, text: str, force: bool = False) -> Stored:
        """Make NAME@VERSION the champion. Raises LawError for an unhealthy law without `force`."""
        asked = parse(text)
        if asked.version is None:
            raise LawError(f"'{text}' states no version.", f"Say which one, e.g. {asked.name}@2.")
        stored = self.load(text)
        if not stored.law.healthy and not force:
            raise LawError(
                f"{stored.reference} is not healthy: {'; '.join(stored.law.findings)}.",
                "Measure what it lacks and fit again, or insist with --force.",
            )
        with self._client(str(asked)) as client:
            client.set_registered_model_alias(asked.name, ALIAS, str(asked.version))
        self._cache.set_champion(asked.name, asked.version)
        return stored

    def _read_champion(self, name: str) -> int:
        with self._client(name) as client:
            version = _alias(client.get_registered_model(name))
        self._cache.set_champion(name, version)
        if version is None:
            raise NotFoundError(
                f"the law {name} has no champion: none of its versions is healthy",
                f"`escala laws show {name}@1` says why; ask a version by its number, or promote one with --force",
            )
        return version

    def _download(self, name: str, version: int) -> Stored:
        with self._client(f"{name}@{version}") as client:
            row = client.get_model_version(name, str(version))
            if KIND not in row.tags:
                raise NotFoundError(f"{name}@{version} in the registry is no law", "`escala laws list`")
            with tempfile.TemporaryDirectory(prefix="escala-law-") as directory:
                law = Path(client.download_artifacts(row.run_id, "law.json", directory)).read_text()
                made = Path(client.download_artifacts(row.run_id, "provenance.json", directory)).read_text()
        stored = Stored(name, version, Law.from_json(law), upgraded(json.loads(made)))
        self._cache.put(stored)
        return stored

    @contextmanager
    def _client(self, wanted: str | None = None) -> Iterator[Any]:
        """MLflow's client; what it raises becomes NotFoundError (of `wanted`) or ClusterError."""
        client = open_client(self._uri)
        from mlflow.exceptions import MlflowException

        try:
            yield client
        except MlflowException as error:
            if wanted and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFoundError(
                    f"there is no law {wanted} in the registry", "`escala laws list` shows them"
                ) from error
            raise tracker_error(self._uri, error) from error
        except OSError as error:  # requests' errors are OSErrors
            raise tracker_error(self._uri, error) from error


def load_law(reference: str, *, settings: Settings | None = None, refresh: bool = False) -> Law:
    """The law "NAME@VERSION", or the champion of "NAME", from this home's cache or the tracker.

    Args:
        settings: of the home; None: from the environment.

    Raises NotFoundError for an unknown law, LawError for a bad name, ClusterError for a tracker that is away.
    """
    settings = Settings() if settings is None else settings
    return Registry(settings.tracker, settings.home).load(reference, refresh=refresh).law


def _close_abandoned(client: Any, experiment: str) -> None:
    """Set to KILLED what a client that died left RUNNING between the two calls that begin a law's run."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return
    wanted = f"attributes.status = 'RUNNING' and tags.`{KEY_TAG}` LIKE '{KEY}:%'"
    for run in client.search_runs([found.experiment_id], wanted, max_results=1000):
        old = time.time() - run.info.start_time / 1000 > ABANDONED_SECONDS
        if old or _client_is_gone(run.data.tags[KEY_TAG]):
            client.set_terminated(run.info.run_id, "KILLED")


def _client_is_gone(key: str) -> bool:
    """Whether the process that began the run was on this machine and has ended."""
    _, host, pid, _ = key.split(":")
    return host == socket.gethostname() and not psutil.pid_exists(int(pid))


def _name(client: Any, run_id: str, law: Law, reference: str, provenance: dict[str, Any]) -> None:
    """What a person reads of the run and of the model's version."""
    text = note.note(law, reference, provenance)
    name, _, version = reference.partition("@")
    client.update_run(run_id, name=note.headline(law, reference))
    client.set_tag(run_id, "mlflow.note.content", note.within(text, note.OF_A_RUN))
    client.update_model_version(name, version, note.within(text, note.OF_A_VERSION))


def _provenance(
    law: Law,
    by: str,
    sources: Sequence[str],
    configuration: Mapping[str, Any] | None,
    stated: Sequence[str] = (),
) -> dict[str, Any]:
    points = law.points
    code = code_fingerprint()
    runs = points["run_id"].dropna().astype(str).unique().tolist() if "run_id" in points else []
    data = {
        name: str(points[name].dropna().iloc[0])
        for name in (*FINGERPRINTS, ATTENTION)
        if name in points and points[name].notna().any()
    }  # one: fit_law saw to it
    return {
        "format": FORMAT,
        "by": by,
        "created_at": time.time(),
        "sources": list(sources),
        "run_ids": runs,
        "points": len(points),
        "refused": len(law.refused),
        "code_fingerprint": code.fingerprint,
        "git_commit": code.git_commit,
        "git_dirty": code.git_dirty,
        "law_fingerprint": fingerprint(json.loads(law.to_json())),
        "configuration": None if configuration is None else dict(configuration),
        "stated": list(stated),
        **data,
    }


def _summary(law: Law, provenance: dict[str, Any]) -> dict[str, str]:
    """Tags of the model version: what `list` shows without reading a file, as one JSON."""
    summary = {"form": law.form_name, "size": law.size, "healthy": law.healthy}
    summary |= {key: provenance[key] for key in ("points", "by", "created_at")}
    return {KIND: OUR_KIND, SUMMARY: json.dumps(summary)}


def _tags(law: Law, provenance: dict[str, Any]) -> dict[str, str]:
    """Tags of the law's run, for people and for MLflow's search; nothing reads them back."""
    told = {k: v for k, v in provenance.items() if v is not None and not isinstance(v, list | dict)}
    told |= {"form": law.form_name, "size": law.size, "healthy": str(law.healthy).lower()}
    lists = {"sources": provenance["sources"], "run_ids": provenance["run_ids"], "findings": law.findings}
    found = {k: str(v) for k, v in told.items()} | {k: json.dumps(v) for k, v in lists.items()}
    return {KIND: OUR_KIND, **{f"escala.{k}": v for k, v in found.items()}}


def _params(law: Law) -> dict[str, str]:
    """What was asked of the fit."""
    settings = {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in law.settings.items()}
    objective = {"space": law.objective.space, "huber_delta": repr(law.objective.huber_delta)}
    return {"form": law.form_name, "formula": law.form.formula, "size": law.size, **objective, **settings}


def _log_metrics(tracker: Tracker, run_id: str, law: Law) -> None:
    """Parameters and their 90 % intervals, the objective, health as 0 or 1."""
    from escala.tracking.tracker import Metric

    values = {"objective_value": law.objective_value, "healthy": float(law.healthy), **law.parameters}
    if len(law.replicates_BP):
        for name, (low, high) in law.intervals(0.9).items():
            values |= {f"{name}_low": low, f"{name}_high": high}
    now = int(time.time() * 1000)
    tracker.metrics(run_id, [Metric(name, value, 0, now) for name, value in values.items()])


def _write_artifacts(law: Law, provenance: dict[str, Any], directory: Path) -> None:
    from escala.laws.export import write_model, write_plain

    write_plain(law, provenance, directory)
    write_model(directory / "law.json", directory / "model")


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={KIND: OUR_KIND})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if client.get_registered_model(name).tags.get(KIND) != OUR_KIND:
            raise LawError(
                f"The registry has a model {name} that is no law.", "Choose another name."
            ) from error


def _all_models(client: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_registered_models(f"tags.`{KIND}` = '{OUR_KIND}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _champion(client: Any, name: str) -> int | None:
    return _alias(client.get_registered_model(name))


def _alias(model: Any) -> int | None:
    version = dict(model.aliases).get(ALIAS)
    return None if version is None else int(version)


def _row(row: Any, champion: int | None) -> LawVersion:
    version = int(row.version)
    said = json.loads(row.tags[SUMMARY]) if SUMMARY in row.tags else _summary_of_0_1(row.tags)
    return LawVersion(name=row.name, version=version, champion=version == champion, run_id=row.run_id, **said)


def _summary_of_0_1(tags: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a version that escala 0.1 registered, a text a tag."""
    return {
        "healthy": tags["escala.healthy"] == "true",
        "form": tags["escala.form"],
        "size": tags["escala.size"],
        "points": int(tags["escala.points"]),
        "by": tags["escala.by"],
        "created_at": float(tags["escala.created_at"]),
    }
