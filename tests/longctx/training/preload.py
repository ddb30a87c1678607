"""Loaded once by the process that the ranks of ``worlds.py`` are forked from."""

import torch._dynamo  # noqa: F401 - by the first step of an optimizer
import transformers.models.llama.modeling_llama  # noqa: F401

import longctx.training.trainer  # noqa: F401
from longctx.training.deepspeed_engine import load_deepspeed

load_deepspeed()
