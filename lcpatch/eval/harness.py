"""A patched model, or one with a cache of lcpatch's, as a model of EleutherAI's lm-eval, so that its tasks run on it.

    import lm_eval
    from lcpatch.eval import harness

    model = harness.lm_class()(pretrained="me/model", method="s2", stride=8, cache="s2")
    lm_eval.simple_evaluate(model, tasks=["longbench_hotpotqa"])

Needs `pip install "lcpatch[lm-eval]"`; importing this file does not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..patching import apply
from .arms import CACHE_CHUNK, Arm, sort_options

NAME = "lcpatch"


@functools.cache
def lm_class() -> type:
    """lm-eval's model class, registered there as "lcpatch".

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"lm-eval is not installed: pip install 'lcpatch[lm-eval]' ({error})") from error

    @register_model(NAME)
    class LcpatchLM(HFLM):
        """`HFLM` with a patch and a cache.

        Args:
            pretrained: as for `HFLM`.
            method: a name from `lcpatch.methods()`; None: the model as it is.
            cache: a name from the registry of caches; None: transformers' own.
            chunk: tokens that go through a cache at a time where likelihoods are asked for: it evicts in between.
            **kwargs: options of the method, of the cache, and what `HFLM` takes.
        """

        def __init__(
            self,
            pretrained: Any,
            method: str | None = None,
            cache: str | None = None,
            chunk: int = CACHE_CHUNK,
            **kwargs: Any,
        ) -> None:
            of_method, of_cache, rest = sort_options(kwargs, method, cache)
            self._arm = Arm(method, of_method, cache, of_cache, chunk)
            self._arm.warn()
            super().__init__(pretrained, **rest)
            if method:
                apply(self.model, method, **of_method)

        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            make_cache = self._arm.maker(self.model)
            if make_cache is None:
                return super()._model_call(inps, attn_mask, labels)
            cache = make_cache()
            with torch.no_grad():
                parts = [
                    self.model(part, past_key_values=cache, use_cache=True).logits
                    for part in inps.split(self._arm.chunk, 1)
                ]
            return torch.cat(parts, 1)

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
            if (make_cache := self._arm.maker(self.model)) is not None:
                kwargs["past_key_values"] = make_cache()
            return super()._model_generate(context, max_length, stop, **kwargs)

    return LcpatchLM
