"""A law as files: law.json, provenance.json, the points as CSV, plots, and MLflow's pyfunc model."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from escala.contract.errors import LawError
from escala.laws.law import Law

REQUIREMENTS = ("mlflow", "numpy", "pandas")  # of the model on its own; escala's code travels with it


def write_plain(law: Law, provenance: dict[str, Any], directory: Path) -> list[Path]:
    """law.json, provenance.json, points.csv, refused.csv (where any) and plots/*.png. Returns the files."""
    from escala.laws.plots import write_plots

    directory.mkdir(parents=True, exist_ok=True)
    texts = {"law.json": law.to_json(), "provenance.json": json.dumps(provenance, indent=1)}
    texts["points.csv"] = law.points.to_csv(index=False)
    if len(law.refused):
        texts["refused.csv"] = law.refused.to_csv(index_label="row")
    for name, text in texts.items():
        (directory / name).write_text(text)
    return [*(directory / name for name in texts), *write_plots(law, directory / "plots")]


def write_model(law_json: Path, directory: Path) -> None:
    """An MLflow pyfunc model of a law.json in `directory`, loadable where escala is not installed."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ParamSchema, ParamSpec

    package = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="escala-code-") as stage:
        code = Path(stage) / "escala"
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        with (
            warnings.catch_warnings()
        ):  # it wants an example of the input, to infer a schema that we do not have
            warnings.simplefilter("ignore", UserWarning)
            mlflow.pyfunc.save_model(
                str(directory),
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"law": str(law_json)},
                pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
                code_paths=[str(code)],
                signature=ModelSignature(params=ParamSchema([ParamSpec("level", "double", 0.9)])),
            )


def export(law: Law, provenance: dict[str, Any], directory: Path) -> list[Path]:
    """All files but the MLflow model into a new or empty directory. Raises LawError where it is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise LawError(f"{directory} is there already, and is not empty.", "Choose a new directory.")
    return write_plain(law, provenance, directory)
