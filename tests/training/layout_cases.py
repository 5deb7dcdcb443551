"""What a layout shows its ranks, against causal attention within documents."""

import torch

from lcpatch.training.parallel.layout import Layout, sees


def assert_sees_causally(layout: Layout, documents: tuple[tuple[int, int], ...]) -> None:
    """Every pair that causal attention within documents allows the queries, in exactly one call, and no other."""
    document = torch.full((layout.length,), -1)
    for n, (start, end) in enumerate(documents):
        document[start:end] = n
    seen = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for i in range(layout.num_ranks):
        for j in range(layout.num_ranks):
            rows, columns = layout.tokens(i)[layout.num_before(i) :], layout.tokens(j)
            for call in sees(layout, documents, i, j):
                for q0, q1, k0, k1, gap in call:
                    triangle = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 + gap - (q1 - q0)).long()
                    seen[rows[q0:q1, None], columns[None, k0:k1]] += triangle
    causal = torch.ones_like(seen).tril() * (document[:, None] == document) * (document >= 0)
    causal[: layout.begin] = 0
    assert seen.equal(causal)
