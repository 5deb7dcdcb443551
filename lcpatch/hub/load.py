"""Load a patched model, from a folder or the Hub, with its patch on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..core.config import PatchConfig
from ..core.flags import check_flag
from ..hf.models import attention_modules, unwrap
from ..hf.sinks import sink_parameters
from ..patching import apply
from ..patching.resolve import pattern_of
from .about import HUB_ID
from .errors import sentence
from .sidecar import CONFIG_FILE, read_config, read_json, read_patch, read_positions, read_sinks

MAX_MODEL_CONFIG_BYTES = 2**20  # JSON takes up to 50 times its size in memory
ADAPTER_CONFIG = "adapter_config.json"
FILES = ["*.json", "*.safetensors"]
"""What a model needs. No pickle is downloaded, and code only with `trust_remote_code=True`."""


def from_pretrained(
    id_or_path: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    adapter: str | None = None,
    attn_implementation: str | None = None,
    impl: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Any:
    """Load what `lcpatch.save_pretrained` or `lcpatch.push_to_hub` wrote: a patched causal LM or a PEFT adapter.

    Args:
        id_or_path: a folder, or a repository on the Hub.
        base: for an adapter: the model it goes on, or its name or folder; default: the one the adapter names.
        adapter: of several adapters, the one to make active; default: "default", or the only one.
        attn_implementation: of what the patch leaves dense; default: the one it was saved with.
        impl: implementation of the attention op, as in `lcpatch.apply`.
        revision: branch, tag or commit of the repository.
        token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.
        **kwargs: for transformers' `from_pretrained`, such as `dtype`, `device_map` or `trust_remote_code`.

    Raises:
        ValueError: no patch there, or one that is broken, of a newer format or not for this model; a flag that is
            neither True nor False.
        HubError: the Hub did not give the files; the message says why and what to do.
    """
    check_flag("local_files_only", local_files_only)
    if kwargs.get("trust_remote_code") is not None:
        check_flag("trust_remote_code", kwargs["trust_remote_code"])
    from transformers import AutoModelForCausalLM

    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = [*FILES, "*.py"] if kwargs.get("trust_remote_code") else FILES
    folder = folder_of(id_or_path, revision, files, hub)
    adapters = adapters_in(folder)
    patch = patch_in(folder, id_or_path, bool(adapters))
    active = _active(adapters, adapter, id_or_path)
    if isinstance(base, nn.Module) and kwargs:
        raise ValueError(f"{sorted(kwargs)[0]} is for loading a base model, but base is one that is loaded already")
    kwargs = {**kwargs, "use_safetensors": True, "attn_implementation": attn_implementation or patch.dense}
    if active:
        model = _adapter(folder, adapters, active, base, {**kwargs, **hub})
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        model.config._name_or_path = model.name_or_path = str(id_or_path)  # not the place in the cache
    model.config.__dict__.pop("lcpatch", None)
    data = patch.to_dict()
    if attn_implementation is not None:
        data["dense"] = attn_implementation
    apply(model, data, impl=impl)
    if patch.has_learnable_sinks:
        _load_sinks(model, folder)
    return model.eval()


def folder_of(id_or_path: str | Path, revision: str | None, files: list[str], hub: dict[str, Any]) -> Path:
    """Where the files lie: the folder itself or, of a repository, those files at one commit.

    Args:
        id_or_path: a folder, or a repository on the Hub.
        revision: branch, tag or commit.
        files: patterns of the files that are wanted.
        hub: what `huggingface_hub.snapshot_download` takes beside them.

    Raises:
        FileNotFoundError: a path where no folder is.
        ValueError: neither a folder nor the name of a repository.
        HubError: the Hub did not give the files.
    """
    if Path(id_or_path).is_dir():
        return Path(id_or_path)
    if str(id_or_path).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{id_or_path} is no folder; give one, or the name of a repository on the Hub")
    from huggingface_hub import snapshot_download

    with sentence(f"load {id_or_path}", hub.get("token")):
        return Path(snapshot_download(str(id_or_path), revision=revision, allow_patterns=files, **hub))


def file_of(id_or_path: str | Path, name: str, revision: str | None, hub: dict[str, Any]) -> Path:
    """Where one file lies: the path itself, `name` in a folder or, of a repository, `name` at one commit.

    A path that does not exist is given back as it is: whoever opens it says so.

    Args:
        hub: what `huggingface_hub.hf_hub_download` takes beside them.

    Raises:
        HubError: the Hub did not give the file.
    """
    path = Path(id_or_path)
    if path.is_dir():
        return path / name
    if path.is_file() or path.suffix == ".safetensors" or not HUB_ID.fullmatch(str(id_or_path)):
        return path
    from huggingface_hub import hf_hub_download

    with sentence(f"load {id_or_path}", hub.get("token")):
        return Path(hf_hub_download(str(id_or_path), name, revision=revision, **hub))


def patch_in(folder: Path, name: str | Path, is_adapter: bool) -> PatchConfig:
    """The patch that the files carry: in the sidecar or, if a model lost it, in `config.json`."""
    patch = read_config(folder)
    carried = None
    config = folder / "config.json"
    if not is_adapter and config.is_file():
        data = read_json(config, MAX_MODEL_CONFIG_BYTES).get("lcpatch")
        carried = None if data is None else read_patch(data, "config.json")
    if patch is None and carried is None:
        raise ValueError(
            f"{name} carries no patch ({CONFIG_FILE} or config.lcpatch): load it with transformers, then lcpatch.apply"
        )
    if patch is not None and carried is not None and patch != carried:
        raise ValueError(f"{name}: {CONFIG_FILE} and config.json carry different patches; save it again with lcpatch")
    found = patch or carried
    pattern_of(found)  # a wrong one is refused before the weights are loaded
    return found


def adapters_in(folder: Path) -> dict[str, Path]:
    """The folder of each adapter by name, as PEFT lays them out: "default" at the top, others in folders of theirs."""
    found = {"default": folder} if (folder / ADAPTER_CONFIG).is_file() else {}
    named = {f.name: f for f in sorted(folder.iterdir()) if (f / ADAPTER_CONFIG).is_file()}
    return {**found, **named}


def _active(adapters: dict[str, Path], wanted: str | None, name: str | Path) -> str | None:
    """The adapter to make active; None for a full model."""
    choices = ", ".join(adapters) or "none, it is a full model"
    if wanted is not None and wanted not in adapters:
        raise ValueError(f"{name} has no adapter {wanted!r}; it has: {choices}")
    if wanted is None and len(adapters) > 1 and "default" not in adapters:
        raise ValueError(f"{name} has several adapters; say which is active: adapter= one of {choices}")
    return wanted or ("default" if "default" in adapters else next(iter(adapters), None))


def _adapter(
    folder: Path, adapters: dict[str, Path], active: str, base: nn.Module | str | Path | None, kwargs: dict[str, Any]
) -> Any:
    """The PEFT model of a folder's adapters."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    for adapter in adapters.values():
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ValueError(f"{adapter} has no adapter_model.safetensors; lcpatch loads no pickles")
    config = PeftConfig.from_pretrained(str(adapters[active]))
    positions = read_positions(folder)
    if not isinstance(base, nn.Module):
        name = base or config.base_model_name_or_path
        if not name:
            raise ValueError("the adapter names no base model; give one: from_pretrained(…, base='org/model')")
        revision = (config.revision if base is None else None) or "main"
        trusted = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only", "trust_remote_code")
                   if name in kwargs}  # fmt: skip
        base_config = AutoConfig.from_pretrained(name, revision=revision, **trusted)
        for setting, value in positions.items():
            setattr(base_config, setting, value)
        base = AutoModelForCausalLM.from_pretrained(name, revision=revision, **{"config": base_config, **kwargs})
    for setting, value in positions.items():
        if (found := getattr(base.config, setting, None)) != value:
            raise ValueError(
                f"the adapter was trained with {setting}={value}, but the base has {found}: leave base out, or load it "
                "with that setting in its config"
            )
    model = PeftModel.from_pretrained(base, str(adapters[active]), adapter_name=active)
    for name in adapters.keys() - {active}:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    return model


def _load_sinks(model: nn.Module, folder: Path) -> None:
    sinks = sink_parameters(attention_modules(unwrap(model)))
    found = read_sinks(folder, {name: tuple(parameter.shape) for name, parameter in sinks.items()})
    for name, parameter in sinks.items():
        parameter.data = found[name].to(parameter.device)
