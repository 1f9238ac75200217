"""Where a law came from: nested JSON; what escala 0.1 registered is read, what a later one did is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from escala.contract.errors import LawError
from escala.laws import Law, fit_law
from escala.laws.law import VERSION
from escala.laws.provenance import FORMAT, in_common, upgraded
from escala.laws.reference import Cache, Stored
from escala.planning.plans import base_of

FLAT = {
    "model.vocab_size": "320",
    "model.moe": "None",
    "data.allow_repeats": "True",
    "data.documents": '["a.txt", "b.txt"]',
    "data.label": "",
    "training.optimizer.learning_rate": "1e-05",
    "training.optimizer.warmup_steps": "None",
    "training.precision": "fp32",
    "training.odd": "[not closed",
}
NESTED = {
    "model": {"vocab_size": 320, "moe": None},
    "data": {"allow_repeats": True, "documents": ["a.txt", "b.txt"], "label": ""},
    "training": {
        "optimizer": {"learning_rate": 1e-05, "warmup_steps": None},
        "precision": "fp32",
        "odd": "[not closed",
    },
}


@pytest.fixture(scope="module")
def law() -> Law:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n_active": 10 ** rng.uniform(6, 9, 20), "tokens": 10 ** rng.uniform(8, 11, 20)})
    clean = 1.8 + 480 * frame.n_active**-0.35 + 2000 * frame.tokens**-0.37
    return fit_law(frame.assign(loss_nats=clean), bootstrap=0)


def test_a_law_of_0_1_in_a_home_is_read(law: Law, tmp_path: Path) -> None:
    cache = Cache(tmp_path, "uri")
    cache.put(Stored("old", 1, law, {}))
    file = tmp_path / "laws" / "old" / "1.provenance.json"
    tracker = json.loads(file.read_text())["tracker"]
    file.write_text(json.dumps({"by": "somebody", "configuration": FLAT, "tracker": tracker}))
    stored = cache.get("old", 1)
    assert stored is not None
    assert stored.provenance == {"format": FORMAT, "by": "somebody", "configuration": NESTED}
    assert json.loads((tmp_path / "laws" / "old" / "1.json").read_text())["version"] == VERSION
    base = base_of(stored)
    assert base["data"] == NESTED["data"]
    assert "optimizer" not in base["training"]
    assert "moe" not in base["model"]
    cache.put(stored)
    again = cache.get("old", 1)
    assert again is not None
    assert again.provenance == stored.provenance


def test_a_later_format_is_refused_by_name(law: Law) -> None:
    with pytest.raises(LawError, match="format 3"):
        upgraded({"format": 3})
    with pytest.raises(LawError, match="format 9"):
        Law.from_json(json.dumps({**json.loads(law.to_json()), "version": 9}))


def test_what_runs_have_in_common_stays_nested() -> None:
    first = {"model": {"layers": 2, "moe": None}, "training": {"seed": 0}, "data": {"a": [1, 2]}}
    second = {"model": {"layers": 2, "moe": {"experts": 4}}, "training": {"seed": 1}, "data": {"a": [1, 2]}}
    assert in_common([first, second]) == {"model": {"layers": 2}, "data": {"a": [1, 2]}}
    assert in_common([first]) == first
    assert in_common([]) == {}
