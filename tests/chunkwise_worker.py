"""One of two processes under DistributedDataParallel: texts of different lengths, one of them without a label.

chunkwise_worker.py RANK STORE
"""

import sys

import torch
from chunkwise_cases import far, rounding, taken
from models import build, tokens
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lcpatch.training import chunkwise


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = [tokens(2, 75), tokens(1, 33, seed=2), tokens(1, 40, seed=3)]
    return list(zip(ids, [ids[0], ids[1], torch.full_like(ids[2], -100)], strict=True))


def main(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    model, data = build("gpt_neox").double().train(), batches()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    for pair in ((0, 1), (0, 2), (2, 1)):  # with different numbers of chunks, and with no labels here or there
        items = sum(int((data[n][1][:, 1:] != -100).sum()) for n in pair)
        model.zero_grad()
        ids, labels = data[pair[rank]]
        with replica.no_sync():  # an accumulation step before: nothing is exchanged until the last
            chunkwise.backward(replica, input_ids=ids, labels=labels, chunk_size=16, num_items_in_batch=items)
        chunkwise.backward(replica, input_ids=ids, labels=labels, chunk_size=16, num_items_in_batch=items)
        got = taken(model)
        model.zero_grad()
        for n in pair:  # the mean over processes of two equal steps: just the sum of both texts
            logits = model(data[n][0], use_cache=False).logits[:, :-1]
            (cross_entropy(logits.flatten(0, 1), data[n][1][:, 1:].flatten(), reduction="sum") / items).backward()
        assert far(got, taken(model)) <= rounding(model), pair
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
