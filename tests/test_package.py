"""Rules that hold across the tree: who may import whom, what an import may load, what gets installed."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import minirea

ROOT = Path(__file__).parent.parent

# Module -> what of minirea it may import. `kernels` and `weights` stand for everything in those folders.
ALLOWED = {
    "minirea.errors": set(),
    "minirea.files": {"errors"},
    "minirea.threads": {"errors"},
    "minirea.checks": {"errors"},
    "minirea.config": {"checks", "errors"},
    "minirea.json_object": {"errors", "files"},
    "minirea.checkpoint_config": {"config", "errors", "files", "json_object"},
    "minirea.isolation": {"errors", "threads"},
    "minirea.memory": {"errors"},
    "minirea.compact": set(),
    "minirea.quantize": set(),
    "minirea.rope": {"config"},
    "minirea.tokenizer": {"tokenizer", "checks", "json_object", "errors", "files", "memory"},
    "minirea.sampling": {"checks"},
    "minirea.placement": set(),
    "minirea.pages": set(),
    "minirea.pinned": {"errors", "memory", "threads"},
    "minirea.cache": {"config", "memory", "errors", "kernels", "pages", "pinned", "placement", "threads"},
    "minirea.attention": {"kernels", "cache", "config", "cpu_attention", "placement", "rope", "errors"},
    "minirea.cpu": {"kernels", "quantize", "pages", "progress", "threads"},
    "minirea.cpu_attention": {"config", "cpu", "kernels", "rope"},
    "minirea.cpu_steps": {"attention", "cache", "kernels", "model"},
    "minirea.plan": {
        *("quantize", "linear", "attention", "cache", "config", "cpu", "kernels", "memory", "placement", "weights"),
    },
    "minirea.linear": {"quantize", "kernels", "cpu"},
    "minirea.ranks": {"config", "errors", "kernels", "sampling"},
    "minirea.model": {"kernels", "attention", "cache", "config", "cpu", "linear", "ranks"},
    "minirea.leader": {"cache", "config", "errors", "model", "ranks", "threads"},
    "minirea.follower": {
        *(
            "attention",
            "cache",
            "config",
            "errors",
            "isolation",
            "leader",
            "loading",
            "model",
            "plan",
            "ranks",
            "weights",
        ),
    },
    "minirea.observer": {"attention", "cache", "kernels", "model", "rope"},
    "minirea.sources": {"cache", "isolation", "model", "observer", "tokenizer"},
    "minirea.steps": {"kernels", "attention", "linear", "model", "cache", "placement", "ranks", "sampling"},
    "minirea.graph": {"steps", "model", "cache", "ranks", "sampling", "threads"},
    "minirea.progress": {"config"},
    "minirea.context": {
        *("cache", "checks", "config", "errors", "files", "isolation", "pinned", "progress", "threads", "weights"),
    },
    "minirea.generate": {
        *("checks", "graph", "steps", "model", "cache", "sampling", "tokenizer", "isolation", "memory", "errors"),
        *("cpu_steps", "leader", "progress", "ranks"),
    },
    "minirea.loading": {"attention", "cache", "isolation", "leader", "model", "plan", "ranks", "weights"},
    "minirea.api": {
        *("follower", "leader", "loading", "ranks"),
        *("generate", "steps", "attention", "model", "checks", "checkpoint_config", "config", "memory"),
        *("tokenizer", "plan", "sources", "weights", "errors", "files", "isolation", "context", "pinned"),
    },
    "minirea.evaluation": {
        *("evaluation", "api", "checks", "config", "generate", "files", "isolation", "json_object", "progress"),
        *("sources", "tokenizer", "errors"),
    },
    "minirea.terminal": {"errors"},
    "minirea.explain": {"evaluation", "explain", "files", "isolation", "sources", "tokenizer", "errors"},
    "minirea.series": {"errors", "files", "json_object"},
    "minirea.chat": {"api", "errors", "files", "generate", "terminal", "threads"},
    "minirea.cli": {"cli", "errors", "follower", "ranks", "terminal", "threads"},
    "minirea.cli.flags": {"config", "errors", "terminal"},
    "minirea.cli.parser": {"cli", "config", "evaluation", "errors"},
    "minirea.cli.inputs": {"api", "errors", "files", "series"},
    "minirea.cli.output": {"api", "errors", "generate", "memory", "terminal"},
    "minirea.cli.commands": {
        *("cli", "api", "chat", "checks", "config", "context", "errors", "evaluation", "explain", "files", "generate"),
        *("memory", "series", "sources", "terminal"),
    },
    "minirea.__main__": {"cli"},
    "minirea.__init__": {"errors", "api", "evaluation", "generate"},
    # What looks inside the model instead of only asking it.
    "minirea.evaluation.tasks.likelihood": {"evaluation", "api", "cache", "steps", "errors", "isolation", "progress"},
    "minirea.evaluation.tasks.observe": {"evaluation", "cache", "generate", "isolation", "model", "observer"},
    "minirea.evaluation.tasks.mechanism_measures": {"evaluation", "config", "kernels", "observer", "rope"},
    "kernels": {"compact", "config", "errors", "kernels", "pages", "quantize", "threads"},
    "weights": {"compact", "quantize", "config", "errors", "files", "json_object", "progress", "threads", "weights"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            module = node.module
            names |= {f"minirea.{alias.name}" for alias in node.names} if module == "minirea" else {module}
    return names


SOURCES = sorted(path for folder in ("minirea", "kernels", "weights") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_dependencies_run_one_way(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    own = f"{package}.{path.stem}"
    roots = ("minirea.evaluation", "kernels")
    folder = next((root for root in roots if package.startswith(root)), package)
    allowed = ALLOWED[own] if own in ALLOWED or package == "minirea" else ALLOWED[folder]
    public = {"__version__"}  # names of the package itself, not modules
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("minirea.")}
    assert ours <= allowed | public


def test_functions_have_at_most_80_lines_and_25_parameters() -> None:
    """Docstrings and the entries of kernels count."""
    for path in (*SOURCES, *sorted((ROOT / "tools").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first, last = min(one.lineno for one in (node, *node.decorator_list)), node.end_lineno or 0
                parameters = [one for one in ast.walk(node.args) if isinstance(one, ast.arg)]
                assert last - first < 80 and len(parameters) <= 25, f"{path}: {node.name}"


def test_bars_come_from_one_place() -> None:
    """Which keeps hidden ones from starting a thread."""
    assert [path.name for path in SOURCES if "tqdm" in imports(path)] == ["progress.py"]


def test_new_tensors_name_their_dtype() -> None:
    """The default one is the caller's."""
    makers = ("empty", "full", "ones", "rand", "randn", "zeros", "tensor", "eye", "linspace")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in makers}:
                assert any(keyword.arg == "dtype" for keyword in node.keywords), f"{path}: line {node.lineno}"


def test_the_twins_and_the_kernel_do_not_know_each_other() -> None:
    assert not any(name.startswith("triton") for name in imports(ROOT / "kernels" / "reference.py"))
    fused = {name for path in (ROOT / "kernels" / "fused").glob("*.py") for name in imports(path)}
    assert "minirea.kernels.reference" not in fused


def modules_after(statement: str) -> set[str]:
    """Names of all modules loaded once `statement` has run."""
    code = f"{statement}\nimport sys; print(*sys.modules, file=sys.stderr)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split())


def test_importing_the_engine_loads_neither_triton_nor_cuda_nor_the_compiler_of_torch() -> None:
    names = modules_after("import minirea.api, torch; assert not torch.cuda.is_initialized()")
    assert "minirea.api" in names
    assert not {name for name in names if name.split(".")[0] == "triton" or name.startswith("torch._dynamo")}


def test_the_command_handles_ctrl_c_before_it_imports_what_takes_long() -> None:
    """Without site, which may import anything."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minirea.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "minirea.__main__" in loaded
    assert not {"typing", "re", "argparse", "torch"} & set(loaded)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["eval", "--help"], ["eval", "needle", "--help"], ["--version"]],
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    statement = f"import minirea.cli\ntry: minirea.cli.main({arguments})\nexcept SystemExit: pass"
    assert "torch" not in modules_after(statement)


def test_the_clone_is_found_from_its_parent_and_from_within(tmp_path: Path) -> None:
    """A folder of the package's name, without the package, is next to it; kernels/ is next to the package."""
    (tmp_path / "minirea").mkdir()
    for folder, name, module in ((tmp_path, "InputError", "minirea.errors"), (ROOT, "load", "minirea.api")):
        code = f"import minirea; print(minirea.{name}.__module__, minirea.__path__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
        assert done.stdout.startswith(module)


def can_build_wheels() -> bool:
    """Whether this environment has pip, and a setuptools that needs no other package (70.1)."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    version = [int(part) for part in re.findall(r"\d+", found.get("setuptools", "0"))]
    return "pip" in found and version >= [70, 1]


@pytest.mark.skipif(not can_build_wheels(), reason="needs pip and setuptools 70.1")
def test_installations_from_a_clone_are_found_wherever_python_starts(tmp_path: Path) -> None:
    """Editable as tools/env.sh makes it, found from the clone's parent; and one that needs the clone no more."""
    clone, room = tmp_path / "minirea", tmp_path / "elsewhere"
    for folder in ("minirea", "kernels", "weights"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (settings,) = re.findall(r"--config-settings \S+ -e", (ROOT / "tools" / "env.sh").read_text())
    ways = {"editable": (settings.split(), tmp_path, clone), "copied": ([], room, room / "lib")}
    room.mkdir()
    pip = [sys.executable, "-m", "pip"]
    for name, (options, start, inside) in ways.items():
        environment = room / "lib" / name
        venv.create(environment, symlinks=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        # Our own environment's libraries, without what its .pth files add, such as minirea.
        (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        install = [*pip, "--python", environment, "install", "-q", "--disable-pip-version-check", "--no-deps"]
        source = [*options, "."] if options else ["."]
        subprocess.run([*install, "--no-build-isolation", *source], check=True, cwd=clone, capture_output=True)
        code = "import minirea, minirea.kernels as k, minirea.weights as w; print(minirea.load, k.__file__, w.__file__)"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, cwd=start)
        _, *files = run([environment / "bin" / "python", "-c", code]).stdout.rsplit(maxsplit=2)
        assert all(Path(file).is_relative_to(inside) for file in files), files
        assert run([environment / "bin" / "minirea", "--version"]).stdout == f"minirea {minirea.__version__}\n"
        assert (Path(files[1]).parent / "demo" / "model.safetensors").exists()


def test_import_minirea_is_lazy() -> None:
    assert "torch" not in modules_after("import minirea")


def test_a_program_can_name_every_error() -> None:
    kinds = [kind for kind in vars(minirea.errors).values() if isinstance(kind, type)]
    assert {kind.__name__ for kind in kinds if kind.__module__ == "minirea.errors"} <= set(minirea.__all__)
    assert all(hasattr(minirea, name) for name in minirea.__all__)


def test_what_is_installed() -> None:
    import minirea.kernels
    import minirea.weights

    assert minirea.kernels.reattention is not None
    assert Path(minirea.kernels.__file__).parent.name == "kernels"
    demo = Path(minirea.weights.__file__).parent / "demo"
    assert (demo / "model.safetensors").exists()
    entry_points = importlib.metadata.entry_points(group="console_scripts")
    module, function = entry_points["minirea"].value.split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"minirea {minirea.__version__}\n"
    assert importlib.metadata.version("minirea") == minirea.__version__
