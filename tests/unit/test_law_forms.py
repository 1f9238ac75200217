"""A form of a law is one file: a new one is fitted, asked, planned and stored without a change elsewhere."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import LawError
from escala.laws import Law, fit_law, forms
from escala.laws.files import read_points_file
from escala.laws.form import Form, Term
from escala.laws.inputs import COMPUTE_FLOPS, TOKENS, Input
from escala.laws.queries import compare_laws, predict_law
from escala.laws.reference import Cache, Stored
from escala.settings import Settings

LAWS = Path(forms.__file__).parents[1]
NEW_FORM = """
from escala.laws.form import D_TERM, N_TERM, Form, Term
from escala.laws.inputs import Input

LAYERS = Input("layers", "layers of the model", "layers", 24, smallest=1.0)
FORM = Form(
    "depth",
    "L_inf + a N^-alpha + b D^-beta + g layers^-gamma",
    (N_TERM, D_TERM, Term("g", "gamma", LAYERS)),
    no_split=("Form depth does not say what layers cost.", "Fit form nd at the depth that you will train."),
)
"""


@pytest.fixture
def depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Form]:
    """A form from one new file of the package."""
    (tmp_path / "depth_form.py").write_text(NEW_FORM)
    monkeypatch.setattr(forms, "__path__", [*forms.__path__, str(tmp_path)])
    forms.discover()
    yield forms.get_form("depth")
    del forms.FORMS["depth"]
    forms.known_inputs.cache_clear()


def table(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n_active": 10 ** rng.uniform(6, 9, n), "tokens": 10 ** rng.uniform(8, 11, n)})
    frame["layers"] = rng.choice([2.0, 4.0, 8.0, 16.0, 32.0], n)
    clean = 1.8 + 480 * frame.n_active**-0.35 + 2000 * frame.tokens**-0.37 + 1.5 * frame.layers**-0.9
    return frame.assign(loss_nats=clean * np.exp(0.002 * rng.standard_normal(n)))


def home_of(law: Law, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **provenance: object) -> None:
    """A home that has the law as mine@1, its champion."""
    uri = "http://127.0.0.1:9"  # nothing listens there
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    cache = Cache(tmp_path / "home", uri)
    cache.put(Stored("mine", 1, law, {"by": "somebody", "created_at": 0.0, "points": 60, **provenance}))
    cache.set_champion("mine", 1)


def test_a_new_form_from_one_file_does_all_that_a_law_does(
    depth: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "points.csv"
    table().rename(columns={"layers": "L"}).to_csv(file, index=False)
    points = read_points_file(file, {"L": "layers"}).points
    law = fit_law(points, "depth", bootstrap=60)
    assert law.healthy, law.findings
    low, high = law.intervals()["gamma"]
    assert low < 0.9 < high
    again = Law.from_json(law.to_json())
    assert again.parameters == law.parameters
    assert again.backtest().error < 0.01
    assert any(
        "layers" in found for found in fit_law(points.assign(layers=8.0), "depth", bootstrap=0).findings
    )
    assert any(
        "units: layers" in f for f in fit_law(points.assign(layers=0.1), "depth", bootstrap=0).findings
    )
    with pytest.raises(LawError, match="what layers cost"):
        law.optimum(1e21)
    home_of(law, tmp_path, monkeypatch)
    at = {"n_active": 1e9, "tokens": 2e10, "layers": 24.0}
    expected = law.predict(0.9, **at)
    assert predict_law(Settings(), "mine", at).prediction == expected
    asked = [word for name, value in at.items() for word in ("--at", f"{name}={value:g}")]
    said = json.loads(CliRunner().invoke(app, ["laws", "predict", "mine", *asked, "--json"]).stdout)
    assert (said["loss_nats"], said["low_nats"]) == (expected.loss_nats, expected.low_nats)
    with pytest.raises(LawError, match="needs layers") as found:
        predict_law(Settings(), "mine", {"n_active": 1e9, "tokens": 2e10})
    assert "layers (layers of the model)" in found.value.hint


@pytest.mark.parametrize("form", sorted(forms.FORMS))
def test_every_form_is_asked_by_at(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = forms.FORMS[form]
    rng = np.random.default_rng(1)
    points = pd.DataFrame({name: 10 ** rng.uniform(8, 10, 30) for name in chosen.needs("n_active")})
    if chosen.mix is not None:
        points["n_total"] = points["n_active"] * rng.choice([1.0, 4.0, 16.0], 30)
    law = fit_law(points.assign(loss_nats=2.0 + rng.uniform(0, 1, 30)), form, bootstrap=0)
    home_of(law, tmp_path, monkeypatch)
    at = {name: float(points[name].iloc[0]) for name in law.inputs}
    words = [word for name, value in at.items() for word in ("--at", f"{name}={value!r}")]
    done = CliRunner().invoke(app, ["laws", "predict", "mine", *words, "--json"])
    assert json.loads(done.stdout)["loss_nats"] == law.predict(**at).loss_nats
    with pytest.raises(LawError, match="needs") as found:
        law.predict()
    for name in law.inputs:
        assert str(forms.known_inputs()[name]) in found.value.hint
    with pytest.raises(LawError, match="no input seconds") as found:
        law.predict(**at, seconds=1.0)
    assert str(forms.known_inputs()[law.inputs[0]]) in found.value.hint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--at", "tokens"], "NAME=VALUE"),
        (["--at", "tokens=many"], "no number"),
        (["--tokens", "1e9", "--at", "tokens=1e9"], "given twice"),
    ],
)
def test_at_that_says_nothing_is_refused(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["laws", "predict", "mine", *words])
    assert isinstance(done.exception, LawError)
    assert said in done.exception.message


def test_a_form_says_why_it_splits_no_budget_and_shares_no_name() -> None:
    one = Form("one", "L_inf + a C^-alpha", (Term("a", "alpha", COMPUTE_FLOPS),))
    with pytest.raises(ValueError, match="no_split"):
        forms.register(one)
    nd = forms.get_form("nd")
    with pytest.raises(ValueError, match="another form"):
        forms.register(Form("nd", "another", nd.terms))
    miles = Input("tokens", "miles", "miles", 1.0)
    with pytest.raises(ValueError, match="another input tokens"):
        forms.register(Form("far", "far", (Term("b", "beta", miles),), no_split=("far", "far")))
    assert set(forms.FORMS) >= {"nd", "ndt", "moe", "moe_cf", "c", "joules"}
    with pytest.raises(LawError, match="no form 'x'"):
        forms.get_form("x")


def test_other_inputs_held_a_form_is_one_of_n_and_d() -> None:
    theta = {
        "L_inf": 1.8,
        "a": 480.0,
        "alpha": 0.35,
        "b": 2000.0,
        "beta": 0.37,
        "c": 5.0,
        "zeta": 0.5,
        "rho": 0.5,
    }
    plain = forms.get_form("nd").reduced(theta, {})
    at_t = forms.get_form("ndt").reduced(theta, {"context_tokens": 2048.0})
    mixture = forms.get_form("moe").reduced(theta, {"n_total_over_active": 8.0})
    assert at_t.constant == 1.8 + 5.0 * 2048.0**-0.5
    assert (at_t.a, at_t.b) == (plain.a, plain.b)
    assert mixture.a == 480.0 * 8.0 ** (-0.35 * 0.5)
    theta_BP = np.array([[1.8, 480.0, 2000.0, 0.35, 0.37], [1.8, 0.0, 2000.0, 0.35, 0.37]])
    assert forms.get_form("nd").interior(theta_BP).tolist() == [True, False]
    assert forms.get_form("ndt").term_of(TOKENS.name) == forms.get_form("nd").token_term


def test_no_module_of_laws_tests_the_name_of_a_form() -> None:
    names = set(forms.FORMS)
    for path in LAWS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                named = {"form_name"} & attributes or names & words
                assert not named, f"{path.name}:{node.lineno}"


def test_laws_of_compute_and_of_n_and_d_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home_of(fit_law(table(), bootstrap=0), tmp_path, monkeypatch)
    cache = Cache(tmp_path / "home", "http://127.0.0.1:9")
    cache.put(Stored("compute", 1, fit_law(table(), "c", bootstrap=0), {}))
    settings = Settings()
    for first, second in (("mine@1", "compute@1"), ("compute@1", "mine@1")):
        found = compare_laws(settings, first, second)
        assert found.disagreement is not None
        assert 0 < found.disagreement < 0.5
