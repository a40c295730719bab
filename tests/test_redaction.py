"""Redaction removes secrets and nothing else."""

import time
from pathlib import Path

import pytest

from prostate_seg.provenance.redaction import REDACTED, Redactor, looks_secret


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
        "PGPASSWORD",
        "MYSQL_PWD",
        "accessToken",
        "STORAGE_ACCOUNT_KEY",
    ],
)
def test_secret_name_is_recognised(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "train.learning_rate",
        "author",
        "mlflow.name",
        "fold.index",
        "data.root",
        "key_of",
        "model.name",
        "num_passes",
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "GIT_ASKPASS",
        "X_TOKEN_FILE",
        "PASSWORD_STORE_DIR",
        "KEYBOARD",
        "MONKEY",
        "record.key",
        "tokenizer",
        "secretary",
        "compass",
    ],
)
def test_ordinary_name_is_not_redacted(name: str) -> None:
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
        ("postgresql://u:pass/with+slash@db:5432/x", "slash"),
        ("python -m x 'store.password=several words' model=unet", "several words"),
        ("x --db-password hunter2 --seed 3", "hunter2"),
        ("password: several words\nseed: 3", "several words"),
        ("password: |\n  first line\n  second line\nseed: 3", "second line"),
        ("password: 'first words\n  second words'\nseed: 3", "second words"),
        ("passwords:\n- one-of-them\nseed: 3", "one-of-them"),
        ("passwords=[one-of-them, another-one]", "another-one"),
        ("seed=3,x.password=hunter2", "hunter2"),
        ("DB_PASSWORD=1", "=1"),
        ("password=data", "data"),
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
        "num_passes=3 tokenizer=abc monkey: 5 GIT_ASKPASS=/usr/bin/ask",
        "http://host:5000/v2/image@sha256 git+https://example.org/a/b@v1",
        "https://example.org/x?monkey=3",
        "a basic understanding of bearer channels",
        "PWD=/tmp/project OLDPWD=/tmp GOOGLE_APPLICATION_CREDENTIALS=/tmp/absent/key.json",
    ],
)
def test_harmless_text_is_not_redacted(text: str) -> None:
    assert Redactor(environment={}).text(text) == text


def test_value_of_a_secret_variable_is_redacted_everywhere() -> None:
    redactor = Redactor(
        environment={"DB_PASSWORD": "tr0ub4dor", "HOME": "/home/ann", "ADDRESS": "http://u:pa55word@h/"}
    )
    assert (
        redactor.text("it said tr0ub4dor in /home/ann and pa55word")
        == f"it said {REDACTED} in /home/ann and {REDACTED}"
    )


def test_value_of_a_secret_setting_is_redacted_everywhere() -> None:
    redactor = Redactor(environment={}, settings={"store": {"access_key": "k3yk3yk3y", "size": 3}})
    assert redactor.tree({"store": {"access_key": "k3yk3yk3y"}, "log": ["used k3yk3yk3y", 3]}) == {
        "store": {"access_key": REDACTED},
        "log": [f"used {REDACTED}", 3],
    }


@pytest.mark.parametrize("value", ["1", "data", "unit", "training", "learning_rate", "train", "password"])
def test_short_or_common_value_is_redacted_only_beside_its_name(value: str) -> None:
    settings = {"train": {"learning_rate": 0.1}, "preprocess": {"image_size": 160}}
    redactor = Redactor(environment={"MY_TOKEN": value}, settings=settings)
    text = f"fold 1 of 10: {value} in data/{value}_1, units of training_data, learning_rates, trainings"
    assert redactor.text(text) == text
    assert redactor.text(f"MY_TOKEN={value} seed=3") == f"MY_TOKEN={REDACTED} seed=3"
    assert redactor.tree({"my_token": value, "seed": 3}) == {"my_token": REDACTED, "seed": 3}


def test_value_of_letters_alone_is_redacted_as_a_whole_word() -> None:
    redactor = Redactor(environment={"MY_TOKEN": "windermere"})
    assert redactor.text("at windermere, windermeres") == f"at {REDACTED}, windermeres"


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "GIT_ASKPASS",
        "X_TOKEN_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "PASSWORD_STORE_DIR",
        "X_PASSWORD",
        "SIGNING_KEY",
    ],
)
@pytest.mark.parametrize("below", [".", "keys/key1.json"])
def test_variable_that_holds_a_path_redacts_nothing(name: str, below: str, tmp_path: Path) -> None:
    value = str(tmp_path / below)
    redactor = Redactor(environment={name: value}, settings={"data": {"root": f"{value}/data"}})
    text = f"python -m prostate_seg data.root={value}/data paths.cache={tmp_path}"
    assert redactor.text(text) == text
    assert redactor.tree({"data": {"root": f"{value}/data"}}) == {"data": {"root": f"{value}/data"}}


def test_secret_that_begins_like_a_path_is_redacted() -> None:
    secret = "/XUtnFEMI/K7MDENG/bPxRfiCY"
    assert secret not in Redactor(environment={"AWS_SECRET_ACCESS_KEY": secret}).text(f"used {secret} here")


@pytest.mark.parametrize(
    ("secret", "written"),
    [
        ("pl@nted/sec ret1", "https://h/?x=pl%40nted%2Fsec%20ret1"),
        ("pl@nted/sec ret1", "https://h/?x=pl%40nted%2fsec+ret1"),
        ("pl@nted/sec ret1", "x: pl@nted/sec\n  ret1"),
        ("planted'1'secret", "a: 'planted''1''secret'"),
        ("planted'1'secret", "a 'planted'\"'\"'1'\"'\"'secret'"),
        ('planted"1"secret', '{"a": "planted\\"1\\"secret"}'),
        ("planted-line-1\nplanted-line-2", "only planted-line-2 here"),
        ("planted%40secret", "it was planted@secret"),
    ],
)
def test_secret_is_redacted_however_it_is_written(secret: str, written: str) -> None:
    shown = Redactor(environment={"MY_TOKEN": secret}).text(written)
    assert "planted" not in shown.replace("pl%40nted", "planted").replace("pl@nted", "planted")
    assert REDACTED in shown


def test_random_value_of_a_key_variable_is_redacted_and_a_plain_one_is_not() -> None:
    redactor = Redactor(environment={"SOME_KEY": "0123456789abcdef0123", "SORT_KEY": "patient_id"})
    assert redactor.text("0123456789abcdef0123 by patient_id") == f"{REDACTED} by patient_id"


def test_all_values_below_a_secret_key_are_redacted() -> None:
    tree = {"auth": {"user": "ann", "pins": [1234, True, None]}, "credentials": {"file": "/tmp/key.json"}}
    assert Redactor(environment={}).tree(tree) == {
        "auth": {"user": REDACTED, "pins": [REDACTED, True, None]},
        "credentials": {"file": "/tmp/key.json"},
    }


def test_secret_in_an_override_is_redacted_everywhere() -> None:
    redactor = Redactor(environment={}, settings={"overrides": ["+x.password=several secret words", "seed=3"]})
    assert redactor.text("it said several secret words") == f"it said {REDACTED}"


def test_long_text_is_redacted_in_a_second() -> None:
    redactor = Redactor(environment={"MY_TOKEN": "planted-token-1"})
    start = time.monotonic()
    for text in ("key" * 100_000, "a=b," * 50_000, "http://" + "a:" * 50_000, "x: y\n" * 50_000):
        redactor.text(text)
    assert time.monotonic() - start < 5


def test_copied_file_has_no_secret(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("to http://me:s3cr3t99@host\n")
    Redactor(environment={}).copy_file(tmp_path / "a.log", tmp_path / "out" / "a.log")
    assert (tmp_path / "out" / "a.log").read_text() == f"to http://{REDACTED}@host\n"
