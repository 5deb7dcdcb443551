"""Texts that are tokenized in pieces: the tokens and documents of the whole, a piece at a time."""

import eval_cases
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lcpatch.training import encode, tokens
from lcpatch.training.sources import sources

TEXTS = ["A short one.", eval_cases.DOCUMENTS[0][:9000], "And another one."]


def spaces_in_front() -> PreTrainedTokenizerFast:
    """As Llama 2's: whatever is tokenized gets a space in front."""
    raw = Tokenizer(BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        eval_cases.DOCUMENTS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def ends_by_itself() -> PreTrainedTokenizerFast:
    """A tokenizer that puts an end behind whatever it is given."""
    from tokenizers.processors import TemplateProcessing

    made = eval_cases.tokenizer(special=True)
    raw = Tokenizer.from_str(made.backend_tokenizer.to_str())
    special = [(name, raw.token_to_id(name)) for name in ("<s>", "</s>")]
    raw.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": eval_cases.tokenizer(),
    "bytes with specials": eval_cases.tokenizer(special=True),
    "spaces in front": spaces_in_front(),
    "ends by itself": ends_by_itself(),
}


def built(tokenizer, folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    names = [str(folder / f"{number}.txt") for number in range(len(TEXTS))]
    store = tokens.build(sources(names), encode.texts(tokenizer), folder / "cache", progress=False)
    return store.tokens(0, len(store)).tolist(), store.ends.tolist(), store.index["shards"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole(tmp_path, monkeypatch, name: str):
    """And its documents, over several shards, of which a run that is killed keeps those it has."""
    tokenizer = TOKENIZERS[name]
    (tmp_path / "whole").mkdir()
    ids, ends, shards = built(tokenizer, tmp_path / "whole")
    assert (len(ends), len(shards)) == (3, 1)
    monkeypatch.setattr(encode, "PIECE", 700)
    monkeypatch.setattr(encode, "NEAR", 60)
    monkeypatch.setattr(tokens, "SHARD_RECORDS", 4)
    longest = []
    monkeypatch.setattr(encode, "_document", spy(encode._document, longest))
    (tmp_path / "pieces").mkdir()
    found = built(tokenizer, tmp_path / "pieces")
    assert found[:2] == (ids, ends)
    assert len(found[2]) == 4
    assert max(longest) <= 700
    (folder,) = (tmp_path / "pieces" / "cache").iterdir()
    for lost in ("index.json", "00003.safetensors"):
        (folder / lost).unlink()
    longest.clear()
    assert built(tokenizer, tmp_path / "pieces") == found
    assert len(longest) <= 4


def spy(document, longest: list[int]):
    def noted(piece, ids, eos):
        longest.append(len(piece["text"]))
        return document(piece, ids, eos)

    return noted


def test_a_text_without_a_good_place_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 100)
    monkeypatch.setattr(encode, "NEAR", 10)
    text = "e" * 250
    assert "".join(encode._cut(TOKENIZERS["bytes"], text)) == text
