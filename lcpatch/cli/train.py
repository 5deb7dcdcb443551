"""`lcpatch train CONFIG`: a training run from a YAML file or by a recipe's name, on this process's device."""

from __future__ import annotations

import argparse
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "recipes"
EPILOG = (
    "Settings follow as `--steps 100`; `lcpatch train sinklora --help` lists them. On several GPUs: "
    f"accelerate launch --config_file {FOLDER}/configs/ddp.yaml {FOLDER}/sinklora.py …"
)


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("train", help="train a model for long context", epilog=EPILOG)
    parser.add_argument("config", metavar="CONFIG", help="a .yaml file, or a recipe: sinklora, longlora, s2, …")
    parser.add_argument("words", metavar="SETTINGS", nargs=argparse.REMAINDER, help="what goes before the file's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    if "--traceback" in args.words:
        args.words.remove("--traceback")
        args.traceback = True
    if Path(args.config).suffix in (".yaml", ".yml"):
        from ..hub import save_pretrained
        from ..training import recipe

        return recipe.main(["--config", args.config, *args.words], {}, save_pretrained, __doc__ or "")
    return recipe_module(args.config).main(args.words)


def recipe_module(name: str) -> Any:
    """The recipe of that name, as a module.

    Raises:
        ValueError: there is none; the message lists them.
    """
    file = FOLDER / f"{name}.py"
    names = sorted(path.stem for path in FOLDER.glob("*.py") if "DEFAULTS" in path.read_text(encoding="utf-8"))
    if name not in names:
        raise ValueError(f"{name!r} is no recipe and no .yaml file; recipes: {', '.join(names)}")
    spec = spec_from_file_location(f"lcpatch_recipe_{name}", file)
    module = module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module
