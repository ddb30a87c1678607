"""Pools of prefill and decode workers that grow and shrink by themselves."""
