"""Malicious inputs: case ids, settings, records of a server, files; see docs/security.md."""

import ast
import contextlib
import json
import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.dataset import OWN_COLUMNS, read_dataset, read_thumbnails
from prostate_seg.segmentation.networks.storage import load_network
from prostate_seg.tracking.reproduction import _restore_input, apply_diff
from tests.conftest import ROOT, composed

UNSAFE = {
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "torch": {"load", "jit"},
    "pandas": {"read_pickle"},
    "pd": {"read_pickle"},
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "unsafe_load_all", "Loader", "UnsafeLoader"},
    "os": {"system", "popen"},
    "shutil": {"unpack_archive"},
    "tempfile": {"mktemp"},
}
"""Functions that execute the content of a file, or a shell."""


def unsafe_calls(source: str) -> list[str]:
    """Return the calls in a module that can execute or unpack content of other authors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if node.attr in UNSAFE.get(node.value.id, ()) else []
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [name] if isinstance(node.func, ast.Name) and name in ("eval", "exec") else []
            found += ["shell=True"] if words.get("shell") == "True" else []
            found += ["allow_pickle=True"] if words.get("allow_pickle") == "True" else []
            found += (
                ["extract without filter='data'"]
                if name in ("extract", "extractall") and words.get("filter") != "'data'"
                else []
            )
    return found


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("import pickle\npickle.loads(x)", "pickle.loads"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import yaml\nyaml.load(text, Loader=yaml.FullLoader)", "yaml.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("archive.extractall(folder)", "extract without filter='data'"),
        ("eval(text)", "eval"),
    ],
)
def test_an_unsafe_call_is_found(source: str, call: str) -> None:
    assert call in unsafe_calls(source)


def test_no_file_content_is_executed() -> None:
    modules = [
        *(ROOT / "prostate_seg").rglob("*.py"),
        *(ROOT / "docker").glob("*.py"),
        *(ROOT / "scripts").glob("stack_*.py"),
    ]
    assert len(modules) > 100
    found = {str(path.relative_to(ROOT)): unsafe_calls(path.read_text()) for path in modules}
    assert {name: calls for name, calls in found.items() if calls} == {}


OUTSIDE = ["../escape", "../../escape", "/tmp/escape", "a/b", "x/../../y", ""]


@pytest.mark.parametrize("case_id", OUTSIDE)
def test_dataset_with_paths_as_case_ids_is_refused(tmp_path: Path, case_id: str) -> None:
    row = dict.fromkeys(OWN_COLUMNS, "1") | {"case_id": case_id}
    pd.DataFrame([row]).to_csv(tmp_path / "dataset.csv", index=False)
    with pytest.raises(InputError, match="a case id is the name of a file") as caught:
        read_dataset(tmp_path / "dataset.csv")
    assert "run stage=preprocess again" in str(caught.value)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.target),))


def test_pickles_in_place_of_arrays_and_weights_are_not_opened(tmp_path: Path) -> None:
    gone_off = tmp_path / "gone_off"
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()  # unpickling does create the file
    np.save(tmp_path / "thumbnails.npy", np.array([Bomb(gone_off)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="run stage=preprocess again"):
        read_thumbnails(tmp_path / "thumbnails.npy", case_ids=[])
    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps(Bomb(gone_off)))
    recipe = SimpleNamespace(
        model=parse(composed("stage=train", "model.channels=[8,16]", "model.strides=[[2,2]]")).model,
        preprocess=SimpleNamespace(regions=["whole_gland"]),
    )
    with pytest.raises(InputError, match="cannot be loaded"):
        load_network(tmp_path, recipe=recipe, device=torch.device("cpu"))
    assert not gone_off.exists()


@contextlib.contextmanager
def params_file(folder: Path, text: str) -> Iterator[Path]:
    science = composed("stage=prepare")
    wanted = ("data", "preprocess", "fold", "model", "train", "evaluate", "seed")
    OmegaConf.save(OmegaConf.create({key: science[key] for key in wanted}), folder / "params.yaml")
    with (folder / "params.yaml").open("a") as stream:
        stream.write(text)
    yield folder


def test_params_file_sets_no_folder_and_no_server(tmp_path: Path) -> None:
    evil = "paths: {root: /evil, cache: /evil, trained: /evil}\nmlflow: {tracking_uri: 'http://evil:1'}\n"
    with params_file(tmp_path, evil) as folder:
        cfg = composed("stage=prepare", name="from_params", folder=folder)
    for group in ("paths", "mlflow"):
        assert "evil" not in str(cfg[group])


def test_python_object_in_a_params_file_is_not_executed(tmp_path: Path) -> None:
    gone_off = tmp_path / "gone_off"
    with (
        params_file(tmp_path, f"x: !!python/object/apply:os.mkdir ['{gone_off}']\n") as folder,
        pytest.raises(Exception, match="python/object"),
    ):
        composed("stage=prepare", name="from_params", folder=folder)
    assert not gone_off.exists()


def test_input_outside_of_the_workspace_of_a_run_is_not_restored(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "code"
    folder.mkdir(parents=True)
    here = tmp_path / "mine.txt"
    here.write_text("mine")
    md5 = "6c5a9a8d2f8c2e1a0d6b2a7d9a9f1d35"
    for key in ("../escape", "data/../../escape", "prepared/../../../escape"):
        with pytest.raises(InputError, match="leads out of its workspace"):
            _restore_input(key, md5, folder, Workspace(root=here, data=here, cache=tmp_path / "cache"), data=None)
    assert not list(tmp_path.rglob("escape"))


def test_recorded_diff_changes_no_file_outside_of_its_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    added = "--- /dev/null\n+++ b/{0}\n@@ -0,0 +1 @@\n+x\n"
    for name in ("../escape", f"{tmp_path}/escape", "a/../../escape", ".git/hooks/escape"):
        header = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
        assert not apply_diff(header + added.format(name), checkout), name
    assert apply_diff("diff --git a/inside b/inside\nnew file mode 100644\n" + added.format("inside"), checkout)
    assert not list(tmp_path.rglob("escape"))
    assert (checkout / "inside").read_text() == "x\n"


class Hostile(BaseHTTPRequestHandler):
    """An MLflow server that lists the requested artifact as a folder with a file outside of it."""

    listed = "../../../escape"

    def do_GET(self) -> None:
        run = {"info": {"run_id": "a" * 32, "artifact_uri": "mlflow-artifacts:/1/a/artifacts"}, "data": {}}
        entry = {"path": self.listed, "is_dir": False, "file_size": 4}
        if "/runs/get" in self.path:
            self._answer({"run": run})
        elif "path=" in self.path or self.path.endswith("/mlflow-artifacts/artifacts"):
            self._answer({"files": [entry]})
        else:
            self._answer("evil")

    def _answer(self, value: object) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


LISTINGS = {
    "provenance.json/deeper": True,  # listing of an honest server
    "../../../escape": False,
    "/tmp/escape": False,
    "provenance.json/../../../escape": False,
    "provenance.json/%2e%2e/%2e%2e/escape": False,
}
"""Listings of an artifact folder, and whether they may be written."""


@pytest.mark.parametrize("listed", LISTINGS)
def test_server_writes_no_file_outside_of_the_folder_for_its_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    monkeypatch.setattr(Hostile, "listed", listed)
    target = tmp_path / "a" / "b" / "artifacts"
    target.mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{server.server_port}")
        with contextlib.suppress(MlflowException):
            client.download_artifacts("a" * 32, "provenance.json", str(target))
        server.shutdown()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if target not in path.parents] == []
    assert [path.name for path in written] == (["deeper"] if LISTINGS[listed] else [])
    assert not Path("/tmp/escape").exists()
