import os

import torch

# Triton decides when a kernel is decorated whether it interprets it, so this comes before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
