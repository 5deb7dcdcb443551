"""Measures of a model, one file a task; `evaluate` runs them under several arms and reports."""

from .arms import Arm
from .perplexity import perplexity, token_nll
from .report import Report
from .run import evaluate
from .stats import recovery
from .task import Task, tasks

__all__ = ["Arm", "Report", "Task", "evaluate", "perplexity", "recovery", "tasks", "token_nll"]
