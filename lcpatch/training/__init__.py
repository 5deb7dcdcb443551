"""Training for long context: LoRA+, RoPE scaling, packed data, gradients chunk by chunk, and the glue to HF Trainer."""
