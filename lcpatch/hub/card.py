"""The card of a patched model or adapter: what changed, how to run it, what it costs, how to cite it.

It is made from the saved folder, as a stranger finds it, from what its maker adds, and from a report of `lcpatch eval`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.config import PatchConfig, Sinks, parse_sinks
from ..eval.report import Report
from ..eval.saved import read_report
from ..hf.layers import with_sink_tokens
from ..patching.resolve import pattern_of
from ..patterns import AttentionPattern, LayerShape
from . import measured
from .about import HUB_ID, About
from .escape import argument, clean
from .load import ADAPTER_CONFIG, MAX_MODEL_CONFIG_BYTES, adapters_in, patch_in
from .save import needs_lcpatch
from .sidecar import read_json, read_positions
from .template import metadata, render
from .upload import PICTURES

DRAWN_LENGTH = 4096
MAX_DRAWN_HEADS = 128
MAX_DRAWN_LAYERS = 512


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        repo_id: what it is, or will be, called on the Hub.
        patch: its patch.
        adapter: the content of `adapter_config.json`; None for a full model.
        config: the model's config as far as it is known: an adapter's folder has none.
        has_tokenizer: whether a tokenizer lies beside it.
        revision: the branch it lies on, if not the main one.
        adapters: names of its adapters.
        positions: what an adapter was trained with: the base must be set to it.
    """

    repo_id: str
    patch: PatchConfig
    adapter: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    has_tokenizer: bool = False
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    positions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, repo_id: str, config: Mapping[str, Any] | None = None, revision: str | None = None
    ) -> Subject:
        """From what `lcpatch.save_pretrained` wrote.

        Args:
            folder: where it wrote to.
            repo_id: the repository.
            config: the model's config, for an adapter.
            revision: the branch.
        """
        adapters = adapters_in(folder)
        patch = patch_in(folder, folder, bool(adapters))
        if config is None and (folder / "config.json").is_file():
            config = read_json(folder / "config.json", MAX_MODEL_CONFIG_BYTES)
        one = adapters.get("default") or next(iter(adapters.values()), None)
        facts = None if one is None else read_json(one / ADAPTER_CONFIG, MAX_MODEL_CONFIG_BYTES)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        positions = read_positions(folder) if adapters else {}
        return cls(repo_id, patch, facts, config or {}, has_tokenizer, revision, tuple(adapters), positions)

    @property
    def shape(self) -> LayerShape | None:
        """The sparse layers' heads, where the config says them."""
        heads = self.config.get("num_attention_heads")
        kv_heads = self.config.get("num_key_value_heads") or heads
        fits = type(heads) is int and type(kv_heads) is int and 0 < kv_heads <= heads <= MAX_DRAWN_HEADS
        layers = self.patch.layers if isinstance(self.patch.layers, tuple) else ()
        fits = fits and heads % kv_heads == 0 and 0 < len(layers) <= MAX_DRAWN_LAYERS
        return LayerShape(heads, kv_heads, 0, len(layers)) if fits else None


def make_card(
    subject: Subject, about: About, report: Report | Mapping[str, Any] | str | Path | None = None
) -> tuple[str, dict[str, Any]]:
    """The card's text, and its pictures as figures by file name.

    Raises:
        ValueError: a report that is broken.
    """
    report = None if report is None else read_report(report)
    drawn = {f"{PICTURES}/{name}": figure for name, figure in _figures(subject, report).items()}
    return card_text(subject, about, report, list(drawn)), drawn


def card_text(subject: Subject, about: About, report: Report | None = None, pictures: Sequence[str] = ()) -> str:
    """The card as Markdown, with those pictures."""
    adapter = subject.adapter
    values = _facts(subject, about) | {
        "metadata": metadata(_metadata(subject, about, report)),
        "measured": None if report is None else measured.Measured.of(report),
        "pictures": {Path(name).stem: name for name in pictures},
    }
    if adapter is None:
        return render("model", **values)
    base = values["base"] or "org/base-model"
    values["peft"] = {"kind": adapter.get("peft_type"), "rank": adapter.get("r")}
    named = [name for name in subject.adapters if name != "default"]
    plain = not named or len(named) < len(subject.adapters)  # whether one lies where PEFT looks first
    values["adapters"] = named
    values["positions"] = list(subject.positions.items())
    values["active"] = argument("adapter", named[0] if len(named) > 1 and not plain else None)
    values["subfolder"] = argument("subfolder", None if plain else named[0])
    values["base_example"] = base
    values["base_argument"] = argument("base", None if base == adapter.get("base_model_name_or_path") else base)
    return render("adapter", **values)


def _facts(subject: Subject, about: About) -> dict[str, Any]:
    """What the templates of a model and of an adapter are filled with."""
    patch, pattern = subject.patch, pattern_of(subject.patch)
    layers = patch.layers if isinstance(patch.layers, tuple) else ()
    total = subject.config.get("num_hidden_layers")
    counted = type(total) is int and total > max(layers, default=0)
    training = about.training
    return {
        "name": subject.repo_id,
        "repo_id": subject.repo_id,
        "revision": argument("revision", subject.revision),
        "base": base_of(subject, about),
        "model_type": subject.config.get("model_type"),
        "patch": patch,
        "pattern": pattern,
        "layers": {
            "sparse": len(layers),
            "total": total if counted else "the model's",
            "all": total == len(layers) if counted else None,
            "listed": _listed(layers),
        },
        "sinks": parse_sinks(patch.sinks) or Sinks("none"),
        "density": _density(subject, pattern),
        "needs_lcpatch": needs_lcpatch(patch),
        "has_tokenizer": subject.has_tokenizer,
        "parameters": _parameters(patch),
        "about": about,
        "training": {
            "rows": list(training.items()) if isinstance(training, Mapping) else [],
            "text": training if isinstance(training, str) else "",
        },
        "bibtex": "\n\n".join(filter(None, [bibtex(pattern), about.citation])),
    }


def base_of(subject: Subject, about: About) -> str | None:
    """The base model's name on the Hub, if it has one."""
    said = (subject.adapter or {}).get("base_model_name_or_path") or subject.config.get("_name_or_path")
    name = about.base_model or said
    if not isinstance(name, str) or name == subject.repo_id or not HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    return name


def bibtex(source: Any) -> str:
    """The entry of a method's paper, from its class: `paper`, `paper_title`, `authors`, `name`."""
    year = f"20{source.paper[:2]}"
    first = re.sub(r"\W", "", source.authors.partition(",")[0]).lower() or "arxiv"
    rows = {"title": source.paper_title, "author": source.authors, "year": year, "eprint": source.paper}
    rows |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{source.paper}"}
    lines = [f"  {key:13} = {{{value}}}" for key, value in rows.items() if value]
    return f"@misc{{{first}{year}{source.name},\n" + ",\n".join(lines) + "\n}"


def _metadata(subject: Subject, about: About, report: Report | None) -> dict[str, Any]:
    is_adapter = subject.adapter is not None
    base = base_of(subject, about)
    tags = ["lcpatch", subject.patch.method, "long-context", "sparse-attention", *map(clean, about.tags)]
    return {
        "license": about.license,
        "language": list(about.language),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": base and (about.base_model_relation or ("adapter" if is_adapter else "finetune")),
        "tags": list(dict.fromkeys(tags)),
        "datasets": list(about.datasets),
        "model-index": None if report is None else measured.model_index(report, subject.repo_id.rpartition("/")[2]),
    }


def _figures(subject: Subject, report: Report | None) -> dict[str, Any]:
    drawn = {}
    if subject.shape is not None:
        from ..patching.picture import draw

        drawn["pattern.png"] = draw(pattern_of(subject.patch), subject.shape, _length(subject), subject.patch.sinks)
    return drawn if report is None else drawn | measured.pictures(report)


def _density(subject: Subject, pattern: AttentionPattern) -> dict[str, Any] | None:
    if subject.shape is None:
        return None
    from lcpatch_kernels import BlockSparseSpec

    length = _length(subject)
    rules = with_sink_tokens(pattern.rules(subject.shape), subject.patch.sinks)
    share = BlockSparseSpec.of(rules, getattr(pattern, "block_size", 64)).density(length)
    return {"length": length, "share": f"{share:.0%}"}


def _length(subject: Subject) -> int:
    limit = subject.config.get("max_position_embeddings")
    return min(limit, DRAWN_LENGTH) if type(limit) is int and limit > 1 else DRAWN_LENGTH


def _parameters(patch: PatchConfig) -> list[tuple[str, Any]]:
    rows = [("method", patch.method), *patch.options.items()]
    layers = ", ".join(map(str, patch.layers)) if isinstance(patch.layers, tuple) else patch.layers
    rows += [("layers", layers), ("mode", patch.mode), ("sinks", patch.sinks or "none"), ("dense layers", patch.dense)]
    return [(key, value) for key, value in rows if value is not None]


def _listed(layers: tuple[int, ...]) -> str:
    """Layer indices, short: every layer of a run, or of a run of steps, is not spelled out."""
    if len(layers) < 4:
        return ", ".join(map(str, layers))
    step = layers[1] - layers[0]
    if list(layers) != list(range(layers[0], layers[-1] + 1, step)):
        return ", ".join(map(str, layers))
    return f"{layers[0]} to {layers[-1]}" + (f", every {step}" if step > 1 else "")
