"""Train, export and measure the shipped demo model: a byte-level Qwen3-shaped decoder of 3 million parameters.

    python -m longctx.models.train_demo --out longctx/models/demo        # train from scratch (hours on two CPU cores)
    python -m longctx.models.train_demo --resume                         # go on from the last checkpoint
    python -m longctx.models.train_demo --evaluate                       # reproduce the model card's numbers

The curriculum lengthens the rows phase by phase, so that copying circuits form on short rows where steps are cheap.
Matrices are stepped by Muon (Jordan et al., 2024), the rest by AdamW. Half of the rows have their positions stretched
by jumps (PoSE, Zhu et al., 2023, section 3), so that distances up to `max_position_embeddings` have been seen. Left
out: several devices.
"""

import argparse
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longctx.models import demo_data

logger = logging.getLogger(__name__)

DEMO_FOLDER = Path(__file__).parent / "demo"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training at one row length."""

    num_steps: int  # optimizer steps
    length: int  # tokens per row
    num_rows: int  # rows per step
    recall_share: float  # share of rows that hold a recall task
    copy_share: float = 0.0  # share of rows that copy random strings


PHASES = (
    Phase(num_steps=800, length=256, num_rows=32, recall_share=0.5, copy_share=0.2),
    Phase(num_steps=260, length=512, num_rows=16, recall_share=0.6, copy_share=0.1),
    Phase(num_steps=320, length=1024, num_rows=8, recall_share=0.6, copy_share=0.05),
    Phase(num_steps=480, length=2048, num_rows=4, recall_share=0.6),
    Phase(num_steps=160, length=4096, num_rows=2, recall_share=0.6),
    Phase(num_steps=80, length=8192, num_rows=1, recall_share=0.7),
)
WARMUP_STEPS = 60
DECAY_SHARE = 0.3  # of all steps, the last ones, over which the learning rate falls to zero
MATRIX_LR, OTHER_LR = 6e-3, 4e-3


def make_model() -> Qwen3ForCausalLM:
    """A fresh model. Query and key norms start above 1: attention over thousands of bytes needs sharp logits."""
    config = Qwen3Config(
        vocab_size=demo_data.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=demo_data.SPECIAL_TOKENS[demo_data.END_OF_TEXT],
        pad_token_id=demo_data.SPECIAL_TOKENS["<|pad|>"],
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, 1.5)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0-255 are the bytes: byte-level BPE without merges, so every text comes back exactly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in demo_data.SPECIAL_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=demo_data.END_OF_TEXT,
        pad_token="<|pad|>",
        model_max_length=65536,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = demo_data.CHAT_TEMPLATE
    return wrapped


def export_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the Hugging Face folder, weights in bf16."""
    copy = make_model().bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=[demo_data.SPECIAL_TOKENS[token] for token in (demo_data.END_OF_TEXT, demo_data.END_OF_TURN)],
        pad_token_id=demo_data.SPECIAL_TOKENS["<|pad|>"],
    )
    copy.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder, save_jinja_files=False)


def stretch_positions(rng: random.Random, length: int, *, max_positions: int) -> list[int]:
    """Position ids of a row: half the time plain, else an ascending sequence with one to three jumps."""
    positions = list(range(length))
    if rng.random() < 0.5:
        return positions
    room = max_positions - length
    for cut in sorted(rng.randrange(length) for _ in range(rng.randint(1, 3))):
        jump = int(math.exp(rng.uniform(0, math.log(room + 1)))) - 1
        room -= jump
        positions[cut:] = [position + jump for position in positions[cut:]]
    return positions


def scale_lr(step: int, num_steps: int) -> float:
    """Warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / (DECAY_SHARE * num_steps))


def compute_token_losses(
    model: Qwen3ForCausalLM, ids_BT: torch.Tensor, positions_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy in nats of each next token, fp32 `[B, T - 1]`; causal over the row, whatever the positions."""
    with torch.autocast("cpu", torch.bfloat16):
        # A mask dictionary is taken as it is: transformers would else read a jump of positions as a document border.
        logits = model(
            input_ids=ids_BT, position_ids=positions_BT, attention_mask={"full_attention": None}, use_cache=False
        ).logits
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none")


def list_steps(num_steps: int | None) -> Iterator[tuple[int, Phase]]:
    """Global step index and phase of each step."""
    steps = enumerate(phase for phase in PHASES for _ in range(phase.num_steps))
    return (item for item in steps if num_steps is None or item[0] < num_steps)


def train(args: argparse.Namespace) -> None:
    """Run the curriculum; every `--save-every` steps write the checkpoint and the exported folder."""
    torch.manual_seed(args.seed)
    corpus, _ = demo_data.load_corpora()
    model = make_model().train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    base_lrs = (MATRIX_LR, OTHER_LR)
    checkpoint, first_step, seconds = args.work / "checkpoint.pt", 0, 0.0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step, seconds = state["step"], state["seconds"]
    num_total = sum(phase.num_steps for phase in PHASES)
    started = time.perf_counter() - seconds
    for step, phase in list_steps(args.steps):
        if step < first_step:
            continue
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale_lr(step, num_total)
        text_loss, answer_loss = train_step(model, optimizers, corpus, phase, random.Random(f"{args.seed}/{step}"))
        if step % 20 == 0:
            elapsed = time.perf_counter() - started
            logger.info(
                "step %d/%d length %d text %.3f answer %.4f, %.0f s",
                step,
                num_total,
                phase.length,
                text_loss,
                answer_loss,
                elapsed,
            )
        if (step + 1) % args.save_every == 0 or step + 1 in (num_total, args.steps):
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step + 1, "seconds": time.perf_counter() - started}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            export_model(model, args.out)


def train_step(
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    corpus: demo_data.Corpus,
    phase: Phase,
    rng: random.Random,
) -> tuple[float, float]:
    """One optimizer step; returns the mean loss of running text and of answers, nats per byte."""
    rows, positions = [], []
    for _ in range(phase.num_rows):
        rows.append(
            demo_data.make_row(
                corpus, rng, length=phase.length, recall_share=phase.recall_share, copy_share=phase.copy_share
            )
        )
        positions.append(stretch_positions(rng, phase.length, max_positions=model.config.max_position_embeddings))
    ids = torch.tensor([row[0] for row in rows])
    weights = torch.tensor([row[1] for row in rows])[:, 1:]
    losses = compute_token_losses(model, ids, torch.tensor(positions))
    ((losses * weights).sum() / weights.sum().clamp(min=1.0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    means = (losses.detach()[weights == weight].mean().item() for weight in (1.0, demo_data.ANSWER_WEIGHT))
    return next(means), next(means)


def make_prompt(
    corpus: demo_data.Corpus, rng: random.Random, *, num_tokens: int, depth: float, chat: bool
) -> tuple[str, str]:
    """A held-out document with a pass key at `depth`, asked for as a chat or as plain text; and the answer expected."""
    fact = demo_data.make_pass_key(rng)
    document = corpus.draw_lines(rng, num_tokens - 130)
    spans = demo_data.hide(document, [fact], [depth], rng)
    text = "".join(span.text for span in spans)
    if not chat:
        return f"{text}\n\n{fact.question} {fact.lead}", f" {fact.value}."
    message = f"{text}\n\n{fact.question}"
    return (
        f"<|im_start|>user\n{message}{demo_data.END_OF_TURN}\n<|im_start|>assistant\n",
        fact.answer + demo_data.END_OF_TURN,
    )


@torch.inference_mode()
def is_answered(model: Qwen3ForCausalLM, prompt: str, answer: str) -> bool:
    """Whether greedy decoding gives exactly `answer`: each byte is the most likely one after those before it."""
    prompt_ids, answer_ids = demo_data.encode(prompt), demo_data.encode(answer)
    ids = torch.tensor([prompt_ids + answer_ids[:-1]])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer_ids)).logits
    return logits[0].argmax(-1).tolist() == answer_ids


@torch.inference_mode()
def measure_bits_per_byte(model: Qwen3ForCausalLM, text: str, *, length: int, num_rows: int) -> float:
    """Mean bits per byte over windows of `length` bytes spread evenly over `text`."""
    ids = demo_data.encode(text)
    starts = [i * (len(ids) - length) // max(1, num_rows - 1) for i in range(num_rows)]
    losses = [
        compute_token_losses(model, torch.tensor([ids[start : start + length]])).mean().item() for start in starts
    ]
    return sum(losses) / len(losses) / math.log(2)


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """Pass-key accuracy by length, form and depth, and held-out bits per byte."""
    _, held_out = demo_data.load_corpora()
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    table: dict[str, dict[str, float]] = {}
    for length in args.lengths:
        num_prompts = max(2, min(args.prompts, args.prompts * 4096 // length))
        for chat in (False, True):
            row = {}
            for depth in DEPTHS:
                rng = random.Random(f"evaluate/{args.seed}/{length}/{chat}/{depth}")
                prompts = [
                    make_prompt(held_out, rng, num_tokens=length, depth=depth, chat=chat) for _ in range(num_prompts)
                ]
                row[str(depth)] = sum(is_answered(model, *prompt) for prompt in prompts) / num_prompts
            table[f"{length} {'chat' if chat else 'text'}, {num_prompts} prompts per depth"] = row
            logger.info("%d %s %s", length, "chat" if chat else "text", row)
    bits = {
        str(length): measure_bits_per_byte(model, held_out.text, length=length, num_rows=60) for length in (1024, 4096)
    }
    return {"pass_key_accuracy_by_depth": table, "held_out_bits_per_byte": bits}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train or measure the shipped demo model.")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="Hugging Face folder to write, or to measure")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_train"), help="folder of the training checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps (default: all phases)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, rows and prompts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--evaluate", action="store_true", help="measure --out instead of training, print JSON")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768], help="lengths to measure"
    )
    parser.add_argument("--prompts", type=int, default=20, help="prompts per depth and form, fewer above 4096 tokens")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.evaluate:
        print(json.dumps(evaluate(args), indent=1))
    else:
        train(args)


if __name__ == "__main__":
    main()
