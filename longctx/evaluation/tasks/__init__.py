"""The tasks of ``longctx eval``, one file each. A new one is a file here and a line below (docs/evaluation.md)."""

from parallel.registry import Registry

TASKS = Registry(
    "task",
    {
        "passkey": "longctx.evaluation.tasks.passkey:TASK",
        "multi_key": "longctx.evaluation.tasks.multi_key:TASK",
        "multi_value": "longctx.evaluation.tasks.multi_value:TASK",
        "multi_query": "longctx.evaluation.tasks.multi_query:TASK",
        "single_needle": "longctx.evaluation.tasks.single_needle:TASK",
        "multiple_needles": "longctx.evaluation.tasks.multiple_needles:TASK",
        "conditional_needles": "longctx.evaluation.tasks.conditional_needles:TASK",
        "single_thread": "longctx.evaluation.tasks.single_thread:TASK",
        "multi_threads": "longctx.evaluation.tasks.multi_threads:TASK",
        "variable_tracking": "longctx.evaluation.tasks.variable_tracking:TASK",
        "common_words": "longctx.evaluation.tasks.common_words:TASK",
        "frequent_words": "longctx.evaluation.tasks.frequent_words:TASK",
        "perplexity": "longctx.evaluation.tasks.perplexity:TASK",
    },
)
