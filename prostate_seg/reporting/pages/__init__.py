"""Templates of the report and the model card, and how their values are written. What comes from data is escaped, always.

The files beside this one belong to its code: `report.html.j2` with `report.css` and `report.js`, and `model_card.md.j2`.
"""

import base64
import hashlib
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

MISSING = "\N{EN DASH}"
"""What stands for a number that does not exist."""


def render_html(template: str, **values: Any) -> str:
    """Fill a template of HTML."""
    environment = _environment()
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_sha256=digest, **values
    )


def render_markdown(template: str, **values: Any) -> str:
    """Fill a template of Markdown."""
    text = _environment(finalize=escape_markdown).get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(value: Any) -> Any:
    """Return a value as Markdown that shows it as it is, on one line; `Markup` stays."""
    if isinstance(value, Markup):
        return value
    words = re.sub(r"\s+", " ", str(value))
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", str(escape(words))))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of digits, or a dash."""
    return MISSING if value is None or value != value else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(summary: Any, digits: int = 3) -> str:
    """Return the interval of a mean, or a dash."""
    low, high = summary["ci95_low"], summary["ci95_high"]
    return MISSING if low is None or low != low else f"{number(low, digits)} to {number(high, digits)}"


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {"num": number, "interval": interval}
    return environment


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
