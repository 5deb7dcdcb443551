"""What a page of keys is remembered by, and how a query scores it. A scorer is one small class.

@scorers.register("mine")
class Mine:
    def summarise(self, keys, page): …   # keys [B, K, pages * page, D] -> tensors [B, K, pages, …]
    def score(self, query, summary): …   # query [B, H, 1, D] -> fp32 [B, H, pages], the higher the better
    page = 16                            # optional: tokens of the pages that it is for
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lcpatch_kernels import page_bounds, page_scores

from ..core.disk import replacing
from ..core.errors import LcpatchError, UnsupportedModelError
from ..core.registry import Registry
from ..hf.layers import head_dim_of, num_kv_heads_of
from ..hf.models import attention_modules, full_attention_layers, unwrap

scorers: Registry[type[Scorer]] = Registry("page scorer", package="lcpatch.caches")

Summary = tuple[Tensor, ...]


class Scorer(Protocol):
    """Of one layer."""

    def summarise(self, keys: Tensor, page: int) -> Summary:
        """What full pages are remembered by: [B, K, pages * page, D] -> tensors [B, K, pages, …]."""

    def score(self, query: Tensor, summary: Summary) -> Tensor:
        """How well each page fits each query head: [B, H, 1, D] -> fp32 [B, H, pages]."""


@scorers.register("quest")
class Quest:
    """The upper bound of q k over the page, from the least and the largest value of every channel.

    Source: Quest, arXiv 2406.10774.
    """

    def summarise(self, keys: Tensor, page: int) -> Summary:
        return page_bounds(keys, page)[:2]

    def score(self, query: Tensor, summary: Summary) -> Tensor:
        return page_scores(query, *summary)


@scorers.register("mean")
class Mean:
    """q times the page's mean key.

    Source: ShadowKV, arXiv 2410.21465 (its landmarks).
    """

    def summarise(self, keys: Tensor, page: int) -> Summary:
        return page_bounds(keys, page)[2:]

    def score(self, query: Tensor, summary: Summary) -> Tensor:
        return page_scores(query, *summary)


@scorers.register("bookmark")
class Bookmark:
    """`Mean` through two learnt projections of this layer; those of `Bookmarks`. Without them it is `Mean`.

    Source: RetroLM, arXiv 2502.11444: bookmark queries and keys have projections of their own. Departure: the paper
    adds a bookmark token to every page, which moves all positions; here the page's mean key stands for it, so that any
    model runs unchanged.
    """

    page = 128

    def __init__(self, query: Tensor | None = None, key: Tensor | None = None) -> None:
        self.query, self.key = query, key

    def summarise(self, keys: Tensor, page: int) -> Summary:
        (mean,) = page_bounds(keys, page)[2:]
        return (mean if self.key is None else mean @ self.key.to(mean),)

    def score(self, query: Tensor, summary: Summary) -> Tensor:
        if self.query is not None:
            query = query @ self.query.to(query).repeat_interleave(query.shape[1] // self.query.shape[0], 0)
        return page_scores(query, *summary)


class Bookmarks(nn.Module):
    """What is trainable of the scorer "bookmark": for every layer and KV head, projections of queries and of means.

    Both begin as the identity, so that untrained it scores as "mean". `scores` is differentiable.

    Args:
        num_layers, num_kv_heads, head_dim: of the model; see `Bookmarks.of(model)`.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        eye = torch.eye(head_dim).repeat(num_layers, num_kv_heads, 1, 1)
        self.query, self.key = nn.Parameter(eye.clone()), nn.Parameter(eye.clone())

    @classmethod
    def of(cls, model: nn.Module) -> Bookmarks:
        """Untrained ones of the shape that `model` needs.

        Raises:
            UnsupportedModelError: its full-attention layers have KV heads of several numbers or sizes.
        """
        base = unwrap(model)
        config, modules = base.config.get_text_config(), attention_modules(base)
        full = full_attention_layers(config, list(modules)) or list(modules)
        shapes = {(num_kv_heads_of(config, layer), head_dim_of(modules[layer])) for layer in full}
        if len(shapes) > 1:
            found = " and ".join(f"{heads} KV heads of {size}" for heads, size in sorted(shapes))
            raise UnsupportedModelError(
                f"{config.model_type} has layers with {found} numbers; bookmarks are of one shape: take scorer='mean'"
            )
        return cls(config.num_hidden_layers, *shapes.pop())

    def scores(self, layer: int, query: Tensor, keys: Tensor, page: int) -> Tensor:
        """Scores [B, H, T, pages] of any queries [B, H, T, D] for the full pages of keys [B, K, S, D]."""
        full = keys.shape[2] // page * page
        mean = keys[:, :, :full].unflatten(2, (-1, page)).mean(3) @ self.key[layer].to(keys)
        query = query.unflatten(1, (keys.shape[1], -1)) @ self.query[layer].to(query)[:, None]
        return (query @ mean[:, :, None].mT).flatten(1, 2)

    def scorer(self, layer: int) -> Bookmark:
        """The scorer of one layer, with the projections as they are now."""
        return Bookmark(self.query[layer].detach(), self.key[layer].detach())

    def save(self, path: str | Path) -> None:
        """Write the projections as safetensors, with what they are in the header.

        Raises:
            LcpatchError: the file could not be written; what was there is untouched.
        """
        tensors = {name: x.detach().contiguous().cpu() for name, x in self.named_parameters()}
        about = {"format": "pt", "lcpatch": json.dumps({"kind": "bookmarks", "version": 1})}
        try:
            with replacing(Path(path)) as partial:
                save_file(tensors, partial, metadata=about)
        except (OSError, SafetensorError) as error:
            raise LcpatchError(f"{path} could not be written, what was there is untouched: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Bookmarks:
        """What `save` wrote.

        Raises:
            LcpatchError: no such file, or not one of bookmarks.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = _about((file.metadata() or {}).get("lcpatch", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, ValueError) as error:
            raise LcpatchError(f"{path} cannot be read as bookmarks: {error}") from error
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        shape = shapes.get("query", ())
        square = len(shape) == 4 and shape[2] == shape[3]  # or they would be built larger than the file is
        if about != {"kind": "bookmarks", "version": 1} or not square or shapes != {"query": shape, "key": shape}:
            raise LcpatchError(
                f"{path} holds {shapes} and says {about}: not bookmarks of this version; write it with Bookmarks.save"
            )
        if not all(x.is_floating_point() for x in tensors.values()):
            raise LcpatchError(f"{path} holds {tensors['query'].dtype} and {tensors['key'].dtype}: not bookmarks")
        bookmarks = cls(shape[0], shape[1], shape[3])
        bookmarks.load_state_dict(tensors)
        return bookmarks


def _about(text: str) -> Any:
    """What a file says it is; a short text, or it would not be parsed."""
    return json.loads(text) if len(text) < 200 else None


def make_scorers(scorer: Any, num_layers: int) -> list[Scorer]:
    """The scorer of every layer, from what a user gives: a name, a class, or `Bookmarks`.

    Raises:
        UnknownNameError: no such scorer.
        ValueError: something else, or bookmarks of another number of layers.
    """
    if isinstance(scorer, Bookmarks):
        if scorer.query.shape[0] != num_layers:
            raise ValueError(f"these bookmarks are of {scorer.query.shape[0]} layers, the model has {num_layers}")
        return [scorer.scorer(layer) for layer in range(num_layers)]
    kind = scorers.get(scorer) if isinstance(scorer, str) else scorer
    if not isinstance(kind, type) or not hasattr(kind, "summarise"):
        raise ValueError(f"scorer={scorer!r} must be one of {', '.join(scorers.all())}, a scorer's class, or Bookmarks")
    return [kind() for _ in range(num_layers)]
