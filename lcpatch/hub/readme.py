"""The README.md that a push brings where there is none: the facts of the patch, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.config import PatchConfig
from .save import needs_lcpatch

_TEMPLATE = """---
library_name: {library}
tags: [lcpatch, {method}, long-context]
---

# {repo_id}

{what} patched with `{method}` by lcpatch (`pip install lcpatch`).

| | |
| --- | --- |
| Method | `{method}` |
| Options | `{options}` |
| Layers | {layers} |
| Mode | `{mode}` |
| Sinks | {sinks} |

```python
import lcpatch

model = lcpatch.from_pretrained("{repo_id}")
```

{without}
"""

_WITHOUT = {
    (True, True): "Plain transformers and PEFT load this adapter without the patch, and do not say so.",
    (True, False): "The patch is active in training only: for inference, PEFT alone loads this adapter.",
    (False, True): 'Without lcpatch, `attn_implementation="sdpa"` loads the model with dense attention, which it was '
    "not saved to run with.",
    (False, False): "The patch is active in training only: for inference, transformers alone loads this model.",
}


def write_readme(folder: Path, repo_id: str, patch: PatchConfig) -> None:
    """Write `README.md` about the model or adapter saved in `folder`."""
    adapter = (folder / "adapter_config.json").is_file()
    text = _TEMPLATE.format(
        library="peft" if adapter else "transformers",
        method=patch.method,
        repo_id=repo_id,
        what="An adapter for a model" if adapter else "A model",
        options=json.dumps(patch.options),
        layers=", ".join(map(str, patch.layers)),
        mode=patch.mode,
        sinks=f"`{patch.sinks}`" if patch.sinks else "none",
        without=_WITHOUT[adapter, needs_lcpatch(patch)],
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
