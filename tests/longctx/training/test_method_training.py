"""Models trained with landmark and CCA attention: ranks have one rank's loss and gradients, evaluation its loss."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from longctx.training.activation_checkpointing import checkpoint_layers
from longctx.training.attention import make_cca, make_landmark
from longctx.training.config import TrainAttentionConfig
from longctx.training.sequence_parallel import IGNORED, SequenceParallel, shift_labels
from tests.parallel.cells import relative_error
from tests.parallel.gloo_ranks import run_ranks
from tests.tiny_checkpoints import make_checkpoint

BOUNDS = (0, 40, 41, 87)
BLOCK_SIZE, LANDMARK = 7, 259
CCA = {"name": "cca", "group_size": 4, "core_position": "mean", "head_pooling": "weights"}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gemma": {},
    "dynamic": {"family": "llama", "max_position_embeddings": 42, "rope_parameters": DYNAMIC},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: str(make_checkpoint(tmp_path_factory.mktemp(name), **({"family": name} | fields)))
        for name, fields in MODELS.items()
    }


def make_ids(method: str) -> torch.Tensor:
    ids = torch.randint(0, 250, (1, BOUNDS[-1]), generator=torch.Generator().manual_seed(3))
    if method == "landmark":
        for start, stop in pairwise(BOUNDS):
            ids[0, start + BLOCK_SIZE : stop : BLOCK_SIZE + 1] = LANDMARK
    return ids


def train(rank, world_size, _folder, cases):
    """Loss, evaluation's loss and gradients of each case."""
    results = []
    for folder, method, layout, checkpointing in cases:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        if checkpointing:
            checkpoint_layers(model, keep_attention=checkpointing == "kept")
        chosen = {
            "landmark": lambda: make_landmark(TrainAttentionConfig()),
            "cca": lambda: make_cca(TrainAttentionConfig(**CCA, window=6)),
            "wide": lambda: make_cca(TrainAttentionConfig(**CCA, window=100)),
        }[method]()
        landmark = LANDMARK if method == "landmark" else None
        parallel = SequenceParallel(model, method=chosen, layout=layout, landmark_token_id=landmark)
        mean, share = parallel.loss(make_ids(method), cu_seqlens=BOUNDS)
        share.backward()
        parallel.reduce_gradients()
        model.eval()
        with torch.no_grad():
            evaluated, _ = parallel.loss(make_ids(method), cu_seqlens=BOUNDS)
        results.append((mean.item(), evaluated.item(), {n: p.grad.numpy() for n, p in model.named_parameters()}))
    return results


CASES = (
    ("llama", "landmark", "balanced", "kept"),
    ("gemma", "landmark", "striped", "anew"),
    ("phi3", "cca", "zigzag", "kept"),
    ("qwen3", "cca", "balanced", "anew"),
    ("dynamic", "cca", "contiguous", ""),
    ("dynamic", "landmark", "balanced", ""),
)


@cache
def train_alone(folders):
    """By one rank, without checkpointing."""
    return run_ranks(
        train, 1, [(folder, method, "balanced", "") for folder, (_, method, *_) in zip(folders, CASES, strict=True)]
    )[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_one_rank(folders, world_size):
    paths = tuple(folders[name] for name, *_ in CASES)
    expected = train_alone(paths)
    cases = [(path, *rest) for path, (_, *rest) in zip(paths, CASES, strict=True)]
    for results in run_ranks(train, world_size, cases):
        for case, (loss, evaluated, gradients), wanted in zip(CASES, results, expected, strict=True):
            assert loss == pytest.approx(wanted[0], rel=1e-5), case
            assert evaluated == pytest.approx(wanted[0], rel=1e-5), case  # through the same attention
            for name, found in gradients.items():
                error = relative_error(torch.from_numpy(found), torch.from_numpy(wanted[2][name]))
                assert error < 1e-5, (case, name)


def test_a_window_over_everything_is_dense(folders):
    """So that RoPE, which attention does itself, is each model's own."""
    cases = [(folder, "wide", "balanced", "") for folder in folders.values()]
    for (folder, *_), (loss, _, gradients) in zip(cases, run_ranks(train, 1, cases)[0], strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids, total, count = make_ids("wide"), torch.zeros(()), 0
        for start, stop in pairwise(BOUNDS):
            logits = model(ids[:, start:stop]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop], reduction="sum")
            count += stop - start - 1
        (total / count).backward()
        assert loss == pytest.approx((total / count).item(), rel=1e-5), folder
        for name, parameter in model.named_parameters():
            assert relative_error(torch.from_numpy(gradients[name]), parameter.grad) < 1e-5, (folder, name)


def test_landmarks_predict_nothing_and_are_not_predicted():
    labels = torch.tensor([[1, 2, 9, 3, 4, 9, 5, 6, 7]])
    is_landmark = torch.tensor([False, False, True, False, False, True, False, False, False])
    targets = shift_labels(labels, (0, 7, 7, 9), is_landmark)
    assert targets.tolist() == [[2, 3, IGNORED, 4, 5, IGNORED, IGNORED, 7, IGNORED]]
    assert shift_labels(torch.tensor([[9, 9]]), (0, 2), torch.tensor([True, True])).tolist() == [[IGNORED, IGNORED]]


def test_a_method_and_its_landmarks_go_together(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ValueError, match="landmark_token_id=None does not go"):
        SequenceParallel(model, method=make_landmark(TrainAttentionConfig()))
