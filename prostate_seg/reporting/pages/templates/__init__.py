"""Jinja2 templates of the report page and the model card, and the formatting of their values; all text is escaped."""

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import prostate_seg

MISSING = "\N{EN DASH}"
"""Shown instead of a number that does not exist."""


def render_html(template: str, **values: Any) -> str:
    """Render a template of HTML; the style sheet and the script become part of the page, the script allowed by its hash."""
    environment = _environment()
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, f"report.{kind}")[0] for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script), script_sha256=digest, **values
    )


def render_markdown(template: str, **values: Any) -> str:
    """Render a template of Markdown."""
    text = _environment(finalize=escape_markdown).get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(value: Any) -> Any:
    """Escape a value as Markdown on one line; `Markup` is left as it is."""
    if isinstance(value, Markup):
        return value
    line = re.sub(r"\s+", " ", str(value))
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", str(escape(line))))


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals; a dash for None and NaN."""
    return MISSING if value is None or value != value else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(summary: Mapping[str, Any], digits: int = 3) -> str:
    """Format the confidence interval of a summary; a dash if there is none."""
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
    environment.globals["version"] = prostate_seg.__version__
    return environment
