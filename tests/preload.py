"""Loaded once by the process that those of ``fork_server.py`` are forked from: what ranks and workers need."""

import pytest  # noqa: F401 - by the modules of tests, whose functions ranks run
import torch._dynamo
import torch.distributed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import cluster.serving_worker  # noqa: F401
import longctx.training.trainer  # noqa: F401
from longctx.training.deepspeed_engine import load_deepspeed

load_deepspeed()
