"""A tokenizer made on the spot, tiny models, options that fit short texts, and a model that knows every answer."""

import functools
from pydoc_data.topics import topics

import models
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from lcpatch.eval import tasks
from lcpatch.eval.ask import turn
from lcpatch.eval.text import Text

VOCAB = 512
DOCUMENTS = ["\n\n".join(topics[name] for name in sorted(topics)[:14])]
LENGTH = 900

OPTIONS = {
    "cwe": {"common": 4, "ratio": 5},
    "fwe": {"alpha": 1.5},
    "topic": {"topics": 4},
    "passkey": {"depths": 3},
    "needle": {"depths": 3, "needles": 2},
    "qa": {"questions": 3},
}
"""What makes a task fit into LENGTH tokens; others run with their defaults."""

QA_TASKS = [name for name, cls in tasks.all().items() if not cls.scores_text and not cls.needs_data]


@functools.cache
def tokenizer(special: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens, without special tokens or with BOS, EOS and a chat template."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>"] if special else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    if not special:
        return PreTrainedTokenizerFast(tokenizer_object=raw)
    from tokenizers.processors import TemplateProcessing

    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{{ bos_token }}USER: {{ messages[0]['content'] }} ASSISTANT:"
    return made


def model(**overrides):
    return models.build(vocab_size=VOCAB, max_position_embeddings=4096, bos_token_id=None, **overrides)


def text(chat: bool = False, special: bool = False) -> Text:
    return Text(tokenizer(special), DOCUMENTS, "the documents", chat=chat)


def task(name: str):
    return tasks.get(name)(**OPTIONS.get(name, {}))


class Oracle(nn.Module):
    """A model that goes on with the right answer wherever a prompt of these samples ends, and knows nothing else.

    What it has read it takes from the cache alone, as ids in place of keys: a cache that is wrong makes it fail.
    """

    def __init__(self, words: Text) -> None:
        super().__init__()
        self.words, self.next = words, {}
        self.config = models.config_for("llama", vocab_size=VOCAB, num_hidden_layers=1, max_position_embeddings=4096)
        self.weight = nn.Parameter(torch.zeros(1))

    def learn(self, sample) -> None:
        """Every way in which the answers of a sample may be written."""
        read = self.words.opening + sample.context
        for question in sample.questions:
            prompt = question.prompt + self.words.after + self.words.gap
            for n in range(len(question.answers)):
                order = question.answers[n:] + question.answers[:n]
                for answer in (order[0], ", ".join(order)):
                    ids = read + self.words.encode(prompt + answer)
                    for at in range(len(read), len(ids)):
                        self.next.setdefault(tuple(ids[:at]), set()).add(ids[at])
            if sample.turns:
                read = read + turn(self.words, question)

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        ids = input_ids[:, None, :, None].float()
        read = past_key_values.update(ids, ids, 0)[0][:, 0, :, 0].long()
        logits = torch.zeros(*input_ids.shape, VOCAB)
        seen = read.shape[1] - input_ids.shape[1]
        for row, known in enumerate(read.tolist()):
            for at in range(input_ids.shape[1])[-logits_to_keep:]:
                logits[row, at, list(self.next.get(tuple(known[: seen + at + 1]), ()))] = 20
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})
