"""SF-Attn against its mask written out in float64: output, gradients, and that nothing is seen of the future."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from longctx.errors import ConfigError
from longctx.training.activation_checkpointing import checkpoint_layers
from longctx.training.attention import make_sf
from longctx.training.config import TrainAttentionConfig
from longctx.training.sequence_parallel import SequenceParallel
from longctx.training.sf_attention import SFAttention
from parallel.layout import LAYOUTS
from parallel.plans import PLANS
from parallel.shard import shard_sequence
from tests.parallel.cells import relative_error
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

HEAD_DIM = 8
HEADS = {"mha": (8, 8), "gqa": (8, 4), "two": (6, 2), "mqa": (4, 1)}
DOCUMENTS = {"one": (0, 53), "packed": (0, 3, 3, 40, 45, 83)}  # short ones have no group but their first
CONFIGS = (
    TrainAttentionConfig(name="sf", group_size=8, sink_tokens=2, returned_heads=0.0),
    TrainAttentionConfig(name="sf", group_size=8, sink_tokens=4, returned_heads=0.5),
    TrainAttentionConfig(name="sf", group_size=9, sink_tokens=0, returned_heads=0.25),
    TrainAttentionConfig(name="sf", group_size=8, sink_tokens=1, returned_heads=1.0),
    TrainAttentionConfig(name="sf", group_size=200, sink_tokens=3, returned_heads=0.0),
)
TOLERANCE = 2e-6


def make_inputs(heads: str, documents: str, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v and dout of the whole sequence."""
    num_heads, num_kv_heads = HEADS[heads]
    generator = torch.Generator().manual_seed(7)
    shapes = [(DOCUMENTS[documents][-1], each, HEAD_DIM) for each in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(1, *shape, generator=generator).to(dtype) for shape in shapes]


def visible(config: TrainAttentionConfig, documents, *, shifted: bool) -> torch.Tensor:
    """Which query sees which key: token by token, from the description."""
    num_tokens = documents[-1]
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    shift = config.group_size // 2 if shifted else config.group_size
    for start, stop in pairwise(documents):
        for i in range(stop - start):
            for j in range(i + 1):
                group_i, group_j = ((x - shift) // config.group_size for x in (i, j))
                seen[start + i, start + j] = group_i == group_j or j < config.sink_tokens
    return seen


def num_shifted(config: TrainAttentionConfig, heads: str) -> int:
    """Query heads: half of the KV heads, without the share that is returned, with their query heads."""
    num_heads, num_kv_heads = HEADS[heads]
    units = num_kv_heads if num_kv_heads > 1 else num_heads
    return (units // 2 - round(units // 2 * config.returned_heads)) * (num_heads // units)


def reference(config: TrainAttentionConfig, heads: str, documents: str) -> list[torch.Tensor]:
    """Output, dq, dk and dv in float64."""
    q, k, v, dout = (x.double() for x in make_inputs(heads, documents))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    num_heads, num_kv_heads = HEADS[heads]
    many_k, many_v = (x.repeat_interleave(num_heads // num_kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, many_k) * HEAD_DIM**-0.5
    cut = num_heads - num_shifted(config, heads)
    masks = [visible(config, DOCUMENTS[documents], shifted=head >= cut) for head in range(num_heads)]
    weights = scores.masked_fill(~torch.stack(masks), float("-inf")).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, many_v)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


def compare(rank, world_size, _folder, cases):
    for config, heads, documents, layout, plan in cases:
        bounds = DOCUMENTS[documents]
        *inputs, dout = (
            shard_sequence(x, 1, rank=rank, world_size=world_size, layout=layout, cu_seqlens=bounds)[0]
            for x in make_inputs(heads, documents)
        )
        inputs = [x.requires_grad_() for x in inputs]
        out = SFAttention(config).attend(*inputs, group=None, cu_seqlens=bounds, layout=layout, plan=plan)
        out.backward(dout)
        found = [out.detach(), *(x.grad for x in inputs)]
        for name, own, whole in zip(("out", "dq", "dk", "dv"), found, reference(config, heads, documents), strict=True):
            wanted, _ = shard_sequence(whole, 1, rank=rank, world_size=world_size, layout=layout, cu_seqlens=bounds)
            error = relative_error(own, wanted, least=0.1)
            assert error <= TOLERANCE, (config, heads, documents, layout, plan, name, error)
    return len(cases)


@pytest.fixture
def alone(tmp_path):
    """A default group of one rank in this process, on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_one_rank_is_exact(heads, config):
    assert compare(0, 1, "", [(config, heads, documents, "balanced", "auto") for documents in DOCUMENTS]) == 2


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_exact_with_every_plan_and_layout(world_size):
    cases = [
        (CONFIGS[idx % 3], list(HEADS)[idx % 4], list(DOCUMENTS)[idx % 2], LAYOUTS[(idx + idx // 4) % 4], plan)
        for idx, plan in enumerate((*PLANS, "auto"))
    ]
    cases += [(CONFIGS[1], heads, "packed", layout, "auto") for heads, layout in zip(HEADS, LAYOUTS, strict=True)]
    assert run_ranks(compare, world_size, cases) == [len(cases)] * world_size


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("heads", HEADS)
def test_the_future_and_other_documents_change_nothing(heads):
    documents = DOCUMENTS["packed"]
    q, k, v, _ = make_inputs(heads, "packed")
    attention = SFAttention(CONFIGS[1])
    before = attention.attend(q, k, v, group=None, cu_seqlens=documents)
    for position in range(4, documents[-1], 17):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, position:] += 5.0
        after = attention.attend(*changed, group=None, cu_seqlens=documents)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])
    start, stop = documents[3], documents[4]
    for x in (k, v):
        x[:, :start] += 5.0
    after = attention.attend(q, k, v, group=None, cu_seqlens=documents)
    assert torch.equal(after[:, start:stop], before[:, start:stop])


@pytest.mark.usefixtures("alone")
def test_half_precision_is_as_near_as_one_rounding():
    config, heads, documents = CONFIGS[1], "gqa", "packed"
    *inputs, dout = make_inputs(heads, documents, torch.bfloat16)
    inputs = [x.requires_grad_() for x in inputs]
    out = SFAttention(config).attend(*inputs, group=None, cu_seqlens=DOCUMENTS[documents])
    out.backward(dout)
    assert {out.dtype, *(x.grad.dtype for x in inputs)} == {torch.bfloat16}
    found = [out.detach(), *(x.grad for x in inputs)]
    for own, wanted in zip(found, reference(config, heads, documents), strict=True):
        assert relative_error(own, wanted) < 0.02  # the inputs are rounded, too


@pytest.mark.usefixtures("alone")
def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"attention\.sink_tokens=5 is not allowed: at most half of .*group_size, 4"):
        SFAttention(TrainAttentionConfig(name="sf", group_size=8, sink_tokens=5))
    q, k, v, _ = make_inputs("gqa", "one")
    attention = SFAttention(CONFIGS[0])
    for arguments, words in (
        ({"cu_seqlens": (0, 53), "window": 4}, "window=4 are not allowed"),
        ({"cu_seqlens": (0, 53), "causal": False}, "causal=False"),
        ({"cu_seqlens": None}, "with the cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=words):
            attention.attend(q, k, v, group=None, **arguments)


def train(rank, world_size, _folder, checkpoint, checkpointing):
    """Loss and gradients of a model with SF-Attn, and the loss of its evaluation."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    if checkpointing:
        checkpoint_layers(model, keep_attention=checkpointing == "kept")
    parallel = SequenceParallel(model, method=make_sf(CONFIGS[1]))
    input_ids = torch.randint(0, 256, (1, 83), generator=torch.Generator().manual_seed(3))
    mean, share = parallel.loss(input_ids, cu_seqlens=DOCUMENTS["packed"])
    share.backward()
    parallel.reduce_gradients()
    model.eval()
    with torch.no_grad():
        dense, _ = parallel.loss(input_ids, cu_seqlens=DOCUMENTS["packed"])
    return mean.item(), dense.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "checkpointing", ["kept", *(pytest.param(value, marks=pytest.mark.slow) for value in ("", "anew"))]
)
def test_a_model_trains_with_it_and_is_dense_at_evaluation(tmp_path, checkpointing):
    checkpoint = str(make_checkpoint(tmp_path / "model", "llama"))
    loss, dense, expected = train(0, 1, "", checkpoint, "")
    for found_loss, found_dense, gradients in run_ranks(train, 2, checkpoint, checkpointing):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found_dense == pytest.approx(dense, rel=1e-5)
        for name, found in gradients.items():
            assert relative_error(torch.from_numpy(found), torch.from_numpy(expected[name])) < 1e-5, name
    assert abs(loss - dense) > 1e-3
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    parts = [
        model(ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
        for ids in torch.randint(0, 256, (1, 83), generator=torch.Generator().manual_seed(3)).split(
            [stop - start for start, stop in pairwise(DOCUMENTS["packed"])], 1
        )
        if ids.shape[1]
    ]
    num_targets = sum(max(0, stop - start - 1) for start, stop in pairwise(DOCUMENTS["packed"]))
    assert dense == pytest.approx(sum(parts) / num_targets, rel=1e-5)
