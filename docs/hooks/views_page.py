"""reference/views.md: the answers of `Escala`'s methods and of `--json`, field by field."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

from docs.hooks.markdown import page, prose, table
from escala import views
from escala.views.base import View

FIELD = re.compile(r"^    (\w+): (.+?)(?: = [^#]*)?(?:  # (.*))?$")
HEAD = """# Views

What [`Escala`'s methods](python.md) answer with, and what `--json` prints (`view.model_dump(mode="json")`): frozen, and
declared by hand, so that a program can rely on them.
"""


def views_page() -> str:
    """The page."""
    _, _, told = (views.__doc__ or "").partition("\n\n")
    return page(HEAD, prose(told), *(part for module in modules() for part in _module(module)))


def modules() -> list[ModuleType]:
    """The modules of views, by name; not the one of what they share."""
    names = sorted(each.name for each in pkgutil.iter_modules(views.__path__))
    return [importlib.import_module(f"escala.views.{name}") for name in names if name != "base"]


def _module(module: ModuleType) -> Iterator[str]:
    yield f"## {module.__name__}"
    yield prose(module.__doc__)
    for view in vars(module).values():
        if isinstance(view, type) and issubclass(view, View) and view.__module__ == module.__name__:
            yield f"### {view.__name__}"
            yield prose(view.__doc__)
            yield table(("field", "type", ""), fields(view))


def fields(view: type[View]) -> Iterator[tuple[str, str, str]]:
    """(name, type, what the line's comment says) of a view's own and inherited fields."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(view.__mro__):
        if issubclass(cls, View):
            for line in inspect.getsource(cls).splitlines():
                if said := FIELD.match(line):
                    found[said[1]] = (said[2], said[3] or "")
    for name, field in view.model_fields.items():
        if not field.exclude:
            kind, comment = found[name]
            yield f"`{name}`", f"`{kind}`", field.description or comment
