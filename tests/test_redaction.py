"""Secrets do not survive, and everything else does."""

from pathlib import Path

import pytest

from prostate_seg.tracking.redaction import REDACTED, Redactor, looks_secret


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "GITHUB_TOKEN",
        "api_key",
        "dbPassword",
        "x.client-secret",
        "passwd",
    ],
)
def test_name_of_a_secret_is_recognised(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    ["train.learning_rate", "author", "mlflow.name", "fold.index", "num_passes", "data.root", "key_of", "model.name"],
)
def test_ordinary_name_is_left_alone(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://ann:hunter2@git.example.org/x.git", "hunter2"),
        ("https://glpat-abcdefghijklmnop1234@git.example.org/x.git", "abcdefghijklmnop"),
        ("postgresql+psycopg2://u:p%40ss@db:5432/mlflow", "p%40ss"),
        ("https://store.example.org/x?sig=abc%2Fdef&expires=1", "abc%2Fdef"),
        ("+    password: correct-horse", "correct-horse"),
        ('AWS_SECRET_ACCESS_KEY="wJalr/XUtn+FEMI"', "wJalr"),
        ('{"api_key": "0123456789abcdef"}', "0123456789abcdef"),
        ("Authorization: Bearer abc.def-ghi012345", "def-ghi012345"),
        ("token ghp_0123456789012345678901234567890123456789", "ghp_0123"),
        ("id AKIAIOSFODNN7EXAMPLE", "AKIAIOSF"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----", "MIIEow"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "c2lnbmF0dXJl"),
    ],
)
def test_credential_in_a_text_is_redacted(text: str, secret: str) -> None:
    shown = Redactor(environment={}).text(text)
    assert secret not in shown
    assert REDACTED in shown


@pytest.mark.parametrize(
    "text",
    [
        "fold 0 epoch 3 val Dice 0.9012",
        "https://example.org/path?page=2",
        "git@github.com:someone/project.git",
        "ph001_1: image and mask are on different grids",
        "train.learning_rate=0.003 model=unet",
    ],
)
def test_harmless_text_is_left_alone(text: str) -> None:
    assert Redactor(environment={}).text(text) == text


def test_value_of_a_secret_variable_is_redacted_wherever_it_turns_up() -> None:
    redactor = Redactor(
        environment={"DB_PASSWORD": "tr0ub4dor", "HOME": "/home/ann", "ADDRESS": "http://u:pa55word@h/"}
    )
    assert (
        redactor.text("it said tr0ub4dor in /home/ann and pa55word")
        == f"it said {REDACTED} in /home/ann and {REDACTED}"
    )


def test_value_of_a_secret_setting_is_redacted_wherever_it_turns_up() -> None:
    redactor = Redactor(environment={}, settings={"store": {"access_key": "k3yk3yk3y", "size": 3}})
    assert redactor.tree({"store": {"access_key": "k3yk3yk3y"}, "log": ["used k3yk3yk3y", 3]}) == {
        "store": {"access_key": REDACTED},
        "log": [f"used {REDACTED}", 3],
    }


def test_short_value_is_not_searched_for() -> None:
    assert Redactor(environment={"MY_TOKEN": "1"}).text("fold 1 of 10") == "fold 1 of 10"


def test_copied_file_has_no_secret(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("to http://me:s3cr3t99@host\n")
    Redactor(environment={}).copy_file(tmp_path / "a.log", tmp_path / "out" / "a.log")
    assert (tmp_path / "out" / "a.log").read_text() == f"to http://{REDACTED}@host\n"
