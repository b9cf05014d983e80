"""What is measured of KV policies: the walk over layers is decoding, and its figures are right."""

from __future__ import annotations

import re

import pytest
import torch
from families import captured
from programs import tiny_program
from sampling import slow_but

from graphopt.errors import SourceError, UsageError
from graphopt.evaluate import policy_steps
from graphopt.evaluate.kv_policy import measure_policy, policy_layers, walk_policy
from graphopt.evaluate.needles import NeedleTasks, needle_tasks, retrieval
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.page_attention import CausalAttention, attention_layers
from graphopt.ir.graph import resolve_attrs
from graphopt.ir.kv_policies import (
    Dense,
    Ema,
    ExpectedAttention,
    Filled,
    LastRow,
    OracleTopK,
    PageBudget,
    PageRange,
    Predictor,
    Quest,
    Scoring,
    SinkLocal,
    SnapKV,
    page_probabilities,
)
from graphopt.ir.kv_policies.attention_cnn import weight_shapes
from graphopt.ir.ops import get_op
from graphopt.ir.ops.attention import PAST_K, PAST_V, SELECTED, SINKS

F64 = torch.float64
PREDICTOR = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) / 4
    for name, shape in weight_shapes(2).items()
}
PAGE = 4
SMALL = PageBudget(PAGE, pages=4, sink=1, local=2)
POLICIES = [
    SinkLocal(SMALL),
    LastRow(SMALL),
    LastRow(SMALL, calibrate_every=3),
    OracleTopK(SMALL),
    Dense(SMALL),
    Ema(SMALL, calibrate_every=4),
    Quest(SMALL),
    PageRange(SMALL),
    SnapKV(SMALL, window=4),
    ExpectedAttention(SMALL),
    Predictor(SMALL, calibrate_every=4, history=8).with_weights(PREDICTOR),
]
PROMPT, TOKENS = 13, 38


def ids_of(program, rows=2, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, 90, (rows, tokens), generator=generator)


def runner_of(program):
    return Runner(program, F64)


class Decoding:
    """A plain loop over tokens, and within it over layers, with an attention's reference."""

    def __init__(self, program, ids, policy, prompt, layers):
        self.runner, self.ids, self.policy = runner_of(program), ids, policy
        self.layers = {(layer.position, layer.node): layer.index for layer in layers}
        self.states, self.outputs, self.hidden, self.reads = {}, {}, {}, {}
        self.logits = [self._step(tokens) for tokens in range(prompt, ids.shape[1] + 1)][1:]

    def _step(self, tokens):
        stream = HiddenStateStream(self.runner, self.ids[:, :tokens])
        for block in stream:
            outputs = {}
            for node in block.function.nodes:
                layer = self.layers.get((block.block.position, node))
                if layer is not None:
                    wanted = CausalAttention.wanted(node)
                    values = dict(zip(wanted, block.values(0, wanted, outputs), strict=True))
                    operands = [None if v is None else values[v] for v in node.inputs[:PAST_K]]
                    attrs = resolve_attrs(node, block.call)
                    outputs[node.outputs[0]] = self._attention(layer, operands, attrs)
            block.advance([block.values(0, [block.function.results[0]], outputs)[0]])
        return stream.output(0, stream.hidden[0])[:, -1]

    def _attention(self, layer, operands, attrs):
        q, k, v = operands[:3]
        operands = [*operands, *[None] * (SELECTED + 1 - len(operands))]
        attention, page = get_op("attention"), self.policy.budget.page
        scoring = Scoring(attrs["scale"], attrs.get("softcap"), operands[SINKS])
        if layer not in self.states:
            self.states[layer] = self.policy.init(
                q[:, :, q.shape[2] - self.policy.history :], k, v, None, scoring
            )
            self.outputs[layer], *_ = attention.reference(operands, attrs)
            self.reads[layer] = []
            return self.outputs[layer]
        lengths, state = Filled.all_of(k), self.states[layer]
        due = self.policy.due(state, layer)
        dense = due is not None and bool(due.all())
        operands[:3] = [x[:, :, -1:] for x in (q, k, v)]
        operands[PAST_K], operands[PAST_V] = k[:, :, :-1], v[:, :, :-1]
        selected = None
        if not dense:
            selected = self.policy.select(state, operands[0], k, lengths, scoring)
            operands[SELECTED] = selected
        attrs = {**attrs, "lse": True, "page_max": page, "page": None if dense else page}
        out, _, _, lse, maxima = attention.reference(operands, attrs)
        probabilities = page_probabilities(maxima, lse, k.shape[1])[:, :, 0]
        if dense:
            state = self.policy.calibrate(state, probabilities, operands[1], lengths)
        else:
            selected = selected.expand(len(k), k.shape[1], -1)
            state = self.policy.observe(state, selected, probabilities, operands[1], lengths)
        self.states[layer] = state
        self.reads[layer].append(selected)
        self.outputs[layer] = torch.cat((self.outputs[layer], out), 2)
        return self.outputs[layer]


def walked(program, ids, policy, layers, prompt=PROMPT):
    stream, reads = HiddenStateStream(runner_of(program), ids), {}

    def observe(layer, batch, scores, read):
        assert batch == 0
        reads[layer.index] = read

    walk_policy(stream, policy, prompt, layers, observe)
    return stream.output(0, stream.hidden[0]), reads


def check(program, policy, dense_layers=0):
    ids = ids_of(program)
    layers, _ = policy_layers(program, dense_layers)
    logits, reads = walked(program, ids, policy, layers)
    decoded = Decoding(program, ids, policy, PROMPT, layers)
    expected = torch.stack(decoded.logits, 1)
    # Sums of at most a hundred products in fp64, in another order.
    torch.testing.assert_close(logits[:, PROMPT:], expected, rtol=1e-9, atol=1e-9)
    for index, steps in decoded.reads.items():
        for step, selected in enumerate(steps):
            tokens = PROMPT + step + 1
            pages = -(-tokens // PAGE)
            for row in range(len(ids)):
                for head in range(reads[index].shape[1]):
                    there = set(reads[index][row, head, step].nonzero()[:, 0].tolist())
                    wanted = range(pages)
                    if selected is not None:
                        wanted = [n for n in selected[row, head].tolist() if 0 <= n < pages]
                    assert there == set(wanted)


@pytest.mark.parametrize(
    "policy", slow_but(POLICIES, *POLICIES[:4]), ids=lambda policy: policy.kind
)
def test_the_walk_over_layers_is_decoding_token_by_token(policy):
    check(tiny_program(layers=3), policy)


@pytest.mark.parametrize("form", ["softcap", "sinks", "dense layers", "cache"])
def test_so_it_is_for_attentions_of_other_forms(form):
    options = {"softcap": {"softcap": 1.5}, "sinks": {"sinks": True}, "cache": {"cache": True}}
    program = tiny_program(layers=2, **options.get(form, {}))
    check(program, LastRow(SMALL, calibrate_every=4), dense_layers=form == "dense layers")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_so_it_is_for_other_families(family):
    """One with sinks in its softmax, both with windows, which are left alone."""
    _, program = captured(family)
    layers, left = policy_layers(program)
    assert len(layers) == len(left) == len(attention_layers(program)) // 2
    assert {reason for _, reason in left} == {"it has a window of 5 tokens"}
    check(program, LastRow(SMALL))


class Replayed:
    """A CUDA graph that runs its work again; to be recorded it is run once, as on a device."""

    count = 0

    def __init__(self, work, tensors):
        type(self).count += 1
        self.work = work
        work()

    def __call__(self, tensors):
        return self.work()


def test_recorded_steps_are_the_same_steps(monkeypatch):
    program, policy = tiny_program(layers=2), LastRow(SMALL, calibrate_every=3)
    ids = ids_of(program)
    layers, _ = policy_layers(program)
    logits, reads = walked(program, ids, policy, layers)
    monkeypatch.setattr(policy_steps, "Recorded", Replayed)
    monkeypatch.setattr(policy_steps, "_are_recorded", lambda device: True)
    replayed, again = walked(program, ids, policy, layers)
    assert Replayed.count == 2 * len(layers)  # steps that select, and steps that read all
    assert torch.equal(replayed, logits)
    assert all(torch.equal(again[index], read) for index, read in reads.items())


def probabilities_of(program, ids, layer):
    """The causal softmax of a layer of a model as it is, [B, G, H / G, S, T] in fp64."""
    stream = HiddenStateStream(runner_of(program), ids)
    stream.run_to([block.position for block in stream.blocks].index(layer.position))
    wanted = layer.node.inputs[:2]
    q, k = stream.current().values(0, wanted)
    attrs = resolve_attrs(layer.node, stream.current().call)
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bghsd,bgtd->bghst", q, k) * attrs["scale"]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def test_recall_is_the_mass_that_is_read_over_all_mass():
    """In the first layer, whose queries and keys no policy changes."""
    program = tiny_program(layers=2)
    ids, budget = ids_of(program, rows=3), PageBudget(PAGE, pages=4, sink=1, local=1)
    layer = attention_layers(program)[0]
    weights = probabilities_of(program, ids, layer)[..., PROMPT:, :]
    expected, best = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    for step in range(TOKENS - PROMPT):
        last = (PROMPT + step) // PAGE
        row = torch.nn.functional.pad(weights[..., step, :], (0, -TOKENS % PAGE))
        mass = row.unflatten(-1, (-1, PAGE)).sum(-1).mean(2)  # [B, G, N]
        read = {0, *range(max(0, last - 2), last + 1)}
        expected += mass[..., sorted(read)].sum((0, 2))
        always = {0, last}
        others = mass[..., [n for n in range(last) if n not in always]]
        chosen = others.sort(-1).values[..., -2:]
        best += mass[..., sorted(always)].sum((0, 2)) + chosen.sum((0, 2))
    steps = len(ids) * (TOKENS - PROMPT)
    result = measure_policy(runner_of(program), ids, SinkLocal(budget), prompt=PROMPT)
    found = torch.tensor([result.layers[0].recall_G, result.layers[0].oracle_recall_G], dtype=F64)
    torch.testing.assert_close(found, torch.stack((expected, best)) / steps, rtol=1e-9, atol=0)
    oracle = measure_policy(runner_of(program), ids, OracleTopK(budget), prompt=PROMPT)
    assert oracle.recall == pytest.approx(oracle.oracle_recall, rel=1e-9)
    assert oracle.recall >= result.recall


def test_reading_all_pages_is_the_model_as_it_is():
    program = tiny_program(layers=2)
    ids = ids_of(program, rows=3)
    plain = measure_policy(runner_of(program), ids, None, prompt=PROMPT)
    likelihoods = Runner(program, F64).logits({"input_ids": ids}).log_softmax(-1)[:, :-1]
    losses = -likelihoods.gather(-1, ids[:, 1:, None])[..., 0]
    assert plain.perplexity == pytest.approx(float(losses[:, PROMPT:].mean().exp()), rel=1e-5)
    quarters = [float(part.mean().exp()) for part in losses.tensor_split(8, 1)]
    assert plain.by_position == pytest.approx(quarters, rel=1e-5)
    for policy in (
        Dense(SMALL),
        SinkLocal(PageBudget(PAGE, pages=10, sink=0, local=1)),
        LastRow(SMALL, calibrate_every=1),
    ):
        result = measure_policy(runner_of(program), ids, policy, prompt=PROMPT)
        assert result.perplexity == pytest.approx(plain.perplexity, rel=1e-5)
        assert result.recall == pytest.approx(1.0, rel=1e-6)
        pages = [-(-tokens // PAGE) for tokens in range(PROMPT + 1, TOKENS + 1)]
        assert result.pages_read == pytest.approx(sum(pages) / len(pages))


def test_which_pages_are_read_over_time_is_shown():
    program = tiny_program(layers=1)
    first = TOKENS - 24  # as many steps as the picture has rows
    budget = PageBudget(PAGE, pages=3, sink=1, local=2)
    result = measure_policy(runner_of(program), ids_of(program), SinkLocal(budget), prompt=first)
    grid = result.layers[0].grid
    assert len(grid) == 24 and len(grid[0]) == -(-TOKENS // PAGE)
    for step, row in enumerate(grid):
        last = (first + step) // PAGE
        assert row == [float(n in (0, last - 1, last)) for n in range(len(row))]


def test_a_calibration_step_reads_all_and_counts_in_no_recall():
    program = tiny_program(layers=2)
    ids = ids_of(program)
    rare, often = (
        measure_policy(runner_of(program), ids, LastRow(SMALL, every), prompt=PROMPT)
        for every in (None, 5)
    )
    assert often.pages_read > rare.pages_read
    assert often.recall < 1


def test_what_cannot_be_measured_is_refused():
    program, ids = tiny_program(layers=2), ids_of(tiny_program(layers=2))
    with pytest.raises(UsageError, match="leaves no step"):
        measure_policy(runner_of(program), ids, Dense(SMALL), prompt=TOKENS - 1)
    with pytest.raises(SourceError, match="adds to its scores by position"):
        measure_policy(runner_of(tiny_program(alibi=True)), ids, Dense(SMALL))
    with pytest.raises(SourceError, match="among the first 2 layers"):
        measure_policy(runner_of(program), ids, Dense(SMALL), dense_layers=2)


class Words:
    """A tokenizer of words and digits, which puts a token before every text."""

    def __init__(self):
        self.known = {"<s>": 0}

    all_special_ids, name_or_path = (0,), "words"

    def __call__(self, text, add_special_tokens=True, **options):
        words = re.findall(r"\d| ?[^\s\d]+|\s+?", text)
        ids = [self.known.setdefault(word, len(self.known)) for word in words]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def test_needles_stand_at_their_depths_and_are_asked_for_behind_the_prompt():
    tokenizer, tokens = Words(), 120
    text = " ".join(f"word{chr(97 + n % 26)}" for n in range(400))
    tasks = needle_tasks(tokenizer, text, tokens, 7, depths=(0.0, 0.5, 1.0), seed=1)
    names = {number: word for word, number in tokenizer.known.items()}
    assert tasks.ids.shape == (7, tokens)
    assert tasks.depths == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0]
    keys = set()
    for row, answer, depth in zip(tasks.ids.tolist(), tasks.answers, tasks.depths, strict=True):
        assert row[0] == 0 and 0 not in row[1:]
        key = "".join(names[number] for number in row[-answer:]).strip()
        assert re.fullmatch(r"\d{5}", key)
        keys.add(key)
        prompt = "".join(names[number] for number in row[: tasks.prompt])
        assert prompt.count(key) == 2 and "What is the pass key" not in prompt
        front, _, back = prompt.partition("The pass key is")
        share = front.count("word") / (front.count("word") + back.count("word"))
        assert share == pytest.approx(depth, abs=0.02)
    assert len(keys) == 7
    again = needle_tasks(tokenizer, text, tokens, 7, depths=(0.0, 0.5, 1.0), seed=1)
    assert torch.equal(again.ids, tasks.ids)
    with pytest.raises(UsageError, match="no room for a needle"):
        needle_tasks(tokenizer, text, 40, 1)
    with pytest.raises(SourceError, match="too short to hide a needle"):
        needle_tasks(tokenizer, text, 600, 1)


@pytest.mark.parametrize("policy", [None, LastRow(SMALL)], ids=["dense", "last-row"])
def test_an_answer_is_right_where_greedy_decoding_writes_it(policy):
    program = tiny_program(layers=2)
    ids = ids_of(program, rows=4)
    layers, _ = policy_layers(program)
    answers, depths = [2, 3, 2, 3], [0.5, 0.5, 1.0, 1.0]
    for row in range(0, 4, 2):  # two of the rows end with what the model would write
        for place in range(TOKENS - answers[row], TOKENS):
            if policy is None:
                logits = Runner(program, F64).logits({"input_ids": ids})
            else:
                logits, _ = walked(program, ids, policy, layers)
            ids[row, place] = logits[row, place - 1].argmax()
    tasks = NeedleTasks(ids, answers, depths, PROMPT)
    result = retrieval(runner_of(program), tasks, policy)
    assert result.right == [True, False, True, False]
    assert (result.count, result.by_depth()) == (2, {0.5: (1, 2), 1.0: (1, 2)})
