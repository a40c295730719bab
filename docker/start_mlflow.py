"""Start the stack's MLflow server: refuse example passwords, create the bucket, and execute `mlflow server`.

The arguments are those of `mlflow server`; or `gc` with those of `mlflow gc`, which permanently deletes runs in the trash; or
`upgrade`, which migrates the tables of an older MLflow. Secrets are read from the environment and passed on in the environment
or in a file that only this user can read, never on the command line, which every user of the machine can read.
"""

import configparser
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

EXAMPLE = "example"
"""Prefix of every secret in .env.example; the server does not start with one of those."""
SHORTEST = 12
SECRETS = (
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "POSTGRES_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
NEEDED = SECRETS[:2]
"""The others exist only in profiles with Postgres and S3."""
LOGIN_SECONDS = 60
"""Lifetime of a cached login: a request takes 8 ms instead of 200. A changed or revoked password remains valid for this time
on the workers that have cached it."""


def main(arguments: list[str]) -> None:
    """Check the passwords and run the command."""
    refused = refused_secrets(os.environ)
    if refused:
        sys.exit(
            "the server does not start with an example, empty or short password (12 characters at least): "
            f"{', '.join(refused)}\nSet them in docker/.env; `make stack` without that file creates one with random passwords."
        )
    store = backend_store(os.environ)
    if arguments[:1] == ["gc"]:
        os.environ |= login_of_the_administrator(os.environ) | dict(os.environ)
        mlflow_command("gc", "--backend-store-uri", store, *arguments[1:])
    elif arguments == ["upgrade"]:
        mlflow_command("db", "upgrade", store)
    else:
        serve(store, arguments)


def login_of_the_administrator(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the login of commands in the server's container; the server deletes artifacts for them."""
    login = {f"MLFLOW_TRACKING_{name}": environment[f"MLFLOW_AUTH_ADMIN_{name}"] for name in ("USERNAME", "PASSWORD")}
    return login | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}


def mlflow_command(*arguments: str) -> None:
    """Run one of MLflow's commands in this process, so that its arguments are not on a command line."""
    from mlflow.cli import cli

    cli.main(list(arguments), prog_name="mlflow")


def serve(store: str, arguments: list[str]) -> None:
    """Prepare database address, permissions and bucket, and replace this process by the server."""
    os.environ["MLFLOW_BACKEND_STORE_URI"] = store
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(write_auth_config(store))
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "")
    if destination.startswith("s3://"):
        make_bucket(destination.removeprefix("s3://").split("/")[0])
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments])


def refused_secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the names of secrets that are absent, short or those of .env.example."""
    there = {name: environment.get(name, "") for name in SECRETS if name in NEEDED or name in environment}
    return [name for name, value in there.items() if len(value) < SHORTEST or value.startswith(EXAMPLE)]


def backend_store(environment: Mapping[str, str]) -> str:
    """Return the address of the database: Postgres if POSTGRES_HOST is set, else the given sqlite file."""
    if "POSTGRES_HOST" not in environment:
        return environment["MLFLOW_BACKEND_STORE_URI"]
    user, password = (quote(environment[f"POSTGRES_{name}"], safe="") for name in ("USER", "PASSWORD"))
    host, port = environment["POSTGRES_HOST"], environment["POSTGRES_PORT"]
    return f"postgresql+psycopg2://{user}:{password}@{host}:{port}/{environment['POSTGRES_DB']}"


def write_auth_config(store: str) -> Path:
    """Write MLflow's permission file: no permission unless granted; users are in the database of the runs."""
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": store.replace("%", "%%"),  # MLflow reads the file with interpolation
        "auth_cache_ttl_seconds": str(LOGIN_SECONDS),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path = Path(tempfile.mkdtemp(prefix="mlflow-auth-")) / "auth.ini"  # readable by this user only
    with path.open("w") as stream:
        config.write(stream)
    return path


def make_bucket(name: str) -> None:
    """Create the bucket if it does not exist."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        sys.exit(
            f"the S3 store {endpoint or 'of AWS'} cannot be used for the bucket {name}: {error}\n"
            "Check S3_ENDPOINT_URL, S3_BUCKET and the S3 keys in docker/.env."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
