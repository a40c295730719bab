"""Removes secrets from every text that a store, a log artifact or DS_VERSION.json gets.

Three nets, each for what the others miss: the values of environment variables and settings with secret-looking names,
wherever they occur; what follows such a name in a text; and shapes that only credentials have. Paths are no secrets.
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
"""Shorter values of secret-looking variables are not searched for in texts: `token=1` would redact every 1."""
_SHORTEST_WORD = 8
"""A value of letters alone, or digits alone, is searched for from this length on, and only as a whole word."""
_SHORTEST_KEY = 16
"""Variables NAME_KEY hold secrets when they look random: at least this long, with letters and digits."""

_SECRET_ENDINGS = ("password", "passwd", "passphrase", "secret", "token", "apikey", "accesskey", "secretkey", "sshpass")
_SECRET_WORDS = {"pass", "pwd", "auth", "authorization", "credential", "credentials", "passwords", "secrets"}
_KINDS_OF_KEYS = {"api", "access", "private", "signing", "encryption", "account", "storage", "shared", "master", "ssh"}
_ABOUT_A_SECRET = {"file", "files", "path", "dir", "folder", "sock", "socket", "type", "method", "mode", "timeout"}
"""Last words of names that say where a secret lies or how it is used: SSH_AUTH_SOCK, X_TOKEN_FILE, PASSWORD_STORE_DIR."""
_WORKING_FOLDER = {"PWD", "OLDPWD"}
"""Variables of the shell, which are no passwords."""
_COMMON_WORDS = {"prostate", "training", "validation", "patients", "password", "username", "localhost", "postgres"}
"""Values that are never searched for in texts, because every log has them; the names of settings are others."""

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
"""Names with what they stand for; redacted where the name looks secret and the value is no path."""

_SHAPES = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), REDACTED),
    (
        re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.\-]{0,30}://)[^/\s\"'<>]*@"),
        rf"\1{REDACTED}@",
    ),  # user, or user:password, in a URL
    (  # a password with a slash in it; digits after the colon are a port
        re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.\-]{0,30}://)[^/\s:@\"'<>]*:(?!\d{1,5}(?:[/?#\s]|$))[^\s\"'<>]*@"),
        rf"\1{REDACTED}@",
    ),
    (
        re.compile(
            r"([?&](?:[\w\-]*(?:token|signature|credential|secret|password)|(?:\w+[_\-])?key|sig)=)[^&\s\"']+", re.I
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b((?i:bearer|basic)\s+)(?=\S*(?:\d|[a-z][A-Z]))[A-Za-z0-9+/=._\-]{8,}"), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w\-]{15,}|hf_\w{20,}|sk-[\w\-]{20,})"), REDACTED),
    (re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w\-]{10,}|dapi[0-9a-f]{32})\b"), REDACTED),
    (re.compile(r"\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"), REDACTED),  # JSON web token
]


class Redactor:
    """Knows the secrets of this process and takes them out of texts."""

    def __init__(
        self, *, environment: Mapping[str, str] = os.environ, settings: Mapping[str, Any] | None = None
    ) -> None:
        settings = settings or {}
        found = {value for name, value in environment.items() if _is_secret_variable(name, value)}
        found |= set(_secret_settings(settings))
        found |= {part for value in environment.values() for part in _url_passwords(value)}
        known = _COMMON_WORDS | set(_names_in(settings))
        searched = {form for value in found for form in _forms(value) if _is_searched_for(form, known)}
        longest_first = sorted(searched, key=len, reverse=True)  # a longer one may hold a shorter one
        self._values = re.compile("|".join(map(_as_pattern, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        if self._values is not None:
            text = self._values.sub(REDACTED, text)
        for pattern, replacement in _SHAPES:
            text = pattern.sub(replacement, text)
        for pattern in _NAMED:
            text = pattern.sub(_without_value, text)
        return text

    def tree(self, value: Any) -> Any:
        """Return nested dicts and lists without secrets; a secret-looking key loses all that stands below it."""
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
        return _blank(value) if looks_secret(key) else self.tree(value)


def looks_secret(name: str) -> bool:
    """Return whether a variable or key of this name probably holds a secret.

    Names are compared word by word: MONKEY, num_passes and tokenizer are none. Neither is where a secret lies (X_TOKEN_FILE).
    """
    words = [word.lower() for word in re.findall(r"[A-Z]*[a-z0-9]+|[A-Z]+", name)]
    if not words or words[-1] in _ABOUT_A_SECRET or name in _WORKING_FOLDER:
        return False
    if any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    pairs = itertools.pairwise(words)
    return any(first in _KINDS_OF_KEYS and second in ("key", "keys", "tokens") for first, second in pairs)


def is_path(text: str) -> bool:
    """Return whether a text names a place on this machine, or several: below a folder of the root, or there already."""
    return bool(text) and all(map(_names_a_place, filter(None, text.split(os.pathsep))))


def _names_a_place(text: str) -> bool:
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    return os.path.lexists(Path(*path.parts[:2])) if path.is_absolute() else "/" in text and os.path.lexists(path)


def _without_value(found: re.Match[str]) -> str:
    value = found["value"].strip().strip("\"'")
    if looks_secret(found["name"]):
        gap = " " if found["value"].startswith("\n") else ""
        return found[0] if not value or is_path(value) else f"{found['before']}{gap}{REDACTED}"
    return found["before"] + found.re.sub(_without_value, found["value"])  # which may hold names of its own


def _blank(value: Any) -> Any:
    """Return what stood below a secret-looking key without its values; switches, absent values and paths are none."""
    if isinstance(value, Mapping):
        return {key: _blank(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_blank(inner) for inner in value]
    return value if value is None or isinstance(value, bool) or is_path(str(value)) else REDACTED


def _is_secret_variable(name: str, value: str) -> bool:
    is_random = len(value) >= _SHORTEST_KEY and bool(re.search(r"\d", value)) and bool(re.search(r"[A-Za-z]", value))
    return (looks_secret(name) or (name.upper().endswith("_KEY") and is_random)) and not is_path(value)


def _secret_settings(value: Any, *, name: str = "") -> Iterable[str]:
    """Return the values below secret-looking names, also in overrides (`name=value`), and the passwords of URLs."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secret_settings(inner, name=name if looks_secret(name) else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secret_settings(inner, name=name)
    elif looks_secret(name) and value is not None and not isinstance(value, bool) and not is_path(str(value)):
        yield str(value)
    elif isinstance(value, str):
        yield from _url_passwords(value)
        override = re.match(r"[+~]*([\w.@/\-]+)=(.+)", value, re.DOTALL)
        if override:
            yield from _secret_settings(override[2].strip("\"'"), name=override[1])


def _url_passwords(text: str) -> list[str]:
    return re.findall(r"://[^/\s:@]*:(?!\d{1,5}(?:[/?#\s]|$))([^\s@]+)@", text)


def _names_in(tree: Mapping[str, Any]) -> Iterable[str]:
    """Return the names of all settings, and their words."""
    for key, value in tree.items():
        yield from (str(key), *str(key).split("_"))
        if isinstance(value, Mapping):
            yield from _names_in(value)


def _forms(secret: str) -> set[str]:
    """Return how a secret may be written: as it is, line by line, in a URL, in JSON, in YAML and in a shell's quotes."""
    lines = {line.strip() for line in secret.splitlines()} | {secret, unquote(secret)}
    escaped = {json.dumps(form)[1:-1] for form in lines} | {
        json.dumps(form, ensure_ascii=False)[1:-1] for form in lines
    }
    quoted = {form.replace("'", there) for form in lines for there in ("''", "\\'", "'\"'\"'")}
    encoded = {encode(form) for form in lines for encode in (lambda form: quote(form, safe=""), quote, quote_plus)}
    in_lower_case = {re.sub("%..", lambda found: found[0].lower(), form) for form in encoded}
    return lines | escaped | quoted | encoded | in_lower_case


def _is_searched_for(value: str, known: set[str]) -> bool:
    shortest = _SHORTEST_WORD if _is_word(value) else _SHORTEST_SECRET
    return len(value) >= shortest and value != REDACTED and value.lower() not in known and not os.path.lexists(value)


def _is_word(value: str) -> bool:
    return value.isalpha() or value.isdigit()


def _as_pattern(value: str) -> str:
    """Return what finds a value anywhere, also where YAML has broken its line; a mere word is found only as a whole."""
    pattern = re.escape(value).replace(r"\ ", r"\s+")
    return rf"(?<!\w){pattern}(?!\w)" if _is_word(value) else pattern
