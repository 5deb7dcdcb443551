"""A decoding loop for `generate` that keeps the device busy: it queues the next forward, then looks at the last token.

transformers' own loop asks the device after every token whether to stop, and only then prepares and launches the next
forward: the device idles for as long as the host works. Here the host looks while the next forward runs. Nothing but
that forward happens too early: no token is chosen, no processor, criterion or streamer is called, before it is known
that the text goes on. So the tokens are those of `generate`, and the random generator is left as it leaves it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
PLAIN = "; leave custom_generate=lcpatch.decode_ahead out of this call"


def decode_ahead(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    stream_to: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """`model.generate(**inputs, past_key_values=cache, custom_generate=lcpatch.decode_ahead)`: the same tokens, sooner.

    Greedy or sampled, with any cache, compiled or not. What differs: where a text ends before its greatest length, the
    cache has read its last token too. A next turn goes on as always; `generate` on the same text without a token more
    needs `cache.crop(-1)` before. It pays on a GPU; on a CPU an early end costs one forward.

    Args:
        model: with the rest up to `generation_config`, as `generate` gives them.
        stream_to: a streamer. `generate(streamer=…)` gets the prompt only: transformers hands no streamer to a
            `custom_generate`, nor an assistant, nor the tokenizer of `stop_strings`.

    Returns:
        [B, T], the prompts and what follows.

    Raises:
        ValueError: beams, assisted decoding and all else that plain `generate` is needed for, or a cache that has read
            the whole text.
        RuntimeError: scores to sample from that are no numbers.
    """
    _check(model, generation_config, input_ids, model_kwargs)
    if stream_to is not None:
        stream_to.put(input_ids.cpu())
    compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
    forward = model.get_compiled_call(generation_config.compile_config) if compiled else model.__call__
    pad = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = pad.to(input_ids.device) if ends else None
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    most, news, always = stopping_criteria.max_length, _News(unfinished), unfinished

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    inputs = _Inputs(model, model_kwargs)
    with model._optimize_model_for_decode():
        while True:
            # A copy: the next replay of a CUDA graph writes its logits to the same place.
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            inputs.follow(outputs)
            del outputs
            scores = logits_processor(input_ids, logits)
            tokens, sound = _drawn(scores) if generation_config.do_sample else (scores.argmax(-1), always)
            if ends:
                tokens = torch.where(unfinished, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            news.send(tokens, unfinished, sound)
            full = most is not None and input_ids.shape[1] >= most  # known without the device: no forward in vain
            if not full:
                outputs = forward(**inputs.next(input_ids), return_dict=True)
            tokens, go_on = news.read()
            if stream_to is not None:
                stream_to.put(tokens)
            if full or not go_on:
                break
    if stream_to is not None:
        stream_to.end()
    return input_ids


def _drawn(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row [B], and whether there was one to draw [B].

    As `torch.multinomial` draws one, on CPU and CUDA from the same random numbers; that checks what it is given, which
    not every torch does without waiting for the device.
    """
    probs = scores.softmax(-1)
    tokens = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    return tokens, ~probs[:, 0].isnan()  # a score that is none leaves none in its row


class _News:
    """What the host wants to know of the newest tokens, copied while the device goes on."""

    def __init__(self, unfinished: Tensor) -> None:
        self.device = unfinished.device
        pinned = self.device.type == "cuda"
        self.host = torch.empty(3, len(unfinished), dtype=torch.long, pin_memory=pinned)
        # Asleep until it is there: a host that spins takes time from the threads that feed other devices.
        self.copied = None if self.device.type == "cpu" else torch.Event(device=self.device, blocking=True)

    def send(self, *news: Tensor) -> None:
        """Queue the copy of tokens, whether their rows go on, and whether they are sound, [B] each."""
        self.host.copy_(torch.stack(news), non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.accelerator.current_stream(self.device))

    def read(self) -> tuple[Tensor, bool]:
        """What was sent last, once it is here: the tokens, and whether any row goes on.

        Raises:
            RuntimeError: a row whose token is not sound.
        """
        if self.copied is not None:
            self.copied.synchronize()
        tokens, unfinished, sound = self.host.tolist()
        if not all(sound):
            raise RuntimeError(
                f"row {sound.index(0)}: its scores hold nan or inf, or nothing but -inf, so no token can be drawn; "
                "look at the logits processors and the model's dtype"
            )
        return torch.tensor(tokens), any(unfinished)


class _Inputs:
    """The inputs of the next forward. Where nothing but token and position changes, those of the last one moved on.

    That is where no mask is given, and `generate` of the model prepares inputs in transformers' own way.
    """

    def __init__(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs
        prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
        self.usual = prepare is GenerationMixin.prepare_inputs_for_generation
        self.last: dict[str, Any] | None = None
        self.behind = 0  # tokens that `kwargs` do not know of

    def follow(self, outputs: Any) -> None:
        """A forward is done: what it was told grows by a token."""
        self.behind += 1
        if self.last is None:
            self._catch_up(outputs)

    def next(self, input_ids: Tensor) -> dict[str, Any]:
        """Of the last token of `input_ids` [B, T]; without a cache, of all."""
        if self.last is not None and _needs_no_mask(self.last["past_key_values"]):
            self.last["input_ids"] = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
            self.last["position_ids"] = self.last["position_ids"] + 1
            return self.last
        if self.behind:
            self._catch_up({})
        num = 1 if self.kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=num, **self.kwargs)
        self.last = inputs if self.usual and num and _moves_on(inputs, input_ids) else None
        return inputs

    def _catch_up(self, outputs: Any) -> None:
        update = self.model._update_model_kwargs_for_generation
        self.kwargs, self.behind = update(outputs, self.kwargs, num_new_tokens=self.behind), 0


def _moves_on(inputs: dict[str, Any], input_ids: Tensor) -> bool:
    """Whether the inputs are a token, its position, a cache and what stays the same."""
    rest = {**inputs}
    moving = [rest.pop(name, None) for name in ("input_ids", "position_ids")]
    if any(x is None or x.device != input_ids.device for x in moving) or rest.pop("past_key_values", None) is None:
        return False
    mask = rest.pop("attention_mask", None)  # one, or one for each type of layer
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return all(x is None for x in masks) and all(isinstance(x, (type(None), int, float, str)) for x in rest.values())


def _needs_no_mask(cache: Any) -> bool:
    """Whether the next token goes without a mask made ahead; asking tells a cache of ours that it comes."""
    return not cache.is_compileable or cache.get_mask_sizes(1, 0) == (0, 0)


def _check(model: nn.Module, config: GenerationConfig, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse what the loop does not do.

    Raises:
        ValueError: what it is, and what to call instead.
    """
    mode = config.get_generation_mode()
    if mode not in MODES:
        names = " and ".join(known.value for known in MODES)
        raise ValueError(f"decode_ahead does {names}, this is {mode.value}{PLAIN}")
    if config.return_dict_in_generate:
        raise ValueError(f"decode_ahead returns token ids, not return_dict_in_generate=True{PLAIN}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"decode_ahead is for decoders, {model.config.model_type} has an encoder{PLAIN}")
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if sharded and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"decode_ahead does not keep the ranks of a sharded model in step{PLAIN}")
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    length = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    if cache is not None and length == input_ids.shape[1] == cache.get_seq_length():
        raise ValueError(
            f"the cache has read all {length} tokens of this text, so none is left to go on from: add the next turn's, "
            "or call cache.crop(-1) first"
        )
