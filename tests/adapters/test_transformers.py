"""`generate(custom_generate=q_star)`: what transformers prepares means what it means there."""

import copy
import functools
import inspect
import threading
import types

import numpy as np
import pytest
import tiny
import torch
from sampling import FALSE_ALARM, p_value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_of_all_kinds import KINDS
from transformers import (
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)
from transformers.generation import logits_process
from transformers.generation import utils as generation_utils

import qstar
from qstar.adapters.pieces import PieceStreamer, new_text
from qstar.adapters.processors import OF_SOUND, REMEMBERING
from qstar.adapters.transformers import OF_THE_CONFIG, _check_request, q_star
from qstar.decoding import generate as decode
from qstar.decoding.filters import GAUGED
from qstar.decoding.kv_cache import KVCache

VOCAB = 9
PROMPT = torch.tensor([[1, 4, 6, 4, 1]])
TEACHER_PROMPT = torch.tensor([[5, 3, 3, 8]])
SCHEMES = {
    "plain": {"scheme": "plain"},
    "one-sided": {"scheme": "one-sided", "gamma": 4},
    "alternating": {"scheme": "alternating", "gamma": 1},
    "alternating, wide": {"scheme": "alternating", "gamma": 4},
    "lookup": {"scheme": "lookup", "gamma": 4},
    "draft-model": {"scheme": "draft-model", "gamma": 4},
    "coin": {"scheme": "coin", "gamma": 4},
    "auto": {"scheme": "auto"},
}


def pair():
    return tiny.llama(1, vocab=VOCAB, sharpness=2.0), tiny.gpt2(4, vocab=VOCAB, sharpness=0.7)


def alike(seed=1):
    """Two models that nearly always agree, so that long blocks are accepted."""
    policy, teacher = tiny.llama(seed, vocab=VOCAB), tiny.llama(seed, vocab=VOCAB)
    with torch.no_grad():
        teacher.get_output_embeddings().weight *= 1.05
    return policy, teacher


@pytest.fixture(params=SCHEMES)
def scheme(request):
    """Options of a scheme. The draft model resembles the policy: some drafts are kept."""
    options = dict(SCHEMES[request.param])
    if request.param == "draft-model":
        options["draft_model"] = tiny.llama(1, vocab=VOCAB, sharpness=1.5)
    return options


def hooked(policy, teacher, ids=PROMPT, **options):
    return policy.generate(ids, custom_generate=q_star, teacher=teacher, **options)


def log_distribution(model, ids):
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, -1]
    return logits.log_softmax(-1)


def log_q_star(policy, teacher, ids, teacher_ids):
    """By whole texts without any cache, and the NumPy reference."""
    rows = log_distribution(policy, ids).numpy(), log_distribution(teacher, teacher_ids).numpy()
    return torch.tensor(qstar.log_geometric_mean(*rows, qstar.solve_kl_symmetry(*rows).alpha))


def slow_greedy(policy, teacher, num_tokens, ids=PROMPT, teacher_ids=None, *, steps=(), ends=()):
    """One token at a time: every processor sees the whole text, the scores are log q*."""
    teacher_ids = ids if teacher_ids is None else teacher_ids
    new = []
    while len(new) < num_tokens and not (new and new[-1] in ends):
        tail = torch.tensor([new], dtype=torch.long)
        text = torch.cat([ids, tail], 1)
        scores = log_q_star(policy, teacher, text, torch.cat([teacher_ids, tail], 1))[None]
        for step in steps:
            scores = step(text, scores)
        new.append(int(scores.argmax()))
    return new


# Greedy decoding, and processors at every position.


def test_greedy_equals_a_slow_loop(scheme):
    policy, teacher = pair()
    out = hooked(policy, teacher, max_new_tokens=14, teacher_input_ids=TEACHER_PROMPT, **scheme)
    expected = slow_greedy(policy, teacher, 14, teacher_ids=TEACHER_PROMPT)
    assert out.tolist() == [PROMPT[0].tolist() + expected]


ENDS = [2, 7, 900]
PROCESSORS = {  # name -> (what generate is asked, the same as processors)
    "repetition penalty": (
        {"repetition_penalty": 1.8},
        [RepetitionPenaltyLogitsProcessor(1.8)],
    ),
    "no repeated pairs": ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
    "at least nine": (
        {"min_new_tokens": 9, "eos_token_id": ENDS, "pad_token_id": 0},
        [MinNewTokensLengthLogitsProcessor(PROMPT.shape[1], 9, ENDS)],
    ),
    "all three": (
        {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 3,
            "min_new_tokens": 6,
            "eos_token_id": ENDS,
            "pad_token_id": 0,
        },
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            NoRepeatNGramLogitsProcessor(3),
            MinNewTokensLengthLogitsProcessor(PROMPT.shape[1], 6, ENDS),
        ],
    ),
    "the caller's own": (
        {"logits_processor": [lambda ids, scores: scores - 0.6 * (ids.sum() % 3) * FAVOUR]},
        [lambda ids, scores: scores - 0.6 * (ids.sum() % 3) * FAVOUR],
    ),
}
FAVOUR = torch.arange(VOCAB, dtype=torch.float64)


@functools.cache
def slow_texts(name):
    """The greedy text under some processors, and without them, by whole texts."""
    asked, steps = PROCESSORS[name]
    loop = functools.partial(slow_greedy, *alike(), 14, ends=asked.get("eos_token_id", ()))
    return loop(steps=steps), loop()


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_right_at_every_position_of_a_block(scheme, name):
    expected, unprocessed = slow_texts(name)
    assert expected != unprocessed, "the processors do nothing"
    out = hooked(*alike(), max_new_tokens=14, **PROCESSORS[name][0], **scheme)
    assert out[0, PROMPT.shape[1] :].tolist() == expected


def test_with_alpha_one_it_is_what_transformers_does():
    """The layout too: left padding in front, the pad token behind rows that ended."""
    policy, teacher = pair()
    ids = torch.tensor([[0, 0, 1, 4, 3], [1, 4, 0, 4, 1], [0, 8, 8, 2, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
    asked = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 2, "pad_token_id": 0}
    lengths = set()
    for end in range(VOCAB):
        for seeded in (False, True):  # greedy; and a temperature so low that it is as good as
            options = asked | {"eos_token_id": [end, 900]}
            if seeded:
                options |= {"do_sample": True, "temperature": 1e-7}
            out = hooked(policy, teacher, ids, alpha=1.0, **options)
            expected = policy.generate(ids, **options)
            assert out.tolist() == expected.tolist()
            lengths |= set((expected[:, 5:] != 0).sum(-1).tolist())
    assert len(lengths) > 3


# Sampling.


def two_token_distribution(policy, teacher, *, temperature=1.0):
    distribution = np.zeros((VOCAB, VOCAB))
    first = (log_q_star(policy, teacher, PROMPT, TEACHER_PROMPT) / temperature).softmax(-1)
    for token in range(VOCAB):
        tail = torch.tensor([[token]])
        texts = torch.cat([PROMPT, tail], 1), torch.cat([TEACHER_PROMPT, tail], 1)
        second = (log_q_star(policy, teacher, *texts) / temperature).softmax(-1)
        distribution[token] = (first[token] * second).numpy()
    return distribution


def sampled_pairs(policy, teacher, rows=8_000, **options):
    torch.manual_seed(0)
    out = hooked(
        policy,
        teacher,
        do_sample=True,
        top_k=0,
        max_new_tokens=2,
        num_return_sequences=rows,
        teacher_input_ids=TEACHER_PROMPT,
        **options,
    )
    return (out[:, -2] * VOCAB + out[:, -1]).numpy()


def test_samples_follow_the_token_level_distribution():
    options = {"scheme": "one-sided", "gamma": 2}
    policy, teacher = tiny.llama(1, vocab=VOCAB, sharpness=0.6), tiny.gpt2(4, vocab=VOCAB)
    with torch.no_grad():
        teacher.get_output_embeddings().weight *= 0.2
    drawn = sampled_pairs(policy, teacher, temperature=1.5, **options)
    assert p_value(drawn, two_token_distribution(policy, teacher, temperature=1.5)) > FALSE_ALARM
    # The controls: another temperature, and another alpha.
    assert p_value(drawn, two_token_distribution(policy, teacher)) < FALSE_ALARM
    drawn = sampled_pairs(policy, teacher, temperature=1.5, alpha=1.0, **options)
    assert p_value(drawn, two_token_distribution(policy, teacher, temperature=1.5)) < FALSE_ALARM


@pytest.mark.parametrize("scheme", ["plain", "one-sided", "alternating", "coin", "lookup"])
@pytest.mark.parametrize("strength", [1.5, 3.0, -0.5])
def test_guidance_is_what_transformers_calls_by_that_name(strength, scheme):
    """Token by token, of one model under two prompts; and not what either prompt alone gives."""
    model = tiny.llama(1, vocab=VOCAB, sharpness=0.5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = [PROMPT, TEACHER_PROMPT]
    theirs = model.generate(
        PROMPT, guidance_scale=strength, negative_prompt_ids=TEACHER_PROMPT, **options
    )
    ours = hooked(
        model, model, teacher_input_ids=TEACHER_PROMPT, alpha=strength, scheme=scheme, **options
    )
    assert ours.tolist() == theirs.tolist()
    new = [model.generate(prompt, **options)[0, prompt.shape[-1] :].tolist() for prompt in ids]
    assert ours[0, PROMPT.shape[-1] :].tolist() not in new


def test_torchs_own_seed_repeats_a_sample():
    policy, teacher = pair()

    def drawn(seed):
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 20, "scheme": "alternating"}
        return hooked(policy, teacher, **options).tolist()

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_several_sequences_of_a_prompt_are_that_many_rows():
    policy, teacher = pair()
    ids = torch.tensor([[1, 2, 3], [8, 7, 6]])
    teacher_ids = torch.tensor([[4, 4], [5, 0]])
    options = {"do_sample": True, "max_new_tokens": 6, "scheme": "one-sided", "gamma": 2}
    torch.manual_seed(0)
    several = hooked(
        policy, teacher, ids, teacher_input_ids=teacher_ids, num_return_sequences=3, **options
    )
    torch.manual_seed(0)
    rows = hooked(
        policy,
        teacher,
        ids.repeat_interleave(3, 0),
        teacher_input_ids=teacher_ids.repeat_interleave(3, 0),
        **options,
    )
    assert several.tolist() == rows.tolist()
    assert len({tuple(row) for row in rows.tolist()}) > 2


ENDING = {"max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0}


def own(model, steps):
    """The tokens of a model's own greedy generate."""
    return model.generate(PROMPT, logits_processor=LogitsProcessorList(steps), **ENDING).tolist()


def alone(model, steps):
    """Those of q_star, where it is the policy alone."""
    options = {"alpha": 1.0, "scheme": "one-sided", "gamma": 2, **ENDING}
    teacher = tiny.gpt2(4, vocab=VOCAB)
    return hooked(model, teacher, logits_processor=LogitsProcessorList(steps), **options).tolist()


def raised(model, offset):
    """The same model, with a number added to all its logits."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((VOCAB,), offset, dtype=torch.float64))
    return model


WATERMARK = {"vocab_size": VOCAB, "device": "cpu", "greenlist_ratio": 0.4, "bias": 1.5}
MADE = {  # every processor that transformers has
    "MinLengthLogitsProcessor": lambda: logits_process.MinLengthLogitsProcessor(11, 2),
    "MinNewTokensLengthLogitsProcessor": lambda: MinNewTokensLengthLogitsProcessor(5, 6, 2),
    "TemperatureLogitsWarper": lambda: logits_process.TemperatureLogitsWarper(0.7),
    "RepetitionPenaltyLogitsProcessor": lambda: RepetitionPenaltyLogitsProcessor(1.3),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda: (
        logits_process.EncoderRepetitionPenaltyLogitsProcessor(1.3, PROMPT)
    ),
    "TopPLogitsWarper": lambda: logits_process.TopPLogitsWarper(0.6),
    "TopKLogitsWarper": lambda: logits_process.TopKLogitsWarper(3),
    "TopHLogitsWarper": lambda: logits_process.TopHLogitsWarper(0.4),
    "MinPLogitsWarper": lambda: logits_process.MinPLogitsWarper(0.2),
    "TypicalLogitsWarper": lambda: logits_process.TypicalLogitsWarper(0.5),
    "EpsilonLogitsWarper": lambda: logits_process.EpsilonLogitsWarper(0.05),
    "EtaLogitsWarper": lambda: logits_process.EtaLogitsWarper(0.05),
    "NoRepeatNGramLogitsProcessor": lambda: NoRepeatNGramLogitsProcessor(2),
    "EncoderNoRepeatNGramLogitsProcessor": lambda: EncoderNoRepeatNGramLogitsProcessor(2, PROMPT),
    "SequenceBiasLogitsProcessor": lambda: logits_process.SequenceBiasLogitsProcessor(
        [[[3], 2.0], [[1, 4], -3.0]]
    ),
    "NoBadWordsLogitsProcessor": lambda: logits_process.NoBadWordsLogitsProcessor([[1], [4, 3]], 2),
    "PrefixConstrainedLogitsProcessor": lambda: logits_process.PrefixConstrainedLogitsProcessor(
        lambda _, ids: [1, 3, 5, 7], 1
    ),
    "ForcedBOSTokenLogitsProcessor": lambda: logits_process.ForcedBOSTokenLogitsProcessor(3),
    "ForcedEOSTokenLogitsProcessor": lambda: logits_process.ForcedEOSTokenLogitsProcessor(12, 2),
    "InfNanRemoveLogitsProcessor": lambda: logits_process.InfNanRemoveLogitsProcessor(),
    "ExponentialDecayLengthPenalty": lambda: logits_process.ExponentialDecayLengthPenalty(
        (2, 1.5), 2, 5
    ),
    "LogitNormalization": lambda: LogitNormalization(),
    "SuppressTokensAtBeginLogitsProcessor": lambda: (
        logits_process.SuppressTokensAtBeginLogitsProcessor([1, 4], 5)
    ),
    "SuppressTokensLogitsProcessor": lambda: logits_process.SuppressTokensLogitsProcessor([1, 4]),
    "WhisperNoSpeechDetection": lambda: logits_process.WhisperNoSpeechDetection(3, 5),
    "ClassifierFreeGuidanceLogitsProcessor": lambda: (
        logits_process.ClassifierFreeGuidanceLogitsProcessor(2.0)
    ),
    "AlternatingCodebooksLogitsProcessor": lambda: (
        logits_process.AlternatingCodebooksLogitsProcessor(5, 3, 3)
    ),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": lambda: (
        logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, pair()[0])
    ),
    "BarkEosPrioritizerLogitsProcessor": lambda: logits_process.BarkEosPrioritizerLogitsProcessor(
        2, 0.1
    ),
    "WatermarkLogitsProcessor": lambda: logits_process.WatermarkLogitsProcessor(**WATERMARK),
    "SynthIDTextWatermarkLogitsProcessor": lambda: (
        logits_process.SynthIDTextWatermarkLogitsProcessor(5, [3, 4], 64, 0, 64, "cpu")
    ),
    "DiaClassifierFreeGuidanceLogitsProcessor": lambda: (
        logits_process.DiaClassifierFreeGuidanceLogitsProcessor(2.0)
    ),
    "DiaEOSChannelFilterLogitsProcessor": lambda: logits_process.DiaEOSChannelFilterLogitsProcessor(
        1, 2
    ),
    "DiaEOSDelayPatternLogitsProcessor": lambda: logits_process.DiaEOSDelayPatternLogitsProcessor(
        [0], 2, 20
    ),
}
NOT_MADE = {"WhisperTimeStampLogitsProcessor"}  # it wants the generation config of Whisper
THEIRS = {
    name
    for name, value in vars(logits_process).items()
    if inspect.isclass(value) and issubclass(value, logits_process.LogitsProcessor)
} - {"LogitsProcessor"}
BY_NAME = {
    "remembers what it was asked": {kind.__name__ for kind in REMEMBERING},
    "reads the model by itself": {"UnbatchedClassifierFreeGuidanceLogitsProcessor"},
    "belongs to a model of sound": {kind.__name__ for kind in OF_SOUND},
    "depends on what is added to all logits alike": {kind.__name__ for kind in GAUGED},
}


def test_every_processor_of_transformers_is_looked_at():
    assert set(MADE) | NOT_MADE == THEIRS


@pytest.mark.parametrize("name", MADE)
def test_with_alpha_one_a_processor_means_what_it_means_to_the_policy_or_is_refused(name):
    policy = raised(pair()[0], 9.0)
    refused = next((said for said, names in BY_NAME.items() if name in names), None)
    if refused is None:
        assert alone(policy, [MADE[name]()]) == own(policy, [MADE[name]()])
    else:
        with pytest.raises(ValueError, match=f"{name} {refused}"):
            alone(policy, [MADE[name]()])


@pytest.mark.parametrize("name", sorted(THEIRS - NOT_MADE))
def test_the_processors_that_go_by_the_gauge_are_those_that_are_listed(name):
    if name in BY_NAME["belongs to a model of sound"] or name.startswith("Unbatched"):
        return
    text = torch.tensor([[1, 4, 6, 4, 1, 4, 4, 3]])
    scores = log_distribution(pair()[0], PROMPT)[None]
    plain, other = (MADE[name]()(text, scores + offset).softmax(-1) for offset in (0.0, 9.0))
    gauged = not torch.allclose(plain, other, atol=1e-9)
    assert gauged == (name in BY_NAME["depends on what is added to all logits alike"])


def test_behind_a_normalisation_a_penalty_means_the_same_in_both():
    """The advice that comes with the refusal."""
    policy = raised(pair()[0], 9.0)
    steps = [LogitNormalization(), RepetitionPenaltyLogitsProcessor(1.5)]
    assert alone(policy, steps) == own(policy, steps)
    assert own(policy, steps) != own(policy, []), "the penalty does nothing"


@pytest.mark.parametrize("alpha", [0, 1, 0.0, np.float64(1)])
def test_a_processor_of_ones_own_that_goes_by_the_gauge_is_refused_at_the_ends(alpha):
    policy, teacher = pair()
    options = {"max_new_tokens": 3, "alpha": alpha}
    at_least = [lambda ids, scores: scores.clamp(min=-5.0)]
    filling = [logits_process.TopKLogitsWarper(3, filter_value=-4.0)]
    parent = "policy" if alpha else "teacher"
    for steps in (at_least, filling):
        with pytest.raises(ValueError, match=f"all logits alike.* raw logits in the {parent}"):
            hooked(policy, teacher, logits_processor=steps, **options)
        hooked(policy, teacher, logits_processor=steps, max_new_tokens=3, alpha=0.5)
    hooked(policy, teacher, logits_processor=[lambda ids, scores: scores - FAVOUR], **options)


def test_a_subclass_that_reads_the_text_sees_the_text():
    class Warmer(logits_process.TemperatureLogitsWarper):
        def __call__(self, ids, scores):
            seen.append(ids.shape)
            return scores / self.temperature ** float(ids.shape[-1] % 3)

    seen = []
    policy, teacher = alike()
    step = Warmer(0.2)
    out = hooked(policy, teacher, max_new_tokens=8, logits_processor=[step], scheme="plain")
    assert {shape[0] for shape in seen} == {1}
    assert {shape[1] for shape in seen} == set(range(5, 13))
    assert out[0, 5:].tolist() == slow_greedy(policy, teacher, 8, steps=[step])
    with pytest.raises(ValueError, match="Warmer reads the text, and filtered='parents'"):
        hooked(policy, teacher, max_new_tokens=8, logits_processor=[step], filtered="parents")


# Batches.


@pytest.mark.parametrize("processed", [False, True])
def test_a_left_padded_batch_equals_its_rows_alone(scheme, processed):
    policy, teacher = pair()
    texts = [[1, 4, 3], [1, 4, 0, 4, 1], [5, 5, 2, 0]]
    teacher_texts = [[2, 2, 3, 4, 1], [6], [1, 2, 3]]
    asked = {"max_new_tokens": 10, "eos_token_id": 3, "pad_token_id": 0}
    if processed:  # they read or count the text: with the padding or without, it must not matter
        asked |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
        asked["eos_token_id"] = [3, 6, 8]
    (ids, mask), (teacher_ids, teacher_mask) = left_padded(texts), left_padded(teacher_texts)
    out = hooked(
        policy,
        teacher,
        ids,
        attention_mask=mask,
        teacher_input_ids=teacher_ids,
        teacher_attention_mask=teacher_mask,
        **asked,
        **scheme,
    )
    assert out[:, : ids.shape[1]].tolist() == ids.tolist()
    alone = [
        hooked(
            policy,
            teacher,
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text)),
            teacher_input_ids=torch.tensor([other]),
            **asked,
            **scheme,
        )[0, len(text) :].tolist()
        for text, other in zip(texts, teacher_texts, strict=True)
    ]
    widest = max(map(len, alone))
    padded = [tokens + [0] * (widest - len(tokens)) for tokens in alone]
    assert out[:, ids.shape[1] :].tolist() == padded
    assert len({len(tokens) for tokens in alone}) > 1, "all rows end at once"


def left_padded(texts, pad=0):
    """Ids and mask as a tokenizer with padding_side="left" makes them."""
    width = max(map(len, texts))
    ids = [[pad] * (width - len(text)) + text for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids), torch.tensor(mask)


def test_padding_is_nothing_to_a_penalty():
    """Token 0 pads, and a penalty on it would change the answer: the control shows how."""
    policy, teacher = alike()
    ids, mask = left_padded([[4, 2], [1, 4, 3, 5, 5]])
    asked = {"max_new_tokens": 10, "repetition_penalty": 1.5, "pad_token_id": 0}
    out = hooked(policy, teacher, ids, attention_mask=mask, **asked)[0, 5:].tolist()
    step = [RepetitionPenaltyLogitsProcessor(1.5)]
    text = torch.tensor([[4, 2]])
    assert out == slow_greedy(policy, teacher, 10, text, steps=step)
    blamed = [lambda ids, scores: step[0](torch.cat([torch.zeros(1, 3).long(), ids], 1), scores)]
    assert out != slow_greedy(policy, teacher, 10, text, steps=blamed)


# Where a row ends.


def long_blocks():
    return [
        {"scheme": "one-sided", "gamma": 12, "drafter": "policy"},
        {"scheme": "alternating", "gamma": 12},
        {"scheme": "draft-model", "gamma": 12, "draft_model": alike()[0]},
        {"scheme": "lookup", "gamma": 12},
    ]


def letters():
    """A tokenizer whose tokens 0..8 are the letters a..i."""
    vocab = {chr(ord("a") + i): i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def going_on(seed=1):
    """Such a pair, and a prompt that holds its own continuation; seed 11 then repeats itself."""
    policy, teacher = alike(seed)
    text = PROMPT[0].tolist()
    return policy, teacher, torch.tensor([text + slow_greedy(policy, teacher, 24)])


def cut(tokens, is_end):
    """Up to and with the first place where the tokens so far end the row."""
    at = next(i for i in range(1, len(tokens) + 1) if is_end(tokens[:i]))
    return tokens[:at]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("how", ["eos", "stop string", "criterion"])
def test_a_row_is_cut_inside_an_accepted_block(which, how):
    policy, teacher, ids = going_on(11 if which == 3 else 1)
    options = long_blocks()[which]
    freely = slow_greedy(policy, teacher, 14, ids)
    at = next(i for i in range(3, 12) if freely[i] not in freely[:i] or i > 5)
    pair_ = freely[at - 1 : at + 1]
    if how == "eos":
        expected = cut(freely, lambda tokens: tokens[-1] == freely[at])
        asked = {"eos_token_id": [freely[at], 900], "pad_token_id": 0}
    elif how == "stop string":
        string = letters().decode(pair_)
        assert len(string) == 2
        # As in transformers the string may begin in the prompt.
        text = ids[0].tolist()
        expected = cut(freely, lambda tokens: (text + tokens)[-2:] == pair_)
        asked = {"stopping_criteria": [StopStringCriteria(letters(), [string])]}
    else:
        expected = freely[: at + 1]
        limit = ids.shape[1] + at + 1
        asked = {"stopping_criteria": [lambda seen, scores: seen.shape[1] >= limit]}
    assert len(expected) < 14
    asked |= {"max_new_tokens": 14, "return_dict_in_generate": True}
    asked |= {"attention_mask": torch.ones_like(ids)}  # the pad token is a token of the text too
    out = hooked(policy, teacher, ids, **asked, **options)
    assert out.sequences[0, ids.shape[1] :].tolist() == expected
    assert out.lengths.tolist() == [len(expected)]
    last = out.trace.rounds[-1]
    assert last.accepted > last.emitted, "the block did not go on beyond the end"


def test_a_criterion_is_asked_once_about_each_token():
    policy, teacher, ids = going_on()
    for options in [{"scheme": "plain"}, *long_blocks()]:
        seen = []

        def counting(text, scores, seen=seen):
            seen.append(text[0].tolist())
            return len(seen) == 7

        out = hooked(
            policy, teacher, ids, max_new_tokens=20, stopping_criteria=[counting], **options
        )
        whole = out[0].tolist()
        assert seen == [whole[: ids.shape[1] + i] for i in range(1, 8)]


@pytest.mark.parametrize("gamma", [1, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_never_more_tokens_than_asked_for(num_tokens, gamma):
    policy, teacher, ids = going_on()
    for options in [{"scheme": "plain"}, {"scheme": "auto"}, *long_blocks()]:
        asked = options | ({"gamma": gamma} if "gamma" in options else {})
        before = ids.shape[1]
        for limit in (
            {"max_new_tokens": num_tokens},
            {"max_length": before + num_tokens},
            {"generation_config": GenerationConfig(max_new_tokens=num_tokens)},
            {"max_new_tokens": 20, "stopping_criteria": limited(before + num_tokens)},
        ):
            assert hooked(policy, teacher, ids, **limit, **asked).shape[1] == before + num_tokens


def limited(length):
    return StoppingCriteriaList([MaxLengthCriteria(length)])


# Streamers.


class Recorder:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.got.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_then_every_token_once(scheme):
    policy, teacher, ids = going_on()
    mine, theirs = Recorder(), Recorder()
    ends = {"max_new_tokens": 15, "eos_token_id": slow_greedy(policy, teacher, 15, ids)[9]}
    out = hooked(policy, teacher, ids, streamer=mine, **ends, **scheme)
    policy.generate(ids, streamer=theirs, **ends)
    assert [value.shape for value in mine.got[:2]] == [value.shape for value in theirs.got[:2]]
    assert {value.shape for value in mine.got[1:]} == {(1,)}
    assert torch.cat([value.reshape(-1) for value in mine.got]).tolist() == out[0].tolist()
    assert mine.ended == 1


def test_a_stream_of_text_can_be_read_from_another_thread():
    policy, teacher = pair()
    tokenizer = letters()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 12, "scheme": "alternating"}
    worker = threading.Thread(
        target=lambda: hooked(policy, teacher, streamer=streamer, **options), daemon=True
    )
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == tokenizer.decode(hooked(policy, teacher, **options)[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_streamer_gives_what_the_tokens_add_to_the_prompt(kind):
    tokenizer = KINDS[kind]()
    sizes = {"vocab": len(tokenizer)}
    policy, teacher = tiny.llama(1, **sizes), tiny.gpt2(4, **sizes)
    ids = torch.tensor([tokenizer("the cat").input_ids])
    streamer = PieceStreamer(tokenizer, timeout=60)
    torch.manual_seed(0)
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "scheme": "one-sided"}
    options["attention_mask"] = torch.ones_like(ids)
    out = hooked(policy, teacher, ids, streamer=streamer, **options)[0].tolist()
    prompt, new = ids[0].tolist(), out[ids.shape[1] :]
    whole = tokenizer.decode(out, skip_special_tokens=True)
    text = "".join(streamer)
    assert text == new_text(tokenizer, prompt, new, skip_special_tokens=True)
    if whole.startswith(before := tokenizer.decode(prompt)):
        assert before + text == whole


def test_a_generate_that_hides_its_arguments_is_named():
    """Under another name: what transformers may come to do."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    renamed = types.FunctionType(code.replace(co_name="produce"), vars(generation_utils))
    renamed.__defaults__ = inspect.unwrap(GenerationMixin.generate).__defaults__
    policy, teacher = pair()
    mine, partly = Recorder(), functools.partial(q_star, streamer=(theirs := Recorder()))
    options = {"teacher": teacher, "max_new_tokens": 3}
    with torch.no_grad(), pytest.warns(UserWarning, match="whether streamer, .* were given"):
        renamed(policy, PROMPT, custom_generate=q_star, streamer=mine, **options)
    assert mine.ended == 0
    with torch.no_grad(), pytest.warns(UserWarning, match="functools.partial"):
        out = renamed(policy, PROMPT, custom_generate=partly, **options)
    assert (torch.cat(theirs.got).tolist(), theirs.ended) == (out[0, 5:].tolist(), 1)


@pytest.mark.parametrize("ids", [PROMPT, PROMPT.repeat(2, 1)], ids=["a model fails", "a batch"])
def test_a_stream_that_fails_is_ended(ids):
    policy, teacher = pair()
    if len(ids) == 1:
        teacher.get_output_embeddings().weight.data[3] = torch.nan
    streamer = Recorder()
    message = "answers nan" if len(ids) == 1 else "a streamer follows one row: got 2"
    with pytest.raises(ValueError, match=message):
        hooked(policy, teacher, ids, streamer=streamer, max_new_tokens=4)
    assert streamer.ended == 1


# What is handed on, and what is refused.


def test_every_option_of_the_decoder_is_handed_on_or_is_transformers_affair():
    own = set(inspect.signature(decode.generate).parameters)
    theirs = {
        "policy": "model",
        "policy_ids": "input_ids",
        "teacher_ids": "teacher_input_ids",
        "draft_ids": "draft_input_ids",
    }
    prepared = {*OF_THE_CONFIG, "sampling", "shown_ids", "on_tokens"}
    taken = set(inspect.signature(q_star).parameters)
    assert own - taken == prepared - {"logits_processor", "stopping_criteria"} | set(theirs)
    assert set(theirs.values()) <= taken


def test_options_reach_the_decoder():
    policy, teacher = pair()
    out = hooked(
        policy,
        teacher,
        max_new_tokens=6,
        return_dict_in_generate=True,
        scheme="one-sided",
        gamma=2,
        drafter="teacher",
        alpha=0.25,
        teacher_input_ids=TEACHER_PROMPT,
    )
    own = decode.generate(
        policy, teacher, PROMPT, TEACHER_PROMPT, max_new_tokens=6, alpha=0.25, greedy=True
    )
    assert out.sequences[:, PROMPT.shape[1] :].tolist() == own.tokens.tolist()
    assert {(r.scheme, r.gamma) for r in out.trace.rounds} <= {("one-sided", 2), ("one-sided", 1)}
    assert out.trace.alpha.tolist() == [[0.25] * 6]
    assert 2 in out.trace.proposer, "the teacher drafts"


def test_one_model_may_be_both_parents(scheme):
    policy, _ = pair()
    out = hooked(policy, policy, max_new_tokens=10, teacher_input_ids=TEACHER_PROMPT, **scheme)
    expected = slow_greedy(policy, policy, 10, teacher_ids=TEACHER_PROMPT)
    assert out[0, PROMPT.shape[1] :].tolist() == expected


MASK = torch.ones_like(PROMPT)
REFUSED = {
    "no teacher": ({"teacher": None}, "q\\* has two parents: pass teacher="),
    "beams": ({"num_beams": 2}, "got a config for beam_search"),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, "got a config for beam_sample"),
    "an assistant": ({"assistant_model": pair()[1]}, "pass draft_model="),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "scheme='lookup'"),
    "scores": ({"output_scores": True}, "keeps no output_scores"),
    "hidden states": ({"output_hidden_states": True}, "keeps no output_hidden_states"),
    "a cache on the host": ({"cache_implementation": "offloaded"}, "'static' or 'dynamic' will do"),
    "guidance": ({"guidance_scale": 1.5}, "Unbatched.* pass its guidance_scale as alpha="),
    "types": ({"token_type_ids": MASK}, "leave token_type_ids out"),
    "positions": ({"position_ids": MASK}, "leave position_ids out"),
    "right padding": (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
        r"padded on the left, .* row 0 has a masked token",
    ),
    "a pad token in the text": (
        {"pad_token_id": 4},
        r"row 0 has a masked token .* where a text holds the pad token itself, pass an attention",
    ),
    "a mask alone": ({"teacher_attention_mask": MASK}, "came without teacher_input_ids"),
    "another batch": (
        {"teacher_input_ids": PROMPT.repeat(2, 1)},
        "teacher_input_ids must have a row for each .* got 2 rows for 1",
    ),
    "parents and text": (
        {"filtered": "parents", "repetition_penalty": 1.5},
        "RepetitionPenaltyLogitsProcessor reads the text, and filtered='parents'",
    ),
    "a misspelt option": ({"gama": 3}, "not used by the model: \\['gama'\\]"),
    "an unknown scheme": ({"scheme": "fast"}, "scheme must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*generation flags are not valid:UserWarning")
def test_what_it_does_not_do_is_refused(name):
    if name == "a cache on the host" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("transformers makes it first, which a CUDA build without a device cannot")
    options, message = REFUSED[name]
    policy, teacher = tiny.gpt2(4, vocab=VOCAB), pair()[0]
    with pytest.raises(ValueError, match=message):
        hooked(policy, **{"teacher": teacher, "max_new_tokens": 3} | options)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_cache_that_was_asked_for_is_taken(kind, monkeypatch):
    made = []
    real = KVCache.start
    monkeypatch.setattr(
        KVCache,
        "start",
        lambda self, texts, **how: (made.append(self.static), real(self, texts, **how))[1],
    )
    policy, teacher = pair()
    torch.manual_seed(0)
    out = hooked(policy, teacher, max_new_tokens=5, do_sample=True, cache_implementation=kind)
    torch.manual_seed(0)
    assert out.tolist() == hooked(policy, teacher, max_new_tokens=5, do_sample=True).tolist()
    assert (True in made) == (kind == "static")


def test_a_row_wise_processor_is_refused_for_several_rows():
    policy, teacher = pair()
    with pytest.raises(ValueError, match=r"EncoderNoRepeatNGram.* decode them one by one"):
        hooked(
            policy, teacher, PROMPT.repeat(2, 1), max_new_tokens=3, encoder_no_repeat_ngram_size=2
        )
    one = hooked(policy, teacher, max_new_tokens=6, encoder_no_repeat_ngram_size=2)
    step = [EncoderNoRepeatNGramLogitsProcessor(2, PROMPT)]
    assert one[0, PROMPT.shape[1] :].tolist() == slow_greedy(policy, teacher, 6, steps=step)


def test_padding_that_nobody_said_is_padding_is_refused():
    policy, teacher = pair()
    with pytest.raises(ValueError, match="pass teacher_attention_mask"):
        hooked(
            policy,
            teacher,
            PROMPT.repeat(2, 1),
            teacher_input_ids=torch.tensor([[0, 3], [4, 3]]),
            pad_token_id=0,
            eos_token_id=2,
            max_new_tokens=3,
        )


@pytest.mark.xfail(raises=ValueError, strict=True, reason="transformers 5.23 drops the tokenizer")
def test_stop_strings_find_their_tokenizer():
    """When this passes, the docstring of `q_star` can forget about StopStringCriteria."""
    policy, teacher = pair()
    hooked(policy, teacher, max_new_tokens=3, stop_strings=["bd"], tokenizer=letters())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_that_transformers_makes_is_no_argument_of_the_caller(name):
    """It is called `cache` since transformers 5.24."""
    made = DynamicCache()
    asked = {"assistant_model": None, "synced_gpus": False}
    config = GenerationConfig(do_sample=True)
    _check_request(object(), config, asked, {name: made})
    made._is_user_defined = True
    with pytest.raises(ValueError, match=f"leave {name} out"):
        _check_request(object(), config, asked, {name: made})
