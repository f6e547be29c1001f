"""transformers samples exactly from q* of two models, by whatever road of its own."""

from functools import cache

import numpy as np
import pytest
import tiny
import torch
from covering import all_pairs
from decoder_distributions import expected_distribution
from sampling import FALSE_ALARM, POWER, smallest_detectable_tv
from scipy.stats import chi2, chisquare, ncx2
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

import qstar
from qstar_book.product_model import CACHE, ProductModel, drafting

VOCAB = 6
LENGTH = 3
PROMPT = torch.tensor([[1, 4, 0, 1, 4]])
MANY = 6_000  # rows of plain sampling
FEW = 400  # calls of assisted sampling, which takes one row at a time
CELL = 5  # rarer outcomes, by expectation, are pooled

PAIRS = {
    "two Llamas": lambda: (
        tiny.llama(1, vocab=VOCAB, sharpness=2.0),
        tiny.llama(2, vocab=VOCAB, sharpness=0.5),
    ),
    "two GPT-2s": lambda: (
        tiny.gpt2(3, vocab=VOCAB, sharpness=0.3),
        tiny.gpt2(4, vocab=VOCAB, sharpness=1.0),
    ),
    "Llama and GPT-2": lambda: (
        tiny.llama(5, vocab=VOCAB, sharpness=2.0),
        tiny.gpt2(6, vocab=VOCAB, sharpness=0.3),
    ),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture
def llamas():
    return PAIRS["two Llamas"]()


def log_law(model, text):
    """log p(. | text) by one forward without any cache, as float64 NumPy."""
    with torch.no_grad():
        logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def log_q(pair, text, alpha):
    """log q_alpha(. | text), by the NumPy reference."""
    rows = [log_law(model, text) for model in pair]
    return qstar.log_geometric_mean(
        *rows, qstar.solve_kl_symmetry(*rows).alpha if alpha is None else alpha
    )


def slow_greedy(pair, num_tokens, alpha):
    """Greedy text by full recomputation, and the smallest lead of a winner, in nats."""
    text, leads = PROMPT[0].tolist(), []
    for _ in range(num_tokens):
        law = log_q(pair, text, alpha)
        second, first = np.sort(law)[-2:]
        leads.append(first - second)
        text.append(int(law.argmax()))
    return text, min(leads)


def assisted(product, gamma, assistant=None, **options):
    assistant = product.policy if assistant is None else assistant
    with drafting(assistant, gamma):
        return product.generate(PROMPT, assistant_model=assistant, **options)


def lookup(product, gamma, **options):
    return product.generate(PROMPT, prompt_lookup_num_tokens=gamma, **options)


def plain(product, gamma, **options):
    return product.generate(PROMPT, **options)


ROADS = {
    "plain": plain,
    "assisted by the policy": assisted,
    "assisted by the teacher": lambda p, gamma, **o: assisted(p, gamma, p.teacher, **o),
    "prompt lookup": lookup,
}


# --- Forwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.3, 0.0, 1.0])
def test_a_forward_gives_log_q_after_every_token(pair, alpha):
    with torch.no_grad():
        out = ProductModel(*pair, alpha=alpha)(PROMPT)
    expected = [log_q(pair, PROMPT[0, : end + 1].tolist(), alpha) for end in range(5)]
    np.testing.assert_allclose(out.logits[0].numpy(), expected, atol=1e-9)
    assert out.past_key_values is None


def fed_in_pieces(product):
    """What follows PROMPT + (2, 3, 5), read in pieces, with a rollback over five tokens."""
    with torch.no_grad():
        cache = product(PROMPT, use_cache=True).past_key_values
        product(torch.tensor([[2, 5, 5, 1, 0]]), past_key_values=cache, use_cache=True)
        cache.crop(-4)
        product(torch.tensor([[0]]), past_key_values=cache, use_cache=True)
        cache.crop(-1)
        out = product(torch.tensor([[3, 5]]), past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 8
    return out.logits[0, -1].numpy()


def test_one_cache_rolls_both_parents_back_exactly(pair):
    expected = log_q(pair, [*PROMPT[0].tolist(), 2, 3, 5], None)
    np.testing.assert_allclose(fed_in_pieces(ProductModel(*pair)), expected, atol=1e-9)


def test_parents_that_write_into_the_same_layers_are_caught(llamas, monkeypatch):
    """Negative control: the teacher's layers not offset."""
    expected = log_q(llamas, [*PROMPT[0].tolist(), 2, 3, 5], None)
    views = ProductModel._views
    monkeypatch.setattr(ProductModel, "_views", lambda self, cache: (views(self, cache)[0],) * 2)
    with pytest.raises((AssertionError, RuntimeError)):
        np.testing.assert_allclose(fed_in_pieces(ProductModel(*llamas)), expected, atol=1e-9)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_only_the_positions_asked_for_are_solved(pair, keep):
    product = ProductModel(*pair)
    with torch.no_grad():
        everything, some = product(PROMPT).logits, product(PROMPT, logits_to_keep=keep).logits
    torch.testing.assert_close(some, everything[:, -keep:], rtol=0, atol=1e-12)


def test_half_precision_parents_meet_in_float32():
    pair = [model.bfloat16() for model in PAIRS["two Llamas"]()]
    with torch.no_grad():
        logits = ProductModel(*pair)(PROMPT).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 5), rtol=0, atol=1e-5)


# --- Greedy text ---------------------------------------------------------------------------------


@cache
def slow_text(pair, alpha):
    """The greedy text of a pair in PAIRS, whose winners must lead."""
    text, lead = slow_greedy(PAIRS[pair](), 20, alpha)
    assert lead > 1e-5, "a tie in the float32 that transformers compares in: choose other models"
    return text


# The draft length is read by the loop of transformers, alpha by one line of a forward, and the
# pair by the cache: every two of them meet, and each pair meets each alpha without drafts too.
GREEDY = [(pair, alpha, "plain", 0) for pair in PAIRS for alpha in (None, 0.3)] + all_pairs(
    PAIRS, [None, 0.3], [road for road in ROADS if road != "plain"], [1, 2, 4]
)


@pytest.mark.parametrize(("name", "alpha", "road", "gamma"), GREEDY)
def test_greedy_text_is_that_of_a_slow_loop_without_caches(name, alpha, road, gamma):
    product = ProductModel(*PAIRS[name](), alpha=alpha)
    made = ROADS[road](product, gamma, max_new_tokens=20, do_sample=False)
    assert made[0].tolist() == slow_text(name, alpha)


@pytest.mark.parametrize("road", ["assisted by the policy", "prompt lookup"])
def test_drafts_are_taken_so_that_the_parents_run_less_often(llamas, road, monkeypatch):
    calls = []
    forward = ProductModel.forward
    monkeypatch.setattr(
        ProductModel, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    ROADS[road](ProductModel(*llamas), 4, max_new_tokens=20, do_sample=False)
    assert len(calls) < 20


def test_rows_padded_on_the_left_answer_as_they_do_alone(pair):
    product = ProductModel(*pair)
    alone = product.generate(PROMPT[:, 2:], max_new_tokens=6, do_sample=False)[0, 3:]
    batch = torch.cat([PROMPT, torch.tensor([[5, 5, 0, 1, 4]])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    both = product.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert both[1, 5:].tolist() == alone.tolist()
    expected, _ = slow_greedy(pair, 6, None)
    assert both[0].tolist() == expected


def test_beams_reorder_both_parents(llamas):
    """Beam search finds a text no less probable than the greedy one, and knows how probable."""
    product = ProductModel(*llamas)
    out = product.generate(
        PROMPT,
        max_new_tokens=6,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )

    def log_probability(text):
        return sum(log_q(llamas, text[:end], None)[text[end]] for end in range(5, len(text)))

    text = out.sequences[0].tolist()
    assert out.sequences_scores.item() == pytest.approx(log_probability(text), abs=1e-5)
    assert log_probability(text) >= log_probability(slow_greedy(llamas, 6, None)[0]) - 1e-9


# --- The law -------------------------------------------------------------------------------------


def enumerated_distribution(pair, alpha):
    return expected_distribution(pair, (PROMPT[0], PROMPT[0]), LENGTH, vocab=VOCAB, alpha=alpha)


def numbered(tokens):
    """Each row's outcome of LENGTH tokens as one number."""
    return (tokens[:, PROMPT.shape[1] :] * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1).numpy()


def sampled(product, road, gamma, calls=FEW):
    torch.manual_seed(0)
    options = {"max_new_tokens": LENGTH, "do_sample": True}
    if road == "plain":
        return numbered(product.generate(PROMPT, num_return_sequences=MANY, **options))
    return numbered(torch.cat([ROADS[road](product, gamma, **options) for _ in range(calls)]))


def pooled(values, expected):
    """Numbers of outcomes, the rare ones as one."""
    rare = expected < CELL
    kept = np.append(values[~rare], values[rare].sum())
    return kept[np.append(expected[~rare], expected[rare].sum()) > 0]


def p_value(outcomes, law):
    """Of a chi-squared test of outcomes against their law; rare ones are pooled."""
    expected = len(outcomes) * law
    counts = np.bincount(outcomes, minlength=len(law))
    return chisquare(pooled(counts, expected), pooled(expected, expected)).pvalue


def planted_mistakes():
    """(calls, the law of a mistake, the law it is held against): those that tests below plant."""
    for name, make in PAIRS.items():
        pair = make()
        right, wrong = enumerated_distribution(pair, 0.3), enumerated_distribution(pair[::-1], 0.3)
        solved = enumerated_distribution(pair, None)
        yield MANY, wrong, right
        yield MANY, enumerated_distribution(pair, 0.5), solved
        if name == "two Llamas":
            policy = enumerated_distribution(pair, 1.0)
            yield from [(FEW, right, wrong), (FEW, right, policy), (FEW, solved, policy)]


def test_the_law_tests_find_the_planted_mistakes_for_certain():
    """With probability 1 - 1e-6 each, by the noncentrality of the pooled cells.

    So they would anything this far from its law in total variation: 12% of plain sampling; of
    assisted sampling, which pools to 80 cells at most, 39%. What is smaller than that is for the
    forwards and the greedy texts, which are exact.
    """
    for calls, law, other in planted_mistakes():
        expected, seen = pooled(calls * other, calls * other), pooled(calls * law, calls * other)
        shift, freedom = ((seen - expected) ** 2 / expected).sum(), len(expected) - 1
        assert ncx2.sf(chi2.isf(FALSE_ALARM, freedom), freedom, shift) > POWER
    assert smallest_detectable_tv(MANY, VOCAB**LENGTH) < 0.12
    assert smallest_detectable_tv(FEW, FEW // CELL) < 0.39


@pytest.mark.parametrize("alpha", [None, 0.3], ids=["solved", "alpha=.3"])
def test_three_plainly_sampled_tokens_follow_the_enumerated_distribution(pair, alpha):
    outcomes = sampled(ProductModel(*pair, alpha=alpha), "plain", 1)
    assert p_value(outcomes, enumerated_distribution(pair, alpha)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("road", "gamma", "alpha"),
    [
        ("assisted by the policy", 2, 0.3),
        ("prompt lookup", 2, None),
    ],
)
def test_three_speculatively_sampled_tokens_follow_the_enumerated_distribution(
    llamas, road, gamma, alpha
):
    """By as many calls of `generate`, one row each: the slowest tests of this file.

    The same outcomes are then held against two wrong laws, which must fail: the roles swapped
    (invisible at alpha = 1/2) and a draft followed in place of the target.
    """
    outcomes = sampled(ProductModel(*llamas, alpha=alpha), road, gamma)
    assert p_value(outcomes, enumerated_distribution(llamas, alpha)) > FALSE_ALARM
    if alpha is not None:
        assert p_value(outcomes, enumerated_distribution(llamas[::-1], alpha)) < FALSE_ALARM
    assert p_value(outcomes, enumerated_distribution(llamas, 1.0)) < FALSE_ALARM


def test_swapped_roles_are_caught(pair):
    outcomes = sampled(ProductModel(*pair[::-1], alpha=0.3), "plain", 1)
    assert p_value(outcomes, enumerated_distribution(pair, 0.3)) < FALSE_ALARM


def test_half_in_place_of_alpha_star_is_caught(pair):
    outcomes = sampled(ProductModel(*pair, alpha=0.5), "plain", 1)
    assert p_value(outcomes, enumerated_distribution(pair, None)) < FALSE_ALARM


def test_a_draft_that_lies_about_its_law_is_caught(llamas, monkeypatch):
    """Negative control on the speculative road itself: drafts drawn sharper than they claim."""
    product = ProductModel(*llamas, alpha=0.3)
    forward = type(product.policy).generate

    def lying(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.scores = tuple(score / 3 for score in out.scores)
        return out

    monkeypatch.setattr(product.policy, "generate", lying.__get__(product.policy), raising=False)
    outcomes = sampled(product, "assisted by the policy", 2)
    assert p_value(outcomes, enumerated_distribution(llamas, 0.3)) < FALSE_ALARM


def test_a_large_vocabulary_is_sampled_whole():
    """transformers' default would cut q* to its 50 most probable tokens."""
    pair = [tiny.llama(seed, vocab=300, sharpness=0.0) for seed in (1, 2)]
    torch.manual_seed(0)
    made = ProductModel(*pair).generate(
        PROMPT, max_new_tokens=1, do_sample=True, num_return_sequences=6_000
    )
    assert len(made[:, -1].unique()) == 300  # missing one: 300 (299/300)^6000, less than 1e-6


# --- Special tokens, settings, errors ------------------------------------------------------------


def test_special_tokens_are_the_policys_and_end_a_text():
    pair = [tiny.llama(seed, vocab=VOCAB, eos=3) for seed in (1, 2)]
    pair[0].generation_config.eos_token_id = [3, 50_256]
    pair[0].generation_config.temperature = 0.1
    product = ProductModel(*pair)
    assert product.generation_config.eos_token_id == [3]
    assert product.generation_config.temperature == 1.0
    torch.manual_seed(0)
    made = product.generate(PROMPT, do_sample=True, max_new_tokens=30, num_return_sequences=50)
    for row in made[:, 5:].tolist():
        assert 3 not in row or set(row[row.index(3) :]) == {3}
    assert (made == 3).any()


def test_eos_ids_outside_the_vocabulary_are_left_out(llamas):
    llamas[0].generation_config.eos_token_id = 50_256
    assert ProductModel(*llamas).generation_config.eos_token_id is None


def test_drafting_gives_the_settings_back(llamas):
    config = llamas[0].generation_config
    before = config.to_dict()
    with pytest.raises(KeyError, match="inside"), drafting(llamas[0], 7):
        raise KeyError("inside")
    assert config.to_dict() == before
    with drafting(llamas[0], 7):
        assert config.num_assistant_tokens == 7
        assert config.num_assistant_tokens_schedule == "constant"
        assert config.assistant_confidence_threshold == 0.0


def test_the_parents_are_shared_and_in_eval_mode():
    policy, teacher = PAIRS["two Llamas"]()
    product = ProductModel(policy.train(), teacher)
    assert (product.policy, product.teacher) == (policy, teacher)
    assert not policy.training


def sliding():
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )


def build(teacher=None, **options):
    policy = tiny.llama(1, vocab=VOCAB)
    return ProductModel(policy, policy if teacher is None else teacher, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (build, "one model, .* two prompts is what qstar.generate does"),
        (lambda: build(tiny.llama(2, vocab=8)), "probabilities to 6 tokens, the teacher to 8"),
        (lambda: build(tiny.llama(2, vocab=6).to("meta")), "one device: got cpu and meta"),
        (lambda: build(sliding()), r"the teacher \(Mistral.*DynamicSlidingWindowLayer"),
        (lambda: build(tiny.llama(2, vocab=6), alpha=1.5), r"in \[0, 1\]: got 1.5"),
        (lambda: build(tiny.llama(2, vocab=6), alpha=float("nan")), r"in \[0, 1\]: got nan"),
        (lambda: drafting(tiny.llama(2), 0).__enter__(), "1 or more: got 0"),
    ],
)
def test_what_makes_no_product_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_either_name_that_transformers_has_given_it(pair, name):
    product = ProductModel(*pair)
    with torch.no_grad():
        cache = product(PROMPT, use_cache=True)[CACHE]
        read_on = product(torch.tensor([[2]]), **{name: cache}).logits[0, -1]
        whole = product(torch.cat([PROMPT, torch.tensor([[2]])], 1)).logits[0, -1]
    assert cache.get_seq_length() == PROMPT.shape[1] + 1
    torch.testing.assert_close(read_on, whole)


def test_a_forward_says_what_it_cannot_do(llamas):
    product = ProductModel(*llamas)
    with pytest.raises(ValueError, match="has no output_attentions: leave"):
        product(PROMPT, output_attentions=True)
    foreign = DynamicCache(config=llamas[0].config)
    with pytest.raises(ValueError, match=r"with 4 plain layers .* DynamicCache with 2 layers"):
        product(PROMPT, past_key_values=foreign, use_cache=True)
    with pytest.raises(ValueError, match=r"a DynamicCache of its own.*StaticCache"):
        product(PROMPT, past_key_values=StaticCache(product.config, max_cache_len=9))


def test_positions_without_q_star_are_named(llamas):
    def second_position_nan(_, __, out):
        out.logits[:, 1] = torch.nan

    handle = llamas[1].register_forward_hook(second_position_nan)
    with torch.no_grad(), pytest.raises(ValueError, match="after position 1 of row 0"):
        ProductModel(*llamas)(PROMPT)
    handle.remove()
    for parent, allowed in zip(llamas, (0, 1), strict=True):
        wall = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
        wall[allowed] = 0
        parent.register_forward_hook(
            lambda _, __, out, wall=wall: setattr(out, "logits", out.logits + wall)
        )
    for alpha in (None, 0.3):
        product = ProductModel(*llamas, alpha=alpha)
        with torch.no_grad(), pytest.raises(ValueError, match="after position 0 of row 0"):
            product(PROMPT)
