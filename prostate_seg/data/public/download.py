"""Downloading one large file: resumed after any stop, tried again where that helps, and in place only when it is complete.

What has arrived lies in NAME.part beside the target; the last byte makes it NAME. Waiting and asking again are urllib3's, by
way of requests, which also heeds the proxy and certificates of the environment (HTTPS_PROXY, REQUESTS_CA_BUNDLE).
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util import Retry

from prostate_seg.common.errors import InputError

log = logging.getLogger(__name__)

PASSING_TROUBLE = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which a server may be well again in a moment."""

CHUNK_BYTES = 1 << 20
"""The most that is read, and reported, at a time."""

MARGIN_BYTES = 200 << 20
"""Room that a disk must keep: a full one takes logs and the tracking store with it."""

OnBytes = Callable[[int, int | None], None]
"""Is told how many bytes are there, and of how many; None where the server does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long trouble may last."""

    silence_s: float = 60.0
    """Seconds without a byte after which a connection is given up."""
    num_tries: int = 6
    """Requests in a row that bring nothing new before the download is given up."""
    first_pause_s: float = 2.0
    """Pause before the second try; each is twice as long as the one before, up to two minutes."""


class _Incomplete(Exception):  # noqa: N818 - the loop's own word for what it mends
    """The transfer ended early; the text says how."""


def download(url: str, target: Path, *, on_bytes: OnBytes, patience: Patience = Patience()) -> None:
    """Bring a file here; a part of it that lies there from before is gone on with.

    Args:
        url: http or https address.
        target: File to write; NAME.part beside it holds what has arrived so far.
        on_bytes: Called with the bytes that are there and the whole size, before the first new byte and after each chunk.
        patience: When to give up.

    Raises:
        InputError: If the server refuses, stays silent or keeps breaking off, or the disk is too small. What has arrived stays.
    """
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    furthest, fruitless = _size_of(part), 0
    with _session(patience) as session:
        while True:
            try:
                _append_rest(session, url, part, on_bytes=on_bytes, silence_s=patience.silence_s)
                os.replace(part, target)
                return
            except (requests.RequestException, HTTPError, _Incomplete) as error:
                fruitless = 0 if _size_of(part) > furthest else fruitless + 1
                furthest = max(furthest, _size_of(part))
                if isinstance(error, requests.exceptions.RetryError) or fruitless >= patience.num_tries:
                    raise InputError(_given_up(url, part, error)) from error
                log.info("%s: %s; going on at %s", target.name, _in_words(error), gigabytes(_size_of(part)))
                time.sleep(min(patience.first_pause_s * 2**fruitless, 120))


def require_checksum(path: Path, checksum: str) -> None:
    """Check a file against a published checksum such as sha256:1c96....

    Raises:
        InputError: If it is another file.
    """
    found = checksum_of(path, checksum.partition(":")[0])
    if found != checksum:
        raise InputError(
            f"{path}: the file must have {checksum}, has {found}\n"
            "It is damaged, or its source has replaced it: download it again; if that does not help, tell the project."
        )


def checksum_of(path: Path, algorithm: str) -> str:
    """Return the checksum of a file, such as md5:9a03...."""
    with path.open("rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()}"


def require_space(folder: Path, num_bytes: int, *, purpose: str, setting: str) -> None:
    """Check that a disk has room.

    Raises:
        InputError: If it has not; nothing was written then.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes + MARGIN_BYTES:
        raise InputError(
            f"{purpose} needs {gigabytes(num_bytes)} and {gigabytes(MARGIN_BYTES)} to spare, and the disk of {folder} has "
            f"{gigabytes(free)} free\nMake room, or choose a folder on another disk: {setting}=DIR. What is there is kept."
        )


def gigabytes(num_bytes: float) -> str:
    """Return a size in words."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def shown_url(url: str) -> str:
    """Return an address without the name and password that it may have."""
    return re.sub(r"//[^/@]+@", "//", url)


def _session(patience: Patience) -> requests.Session:
    session = requests.Session()
    retry = Retry(
        total=patience.num_tries - 1,
        backoff_factor=patience.first_pause_s / 2,
        status_forcelist=PASSING_TROUBLE,
        allowed_methods=["GET"],
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # a range counts the bytes of the file, not of its compression
    return session


def _append_rest(session: requests.Session, url: str, part: Path, *, on_bytes: OnBytes, silence_s: float) -> None:
    """Ask for what is missing and append it."""
    have = _size_of(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=(min(silence_s, 30), silence_s)) as reply:
        if reply.status_code == requests.codes.requested_range_not_satisfiable:
            _require_all_there(part, reply)
            return
        if not reply.ok:
            raise InputError(_refused(url, reply, part))
        have = _place_of(reply, part, have)
        total = _total(reply, have)
        if total is not None:
            require_space(part.parent, total - have, purpose=f"downloading {shown_url(url)}", setting="paths.cache")
        on_bytes(have, total)
        with part.open("ab") as stream:
            while chunk := reply.raw.read1(
                CHUNK_BYTES, decode_content=False
            ):  # what has come, without waiting for more
                stream.write(chunk)
                on_bytes(stream.tell(), total)
    if total is not None and _size_of(part) != total:
        raise _Incomplete(f"{gigabytes(_size_of(part))} of {gigabytes(total)} came")


def _place_of(reply: requests.Response, part: Path, have: int) -> int:
    """Return where the reply's first byte belongs; a server that knows no ranges sends all again."""
    first = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    if reply.status_code == requests.codes.partial_content and first and int(first.group(1)) == have:
        return have
    part.unlink(missing_ok=True)
    if reply.status_code == requests.codes.partial_content:
        raise _Incomplete("the server sent another part than was asked for")
    return 0


def _require_all_there(part: Path, reply: requests.Response) -> None:
    """Take the answer that nothing comes after the last byte for what it is, or begin anew."""
    total = re.match(r"bytes \*/(\d+)", reply.headers.get("Content-Range", ""))
    if not total or int(total.group(1)) != _size_of(part):
        part.unlink()
        raise _Incomplete("the file at the source is shorter than what is here")


def _total(reply: requests.Response, have: int) -> int | None:
    length = reply.headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() else None


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _refused(url: str, reply: requests.Response, part: Path) -> str:
    kept = f"; the {gigabytes(_size_of(part))} that are here are kept" if part.is_file() else ""
    return (
        f"{shown_url(url)}: the server answers {reply.status_code} {reply.reason}{kept}\n"
        "Look at the address in a browser: if the file has moved, download it by hand into a folder and name that with "
        "fetch.origin=DIR."
    )


def _given_up(url: str, part: Path, error: Exception) -> str:
    return (
        f"{shown_url(url)}: given up after several tries: {_in_words(error)}\n"
        f"{gigabytes(_size_of(part))} are here and are kept; the same command goes on from there. Behind a proxy, set "
        "HTTPS_PROXY; without a network, see fetch.origin."
    )


def _in_words(error: Exception) -> str:
    """Say in a few words what went wrong, without urllib3's object names."""
    if isinstance(error, _Incomplete):
        return str(error)
    text = str(error)
    status = re.search(r"too many (\d+) error responses", text)
    known = (
        (status is not None, f"the server keeps answering {status.group(1) if status else ''}"),
        (isinstance(error, (requests.Timeout, ReadTimeoutError)) or "timed out" in text, "the server fell silent"),
        (isinstance(error, HTTPError), "the connection broke off"),
        (isinstance(error, requests.exceptions.SSLError), "the certificate of the server is not trusted"),
        (isinstance(error, requests.ConnectionError), "the server cannot be reached"),
    )
    return next((words for holds, words in known if holds), text)
