"""Texts and generated recall tasks on which the shipped demo model is trained and measured.

Two sources: the Python standard library of the running interpreter (its test suites and character tables left out),
and recall tasks that hide one or several facts ("The pass key is 48213.") in a document and ask for them, as plain
completion text or as a chat. The plain form follows Mohtashami & Jaggi, "Landmark Attention" (2023), section 4.2;
several named keys and `key = value` look-ups follow the idea of RULER (Hsieh et al., 2024), section 3.

A token is a byte; a few special tokens follow the 256 bytes. Everything is a pure function of the random generator
handed in. Left out: other languages, other text, summaries, dialogue beyond a greeting.
"""

import random
import re
import string
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

SPECIAL_TOKENS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|pad|>": 259}
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ANSWER_WEIGHT = 8.0  # loss weight of an answer byte; a byte of running text counts 1
HELD_OUT_SHARE = 20  # one file in so many is kept from training
EXCLUDED_PARTS = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}

_SPECIAL_PATTERN = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")
_NOUNS = (
    "passkey",
    "secret code",
    "magic number",
    "access code",
    "password",
    "secret number",
    "PIN",
    "token",
    "code word",
)
_NAMES = (
    *(
        "alpha",
        "bravo",
        "delta",
        "Paris",
        "Tokyo",
        "Berlin",
        "London",
        "Alice",
        "Bob",
        "Carol",
        "Dave",
        "server",
        "router",
    ),
    *(
        "red",
        "green",
        "blue",
        "apple",
        "banana",
        "cherry",
        "the north door",
        "the vault",
        "the garage",
        "user 7",
        "room 12",
    ),
)
_WORDS = (
    *(
        "river",
        "copper",
        "window",
        "garden",
        "silver",
        "planet",
        "orange",
        "hammer",
        "castle",
        "monkey",
        "purple",
        "rocket",
    ),
    *(
        "forest",
        "candle",
        "mirror",
        "pepper",
        "basket",
        "tunnel",
        "velvet",
        "walnut",
        "yellow",
        "zebra",
        "anchor",
        "bottle",
    ),
)
_FACT_FORMS = (
    *("The {n} is {v}. Remember it. {v} is the {n}.", "The {n} is {v}. Remember it.", "The {n} is {v}."),
    *("Remember this: the {n} is {v}.", "Important: the {n} is {v}.", "# NOTE: the {n} is {v}.", "# the {n} is {v}"),
)
_QUESTION_FORMS = (
    *("What is the {n}?", "What is the {n}?", "What is the {n}?", "What was the {n}?", "Tell me the {n}."),
    *("Find the {n} in the text.", "What is the {n} in the document?", "What is the {n} mentioned in the text above?"),
)
_PAIR_FORMS = ("{n} = {v}", "{n} = '{v}'", '{n} = "{v}"', "# {n}: {v}", "{n}: {v}", "# {n}={v}")
_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
_GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Hi there",
    "Good morning",
    "Who are you?",
    "What are you?",
    "What can you do?",
)
_INTRODUCTION = (
    "Hello! I am the longctx demo model. "
    "I continue Python source text, and I find a pass key hidden in a long document."
)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text and the loss weight of each of its tokens."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Fact:
    """What is hidden in a document: `sentence` holds it, `question` asks for it, `lead` + `value` + "." answers."""

    sentence: str
    question: str
    lead: str
    value: str

    @property
    def answer(self) -> str:
        return f"{self.lead} {self.value}."


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of the standard library; `text` is all of them, each followed by the end-of-text token."""

    documents: tuple[str, ...]
    text: str

    def draw_lines(self, rng: random.Random, num_chars: int) -> str:
        """At most `num_chars` characters of one document (several where it is short), from a line start."""
        document = rng.choice(self.documents)
        while len(document) < num_chars:
            document += "\n" + rng.choice(self.documents)
        start = rng.randrange(len(document) - num_chars + 1)
        start = document.rfind("\n", 0, start) + 1
        return document[start : start + num_chars]


def load_corpora(stdlib: Path | None = None) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus; a file is held out by a checksum of its path, so every run agrees."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    split: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 500:
            split[is_held_out(relative)].append(text)
    train, held_out = (Corpus(tuple(part), END_OF_TEXT.join(part) + END_OF_TEXT) for part in split)
    return train, held_out


def is_held_out(relative: Path) -> bool:
    """Whether the standard-library file at this relative path is kept from training."""
    return zlib.crc32(relative.as_posix().encode()) % HELD_OUT_SHARE == 0


def encode(text: str) -> list[int]:
    """Token ids of `text`, as the shipped tokenizer gives them: its UTF-8 bytes, special tokens found in the text."""
    ids: list[int] = []
    for piece in _SPECIAL_PATTERN.split(text):
        ids.extend([SPECIAL_TOKENS[piece]] if piece in SPECIAL_TOKENS else piece.encode())
    return ids


def make_pass_key(rng: random.Random) -> Fact:
    """The plain five-digit pass key which the model card measures."""
    value = str(rng.randrange(10_000, 100_000))
    return Fact(f"The pass key is {value}. Remember it.", "What is the pass key?", "The pass key is", value)


def make_facts(rng: random.Random, num_facts: int) -> list[Fact]:
    """Facts with different names, so that each question has one answer."""
    if num_facts == 1 and rng.random() < 0.6:
        return [_make_noun_fact(rng, "pass key" if rng.random() < 0.6 else rng.choice(_NOUNS))]
    if rng.random() < 0.4:
        return [_make_pair_fact(rng, name) for name in sorted({_draw_identifier(rng) for _ in range(num_facts)})]
    noun = "pass key" if rng.random() < 0.4 else rng.choice(_NOUNS)
    names = {rng.choice(_NAMES) if rng.random() < 0.5 else _draw_letters(rng) for _ in range(num_facts)}
    return [_make_noun_fact(rng, f"{noun} {rng.choice(('for', 'of'))} {name}") for name in sorted(names)]


def hide(document: str, facts: list[Fact], depths: list[float], rng: random.Random) -> list[Span]:
    """`document` with each fact's sentence at its depth (0 start, 1 end), moved to the next line or word boundary.

    The values inside the document are drawn at random, so they carry no loss.
    """
    spans: list[Span] = []
    position = 0
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda item: item[0]):
        boundary = "\n" if rng.random() < 0.7 else " "
        target = max(position, int(depth * len(document)))
        found = document.find(boundary, target) + 1
        if target == 0 or not found or found - target > 200:
            found = target
        spans += [Span(document[position:found]), *_fact_spans(fact, boundary)]
        position = found
    return [*spans, Span(document[position:])]


def ask_in_chat(document: list[Span], facts: list[Fact], rng: random.Random) -> list[Span]:
    """A chat whose first message holds the document and the first question; each further fact is one more turn."""
    ask_first = rng.random() < 0.15
    spans = [Span(f"<|im_start|>system\nYou are a helpful assistant.{END_OF_TURN}\n")] if rng.random() < 0.2 else []
    for turn, fact in enumerate(facts):
        question, answer = fact.question, fact.answer
        if rng.random() < 0.15:
            question, answer = f"{question} Answer with the {rng.choice(('value', 'key', 'number'))} only.", fact.value
        spans.append(Span("<|im_start|>user\n"))
        if turn:
            spans.append(Span(question))
        else:
            spans += [Span(f"{question}\n\n"), *document] if ask_first else [*document, Span(f"\n\n{question}")]
        spans += [
            Span(f"{END_OF_TURN}\n<|im_start|>assistant\n", 0.5),
            Span(f"{answer}{END_OF_TURN}", ANSWER_WEIGHT),
            Span("\n"),
        ]
    return spans


def ask_in_text(document: list[Span], facts: list[Fact], rng: random.Random) -> list[Span]:
    """The document, then question and answer in running text."""
    spans = [Span(_TASK), *document] if rng.random() < 0.3 else list(document)
    for fact in facts:
        question = f"{fact.question} " if rng.random() < 0.8 else ""
        spans += [Span(f"\n\n{question}{fact.lead}", 0.5), Span(f" {fact.value}.", ANSWER_WEIGHT)]
    return [*spans, Span("\n" + END_OF_TEXT)]


def make_recall(corpus: Corpus, rng: random.Random, num_tokens: int) -> list[Span]:
    """A recall task of roughly `num_tokens` tokens."""
    num_facts = 1 if rng.random() < 0.4 else rng.randint(2, max(2, min(8, num_tokens // 100)))
    facts = make_facts(rng, num_facts)
    num_chars = max(40, num_tokens - 160 * len(facts) - 40)
    document = corpus.draw_lines(rng, num_chars)
    if rng.random() < 0.12:
        document = (_GRASS * (num_chars // len(_GRASS) + 1))[:num_chars]
    hidden = hide(document, facts, [rng.random() for _ in facts], rng)
    asked = rng.sample(facts, len(facts))
    return (ask_in_chat if rng.random() < 0.6 else ask_in_text)(hidden, asked, rng)


def make_copy(rng: random.Random, num_tokens: int) -> list[Span]:
    """Random strings in a row, then some of them again: the plainest task that needs a copying circuit."""
    alphabet = rng.choice((string.digits, string.ascii_lowercase, string.ascii_letters + string.digits))
    length = rng.randint(12, max(13, min(60, num_tokens // 4)))
    pieces = ["".join(rng.choices(alphabet, k=length)) for _ in range(max(1, num_tokens // (2 * length)))]
    spans = [Span(" ".join(pieces) + "\n", 0.05)]
    for piece in rng.sample(pieces, len(pieces)):
        spans += [Span(piece[:6], 0.05), Span(piece[6:] + " ", 2.0)]
    return [*spans, Span(END_OF_TEXT)]


def make_greeting(rng: random.Random) -> list[Span]:
    """A greeting and the model's introduction of itself."""
    turn = f"<|im_start|>user\n{rng.choice(_GREETINGS)}{END_OF_TURN}\n<|im_start|>assistant\n"
    return [Span(turn), Span(f"{_INTRODUCTION}{END_OF_TURN}", 2.0), Span("\n")]


def make_row(
    corpus: Corpus, rng: random.Random, *, length: int, recall_share: float, copy_share: float
) -> tuple[list[int], list[float]]:
    """One training row: exactly `length` token ids and the loss weight of each. What a task leaves is running text."""
    ids: list[int] = []
    weights: list[float] = []
    draw = rng.random()
    spans: list[Span] = []
    if draw < recall_share:
        spans = make_recall(corpus, rng, int(length * rng.choice((1.0, 1.0, 0.95, 0.8, 0.5))))
    elif draw < recall_share + copy_share:
        spans = make_copy(rng, length)
    elif draw > 0.98:
        spans = make_greeting(rng)
    for span in spans:
        piece = encode(span.text)
        ids += piece
        weights += [span.weight] * len(piece)
    room = max(0, length - len(ids))
    start = rng.randrange(len(corpus.text) - 2 * length - 16)
    ids += encode(
        corpus.text[start : start + 2 * room + 16]
    )  # more: an end-of-text mark is many characters but one token
    weights += [1.0] * (len(ids) - len(weights))
    return ids[:length], weights[:length]


def _fact_spans(fact: Fact, boundary: str) -> list[Span]:
    head, *rest = fact.sentence.split(fact.value)
    spans = [Span(head)]
    for piece in rest:
        spans += [Span(fact.value, 0.0), Span(piece)]
    return [*spans, Span(boundary)]


def _make_noun_fact(rng: random.Random, noun: str) -> Fact:
    value = _draw_value(rng)
    sentence, question = rng.choice(_FACT_FORMS).format(n=noun, v=value), rng.choice(_QUESTION_FORMS).format(n=noun)
    return Fact(sentence, question, f"The {noun} is", value)


def _make_pair_fact(rng: random.Random, name: str) -> Fact:
    value = _draw_value(rng)
    question = rng.choice(("What is the value of {n}?", "What is {n}?", "Look up {n}.")).format(n=name)
    return Fact(rng.choice(_PAIR_FORMS).format(n=name, v=value), question, f"The value of {name} is", value)


def _draw_value(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.55:
        return str(rng.randrange(10_000, 100_000))
    if draw < 0.72:
        return "".join(rng.choices(string.digits, k=rng.randint(3, 9)))
    if draw < 0.86:
        return "-".join(rng.sample(_WORDS, rng.randint(1, 3)))
    return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(5, 12)))


def _draw_letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))


def _draw_identifier(rng: random.Random) -> str:
    name = f"{rng.choice(_WORDS)}_{_draw_letters(rng)}" if rng.random() < 0.5 else _draw_letters(rng)
    return name.upper() if rng.random() < 0.4 else name
