"""Publish `lcpatch_kernels` as a kernel of the Hub: the layout that Hugging Face's `kernels` package loads.

    build/torch-cpu/    build/torch-cuda/    …    one folder a backend, each the whole package
        __init__.py  _ops.py  metadata.json  …

The kernels are Triton and torch, compiled where they run: nothing has to be built, and the folders have the same
sources. Each has an op namespace of its own, made from its content, so that two versions can be loaded side by side.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_files import signed
from .escape import Ready
from .template import render
from .upload import Push, Target, publish

PACKAGE = "lcpatch_kernels"
NAMESPACE = re.compile(r'^NAMESPACE = "\w+"$', re.MULTILINE)
BACKENDS = ("cpu", "cuda", "rocm", "xpu")


@dataclass(frozen=True)
class Project:
    """What `build.toml` says.

    Args:
        name: of the kernel, with dashes.
        version: its major version; published on the branch v<version>.
        license: the Hub's name of the licence.
        backends: what it is for.
        repo_id: where it is published by default.
        sources: the package's files by name.
    """

    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    repo_id: str
    sources: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path | None = None) -> Project:
        """The project in `folder`; default: that of this checkout.

        Raises:
            ValueError: no project there, or one whose settings do not fit.
        """
        folder = folder or Path(__file__).parents[2] / "kernels"
        file, package = folder / "build.toml", folder / "torch-ext" / PACKAGE
        if not file.is_file() or not package.is_dir():
            raise ValueError(
                f"{folder} holds no kernel project: this needs a checkout of lcpatch, not an installed one"
            )
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        general = data["general"]
        found = tuple(general["backends"])
        if "torch-noarch" not in data or not set(found) <= set(BACKENDS):
            raise ValueError(f"{file}: [torch-noarch] with backends among {', '.join(BACKENDS)} is wanted")
        sources = {f.relative_to(package).as_posix(): f.read_bytes() for f in sorted(package.rglob("*.py"))}
        named = (general["name"], general["version"], general["license"], found, general["hub"]["repo-id"])
        return cls(*named, sources)

    @property
    def digest(self) -> str:
        """Of the sources and the version."""
        parts = [f"{self.name} {self.version}".encode()]
        parts += [part for name, content in sorted(self.sources.items()) for part in (name.encode(), content)]
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def export_kernels(out: str | Path, *, repo_id: str | None = None, project: Path | None = None) -> dict[str, int]:
    """Write the kernel as it is published into `out`.

    Args:
        out: a folder that does not exist or is empty.
        repo_id: where it will be published, for its card; default: what `build.toml` says.
        project: the kernel project; default: the `kernels/` of this checkout.

    Returns:
        Size in bytes of each file, by name.

    Raises:
        ValueError: `out` holds something, the project is not there, or the repository's name is not a valid one.
    """
    from huggingface_hub.utils import validate_repo_id

    folder, found = Path(out), Project.read(project)
    repo_id = repo_id or found.repo_id
    validate_repo_id(repo_id)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; take another, or remove it first")
    files = {f"build/torch-{b}/{name}": c for b in found.backends for name, c in _variant(found, b).items()}
    files["README.md"] = signed(_card(found, repo_id)).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: len(content) for name, content in files.items()}


def push_kernels(
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
    project: Path | None = None,
) -> Push:
    """Export the kernel and push it to a kernel repository, on the branch of its version, in one commit.

    Args:
        repo_id: default: what `build.toml` says.
        private, create_pr, token, dry_run: as in `lcpatch.push_to_hub`.
        project: as in `export_kernels`.

    Raises:
        ValueError: as `export_kernels`.
        HubError: the Hub refused or failed; the exported files are kept, and the message says where.
    """
    found = Project.read(project)
    target = Target(repo_id or found.repo_id, "kernel", private, f"v{found.version}", create_pr, token)

    def fill(folder: Path) -> None:
        export_kernels(folder, repo_id=target.repo_id, project=project)

    message = f"{found.name} {found.version}, {found.digest}"
    return publish(fill, target, message, replaced=["build/*"], dry_run=dry_run)


def _variant(project: Project, backend: str) -> dict[str, bytes]:
    """The files of one backend's folder."""
    files = dict(project.sources)
    unique = f"_{project.name.replace('-', '_')}_{backend}_{project.digest}"
    renamed, count = NAMESPACE.subn(f'NAMESPACE = "{unique}"', files["_ops.py"].decode())
    if count != 1:
        raise ValueError("_ops.py must set NAMESPACE to one string, once: the export gives it a value of its own")
    files["_ops.py"] = renamed.encode()
    digests = {n: base64.b64encode(hashlib.sha256(c).digest()).decode() for n, c in files.items()}
    metadata: dict[str, Any] = {
        "id": unique,
        "name": project.name,
        "version": project.version,
        "license": project.license,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return {**files, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}


def _card(project: Project, repo_id: str) -> str:
    """kernel-builder's own template, filled with the same variables."""
    (names,) = re.findall(r"__all__ = \[(.*?)\]", project.sources["__init__.py"].decode(), re.DOTALL)
    values = {"repo_id": repo_id, "version": project.version, "license": project.license, "layers": [], "source": ""}
    ready = {name: Ready(value) if isinstance(value, str) else value for name, value in values.items()}
    return render("kernel", **ready, functions=[Ready(name) for name in re.findall(r'"(\w+)"', names)])
