"""Nothing secret leaves this process: every text that a store, a log artifact or DS_VERSION.json gets passes through here.

Three nets, each for what the others miss: the values of environment variables and settings with secret-looking names,
wherever they turn up; what follows such a name in a text; and shapes that only credentials have.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = (
    r"pass(?:word|wd|phrase)?|pwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|credentials?"
)
_SECRET_NAME = re.compile(rf"(?:^|[^a-z])(?:{_SECRET_WORDS}|auth)(?:$|[^a-z])", re.IGNORECASE)
_SHORTEST_SECRET = 6
"""Shorter values of secret-looking variables are not searched for in texts: `token=1` would redact every 1."""

_SHAPES = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*://)[^/\s\"'<>]*@"), rf"\1{REDACTED}@"),  # user, or user:password, in a URL
    (
        re.compile(r"([?&](?:[\w\-]*(?:token|signature|credential|key|secret|password)|sig)=)[^&\s\"']+", re.I),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b((?:bearer|basic)\s+)[A-Za-z0-9+/=._\-]{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w\-]{15,}|hf_\w{20,}|sk-[\w\-]{20,})"), REDACTED),
    (re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w\-]{10,}|dapi[0-9a-f]{32})\b"), REDACTED),
    (re.compile(r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"), REDACTED),  # JSON web token
    (
        re.compile(
            rf"((?:^|[^\w])[\w.\-]*?(?:{_SECRET_WORDS})[\w.\-]*[\"']?\s*[:=]\s*)"
            r"(\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;(){}\[\]]+)",
            re.IGNORECASE | re.MULTILINE,
        ),
        rf"\1{REDACTED}",
    ),
]


class Redactor:
    """Knows the secrets of this process and takes them out of texts."""

    def __init__(
        self, *, environment: Mapping[str, str] = os.environ, settings: Mapping[str, Any] | None = None
    ) -> None:
        found = {value for name, value in environment.items() if looks_secret(name)}
        found |= set(_secret_settings(settings or {}))
        found |= {part for value in environment.values() for part in _url_passwords(value)}
        usable = [value for value in found if len(value) >= _SHORTEST_SECRET and value != REDACTED]
        self._values = sorted(usable, key=len, reverse=True)  # a longer one may hold a shorter one

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        for value in self._values:
            text = text.replace(value, REDACTED)
        for pattern, replacement in _SHAPES:
            text = pattern.sub(replacement, text)
        return text

    def tree(self, value: Any) -> Any:
        """Return nested dicts and lists without secrets; a secret-looking key loses its whole value."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._under(str(key), inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(inner) for inner in value]
        return self.text(value) if isinstance(value, str) else value

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy a text file without its secrets."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(source.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")

    def _under(self, key: str, value: Any) -> Any:
        return REDACTED if looks_secret(key) and isinstance(value, (str, int)) else self.tree(value)


def looks_secret(name: str) -> bool:
    """Return whether a variable or key of this name probably holds a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return bool(_SECRET_NAME.search(words.replace("-", "_")))


def _secret_settings(tree: Mapping[str, Any]) -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _secret_settings(value)
        elif isinstance(value, str):
            yield from [value] if looks_secret(str(key)) else _url_passwords(value)


def _url_passwords(text: str) -> list[str]:
    return re.findall(r"://[^/\s:@]*:([^/\s@]+)@", text)
