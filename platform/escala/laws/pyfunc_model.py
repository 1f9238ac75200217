"""The law as an MLflow pyfunc model (models from code): columns of a DataFrame in, losses with intervals out.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(frame, params={"level": 0.9})`, where `frame` has the
law's inputs: n_active, tokens, ... Any other column of the law's inputs only counts for the extrapolation.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from escala.laws.forms import known_inputs
from escala.laws.law import Law


class LawModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is not followed: its base is Any
    """Loss in nats per token, its predictive interval, and how far the point lies outside the data."""

    def load_context(self, context: Any) -> None:
        """Read law.json."""
        self._law = Law.from_json(Path(context.artifacts["law"]).read_text())

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row for each row: loss_nats, low_nats, high_nats (NaN: the law has no intervals), farthest (1: inside)."""
        level = float((params or {}).get("level", 0.9))
        known = [name for name in known_inputs() if name in model_input]
        rows = []
        for point in model_input[known].to_dict("records"):
            answer = self._law.predict(level, **{str(name): float(value) for name, value in point.items()})
            rows.append(
                {
                    "loss_nats": answer.loss_nats,
                    "low_nats": math.nan if answer.low_nats is None else answer.low_nats,
                    "high_nats": math.nan if answer.high_nats is None else answer.high_nats,
                    "farthest": answer.farthest,
                }
            )
        return pd.DataFrame(rows, index=model_input.index)


mlflow.models.set_model(LawModel())
