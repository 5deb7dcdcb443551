"""Caches at the sizes of the tests' tiny models, and the ways to feed a model through one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig

import lcpatch
from lcpatch.caches import caches
from lcpatch.hf.state import own_spec
from lcpatch.hf.watch import Call, ask

FULL: dict[str, dict[str, Any]] = {
    "s2": {},
    "retrieval": {"budget": 4096, "page": 8, "recent": 8},
    "tiered": {"budget": 4096, "page": 8, "recent": 8, "codec": None},
}
"""Options with which a cache keeps everything; a cache that is not listed takes a budget above any length here."""

SMALL: dict[str, dict[str, Any]] = {
    "s2": {},
    "retrieval": {"budget": 24, "page": 4, "recent": 4},
    "tiered": {"budget": 24, "page": 4, "recent": 4, "codec": None},
}
"""Options with which it keeps (or reads) about 24 tokens of `LENGTH`; default: budget=24."""

KEEPS_ALL = ("retrieval", "tiered")
"""Caches whose budget is what a token reads, not what is kept."""

ALL = tuple(caches.all())
COMPILED = tuple(name for name in ALL if "compiled" in inspect.signature(caches.get(name).__init__).parameters)
LENGTH = 90


def make_model(name: str, model: Any = None, **settings: Any) -> Any:
    """A model that cache `name` works with; `model`, or a random one of these settings."""
    model = build(**settings) if model is None else model
    if name == "s2":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="s2: .* far blocks are seen by no head")
            lcpatch.apply(model, "s2", block_size=16, local_blocks=1, stride=3)
    return model


def make(name: str, model: nn.Module, small: bool = False, **options: Any) -> Any:
    """An empty cache, which keeps everything or little."""
    given = SMALL.get(name, {"budget": 24}) if small else FULL.get(name, {"budget": 4096})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* keep transformers' own cache")
        return caches.get(name)(model, **{**given, **options})


def placed(name: str, folder: Path, device_map: dict[str, Any]) -> Any:
    """The model of the tests with four layers, from a folder to where `device_map` says, for cache `name`.

    Args:
        name: of the cache.
        folder: for its weights, and those that the map leaves on disk.
        device_map: "rest" stands for all that is no layer, a number for a layer.
    """
    build(num_hidden_layers=4).save_pretrained(folder / "model")
    names = {"rest": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    where = {part: device for key, device in device_map.items() for part in names.get(key, [f"model.layers.{key}"])}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=where, offload_folder=folder / "offload", dtype=torch.float32
    )
    return make_model(name, model.eval())


def generated(name: str, model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What cache `name` generates with room for everything and with little, greedily and with beams."""
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    return [
        model.generate(ids, past_key_values=make(name, model, small), num_beams=beams, **options).cpu()
        for small in (False, True)
        for beams in (1, 2)
    ]


@torch.no_grad()
def feed(model: nn.Module, ids: Tensor, cache: Any, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """The logits [B, T, V] of `ids`, fed in parts of `sizes`; `mask` [B, T] says left padding."""
    logits, seen = [], 0
    for part in ids.split(sizes, 1):
        end = seen + part.shape[1]
        padding = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            padding = {"attention_mask": mask[:, :end], "position_ids": positions[:, seen:end]}
        logits.append(model(part, past_key_values=cache, **padding).logits)
        seen = end
    return torch.cat(logits, 1)


def step(layer: Any, q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of one step, as a model's attention makes it with a cache's layer; no padding."""
    layer.expected = True
    keys, values = layer.update(k, v)
    return ask(layer, Call(q, keys, values, own_spec(q.shape[1], None), None, None, softcap, "auto"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_padding(pads: list[int], length: int = LENGTH) -> Tensor:
    """An attention mask [B, length] whose row r begins with `pads[r]` pads."""
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def tensors_of(x: Any, found: dict[int, Tensor] | None = None, visited: set[int] | None = None) -> dict[int, Tensor]:
    """Every tensor that hangs on `x`, by its storage: what a cache really holds."""
    found, visited = {} if found is None else found, set() if visited is None else visited
    if id(x) in visited or isinstance(x, (str, int, float, type, nn.Module)):
        return found
    visited.add(id(x))
    if isinstance(x, Tensor):
        found[x.untyped_storage().data_ptr()] = x
    elif isinstance(x, dict):
        for value in x.values():
            tensors_of(value, found, visited)
    elif isinstance(x, (list, tuple, set)):
        for value in x:
            tensors_of(value, found, visited)
    elif hasattr(x, "__dict__"):
        tensors_of(vars(x), found, visited)
    return found


def compiling(graphs: list[Any], inputs: list[Any] | None = None) -> CompileConfig:
    """What lets `generate` compile on a CPU too, anew; every graph is noted, and where asked what it is given."""

    def backend(graph: Any, given: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        if inputs is not None:
            inputs.extend(given)
        return graph.forward

    torch._dynamo.reset()
    how = CompileConfig(backend=backend, mode=None, fullgraph=True)
    how._compile_all_devices = True
    return how
