"""The rules of the house: who may import whom, how long files are, how fast the door opens."""

import ast
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "vlm": {"vlm"},
    "data": {"data", "vlm"},
    "serve": {"serve", "vlm"},
    "train": {"train", "data", "serve", "vlm"},
}
MOST_LINES = 350
HELP_SECONDS = 0.3
# Where the import name isn't the distribution's.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for package in MAY_IMPORT for path in sources(package)}


def statements(node: ast.AST, run_time_only: bool) -> Iterator[ast.stmt]:
    """All statements, those in functions too; perhaps without what only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        if run_time_only and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from statements(other, run_time_only)
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from statements(child, run_time_only)


def imports(name: str, path: Path, known: dict[str, Path], run_time_only: bool = False) -> set[str]:
    """Full names of what a module imports; `from a import b` is a.b where that is a module, else a."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), run_time_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a walk along the edges closes first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                walk(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def test_packages_import_lower_floors_only() -> None:
    known = modules()
    for name, path in known.items():
        own = {target.split(".")[0] for target in imports(name, path, known)} & set(MAY_IMPORT)
        forbidden = own - MAY_IMPORT[name.split(".")[0]]
        assert not forbidden, f"{path.relative_to(ROOT)} must not import {sorted(forbidden)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(name, path, known, run_time_only=True) & set(known) for name, path in known.items()}
    assert not circles(graph)


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c", "b"], ["d", "d"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_imports_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import train.loop\n"
        "def f():\n    from data import records\n    from . import chat\n"
    )
    known = {"data.records": path, "vlm.chat": path}
    assert imports("vlm.cli", path, known) == {"typing", "train.loop", "data.records", "vlm.chat"}
    assert imports("vlm.cli", path, known, run_time_only=True) == {"typing", "data.records", "vlm.chat"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_files_are_short(package: str) -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package)}
    assert lengths, f"{package} has no Python"
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


def test_no_module_is_named_after_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]
    names = [re.match(r"[A-Za-z0-9_-]+", requirement) for requirement in wanted]
    taken = {IMPORT_NAMES.get(name[0].lower(), name[0]).replace("-", "_").lower() for name in names if name}
    assert {"torch", "datasets", "pil", "yaml"} <= taken
    for name in modules():
        assert name.rpartition(".")[2].lower() not in taken, name


def test_help_is_fast_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("vlm")
    assert program.exists(), "vlm is not installed here: make install"
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert "demo" in done.stdout
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'pydantic', 'yaml', 'rich', 'fastapi'}"
    code = (
        "import sys\nfrom vlm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(repr({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert statistics.median(seconds) < HELP_SECONDS


def config_files() -> list[Path]:
    return sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file())


def test_configs_are_yaml_or_json() -> None:
    assert config_files()
    assert {path.suffix for path in config_files()} <= {".yaml", ".json"}


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        assert isinstance(json.loads(text), dict)
        return
    assert isinstance(yaml.safe_load(text), dict)
    assert load_recipe(path)


@pytest.mark.slow
def test_the_wheel_holds_code_pages_and_configs(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves a build folder beside the sources, and would pack what lies in it.
    tree = tmp_path / "tree"
    for name in (*MAY_IMPORT, "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("vlm-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in modules().values()} <= held
    assert {f"vlm_configs/{path.relative_to(ROOT / 'configs')}" for path in config_files()} <= held
    pages = {str(p.relative_to(ROOT)) for p in (ROOT / "serve" / "page").rglob("*") if p.is_file()}
    templates = {
        str(p.relative_to(ROOT))
        for s in ("html", "css", "js", "jinja")
        for package in ("train", "data")
        for p in (ROOT / package).rglob(f"*.{s}")
    }
    assert pages | templates <= held
    assert not any(name.startswith(("tests/", "configs/")) for name in held)
