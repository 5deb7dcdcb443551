"""Measures of a model, one file a task."""

from .perplexity import perplexity, token_nll

__all__ = ["perplexity", "token_nll"]
