"""One training run, from a config to a model on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..core.errors import UnsupportedModelError
from ..hf.demo_model import cache_folder
from ..hf.models import unwrap
from . import arms, encode, lora, rows, tokens
from .checkpoints import DATA, alone_in, arriving, claim, resumed_from, step_of
from .config import TrainConfig
from .model import checkpointing_settings, dtype_of, enable_inputs, load_model, load_tokenizer, why_documents_meet
from .sharded import launched_as
from .sources import sources
from .support import why_inexact

LOG_FILE = "log.json"
PATIENCE = timedelta(hours=2)
"""How long processes wait for one of them, as while the first tokenizes or writes a model: longer than NCCL's own ten
minutes. A process that died is not waited for, as the launcher ends the others."""
Save = Callable[..., None]


@dataclass
class Result:
    """What a run came to.

    Args:
        model: as it was trained, patched, and in the dtype of its frozen weights. Of a sharded one only the main
            process has the whole, in the host's memory; the others have their pieces.
        losses: of every step that this process ran.
        metrics: of the last evaluation.
        finished: False if it was asked to stop before its last step.
        step: the last step.
        log: what was logged, as in `log.json`.
    """

    model: nn.Module
    losses: list[float]
    metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = True
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


def train(config: TrainConfig, save: Save | None) -> Result:
    """Train, evaluate, and save the model in `config.output`/model.

    Args:
        config: what to do.
        save: `lcpatch.save_pretrained`, or what takes the same arguments; None: the model is only returned.

    Raises:
        ValueError: a setting, model or data that do not fit; before anything is trained.
        TrainingError: the loss was not a number, or a checkpoint could not be written.
    """
    with ExitStack() as held:
        return _train(config, save, held)


def _train(config: TrainConfig, save: Save | None, held: ExitStack) -> Result:
    from accelerate import PartialState
    from transformers import set_seed

    from .parallel import parallelize
    from .parallel.strategy import strategies
    from .parallel.trainer import group_of
    from .trainer import LongTrainer, StopOnSignal

    _accelerate_is_there()
    patch = arms.patch_for(config.attention, config.options, config.layers, config.sinks)
    if 0 < config.chunk_size < config.length and arms.follows_length(patch):
        raise ValueError(
            f"chunk_size={config.chunk_size} with attention={config.attention!r}: its groups follow the length of the "
            f"row, which a chunk does not see; give a fixed --group-size, such as {config.length // 4}, and no --wrap"
        )
    if config.parallel != "auto":
        strategies.get(config.parallel)
    loggers = loggers_of(config.report_to)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    group = group_of(config.context_parallel) if config.context_parallel > 1 else None
    tokenizer = load_tokenizer(config)
    meeting = why_documents_meet(config)
    if meeting and config.task == "extend" and config.documents == "masked":
        raise ValueError(f"{meeting}, which documents='masked' would not stop: say --documents joined")
    with state.main_process_first():
        train_rows, eval_rows = datasets(config, tokenizer, packs=meeting is None)
    output = Path(config.output).expanduser()
    record = _record(config, train_rows)
    if state.is_main_process:
        held.enter_context(alone_in(output))
    with state.main_process_first():
        checkpoint = resumed_from(output, record, config.resume if state.is_main_process else "auto")
    set_seed(config.seed)
    model = load_model(config)
    if config.chunk_size and (reason := why_inexact(model, unwrap(model).config, config.length)):
        raise UnsupportedModelError(f"{config.model}: {reason}; or leave --chunk-size out")
    stop = StopOnSignal()
    with ExitStack() as stack:
        stack.callback(enable_inputs(model).remove)
        stack.enter_context(lora.keep_dtype(model))
        stack.enter_context(stop.listening())
        trainer = LongTrainer(
            model=model,
            args=arguments(config, output),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=rows.stack,
            processing_class=tokenizer,
            callbacks=[stop, *loggers],
            offload=config.offload and not config.chunk_size,  # by chunks it is keys, values and their gradients
            chunkwise=chunks(config),
        )
        if config.context_parallel > 1:
            trainer.ranks = stack.enter_context(parallelize(model, group, config.parallel))
        if state.is_main_process:
            claim(output, record)  # only now: what does not fit the model has been told
        if checkpoint is not None and step_of(checkpoint) >= config.steps:
            trainer.take(checkpoint)  # all steps were taken: the model is evaluated and written as it is
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finished = trainer.state.global_step >= config.steps
        metrics = trainer.evaluated() if finished and eval_rows is not None else {}
    model = trainer.whole(partial(load_model, config))
    log = trainer.state.log_history
    result = Result(model, trainer.losses, metrics, finished, trainer.state.global_step, log)
    if state.is_main_process:
        with arriving(output / LOG_FILE) as new:
            new.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    writes = finished and save is not None and state.is_main_process
    if writes:
        with arriving(output / "model") as folder:
            save(model, folder, tokenizer=tokenizer)
    if state.is_main_process or not trainer.in_pieces:
        lora.settle(model)
    if writes and config.merged:
        result.model = lora.merge(model)
        with arriving(output / "merged") as folder:
            save(result.model, folder, tokenizer=tokenizer)
    state.wait_for_everyone()
    return result


def datasets(config: TrainConfig, tokenizer: Any, packs: bool = True) -> tuple[Dataset, Dataset | None]:
    """The rows to train and to evaluate on; `packs`: whether conversations may share a row.

    Raises:
        FileNotFoundError, ValueError: data that is missing, empty, broken or too short.
    """
    train_rows = _rows(config, tokenizer, config.data, packs)
    if config.eval_data and config.eval_rows:
        try:
            held_out = _rows(config, tokenizer, config.eval_data, packs)
        except ValueError as error:
            raise ValueError(f"--eval-data: {error}") from error
        count = min(config.eval_rows, len(held_out))  # type: ignore[arg-type]
        return train_rows, torch.utils.data.Subset(held_out, range(count))
    return rows.split(train_rows, config.eval_rows)


def arguments(config: TrainConfig, output: Path) -> Any:
    """transformers' own arguments."""
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=dtype_of(config) == torch.bfloat16,
        use_cpu=not gpu,
        **checkpointing_settings(config.checkpointing),
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep,
        eval_strategy="steps" if config.evaluate_every else "no",
        eval_steps=config.evaluate_every or None,
        prediction_loss_only=True,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to="none",  # `loggers_of` has made them
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    if args.n_gpu > 1:
        # One process that sees several GPUs: the Trainer would take torch's DataParallel, whose replicas are made anew
        # every step, without what a patch holds on to, and would multiply the batch by the GPUs.
        warnings.warn(
            f"one of {args.n_gpu} GPUs is used; `accelerate launch` starts a process for each (recipes/configs)",
            stacklevel=2,
        )
        args._n_gpu = 1
    return args


def loggers_of(report_to: str) -> list[Any]:
    """The Trainer's callbacks that report to tensorboard and the like, of names with commas between.

    Raises:
        ValueError: an unknown name.
        ImportError: one that is not installed, or not set up.
    """
    from transformers.integrations import integration_utils

    if report_to == "none":
        return []
    known, installed = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations
    made = []
    for name in installed() if report_to == "all" else [name.strip() for name in report_to.split(",")]:
        if name not in known:
            raise ValueError(f"report_to={name!r} is not one of none, all, {', '.join(sorted(known))}")
        try:
            made.append(known[name]())
        except (RuntimeError, ImportError) as error:  # of some kinds because of how they are set up
            how = "pip install tensorboard" if name == "tensorboard" else error
            raise ImportError(f"report_to={name!r} cannot begin: {how}; or leave --report-to out") from error
    return made


def chunks(config: TrainConfig) -> dict[str, Any] | None:
    """What `chunkwise.backward` is told; None: rows go through the model whole."""
    if not config.chunk_size:
        return None
    told: dict[str, Any] = {"chunk_size": config.chunk_size, "offload": config.offload}
    if config.keep_chunks < 1:
        told |= {"estimator": "bernoulli", "keep": config.keep_chunks}
    return told


def _rows(config: TrainConfig, tokenizer: Any, names: tuple[str, ...], packs: bool) -> Dataset:
    cache = cache_folder() / "tokens"
    if config.task == "sft":
        store = tokens.build(sources(names), encode.chats(tokenizer, config.length), cache)
        if left_out := store.index["left_out"]:
            warnings.warn(
                f"{left_out} of {store.index['records']} records were left out: longer than {config.length} tokens, or "
                "without an answer",
                stacklevel=2,
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        return rows.ChatRows(store, config.length, pad, packs)
    encoder = encode.texts(tokenizer, config.text_field)
    store = tokens.build(sources(names), encoder, cache, text_field=config.text_field)
    return rows.TextRows(store, config.length, config.documents == "masked")


def _record(config: TrainConfig, train_rows: Dataset) -> dict[str, Any]:
    """What a checkpoint's run must have in common with the one that goes on with it."""
    content = getattr(train_rows, "dataset", train_rows).key
    return json.loads(json.dumps({**config.to_dict(), DATA: content, **launched_as()}))


def _accelerate_is_there() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training needs accelerate: pip install 'lcpatch[train]' ({error})") from error
