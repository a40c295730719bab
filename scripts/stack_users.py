"""Manage users of the stack and their permissions, as its administrator.

    python scripts/stack_users.py add ann                                 # prints a password, once
    python scripts/stack_users.py grant ann EDIT --experiment prostate_seg
    python scripts/stack_users.py grant ann READ --model prostate_seg
    python scripts/stack_users.py password ann                            # a new one
    python scripts/stack_users.py remove ann                              # runs stay

The server and the administrator are those of MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, by default those of docker/.env.
The creator of an experiment or a model can manage it and grant permissions; nobody else can read it.
"""

import argparse
import os
import secrets
import sys

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client
from stack_settings import login_to_use

RIGHTS = ("READ", "EDIT", "MANAGE", "NONE")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("add", "password", "remove", "grant"):
        command = commands.add_parser(name)
        command.add_argument("user")
        if name == "grant":
            command.add_argument("right", choices=RIGHTS, help="NONE revokes the permission")
            what = command.add_mutually_exclusive_group(required=True)
            what.add_argument("--experiment", metavar="NAME")
            what.add_argument("--model", metavar="NAME")
    arguments = parser.parse_args()
    os.environ |= login_to_use(os.environ)
    try:
        print(carry_out(arguments))
    except (MlflowException, OSError) as error:
        sys.exit(f"{os.environ['MLFLOW_TRACKING_URI']}: {str(error).splitlines()[0]}")


def carry_out(arguments: argparse.Namespace) -> str:
    """Change users or permissions; return a message."""
    users = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    user = arguments.user
    if arguments.command == "grant":
        kind, key = _resource(arguments.experiment, arguments.model)
        if arguments.right == "NONE":
            users.revoke_user_permission(user, kind, key)
        else:
            users.grant_user_permission(user, kind, key, arguments.right)
        return f"{user}: {arguments.right} on {kind} {arguments.experiment or arguments.model}"
    if arguments.command == "remove":
        users.delete_user(user)
        return f"{user} is removed"
    password = secrets.token_urlsafe(15)
    if arguments.command == "add":
        users.create_user(user, password)
    else:
        users.update_user_password(user, password)
    return f"{user} logs in with MLFLOW_TRACKING_USERNAME={user} MLFLOW_TRACKING_PASSWORD={password}"


def _resource(experiment: str | None, model: str | None) -> tuple[str, str]:
    if experiment is None:
        return "registered_model", str(model)
    found = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"]).get_experiment_by_name(experiment)
    if found is None:
        sys.exit(
            f"there is no experiment {experiment}: its first run creates it, and the user of that run can grant permissions"
        )
    return "experiment", str(found.experiment_id)


if __name__ == "__main__":
    main()
