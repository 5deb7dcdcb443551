"""The house itself: what importing does, what the wheel ships, what the tree must not contain."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import lcpatch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "torch-ext" / "lcpatch_kernels"


def project_files() -> list[Path]:
    """Every file, or link to a folder, that is committed or about to be."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, check=True, capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter that finds the packages where this one does; return what it printed."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(KERNELS.parent)!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def absolute_imports(tree: ast.AST) -> set[str]:
    """The top-level packages a module imports by absolute name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


# Importing


def test_importing_lcpatch_loads_no_framework():
    """So it is quick, and it cannot have changed a library that is not even loaded."""
    loaded = run_python("import lcpatch; print(*{'torch', 'transformers', 'triton', 'peft'} & set(sys.modules))")
    assert loaded == ""


def test_importing_lcpatch_registers_nothing():
    changed = run_python(
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "names = lambda: (set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys()))\n"
        "before = names()\n"
        "import lcpatch\n"
        "print(names() != before)"
    )
    assert changed == "False"


def test_kernels_import_without_triton():
    # None in sys.modules makes `import triton` raise, and find_spec say that there is none.
    assert run_python("sys.modules['triton'] = None; import lcpatch_kernels; print('ok')") == "ok"


# The kernels, as the Hub wants them


def test_no_init_in_kernels():
    """It would shadow Hugging Face's `kernels` for whoever has the repository root on the path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda f: f.relative_to(KERNELS).as_posix())
def test_kernels_can_be_published_as_they_stand(file: Path):
    """The Hub loads a kernel under a name of its own, and brings nothing along but torch and triton."""
    tree = ast.parse(file.read_text())
    assert absolute_imports(tree) <= set(sys.stdlib_module_names) | {"torch", "triton"}
    # kernel-builder replaces our _ops.py by one of its own, which has these names
    from_ops = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "_ops" for a in n.names}
    assert from_ops <= {"add_op_namespace_prefix", "ops"}


# Version and wheel


def test_changelog_knows_no_later_version():
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert max(map(Version, released), default=Version("0")) <= Version(lcpatch.__version__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, so that no stale build/ gets in and none is left behind."""
    copy = tmp_path_factory.mktemp("wheel")
    for file in project_files():
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").iterdir()
    return built


@pytest.mark.slow
def test_wheel_ships_the_two_packages_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"lcpatch-{lcpatch.__version__}.dist-info"  # which also says that the two versions agree
    assert {name.split("/")[0] for name in names} == {"lcpatch", "lcpatch_kernels", info}
    sources = {file for file in project_files() if file.suffix == ".py"}
    shipped = {f.relative_to(r).as_posix() for r in (ROOT, KERNELS.parent) for f in sources if f.is_relative_to(r)}
    modules = {name for name in shipped if name.startswith(("lcpatch/", "lcpatch_kernels/"))}
    assert modules <= set(names)
    recipes = {f.relative_to(ROOT).as_posix() for f in (ROOT / "recipes").rglob("*") if f.suffix in (".py", ".yaml")}
    assert {f"lcpatch/{name}" for name in recipes} <= set(names)
    templates = {f.name for f in (ROOT / "hub_cards").iterdir()}  # some of them, and their folder, are links
    assert templates == {Path(name).name for name in names if name.startswith("lcpatch/hub/hub_cards/")}
    assert "model.md.jinja" in templates


# The tree

# What is true of one machine only, or of how a change came about, belongs in no file.
FOREIGN = {
    "a path of one machine": r"(?<![\w.~}])/(?:home|root|Users|work|mnt|opt)/\w",
    "the address of a package index": r"--(?:extra-)?index-url[ =]\S*//|--find-link[s]|\b(pypi|download\.pytorch)\.org",
    "an issue's number": r"(?i)\bissue #?\d+",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_no_file_contains(what: str):
    pattern = re.compile(FOREIGN[what])
    hits = []
    for file in filter(Path.is_file, project_files()):
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            if pattern.search(line):
                hits.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not hits, f"{what}:\n" + "\n".join(hits)
