"""Training for long context: LoRA+, RoPE scaling, packed data, and the one glue to transformers' Trainer."""
