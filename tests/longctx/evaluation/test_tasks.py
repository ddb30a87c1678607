"""Prompts of every task: their length, where the answer stands, that nothing else is one, and how answers score."""

import collections
import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from longctx.evaluation.case import Task
from longctx.evaluation.config import EvalConfig
from longctx.evaluation.fitting import TooShortError
from longctx.evaluation.haystack import load_text
from longctx.evaluation.needles import find_boundary, hide
from longctx.evaluation.run import list_cells
from longctx.evaluation.tasks import TASKS
from longctx.evaluation.tasks.frequent_words import NOISE
from longctx.evaluation.tasks.perplexity import fill_buckets, measure_perplexity, name_bucket
from longctx.evaluation.wording import STYLES
from longctx.models import demo_data
from tests.longctx.evaluation.materials import (
    ASKING,
    HAYSTACKS,
    MEASURES,
    WITH_DEPTH,
    make,
    make_cell,
    make_material,
)

PAIRS = ("single_needle", "multiple_needles", "conditional_needles", "single_thread", "multi_threads")
RECALL = ("passkey", "multi_key", "multi_value", "multi_query")
UNIT = 90  # characters of a pair


def read_pairs(case):
    """The JSON object of a prompt, in order."""
    text = case.prompt[case.prompt.index("{") : case.prompt.rindex("}") + 1]
    return json.loads(text, object_pairs_hook=list)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [2048, 8192, 20_000])
@pytest.mark.parametrize("task", ASKING)
def test_length_is_what_was_asked_for(task, length, measure):
    count, chars_per_token = MEASURES[measure]
    for index, depth in enumerate((0, 40, 100)):
        case = make(task, make_material(measure=measure), length=length, index=index, depth=depth)
        num_tokens = count(case.prompt, case.lead)
        assert num_tokens <= length
        assert num_tokens >= min(0.98 * length, length - UNIT / chars_per_token)


@pytest.mark.parametrize("task", ASKING)
def test_the_same_cell_gives_the_same_prompt_and_another_one_another(task):
    first = make(task)
    assert make(task, make_material()) == first
    others = [make(task, index=1), make(task, seed=1)]
    assert len({first.prompt, *(other.prompt for other in others)}) == 3
    assert all(other.expected != first.expected for other in others)


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", RECALL)
def test_facts_stand_in_the_text_once(task, style, haystack):
    case = make(task, make_material(haystack=haystack, style=style))
    times = 2 if (task, style) == ("passkey", "plain") else 1
    assert all(case.prompt.count(value) == times for value in case.expected)
    assert len(set(case.expected)) == len(case.expected) == (1 if task in ("passkey", "multi_key") else 4)
    text = HAYSTACKS[haystack]
    assert not any(text.holds(value) for value in case.expected)


def test_prompts_of_one_text_differ_in_what_they_ask_for():
    depths = (0, 30, 70, 100)
    material = make_material()
    material = replace(material, options=replace(material.options, num_distractors=5, shared_depths=depths))
    cases = [make("multi_key", material, length=4096, depth=depth) for depth in depths]
    texts = {case.prompt.rpartition("\n\n")[0] for case in cases}
    assert len(texts) == 1 and len({case.prompt for case in cases}) == len(depths)
    (text,) = texts
    for depth, case in zip(depths, cases, strict=True):
        place = text.index(case.expected[0]) / len(text)
        assert abs(place - depth / 100) < 0.08
    other = make("multi_key", material, length=4096, depth=30, index=1)
    assert other.prompt.rpartition("\n\n")[0] not in texts


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("depth", [0, 10, 50, 75, 100])
@pytest.mark.parametrize("task", ["passkey", "multi_key"])
def test_a_fact_stands_at_its_depth(task, depth, haystack):
    material = make_material(haystack=haystack, num_distractors=0)
    case = make(task, material, depth=depth)
    text = case.prompt.removeprefix(material.wording.preamble).rsplit("\n\n", 1)[0]
    (sentence,) = re.findall(rf"(?:The|One)[^.]*\b{case.expected[0]}\b[^\n]*?\.", text)[:1]
    place = text.index(sentence) / (len(text) - len(sentence))
    assert place == pytest.approx(depth / 100, abs=0.01)
    before = text[: text.index(sentence)]
    assert before == "" or before.endswith(("\n", ". "))


@pytest.mark.parametrize("task", ["multi_key", "multi_value", "multi_query"])
def test_distractors_are_told_alike_with_other_names_and_values(task):
    case = make(task, make_material(num_distractors=7, num_needles=3))
    told = re.findall(r"magic numbers for (\w+) is: (\d+)\.", case.prompt)
    asked = [name for name, _ in told if name in case.prompt.rsplit("\n\n", 1)[1]]
    assert len(told) == 7 + len(case.expected)
    assert {value for name, value in told if name in asked} == set(case.expected)
    assert len({value for _, value in told}) == len(told)
    assert len(set(asked)) == (3 if task == "multi_query" else 1)


@pytest.mark.parametrize("depth", [0, 30, 100])
def test_a_needle_stands_at_its_depth_among_pairs(depth):
    case = make("single_needle", depth=depth)
    pairs = read_pairs(case)
    (index,) = [index for index, (key, _) in enumerate(pairs) if key in case.ignored]
    assert pairs[index][1] == case.expected[0]
    assert index == pytest.approx(depth / 100 * (len(pairs) - 1), abs=0.5)


@pytest.mark.parametrize("task", PAIRS)
def test_pairs_are_different_and_the_answer_stands_once(task):
    case = make(task)
    pairs = read_pairs(case)
    assert len(dict(pairs)) == len(pairs) > 50
    assert all(case.prompt.count(value) == 1 for value in case.expected)


def test_keys_of_all_needles_are_asked_for():
    case = make("multiple_needles")
    pairs = dict(read_pairs(case))
    asked = json.loads(re.search(r"Keys: (\[.*\])", case.prompt)[1])
    assert sorted(pairs[key] for key in asked) == sorted(case.expected)
    assert tuple(asked) == case.ignored


def test_exactly_the_needles_meet_the_condition():
    case = make("conditional_needles", make_material(num_needles=6))
    assert sorted(value for key, value in read_pairs(case) if "*" in key) == sorted(case.expected)
    assert len(case.expected) == 6


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("task", ["single_thread", "multi_threads"])
def test_a_thread_leads_to_its_value(task, direction):
    material = make_material(thread_length=5, num_threads=3, thread_direction=direction)
    case = make(task, material)
    pairs = read_pairs(case)
    values, place = dict(pairs), {key: index for index, (key, _) in enumerate(pairs)}
    for key, expected in zip(case.ignored, case.expected, strict=True):
        keys = [key]
        while values[keys[-1]] in values:
            keys.append(values[keys[-1]])
        assert len(keys) == 5
        assert values[keys[-1]] == expected
        steps = [place[after] > place[before] for before, after in itertools.pairwise(keys)]
        assert {"forward": all(steps), "backward": not any(steps), "random": True}[direction]
    assert len(case.expected) == (1 if task == "single_thread" else 3)


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
@pytest.mark.parametrize("depth", [0, 60, 100])
def test_a_thread_ends_at_its_depth_as_near_as_its_other_pairs_allow(depth, direction):
    case = make("single_thread", make_material(thread_length=5, thread_direction=direction), depth=depth)
    pairs = read_pairs(case)
    (index,) = [index for index, (_, value) in enumerate(pairs) if value == case.expected[0]]
    wanted = round(depth / 100 * (len(pairs) - 1))
    low, high = {"forward": (4, len(pairs) - 1), "backward": (0, len(pairs) - 5), "random": (0, len(pairs) - 1)}[
        direction
    ]
    assert index == min(max(wanted, low), high)


@pytest.mark.parametrize("num_chains", [1, 3])
def test_variables_of_the_asked_value_are_those_that_are_assigned_it(num_chains):
    case = make("variable_tracking", make_material(num_chains=num_chains, thread_length=6))
    assigned = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", case.prompt):
        assigned[name] = assigned.get(source, source)  # in the order of the text: a source comes before its copies
    asked = re.search(r"assigned the value (\d+) in", case.prompt)[1]
    assert sorted(name for name, value in assigned.items() if value == asked) == sorted(case.expected)
    assert len(case.expected) == 7
    assert len(assigned) == 7 * num_chains


@pytest.mark.parametrize("length", [1800, 8192])
def test_common_words_are_the_most_common(length):
    case = make("common_words", length=length)
    counts = collections.Counter(re.findall(r"\d+\. ([a-z]+)", case.prompt))
    assert {word for word, _ in counts.most_common(10)} == set(case.expected)
    (tenth, eleventh) = [count for _, count in counts.most_common(11)][-2:]
    assert tenth >= 10 * eleventh


@pytest.mark.parametrize("length", [1200, 20_000])
def test_frequent_words_are_the_most_frequent_after_the_noise(length):
    case = make("frequent_words", length=length)
    text = case.prompt.split("\n\n")[1]
    counts = collections.Counter(text.split())
    (noise, _), *rest = counts.most_common(5)
    assert noise == NOISE
    assert tuple(word for word, _ in rest[:3]) == case.expected
    assert rest[2][1] > rest[3][1]


@pytest.mark.parametrize("task", ASKING)
def test_right_answers_score_and_wrong_ones_do_not(task):
    case, other = make(task), make(task, index=1)
    assert case.score(case.lead + case.ending) == (1.0, case.expected)
    assert case.score(case.ending)[0] == 1.0
    assert case.score("")[0] == case.score("I do not know.")[0] == 0.0
    assert case.score(case.lead + other.ending)[0] == 0.0
    assert case.score(other.ending + case.ending)[0] == 0.0  # as many values are taken as are expected
    assert case.score(" ".join([*case.ignored, case.ending]))[0] == 1.0  # says the keys again
    half = case.expected[: len(case.expected) // 2]
    assert case.score(" and ".join(half))[0] == len(half) / len(case.expected)


@pytest.mark.parametrize(
    ("answer", "score"), [(" {0}", 1.0), ("it is {0}!", 1.0), ("{0}9", 0.0), ("1{0}", 0.0), ("12 {0}", 0.0)]
)
def test_a_number_counts_as_a_whole(answer, score):
    case = make("passkey")
    assert case.score(answer.format(case.expected[0]))[0] == score


@pytest.mark.parametrize("task", ASKING)
def test_a_length_without_room_for_the_question_is_refused(task):
    with pytest.raises(TooShortError, match=r"its shortest prompt has \d+ tokens"):
        make(task, length=60)


def test_every_task_says_whether_it_has_a_depth():
    config = EvalConfig(depths=[0, 50], num_prompts=3, first_prompt=2)
    for name in TASKS:
        cells = list_cells(config, name, 100)
        assert len(cells) == (6 if name in WITH_DEPTH else 3)
        assert {cell.index for cell in cells} == {2, 3, 4}
        assert isinstance(TASKS.get(name), Task) == (name != "perplexity")


def test_making_prompts_loads_no_torch():
    script = (
        "import sys; from longctx.evaluation.tasks import TASKS; import longctx.evaluation.run\n"
        "[TASKS.get(name) for name in TASKS]; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_demo_style_says_what_the_demo_model_was_trained_on():
    fact, form = demo_data.make_pass_key(random.Random(0)), STYLES["demo"].pass_key
    assert form.tell("", fact.value) == fact.sentence
    assert (form.question, form.lead) == (fact.question, f" {fact.lead}")
    form = STYLES["demo"].fact
    assert form.sentence.format(name="{n}", value="{v}") in demo_data._PAIR_FORMS
    assert form.lead.format(name="x") == " The value of x is"


@pytest.mark.parametrize("boundary", [". ", "\n", "#"])
def test_hiding_changes_nothing_but_what_is_put_in(boundary):
    text = HAYSTACKS["filler" if boundary == ". " else "text"].open(random.Random(0), 3000)(3000)
    sentences = [(depth, f"<{depth}>") for depth in (0.0, 0.31, 0.31, 0.9, 1.0)]
    hidden = hide(text, sentences, boundary=boundary, separator="\n")
    assert re.sub(r"\s", "", re.sub(r"<[\d.]+>", "", hidden)) == re.sub(r"\s", "", text)
    assert re.findall(r"<([\d.]+)>", hidden) == ["0.0", "0.31", "0.31", "0.9", "1.0"]


@pytest.mark.parametrize(("target", "place"), [(0, 0), (5, 4), (6, 4), (7, 8), (9, 8), (10, 11), (11, 11)])
def test_the_nearest_boundary_is_found(target, place):
    assert find_boundary("abc\ndef\nghi", target, "\n") == place


def test_real_text_begins_with_what_the_demo_model_has_not_seen(tmp_path):
    text, held_out = load_text(None), demo_data.load_corpora()[1]
    for seed in range(10):
        part = text.open(random.Random(seed), 4000)(3000)
        assert any(part[:1000] in document or "\n\n" in part for document in held_out.documents)
        assert part in "\n\n".join(held_out.documents)
    file = tmp_path / "book.txt"
    file.write_text("line of a book\n" * 100)
    long = load_text(str(file)).open(random.Random(0), 5000)(5000)
    assert len(long) == 5000
    assert set(long.splitlines()[:-1]) == {"line of a book"}


@pytest.mark.parametrize("num_tokens", [2, 512, 513, 1024, 3000])
def test_buckets_hold_every_scored_token_once(num_tokens):
    logprobs = [-1.0 / position for position in range(1, num_tokens)]
    buckets = fill_buckets(logprobs)
    for bucket in buckets:
        inside = [1.0 / position for position in range(max(bucket.start, 1), min(bucket.stop, num_tokens))]
        assert bucket.num_tokens == len(inside) > 0
        assert bucket.nll == pytest.approx(sum(inside))
    assert sum(bucket.num_tokens for bucket in buckets) == num_tokens - 1
    names = ["0-512", "512-1K", "1K-2K", "2K-4K"]
    assert [name_bucket(bucket) for bucket in buckets] == names[: len(buckets)]
    assert measure_perplexity(fill_buckets([-0.5] * (num_tokens - 1))) == pytest.approx(2.718281828**0.5)


def test_text_to_be_scored_has_more_tokens_than_are_asked_for():
    for length in (100, 5000):
        window = TASKS.get("perplexity").make(make_cell("perplexity", length=length), make_material())
        assert len(window.text.encode()) > length
        again = TASKS.get("perplexity").make(make_cell("perplexity", length=length), make_material())
        assert again == window
