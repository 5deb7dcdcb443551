"""`lcpatch push FOLDER REPO`: what goes along, what is refused, and what becomes of the folder."""

from pathlib import Path

import peft
import pytest
from models import SHORT, build

import lcpatch
from lcpatch.cli import main
from lcpatch.hub.card_files import README, is_ours, signed
from lcpatch.hub.saved import push_saved
from lcpatch.hub.upload import Target

TARGET = Target("me/model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lcpatch.save_pretrained(lcpatch.apply(build(), "s2", **SHORT["s2"]), tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_goes_with_a_card_and_stays_as_it_is(folder: Path, capsys):
    before = contents(folder)
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in (*before, README, "card/pattern.png"):
        assert f"  {name}\n" in said
    assert "would go to me/model" in said
    assert contents(folder) == before


def test_a_readme_of_ones_own_goes_along(folder: Path):
    (folder / README).write_text("# Mine")
    assert push_saved(folder, TARGET, dry_run=True).files[README] == len("# Mine")
    with pytest.raises(ValueError, match="was written by hand, and stays"):
        push_saved(folder, TARGET, about={"license": "mit"}, dry_run=True)
    (folder / README).write_text(signed("an old card"))
    assert push_saved(folder, TARGET, dry_run=True).files[README] > 1000


def test_an_adapter_has_no_empty_readme(tmp_path: Path):
    model = peft.get_peft_model(
        lcpatch.apply(build(), "sf", **SHORT["sf"]), peft.LoraConfig(target_modules="all-linear")
    )
    lcpatch.save_pretrained(model, tmp_path)
    assert not (tmp_path / README).exists()
    assert push_saved(tmp_path, TARGET, dry_run=True).files[README] > 1000
    (tmp_path / README).write_text("# Mine\n")
    lcpatch.save_pretrained(model, tmp_path)
    assert "# Mine" in (tmp_path / README).read_text()


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 2
    assert "notes.txt is a link out of" in capsys.readouterr().err
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to("config.json")  # one within is a file like any other
    assert "notes.txt" in push_saved(folder, TARGET, dry_run=True).files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "old/training.pkl"])
def test_pickles_are_refused(name: str, folder: Path):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle, which lcpatch does not publish"):
        push_saved(folder, TARGET, dry_run=True)


def test_what_is_no_patched_model_is_refused(tmp_path: Path, capsys):
    build().save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), "me/model", "--dry-run"]) == 2
    assert "carries no patch" in capsys.readouterr().err
    assert main(["push", "x" * 3 + ".safetensors", "me/model", "--dry-run"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert not is_ours("")
