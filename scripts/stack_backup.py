"""Save the stack's database and files to a folder, and restore them into an empty stack: `make stack-backup`, `stack-restore`.

    python scripts/stack_backup.py save FOLDER       # creates FOLDER; links unchanged files of the newest backup beside it
    python scripts/stack_backup.py restore FOLDER

The database is that of libpq's variables (PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD), the files are those of S3_BUCKET at
S3_ENDPOINT_URL. A backup contains `database.dump`, a file per object in `objects/` named by its sha256, and `manifest.json`,
which is written last: a folder without it is incomplete.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

MANIFEST, DUMP, OBJECTS = "manifest.json", "database.dump", "objects"
NUM_TRANSFERS = 8


class BackupError(Exception):
    """A backup cannot be created or restored; the message contains the next step."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An object of the bucket and the file with its content."""

    key: str
    size: int
    etag: str
    """Identifier of the content in the S3 store; an object with the same ETag and size is unchanged."""
    sha256: str

    def file_in(self, backup: Path) -> Path:
        """Return the path of the content in a backup; it does not depend on names that clients choose."""
        return backup / OBJECTS / self.sha256[:2] / self.sha256


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The bucket of the stack."""

    client: Any
    name: str

    def listed(self) -> list[dict[str, Any]]:
        """Return every object's Key, Size and ETag."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [entry for page in pages for entry in page.get("Contents", [])]


def main() -> None:
    """Save or restore."""
    parser = argparse.ArgumentParser(description="Back up the stack, or restore it.")
    parser.add_argument("what", choices=["save", "restore"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        print({"save": save, "restore": restore}[arguments.what](arguments.folder, bucket_of_the_stack()))
    except (BackupError, BotoCoreError, ClientError, OSError) as error:
        sys.exit(f"{arguments.what} {arguments.folder}: {error}")


def bucket_of_the_stack() -> Bucket:
    """Return the bucket of the environment variables."""
    client = boto3.client(
        "s3",
        endpoint_url=os.environ.get("S3_ENDPOINT_URL") or None,
        region_name=os.environ.get("S3_REGION", "us-east-1"),
        aws_access_key_id=os.environ.get("S3_ACCESS_KEY"),
        aws_secret_access_key=os.environ.get("S3_SECRET_KEY"),
    )
    return Bucket(client=client, name=os.environ.get("S3_BUCKET", "mlflow"))


def save(folder: Path, bucket: Bucket) -> str:
    """Write a backup, the database first, so that the files of its runs are already in the bucket."""
    if folder.exists():
        raise BackupError("exists already, and a backup is never overwritten: choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    earlier = earlier_backup(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        run_postgres("pg_dump", "--format=custom", f"--file={partial / DUMP}")
        objects = save_objects(bucket, partial, earlier)
        manifest = {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "database": sha256_of(partial / DUMP),
            "objects": [asdict(stored) for stored in objects],
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shared = f", unchanged ones shared with {earlier.name}" if earlier else ""
    megabytes = sum(stored.size for stored in objects) / 2**20
    return f"{folder}: the database and {len(objects)} files, {megabytes:.0f} MB{shared}"


def restore(folder: Path, bucket: Bucket) -> str:
    """Restore a backup into an empty stack: the files first, the database in one transaction at the end."""
    objects = checked_objects(folder)
    require_empty_database()
    if bucket.name not in {entry["Name"] for entry in bucket.client.list_buckets()["Buckets"]}:
        bucket.client.create_bucket(Bucket=bucket.name)
    require_no_foreign_objects(bucket, objects)
    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        upload = bucket.client.upload_file
        list(pool.map(lambda stored: upload(str(stored.file_in(folder)), bucket.name, stored.key), objects))
    transaction = ["--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
    run_postgres("pg_restore", *transaction, f"--dbname={os.environ.get('PGDATABASE', '')}", str(folder / DUMP))
    return f"{folder}: the database and {len(objects)} files are restored; users have the passwords of the backup"


def earlier_backup(parent: Path) -> Path | None:
    """Return the newest complete backup in the folder."""
    backups = [path.parent for path in parent.glob(f"*/{MANIFEST}")]
    return max(backups, key=lambda backup: str(read_manifest(backup)["made"]), default=None)


def save_objects(bucket: Bucket, backup: Path, earlier: Path | None) -> list[StoredObject]:
    """Download every object, or link the file of the earlier backup if the object is unchanged."""
    known = {stored.key: stored for stored in objects_of(earlier)} if earlier else {}

    def save_one(entry: dict[str, Any]) -> StoredObject:
        before = known.get(entry["Key"])
        if earlier and before and (before.etag, before.size) == (entry["ETag"], entry["Size"]):
            put(before.file_in(earlier), before.file_in(backup), link=True)
            return before
        with tempfile.TemporaryDirectory(dir=backup) as name:
            file = Path(name) / "object"
            bucket.client.download_file(bucket.name, entry["Key"], str(file))
            stored = StoredObject(
                key=entry["Key"], size=file.stat().st_size, etag=entry["ETag"], sha256=sha256_of(file)
            )
            put(file, stored.file_in(backup), link=False)
            return stored

    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        return list(pool.map(save_one, bucket.listed()))


def put(source: Path, target: Path, *, link: bool) -> None:
    """Move or link a file to the path of its hash, if that does not exist yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    if not link:
        source.replace(target)
        return
    try:
        os.link(source, target)
    except FileExistsError:  # another thread has just linked the same content
        return
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def read_manifest(backup: Path) -> dict[str, Any]:
    """Return a backup's manifest."""
    try:
        manifest = json.loads((backup / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BackupError(f"{backup} is not a complete backup: {MANIFEST} cannot be read ({error})") from error
    return dict(manifest)


def objects_of(backup: Path) -> list[StoredObject]:
    """Return the objects of a backup."""
    return [StoredObject(**entry) for entry in read_manifest(backup)["objects"]]


def checked_objects(backup: Path) -> list[StoredObject]:
    """Return the objects of a backup after comparing every file with its hash: damaged files are never restored."""
    objects = objects_of(backup)
    files = {stored.file_in(backup): stored.sha256 for stored in objects}
    files[backup / DUMP] = str(read_manifest(backup)["database"])
    bad = [file for file, sha256 in files.items() if not file.is_file() or sha256_of(file) != sha256]
    if bad:
        names = ", ".join(str(file.relative_to(backup)) for file in bad[:3])
        raise BackupError(
            f"{len(bad)} of its files are missing or damaged: {names}; nothing was restored, use another backup"
        )
    return objects


def require_empty_database() -> None:
    """Refuse a database with tables."""
    query = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    num_tables = int(run_postgres("psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--command={query}"))
    if num_tables:
        raise BackupError(
            f"the database {os.environ.get('PGDATABASE')} has {num_tables} tables already; only an empty stack is restored: "
            "stop the server, and drop the database or take new volumes"
        )


def require_no_foreign_objects(bucket: Bucket, objects: list[StoredObject]) -> None:
    """Refuse a bucket with other files than those of this backup, which an interrupted restore leaves."""
    foreign = {entry["Key"] for entry in bucket.listed()} - {stored.key for stored in objects}
    if foreign:
        raise BackupError(
            f"the bucket {bucket.name} contains {len(foreign)} files that are not of this backup, such as {min(foreign)}; "
            "only an empty stack is restored: choose another S3_BUCKET, or empty this one"
        )


def run_postgres(program: str, *arguments: str) -> str:
    """Run one of Postgres' programs, which reads address and password from the environment."""
    if shutil.which(program) is None:
        raise BackupError(f"{program} is not installed (Debian's postgresql-client)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackupError(f"{program} failed: {done.stderr.strip()}")
    return done.stdout


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    main()
