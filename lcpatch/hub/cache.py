"""Prefix caches on the Hub: read a long text once, continue it anywhere.

A cache is one safetensors file with a header (`lcpatch.caches.prefix_file`), which is checked like any file of unknown
origin; here it travels, with a card.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..caches import LongCache, caches, store
from ..caches.prefix_file import read_header
from ..core.flags import check_flag
from .about import HUB_ID, About
from .card_files import write_card
from .escape import Ready, argument
from .load import file_of
from .template import metadata, render
from .upload import Push, Target, publish

CACHE_FILE = "cache.safetensors"
"""What a cache is called in a repository."""
DTYPES = ("float32", "bfloat16", "float16")


def load_cache(
    id_or_path: str | Path,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **places: Any,
) -> LongCache:
    """The cache that `cache.save` or `lcpatch.push_to_hub` wrote: `model.generate(**inputs, past_key_values=cache)`.

    The inputs are the whole text, the saved prefix in front, as in any later turn. Continuing gives what continuing
    the saved cache gives, to the bit.

    Args:
        id_or_path: the file, a folder that holds it, or a repository on the Hub.
        model: the model that the cache was made for, or its equal: geometry, RoPE, patch, dtype and weights are
            compared.
        tokenizer: if given, and one was when saving, it must be equal too.
        verify: compare the checksums of all tensors, so that a file which was damaged since it was saved is refused;
            the header's is compared in any case.
        revision: branch, tag or commit of the repository.
        token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`.
        **places: where this machine keeps it: `disk` and `host_bytes` of a tiered cache, which no file brings.

    Raises:
        StoreError: no such file, a broken or unknown one, or a cache of another model.
        HubError: the Hub did not give the file; the message says why and what to do.
    """
    check_flag("verify", verify)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    path = file_of(id_or_path, CACHE_FILE, revision, hub)
    return store.load_cache(path, model, tokenizer, verify, **places)


def push_cache(
    cache: LongCache | str | Path,
    target: Target,
    *,
    tokenizer: Any = None,
    about: Any = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Push a cache, or the file that `cache.save` wrote, in one commit with a card; see `lcpatch.push_to_hub`."""
    about = About.of(about)

    def fill(folder: Path) -> None:
        file = folder / CACHE_FILE
        if isinstance(cache, LongCache):
            cache.save(file, tokenizer)
        else:
            shutil.copyfile(cache, file)
        header = read_header(file)
        revision = None if target.create_pr else target.revision
        write_card(folder, cache_card(header, target.repo_id, about, file.stat().st_size, revision), {})

    if not isinstance(cache, LongCache):
        read_header(cache)  # what is no cache is refused before anything is copied
    return publish(fill, target, message or "Prefix cache by lcpatch", dry_run=dry_run)


def cache_card(
    header: Mapping[str, Any], repo_id: str, about: About, size: int = 0, revision: str | None = None
) -> str:
    """The card of a cache whose header is `header`.

    Raises:
        UnknownNameError: a kind of cache that this lcpatch does not have.
    """
    kind, model = caches.get(header["cache"]), header["model"]
    base = about.base_model or model.get("name")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base) or Path(base).exists():
        base = None
    dtype = model.get("dtype") if model.get("dtype") in DTYPES else "float32"
    numbers = [_mapping(_mapping(entry).get("numbers")) for entry in header["layers"]]
    patch, versions = _mapping(model.get("patch")), _mapping(header.get("versions"))
    data = {
        "license": about.license,
        "language": list(about.language),
        "base_model": base,
        "tags": list(dict.fromkeys(["lcpatch", "kv-cache", kind.name, "long-context", *about.tags])),
        "datasets": list(about.datasets),
    }
    return render(
        "cache",
        metadata=metadata(data),
        name=repo_id,
        repo_id=repo_id,
        revision=argument("revision", revision),
        base=base,
        loader="lcpatch" if patch else "transformers",
        dtype=Ready(dtype),
        kind=kind.name,
        title=title_of(kind),
        papers=papers_of(kind),
        options=list(header["options"].items()),
        tokens=max((n["seen"] for n in numbers if type(n.get("seen")) is int), default=0),
        size=f"{size / 2**20:.1f}",
        method=patch.get("method", ""),
        versions=list(versions.items()),
        has_tokenizer=header.get("tokenizer") is not None,
        about=about,
    )


def title_of(kind: type) -> str:
    """What a cache's class says it is, after the call that it begins with."""
    return (kind.__doc__ or kind.name).splitlines()[0].rpartition(": ")[2]


def papers_of(kind: type) -> list[str]:
    """arXiv ids of the papers that a cache's file names as its sources."""
    text = sys.modules[kind.__module__].__doc__ or ""
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value`, or an empty one: a header's parts may be anything."""
    return value if isinstance(value, Mapping) else {}
