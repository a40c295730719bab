"""Download of one large file: resumable, with retries, and renamed to its target only when it is complete.

NAME.part beside the target holds the bytes so far. urllib3 retries busy servers, by way of requests, which also uses the proxy
and certificates of the environment (HTTPS_PROXY, REQUESTS_CA_BUNDLE).
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util import Retry

from prostate_seg.common.errors import InputError

log = logging.getLogger(__name__)

RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of temporary failures."""
CHUNK_BYTES = 1 << 20
"""Maximum number of bytes between two reports of progress."""
MARGIN_BYTES = 200 << 20
"""Space that stays free: on a full disk logs and the tracking store fail as well."""

TIMEOUT_S = 60.0
"""Seconds without a byte after which a connection is closed."""
NUM_TRIES = 6
"""Maximum number of successive requests without a new byte."""
FIRST_PAUSE_S = 2.0
"""Pause before the second try; it doubles with each try, up to two minutes."""

OnBytes = Callable[[int, int | None], None]
"""Called with the downloaded and the total bytes; None if the server does not state the total."""


class _IncompleteError(Exception):
    """The transfer ended early."""


def download(url: str, target: Path, *, on_bytes: OnBytes) -> None:
    """Download a file, resuming a partial one.

    `on_bytes` is called before the first new byte and after each chunk.

    Raises:
        InputError: If the server refuses, does not respond or keeps closing the connection, or the disk is too small. The
            partial file stays.
    """
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    furthest, num_fruitless = _size_of(part), 0
    with _session() as session:
        while True:
            try:
                _append_rest(session, url, part, on_bytes=on_bytes)
                os.replace(part, target)
                return
            except (requests.RequestException, HTTPError, _IncompleteError) as error:
                num_fruitless = 0 if _size_of(part) > furthest else num_fruitless + 1
                furthest = max(furthest, _size_of(part))
                if isinstance(error, requests.exceptions.RetryError) or num_fruitless >= NUM_TRIES:
                    raise InputError(
                        f"{shown_url(url)}: given up after several tries: {_reason(error)}\n"
                        f"{gigabytes(_size_of(part))} are here and are kept; the same command goes on from there. Behind a "
                        "proxy, set HTTPS_PROXY; without a network, see fetch.origin."
                    ) from error
                log.info("%s: %s; going on at %s", target.name, _reason(error), gigabytes(_size_of(part)))
                time.sleep(min(FIRST_PAUSE_S * 2 ** max(0, num_fruitless - 1), 120))


def _session() -> requests.Session:
    """Return a session in which urllib3 repeats a request to a busy server; `download` repeats all others."""
    session = requests.Session()
    retry = Retry(
        total=NUM_TRIES - 1,
        connect=0,
        read=0,
        backoff_factor=FIRST_PAUSE_S / 2,
        status_forcelist=RETRY_STATUSES,
        allowed_methods=["GET"],
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"  # a range counts the bytes of the file, not of its compression
    return session


def require_checksum(path: Path, checksum: str) -> None:
    """Raise InputError unless a file has a published checksum such as sha256:1c96...."""
    found = checksum_of(path, checksum.partition(":")[0])
    if found != checksum:
        raise InputError(
            f"{path}: the file must have {checksum}, has {found}\n"
            "It is damaged, or its source has replaced it: download it again; if that does not help, report it to the project."
        )


def checksum_of(path: Path, algorithm: str) -> str:
    """Return the checksum of a file, such as md5:9a03...."""
    with path.open("rb") as stream:
        return f"{algorithm}:{hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()}"


def require_space(folder: Path, num_bytes: int, *, purpose: str, setting: str) -> None:
    """Raise InputError, before anything is written, unless a disk has room."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes + MARGIN_BYTES:
        raise InputError(
            f"{purpose} needs {gigabytes(num_bytes)} and {gigabytes(MARGIN_BYTES)} to spare, and the disk of {folder} has "
            f"{gigabytes(free)} free\nMake room, or choose a folder on another disk: {setting}=DIR. What is there is kept."
        )


def gigabytes(num_bytes: float) -> str:
    """Return a size with its unit."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def shown_url(url: str) -> str:
    """Return an address without the name and password that it may have."""
    return re.sub(r"//[^/@]+@", "//", url)


def _append_rest(session: requests.Session, url: str, part: Path, *, on_bytes: OnBytes) -> None:
    have = _size_of(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=(min(TIMEOUT_S, 30), TIMEOUT_S)) as reply:
        if reply.status_code == requests.codes.requested_range_not_satisfiable:
            size = re.match(r"bytes \*/(\d+)", reply.headers.get("Content-Range", ""))
            if not size or int(size.group(1)) != have:
                part.unlink()
                raise _IncompleteError("the file at the source is shorter than what is here")
            return  # nothing follows the last byte
        if not reply.ok:
            kept = f"; the {gigabytes(have)} that are here are kept" if part.is_file() else ""
            raise InputError(
                f"{shown_url(url)}: the server answers {reply.status_code} {reply.reason}{kept}\n"
                "Look at the address in a browser: if the file has moved, download it by hand into a folder and name that "
                "with fetch.origin=DIR."
            )
        have = _start_of(reply, part)
        length = reply.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if total is not None:
            require_space(part.parent, total - have, purpose=f"downloading {shown_url(url)}", setting="paths.cache")
            log.info("%s: %s of %s are here", part.stem, gigabytes(have), gigabytes(total))
        on_bytes(have, total)
        with part.open("ab") as stream:
            # read1 returns the bytes that have arrived, without waiting for a full chunk
            while chunk := reply.raw.read1(CHUNK_BYTES, decode_content=False):
                stream.write(chunk)
                on_bytes(stream.tell(), total)
    if total is not None and _size_of(part) != total:
        raise _IncompleteError(f"{gigabytes(_size_of(part))} of {gigabytes(total)} came")


def _start_of(reply: requests.Response, part: Path) -> int:
    """Return the position of a reply's first byte: the end of the partial file, or 0, for which that file is removed."""
    is_partial = reply.status_code == requests.codes.partial_content
    first = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    if is_partial and first and int(first.group(1)) == _size_of(part):
        return int(first.group(1))
    part.unlink(missing_ok=True)
    if is_partial:
        raise _IncompleteError("the server sent another part than was asked for")
    return 0


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _reason(error: Exception) -> str:
    """Return the reason of a failed transfer, without urllib3's object names."""
    text = str(error)
    if isinstance(error, _IncompleteError):
        return text
    if status := re.search(r"too many (\d+) error responses", text):
        return f"the server keeps answering {status.group(1)}"
    if isinstance(error, (requests.Timeout, ReadTimeoutError)) or "timed out" in text:
        return "the connection timed out"
    if isinstance(error, HTTPError):
        return "the connection broke off"
    if isinstance(error, requests.exceptions.SSLError):
        return "the certificate of the server is not trusted"
    return "the server cannot be reached" if isinstance(error, requests.ConnectionError) else text
