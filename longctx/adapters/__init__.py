"""Adapters: little trained weights beside a frozen model."""
