"""The forms of a law, by name. A form is one module of this package that defines `FORM`; nothing else names it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from escala.contract.errors import LawError
from escala.laws.form import Form
from escala.laws.inputs import COMMON, SIZE, Input

FORMS: dict[str, Form] = {}


def register(form: Form) -> None:
    """Add a form. Raises ValueError for a name or an input's name that stands for something else already."""
    if FORMS.get(form.name, form) != form:
        raise ValueError(f"there is another form {form.name}")
    if form.no_split is None and (form.size_term is None or form.token_term is None):
        raise ValueError(f"form {form.name} has no N or no D: say in no_split why it splits no budget")
    for each in form.inputs:
        if each is not SIZE and known_inputs().get(each.name, each) != each:
            raise ValueError(f"form {form.name} has another input {each.name}")
    FORMS[form.name] = form
    known_inputs.cache_clear()


def get_form(name: str) -> Form:
    """The form called `name`; raises LawError for an unknown one."""
    if name not in FORMS:
        raise LawError(f"There is no form '{name}'.", f"Choose one of: {', '.join(FORMS)}.")
    return FORMS[name]


@cache
def known_inputs() -> Mapping[str, Input]:
    """Every input of every form, by name; the common ones first."""
    own = (each for form in FORMS.values() for each in form.inputs if each is not SIZE)
    return MappingProxyType({each.name: each for each in (*COMMON, *own)})


def discover() -> None:
    """Register the form of every module of this package."""
    for module in iter_modules(__path__):
        register(import_module(f"{__name__}.{module.name}").FORM)


discover()
