"""Caches for whoever only knows `generate`: a repository with `custom_generate/generate.py`.

    model.generate(**inputs, custom_generate="me/h2o", trust_remote_code=True)

runs that file, which puts one of lcpatch's caches in and goes on as usual.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..caches import caches
from .about import About
from .cache import papers_of, title_of
from .card_files import write_card
from .escape import Ready
from .template import metadata, render
from .upload import Push, Target, publish

SOURCE = '''"""Generate with lcpatch's "{name}" cache. Exported by lcpatch {version}."""

import lcpatch

OPTIONS = {options!r}


def generate(model, past_key_values=None, cache_options=None, **kwargs):
    """As `model.generate`, with a `{class_name}` unless a cache is given.

    Args:
        past_key_values: a cache of an earlier turn; None: a new one.
        cache_options: options of a new one, over those of this file.
    """
    if past_key_values is None:
        past_key_values = lcpatch.{class_name}(model, **{{**OPTIONS, **(cache_options or {{}})}})
    elif cache_options:
        raise ValueError("cache_options are for a new cache, but past_key_values is one that is there already")
    # The class's: a model that was loaded from this repository has this function in place of its own.
    return type(model).generate(model, past_key_values=past_key_values, **kwargs)
'''


def export_generate(
    name: str, out: str | Path, *, repo_id: str | None = None, about: Any = None, **options: Any
) -> list[Path]:
    """Write a `custom_generate` repository for a cache into `out`.

    Args:
        name: the cache's registered name, such as "h2o".
        out: a folder; made if it does not exist.
        repo_id: what it will be called, for its card; default: "me/" and the name.
        about: `license`, `tags`, `limits` for its card, as in `lcpatch.push_to_hub`.
        **options: of the cache.

    Returns:
        The files.

    Raises:
        UnknownNameError: no such cache, or no such scorer.
        ValueError: an option that it does not have, a value that it refuses or that is no plain one, a place on this
            machine (`disk`); a README.md of somebody else's in `out`.
    """
    kind, folder, about = caches.get(name), Path(out), About.of(about)
    _check(kind, options)
    card = _card(kind, repo_id or f"me/{name}", options, about)
    written = write_card(folder, card, {})
    files = {"generate.py": _source(kind, options), "requirements.txt": f"lcpatch>={__version__}\n"}
    (folder / "custom_generate").mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / "custom_generate" / file).write_text(content, encoding="utf-8")
    return [*written, *(folder / "custom_generate" / file for file in files)]


def push_generate(
    name: str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
    about: Any = None,
    **options: Any,
) -> Push:
    """Export a cache as a `custom_generate` repository and push it in one commit.

    Args:
        name, about, **options: as in `export_generate`.
        repo_id, private, revision, create_pr, token, dry_run: as in `lcpatch.push_to_hub`.

    Raises:
        UnknownNameError, ValueError: as `export_generate`.
        HubError: the Hub refused or failed; the files are kept, and the message says where.
    """
    target = Target(repo_id, "model", private, revision, create_pr, token)

    def fill(folder: Path) -> None:
        export_generate(name, folder, repo_id=repo_id, about=about, **options)

    return publish(fill, target, f"Generation with lcpatch's {name} cache", dry_run=dry_run)


def _check(kind: type, options: Mapping[str, Any]) -> None:
    """Refuse what whoever uses the file would be refused, with the sentence that they would read."""
    known = list(inspect.signature(kind).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{kind.name} cache has no option {unknown[0]!r}; options: {', '.join(known) or 'none'}")
    for option, value in options.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"{option}={value!r} must be a plain value to be written into a file")
        if option in kind.places:
            raise ValueError(
                f"{option}={value!r} is for whoever generates to choose, on their machine: leave it out here, and give "
                f"it to generate as cache_options={{{option!r}: …}}"
            )
    if options:  # without, a cache is what it is by default
        kind(_any_model(), **options)


def _any_model() -> nn.Module:
    """A tiny one with random weights, of the kind that caches with options take; random numbers go on as they were."""
    from transformers import LlamaConfig, LlamaForCausalLM  # here: importing lcpatch.hub needs no model's code

    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 8)
    heads = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def _source(kind: type, options: Mapping[str, Any]) -> str:
    return SOURCE.format(name=kind.name, version=__version__, options=dict(options), class_name=kind.__name__)


def _card(kind: type, repo_id: str, options: Mapping[str, Any], about: About) -> str:
    tags = ["lcpatch", "custom_generate", "kv-cache", kind.name, "long-context", *about.tags]
    data = {"license": about.license, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
    defaults = {n: p.default for n, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}
    return render(
        "generate",
        metadata=metadata(data),
        name=repo_id,
        repo_id=Ready(repo_id),
        kind=kind.name,
        title=title_of(kind),
        papers=papers_of(kind),
        options=list({**defaults, **options}.items()),
        about=about,
    )
