"""Redaction of secrets in everything that is sent to a tracking store, logged as an artifact or written to DS_VERSION.json.

Three rules: the values of environment variables and settings with secret-looking names, wherever they occur; text that follows
such a name; and text in a form that only credentials have. Paths are no secrets.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REDACTED = "[redacted]"

_SHORTEST_SECRET = 6
"""Shorter values are not searched for: `token=1` would redact every 1."""
_SHORTEST_WORD = 8
"""Shortest value of letters alone, or digits alone, that is searched for, and only as a whole word."""
_SHORTEST_KEY = 16
"""Variables NAME_KEY hold secrets if they look random: at least this long, with letters and digits."""

_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "secretkey", "sshpass")
_SECRET_WORDS = {"pass", "pwd", "auth", "authorization", "credential", "credentials", "passwords", "secrets"}
_KINDS_OF_KEYS = {"api", "access", "private", "signing", "encryption", "account", "storage", "shared", "master", "ssh"}
_ABOUT_A_SECRET = {"file", "files", "path", "dir", "folder", "sock", "socket", "type", "method", "mode", "timeout"}
"""Last words of names that hold the path or use of a secret: SSH_AUTH_SOCK, X_TOKEN_FILE, PASSWORD_STORE_DIR."""
_WORKING_FOLDER = {"PWD", "OLDPWD"}
"""Variables of the shell, which are no passwords."""
_COMMON_WORDS = {"prostate", "training", "validation", "patients", "password", "username", "localhost", "postgres"}
"""Values that are never searched for, because they are common in logs; names of settings are added."""

_NAME = r"(?P<name>(?<![\w.\-])[\w.\-]{0,99}(?:pass|pwd|secret|token|key|auth|credential)[\w.\-]{0,99})"
_VALUE = r"(?:\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s\"',;)\]}]|[,;)\]}](?!\s|$))+"
_NAMED = [
    re.compile(rf"(?P<before>(?P<q>[\"'])[+~]*{_NAME}=)(?P<value>[^\"'\n]*)(?=(?P=q))", re.I),  # 'name=several words'
    re.compile(  # a whole line of YAML or INI, with the lines that continue it
        rf"^(?P<before>(?P<margin>[+\- ]?[ \t]*)(?:- )?[\"']?{_NAME}[\"']?(?::|[ \t]+=)(?:[ \t]+|(?=\n)))"
        r"(?P<value>\"(?:[^\"\\]|\\.)*\"|'[^']*'|(?:[^\s\[\]{},\"'].*)?(?:\n(?P=margin)(?:[ \t]+|- )\S.*)*)",
        re.IGNORECASE | re.MULTILINE,
    ),
    re.compile(rf"(?P<before>--(?P<name>[\w\-]+)[ \t]+)(?P<value>(?!-){_VALUE})", re.I),
    re.compile(rf"(?P<before>{_NAME}[\"']?[ \t]*[:=][ \t]*)(?P<value>\[[^\]\n]*\]|\{{[^}}\n]*\}}|{_VALUE})", re.I),
]
"""Names with their values; redacted if the name looks secret and the value is no path."""

_SCHEME = r"\b[a-zA-Z][a-zA-Z0-9+.\-]{0,30}://"
_QUERY_NAME = r"(?:[\w\-]*(?:token|signature|credential|secret|password)|(?:\w+[_\-])?key|sig)"
_SHAPES = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(rf"({_SCHEME})[^/\s\"'<>]*@"), rf"\1{REDACTED}@"),  # user, or user:password, in a URL
    (  # a password with a slash in it; digits after the colon are a port
        re.compile(rf"({_SCHEME})[^/\s:@\"'<>]*:(?!\d{{1,5}}(?:[/?#\s]|$))[^\s\"'<>]*@"),
        rf"\1{REDACTED}@",
    ),
    (re.compile(rf"([?&]{_QUERY_NAME}=)[^&\s\"']+", re.I), rf"\1{REDACTED}"),
    (re.compile(r"\b((?i:bearer|basic)\s+)(?=\S*(?:\d|[a-z][A-Z]))[A-Za-z0-9+/=._\-]{8,}"), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w\-]{15,}|hf_\w{20,}|sk-[\w\-]{20,})"), REDACTED),
    (re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w\-]{10,}|dapi[0-9a-f]{32})\b"), REDACTED),
    (re.compile(r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"), REDACTED),  # JSON web token
]


class Redactor:
    """Removes the secrets of this process from text."""

    def __init__(
        self, *, environment: Mapping[str, str] = os.environ, settings: Mapping[str, Any] | None = None
    ) -> None:
        settings = settings or {}
        found = set(_secret_settings(settings))
        for name, value in environment.items():
            is_random = len(value) >= _SHORTEST_KEY and re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
            is_secret = looks_secret(name) or (name.upper().endswith("_KEY") and is_random)
            found |= {value} if is_secret and not is_path(value) else set()
            found |= set(_url_passwords(value))
        common = _COMMON_WORDS | set(_names_in(settings))
        forms = {
            form
            for value in found
            for form in _forms(value)
            if len(form) >= (_SHORTEST_WORD if _is_word(form) else _SHORTEST_SECRET)
            and form != REDACTED
            and form.lower() not in common
            and not os.path.lexists(form)
        }
        longest_first = sorted(forms, key=len, reverse=True)  # a longer form may contain a shorter one
        self._values = re.compile("|".join(map(_as_pattern, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """Return text without secrets."""
        if self._values is not None:
            text = self._values.sub(REDACTED, text)
        for pattern, replacement in _SHAPES:
            text = pattern.sub(replacement, text)
        for pattern in _NAMED:
            text = pattern.sub(_without_value, text)
        return text

    def tree(self, value: Any, *, is_secret: bool = False) -> Any:
        """Return nested dicts and lists without secrets; below a secret-looking key all values but booleans, None and paths."""
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): self.tree(inner, is_secret=is_secret or looks_secret(str(key)))
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.tree(inner, is_secret=is_secret) for inner in value]
        if is_secret:
            return REDACTED if _is_secret_value(value) else value
        return self.text(value) if isinstance(value, str) else value

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy a text file without its secrets."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(source.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


def looks_secret(name: str) -> bool:
    """Return whether a variable or key of this name probably holds a secret.

    Names are compared word by word, so that MONKEY, num_passes and tokenizer do not match, nor does X_TOKEN_FILE, a path.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]*[a-z0-9]+|[A-Z]+", name)]
    if not words or words[-1] in _ABOUT_A_SECRET or name in _WORKING_FOLDER:
        return False
    if any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    pairs = itertools.pairwise(words)
    return any(first in _KINDS_OF_KEYS and second in ("key", "keys", "tokens") for first, second in pairs)


def is_path(text: str) -> bool:
    """Return whether text is a path, or several: below an existing folder of the root, or existing relative to here."""

    def is_one(part: str) -> bool:
        path = Path.home() / part[2:] if part.startswith("~/") else Path(part)
        return os.path.lexists(Path(*path.parts[:2])) if path.is_absolute() else "/" in part and os.path.lexists(path)

    return bool(text) and all(map(is_one, filter(None, text.split(os.pathsep))))


def _without_value(found: re.Match[str]) -> str:
    """Return a match of _NAMED with its value redacted if the name looks secret, else with the names inside its value."""
    value = found["value"].strip().strip("\"'")
    if looks_secret(found["name"]):
        gap = " " if found["value"].startswith("\n") else ""
        return found[0] if not value or is_path(value) else f"{found['before']}{gap}{REDACTED}"
    return found["before"] + found.re.sub(_without_value, found["value"])


def _is_secret_value(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and not is_path(str(value))


def _secret_settings(value: Any, *, name: str = "") -> Iterable[str]:
    """Yield the values below secret-looking names, also in overrides (`name=value`), and the passwords of URLs."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secret_settings(inner, name=name if looks_secret(name) else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secret_settings(inner, name=name)
    elif looks_secret(name) and _is_secret_value(value):
        yield str(value)
    elif isinstance(value, str):
        yield from _url_passwords(value)
        override = re.match(r"[+~]*([\w.@/\-]+)=(.+)", value, re.DOTALL)
        if override:
            yield from _secret_settings(override[2].strip("\"'"), name=override[1])


def _url_passwords(text: str) -> list[str]:
    return re.findall(r"://[^/\s:@]*:(?!\d{1,5}(?:[/?#\s]|$))([^\s@]+)@", text)


def _names_in(tree: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names of all settings, and their words."""
    for key, value in tree.items():
        yield from (str(key), *str(key).split("_"))
        if isinstance(value, Mapping):
            yield from _names_in(value)


def _forms(secret: str) -> set[str]:
    """Return a secret as written plainly, line by line, in a URL, in JSON, in YAML and in a shell's quotes."""
    lines = {line.strip() for line in secret.splitlines()} | {secret, unquote(secret)}
    escaped = {json.dumps(form, ensure_ascii=is_ascii)[1:-1] for form in lines for is_ascii in (True, False)}
    quoted = {form.replace("'", mark) for form in lines for mark in ("''", "\\'", "'\"'\"'")}
    encoded = {text for form in lines for text in (quote(form, safe=""), quote(form), quote_plus(form))}
    in_lower_case = {re.sub("%..", lambda found: found[0].lower(), form) for form in encoded}
    return lines | escaped | quoted | encoded | in_lower_case


def _is_word(value: str) -> bool:
    return value.isalpha() or value.isdigit()


def _as_pattern(value: str) -> str:
    """Return a pattern that finds a value, also across a line break of YAML; a mere word only as a whole word."""
    pattern = re.escape(value).replace(r"\ ", r"\s+")
    return rf"(?<!\w){pattern}(?!\w)" if _is_word(value) else pattern
