"""The exported kernel: its layout, its metadata, and that it is the package with names of its own."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lcpatch
from lcpatch.cli import main
from lcpatch.hub.card_files import is_ours
from lcpatch.hub.kernels import PACKAGE, Project, export_kernels, push_kernels

SOURCE = Path(lcpatch.__file__).parents[1] / "kernels" / "torch-ext" / PACKAGE


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "kernel"
    export_kernels(folder, repo_id="me/kernel")
    return folder


def test_each_backend_has_the_whole_package(exported: Path):
    assert {f.name for f in (exported / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    names = {f.relative_to(SOURCE).as_posix() for f in SOURCE.rglob("*.py")}
    for variant in (exported / "build").iterdir():
        found = {f.relative_to(variant).as_posix() for f in variant.rglob("*") if f.is_file()}
        assert found == {*names, "metadata.json"}
        for name in names - {"_ops.py"}:
            assert (variant / name).read_bytes() == (SOURCE / name).read_bytes()


def test_the_metadata_is_true(exported: Path):
    ids = set()
    for variant in (exported / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.name.removeprefix("torch-")}
        assert (metadata["name"], metadata["version"], metadata["python-depends"]) == ("lcpatch-kernels", 1, [])
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((variant / name).read_bytes()).digest()
        assert f'NAMESPACE = "{metadata["id"]}"' in (variant / "_ops.py").read_text()
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert len(ids) == 2


def test_the_namespace_follows_the_content():
    project = Project.read()
    changed = Project(**{**vars(project), "sources": {**project.sources, "_ops.py": b'NAMESPACE = "x"\n'}})
    newer = Project(**{**vars(project), "version": 2})
    assert len({project.digest, changed.digest, newer.digest}) == 3
    assert project.digest == Project.read().digest


def test_it_runs_beside_the_package_itself(exported: Path):
    """Imported under another name, as Hugging Face's loader does, it registers its ops beside ours and agrees."""
    code = """
import importlib.util, torch, lcpatch_kernels as ours
variant = sys.argv[1]
spec = importlib.util.spec_from_file_location("other", variant + "/__init__.py")
other = sys.modules["other"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
torch.manual_seed(0)
q, k, v = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
results = [m.block_sparse(q, k, v, m.BlockSparseSpec.of([m.Rule(sinks=3, back=7)] * 4))[0] for m in (ours, other)]
names = {n.split("::")[0] for n in torch._C._dispatch_get_all_op_names() if "lcpatch" in n}
print(torch.equal(*results), len(names))
"""
    path = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
    command = [sys.executable, "-c", path + code, str(exported / "build" / "torch-cpu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "2"], done.stderr


def test_the_card_is_filled_in(exported: Path):
    card = (exported / "README.md").read_text()
    assert is_ours(card)
    assert 'get_kernel("me/kernel", version=1, trust_remote_code=True)' in card
    assert "- `flash_attn_forward`" in card
    assert not re.search(r"\{[{%]", card)


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main(["kernels", "export", "--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"
    with pytest.raises(ValueError, match="needs a checkout"):
        export_kernels(tmp_path / "out", project=tmp_path)
    with pytest.raises(ValueError, match="Repo id"):
        export_kernels(tmp_path / "out", repo_id="a/b/c")
    assert main(["kernels", "push", "--dry-run", "--repo-id", "me/kernel"]) == 0
    assert "would go to me/kernel" in capsys.readouterr().out
    assert "build/torch-cuda/metadata.json" in push_kernels("me/kernel", dry_run=True).files
