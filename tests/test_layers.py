"""Imports point down the layers only, and heavy or tracking libraries are imported only in their folders."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prostate_seg"

LAYERS = {
    "common": set(),
    "imaging": {"common"},
    "data": {"common", "imaging"},
    "phantom": {"common", "imaging", "data"},
    "segmentation": {"common", "imaging"},
    "config": {"common", "imaging", "data", "phantom", "segmentation", "reporting"},
    "provenance": {"common", "config"},
    "operations": {"common", "config", "provenance"},
    "tracking": {"common", "config", "provenance", "operations"},
    "sweeping": {"common", "config", "provenance", "operations", "tracking", "cli"},
    "reporting": {"common", "imaging", "data", "segmentation"},
    "steps": {
        *("common", "imaging", "data", "segmentation", "config"),
        *("provenance", "operations", "tracking", "reporting"),
    },
    "stages": {
        *("common", "imaging", "data", "phantom", "segmentation", "config"),
        *("provenance", "operations", "tracking", "sweeping", "reporting", "steps"),
    },
}
"""The folders of the package, and what each may import beside itself."""
RECORDING = {"mlflow", "dvc", "dvc_data", "dvc_objects"}
SEARCHING = {"hydra", "omegaconf", "optuna"}
FORBIDDEN = {
    "imaging": {"torch", "monai", *SEARCHING, *RECORDING},
    "data": {"torch", "monai", *SEARCHING, *RECORDING},
    "segmentation": {*SEARCHING, *RECORDING},
    "reporting": {"torch", "monai", *SEARCHING, *RECORDING},
    "steps": {*SEARCHING, *RECORDING},
    "stages": {*SEARCHING, *RECORDING},
    "common": {"torch", "monai", *SEARCHING, *RECORDING},
    "phantom": {"torch", "monai", *SEARCHING, *RECORDING},
    "config": {"torch", "monai", "optuna", *RECORDING},
    "provenance": {"torch", "monai", "mlflow", *SEARCHING},
    "operations": {"torch", "monai", *SEARCHING, *RECORDING},
    "tracking": {"torch", "monai", *SEARCHING, "dvc", "dvc_data", "dvc_objects"},
    "sweeping": {"torch", "monai", *RECORDING},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*/**/*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_lies_below_it(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("prostate_seg.")}
    assert ours <= LAYERS[layer] | {layer}
    others = {name.split(".")[0] for name in imports(path)}
    assert not others & FORBIDDEN[layer]


def test_stages_have_a_run_and_import_no_other_stage() -> None:
    for path in PACKAGE.glob("stages/[!_]*.py"):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert "run" in functions, path.name
        assert not [name for name in imports(path) if name.startswith("prostate_seg.stages")], path.name


def test_folders_have_at_most_16_modules() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE / "stages"}
    assert not [folder.name for folder in folders if len(list(folder.glob("[!_]*.py"))) > 16]


def test_no_module_imports_itself_through_others() -> None:
    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: (run_time_imports(path) & set(paths)) - {name} for name, path in paths.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def run_time_imports(path: Path) -> set[str]:
    """Return imported modules and names, without those of type checking only."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for block in blocks:
        block.body = []
    nodes = list(ast.walk(tree))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_launcher_and_callback_import_nothing_heavy_at_the_top() -> None:
    for name in ("__main__.py", "callback.py"):
        top = {module.split(".")[0] for module in imports(PACKAGE / name)}
        assert not top & (RECORDING | {"torch", "monai", "numpy", "psutil", "optuna"}), name


def test_only_hashing_and_cache_import_dvc() -> None:
    users = {
        path.name for path in modules() if {name.split(".")[0] for name in imports(path)} & (RECORDING - {"mlflow"})
    }
    assert users == {"hashing.py", "dvc_cache.py"}


def test_every_folder_of_the_package_has_its_rule() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(LAYERS)
