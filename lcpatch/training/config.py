"""What a training run is told: one dataclass, filled from defaults < a recipe < a YAML file < the command line."""

from __future__ import annotations

import argparse
import math
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..core.choices import did_you_mean
from ..core.options import parse_options
from ..patterns import patterns


def option(default: Any, says: str, choices: Sequence[str] | None = None) -> Any:
    """A field with its one documentation, which `--help` prints."""
    return field(default=default, metadata={"help": says, "choices": tuple(choices) if choices else None})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run. Without any, it trains a small model on Python's manual, anywhere."""

    model: str = option("demo", "a folder, an id on the Hub, or `demo` (SmolLM2-135M-Instruct)")
    dtype: str = option("auto", "of the frozen weights; auto: bfloat16 on a GPU", ["auto", "float32", "bfloat16"])
    quantize: str = option("none", "4bit: QLoRA, needs bitsandbytes", ["none", "4bit"])
    dense: str | None = option(None, "attention implementation of what stays dense, such as flash_attention_2")

    task: str = option("extend", "extend: next tokens of texts; sft: answers of chats", ["extend", "sft"])
    data: tuple[str, ...] = option((), "files, folders, hub:NAME@SPLIT; none: Python's own manual")
    text_field: str = option("text", "the field of JSONL, Parquet and Hub records that holds the text")
    documents: str = option(
        "masked", "masked: no token sees another document; joined: as LongLoRA trains", ["masked", "joined"]
    )
    length: int = option(1024, "tokens of a row")
    eval_data: tuple[str, ...] = option((), "what to evaluate on; none: the last --eval-rows rows of the data")
    eval_rows: int = option(2, "rows to evaluate on; 0: do not evaluate")

    attention: str = option(
        "sf",
        "full, short (groups only), shift, sf, s2 or another method; another arm than the file's or the recipe's goes "
        "without their layers and options",
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "of the method", "choices": None})
    layers: tuple[int, ...] | str | None = option(None, "sparse layers: every_2 or 0,2,4; none: all")
    sinks: str | None = option(None, "tokens:N; or learnable: logit[:START], prefix[:N[:START]]")
    rope: str = option("linear", "how positions beyond the model's are reached", ["linear", "yarn", "dynamic", "none"])

    tune: str = option("lora+", "lora+: and norms and embeddings; lora; full: all weights", ["lora+", "lora", "full"])
    lora_r: int = option(8, "rank")
    lora_alpha: int = option(16, "scale of the update, over the rank")
    lora_dropout: float = option(0.0, "dropout in front of the adapter")

    steps: int = option(20, "optimizer steps")
    batch_size: int = option(1, "rows of a process at a time")
    accumulate: int = option(1, "batches of a step")
    learning_rate: float = option(2e-4, "after the warm-up")
    schedule: str = option("constant_with_warmup", "of the learning rate", ["constant_with_warmup", "cosine", "linear"])
    warmup: int = option(5, "steps until the learning rate is reached")
    weight_decay: float = option(0.0, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to it")
    seed: int = option(0, "of new weights and the order of rows")

    checkpointing: str = option(
        "full",
        "what is computed again in the backward pass; selective: all but attention",
        ["full", "selective", "none"],
    )
    offload: bool = option(False, "keep what waits for the backward pass in the host's memory")
    chunk_size: int = option(
        0,
        "SeCO: exact gradients with so many tokens' activations at a time; 0: the whole row, whatever keep_chunks was",
    )
    keep_chunks: float = option(1.0, "SpaCO: how likely a chunk's gradient is computed; 1: SeCO, exact")
    context_parallel: int = option(1, "processes that share each row, or each chunk of it; a step has as many rows")
    parallel: str = option("auto", "how they share it: auto, halo, ring, lightseq, tokenring, ulysses")

    output: str = option("lcpatch-run", "folder of checkpoints and of the model")
    save_every: int = option(100, "steps from one checkpoint to the next; 0: none")
    keep: int = option(2, "checkpoints to keep")
    resume: str = option("auto", "auto: go on where this run stopped; never: refuse a used folder", ["auto", "never"])
    evaluate_every: int = option(0, "steps from one evaluation to the next; 0: once, at the end")
    log_every: int = option(1, "steps from one line to the next")
    report_to: str = option(
        "none", "tensorboard, wandb, …, with commas between several; all that are installed; or none"
    )
    workers: int = option(0, "processes that read data")
    merged: bool = option(False, "also write the model with the adapter merged into it")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is not one of {', '.join(choices)}")
        for name in ("length", "steps", "batch_size", "accumulate", "keep", "log_every", "lora_r", "lora_alpha"):
            self._at_least(name, 2 if name == "length" else 1)
        self._at_least("context_parallel", 1)
        for name in ("eval_rows", "warmup", "save_every", "evaluate_every", "workers", "weight_decay", "chunk_size"):
            self._at_least(name, 0)
        for name in ("beta2", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, and below 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be a whole number from 0 to 2**32 - 1")
        if not 0 < self.keep_chunks <= 1:
            raise ValueError(f"keep_chunks={self.keep_chunks} must be above 0, and at most 1")
        if self.keep_chunks < 1 and not self.chunk_size:
            raise ValueError(f"keep_chunks={self.keep_chunks} needs chunks: say chunk_size, such as 2048")
        if self.context_parallel > 1 and self.chunk_size:
            self._at_least("chunk_size", self.context_parallel)
            if self.offload:
                raise ValueError(
                    f"offload with chunk_size={self.chunk_size} keeps keys in the host's memory, which "
                    f"context_parallel={self.context_parallel} cannot: leave one of the three out"
                )
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if math.isinf(self.learning_rate):
            raise ValueError(f"learning_rate={self.learning_rate} must be a finite number")

    def _at_least(self, name: str, least: int) -> None:
        if not getattr(self, name) >= least:
            raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the config") -> TrainConfig:
        """From names and values as YAML reads them.

        Raises:
            ValueError: an unknown key or a value of the wrong kind; the message names it and the choices.
        """
        return cls(**_typed(data, source))


def load(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None, says: str = "") -> TrainConfig:
    """The config of a command line: `[--config FILE] [--steps 100 …] [--group-size 1024 …]`.

    Args:
        argv: its words; None: the process's own.
        defaults: a recipe's settings; a YAML file goes before them, and the command line before that.
        says: the recipe's docstring, for `--help`.

    Raises:
        ValueError: an unknown key, or a wrong value.
    """
    parser = argparse.ArgumentParser(
        description=says,
        epilog="Options of the method follow as `--group-size 1024`; `lcpatch methods METHOD` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as YAML; the command line goes before it")
    for f in fields(TrainConfig):
        if f.name != "options":
            names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
            parser.add_argument(*names, dest=f.name, **_argument(f))
    args, rest = parser.parse_known_args(argv)
    words = {k: v for k, v in vars(args).items() if v is not None and k != "config"}
    given = _typed(words, "the command line")
    from_file = {} if args.config is None else read_yaml(args.config)
    settings = _over(_over(defaults or {}, from_file), given)
    if left_out := [f"{name}={value!r}" for name, value in from_file.items() if name not in settings]:
        warnings.warn(
            f"{args.config}: {', '.join(left_out)} left out, because the command line says another attention, or no "
            "chunks; repeat there what should stay",
            stacklevel=2,
        )
    if more := parse_options(rest):
        _check_options(more)
        settings["options"] = {**settings.get("options", {}), **more}
    return TrainConfig.from_dict(settings)


def _check_options(names: Iterable[str]) -> None:
    """What is no setting is an option of a method: here of any, as the one that is trained says later what it takes."""
    of_methods = {f.name for method in patterns.all().values() for f in fields(method)}
    of_runs = [f.name for f in fields(TrainConfig)]
    for name in names:
        if name not in of_methods:
            guess = did_you_mean(name, [*of_runs, *of_methods])
            raise ValueError(f"the command line: {name!r} is no setting, and no option of a method.{guess} See --help")


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` before `below`, without what in `below` belongs to an arm or to chunks that `above` replaces."""
    arm = below.get("attention", TrainConfig.attention)
    gone = ["layers", "options"] if above.get("attention", arm) != arm else []
    gone += ["keep_chunks"] if above.get("chunk_size") == 0 else []
    return {name: value for name, value in below.items() if name not in gone} | dict(above)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or with a key that is unknown, or there twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"{path} is no file; --config names one with settings as YAML") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        what = "nothing" if data is None else type(data).__name__
        raise ValueError(f"{path} must hold `key: value` lines, not {what}")
    names = [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value]
    if twice := [name for name in data if names.count(name) > 1]:
        raise ValueError(f"{path} has {twice[0]!r} twice, of which YAML would take the last: delete one")
    return _typed(data, str(path))


def _argument(f: Field) -> dict[str, Any]:
    default = f.default if f.default is not MISSING else None
    shown = "" if default in (None, ()) or isinstance(default, bool) else f" (default {default})"
    about: dict[str, Any] = {"help": (f.metadata["help"] + shown).replace("%", "%%"), "metavar": "VALUE"}
    if isinstance(default, tuple):
        return {**about, "nargs": "+"}
    if isinstance(default, bool):
        return {"help": about["help"], "action": argparse.BooleanOptionalAction, "default": None}
    return about


def _typed(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values as their fields' types: a YAML reader gives `2e-5` as text, and lists for tuples."""
    hints = get_type_hints(TrainConfig)
    known = {f.name for f in fields(TrainConfig)}
    if unknown := [str(key) for key in data if key not in known]:
        guess = did_you_mean(unknown[0], known)
        raise ValueError(f"{source}: unknown key {unknown[0]!r}.{guess} Keys: {', '.join(sorted(known))}")
    return {name: _as(hints[name], source, name, value) for name, value in data.items()}


def _as(hint: Any, source: str, name: str, value: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):
        try:
            return _convert(kind, value)
        except (TypeError, ValueError):
            continue
    wanted = " or ".join(_KINDS.get(get_origin(kind) or kind, "a list") for kind in kinds)
    raise ValueError(f"{source}: {name}={value!r} must be {wanted}")


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"} | {
    type(None): "none"
}


def _convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, or TypeError or ValueError."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        parts = value.split(",") if isinstance(value, str) and item is int else value
        return tuple(_convert(item, part) for part in ([parts] if isinstance(parts, str) else parts))
    if kind is type(None) and (value is None or value in ("none", "null")):
        return None
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = float(value)
        if kind is float or number.is_integer():
            return kind(number)
    if (get_origin(kind) or kind) is dict and isinstance(value, Mapping):
        return dict(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise TypeError
