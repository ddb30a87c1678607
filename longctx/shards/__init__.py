"""One engine over several ranks: each keeps its part of every sequence's KV, and queries or keys travel between them.

Rank 0 schedules and samples (``runner``); it tells every rank what each step computes (``step``). From that, each rank
finds its tokens and keys (``layout``), plans the exchange (``plans``) and runs the model on its tokens (``rank``), with
an attention that exchanges (``attention``; ``landmarks`` of landmark models).
"""
