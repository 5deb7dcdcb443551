"""Every command that the documents and the Makefile show parses: a reader, or a lent GPU, runs it as it is."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from lcpatch.cli import _parser, parse_options
from lcpatch.cli.eval import _arms
from lcpatch.cli.train import recipe_module
from lcpatch.eval.run import make_tasks
from lcpatch.training.config import load

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/RESULTS.md", "kernels/NOTES.md"]


def shown(name: str) -> list[str]:
    """The commands of a document's bash blocks, a line each, and those of ours within its sentences."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    within = [" ".join(words.split()) for words in re.findall(r"`(lcpatch \w+ [^`]*)`", text)]
    return [line for line in lines if shlex.split(line, comments=True)] + within


def made() -> list[str]:
    """What the Makefile runs of our commands."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return [f"lcpatch {words}" for words in re.findall(r"-m lcpatch\.cli\s+(.*)", text)]


def recorded() -> list[str]:
    """What the report of the README's table says that it was made with."""
    return [json.loads((ROOT / "kernels/results/quality-smollm2.json").read_text())["command"]]


COMMANDS = [*(line for name in DOCUMENTS for line in shown(name)), *made(), *recorded()]


def lcpatch(words: list[str]) -> None:
    args, rest = _parser().parse_known_args(words)
    if args.verb == "train":
        load(args.words, recipe_module(args.config).DEFAULTS)
    elif getattr(args, "takes_options", False):
        args.options = parse_options(rest)
        if args.verb == "eval" and args.model:
            make_tasks(args.tasks, _arms(args)[1])
    else:
        assert not rest


def accelerate(words: list[str]) -> None:
    place = next(n for n, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).is_file()
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    load(words[place + 1 :], recipe_module(Path(words[place]).stem).DEFAULTS)


def python(words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("documented", ROOT / words[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parse([word for word in words[1:] if word != "…"])


def make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    text = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", text, re.MULTILINE) for target in targets)


PROGRAMS = {"lcpatch": lcpatch, "accelerate": accelerate, "python": python, "make": make}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[0] in PROGRAMS])
def test_a_command_that_is_shown_parses(line: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line, comments=True)
    PROGRAMS[program](words)


def test_none_is_left_out():
    assert {line.split()[0] for line in COMMANDS} - PROGRAMS.keys() <= {"pip"}
    assert len(COMMANDS) > 42
