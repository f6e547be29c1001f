"""Whether a model's cache changes what it answers: tried before it is trusted.

What a model answers to a text is what it answers when it reads that text alone, at once, without a
cache, and works the positions out itself. Not every model is built so that a cache leaves that
alone.
"""

import re
import warnings
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .eval_mode import quiet
from .kv_cache import KVCache, said
from .traits import Sliding, modules_of, tensors_of

CHECK_LENGTH = 48
"""Tokens of the text on which a cache is tried, unless something changes at a greater length."""

CHECK_AT_LEAST = 8
"""Tokens below which there is nothing to try: such short texts are read anew."""

CHECK_AT_MOST = 1040
"""Tokens of the longest text on which a window that transformers knows is tried."""

TOLERANCE = {
    torch.float64: (1e-6, 1e-5),  # eager attention has its softmax in float32
    torch.float32: (1e-4, 1e-3),
    torch.float16: (8e-3, 0.03),
    torch.bfloat16: (0.0625, 0.15),
}
"""Total variation that rounding may always explain, and that it never does, by precision.

Of narrow weights the first is what the last bits of logits between 16 and 32 can change. Where each
logit is off by d at most, the distribution is by tanh(d / 2); d is 1/64 in float16 and 1/8 in
bfloat16. Two readings at once can agree to the bit, by the same kernels, and then say nothing of
what others do, through which a cache is read: SmolLM2's in bfloat16 is 0.03 away in the median.

In between, 30 times what two readings at once are apart. Of narrow weights the median over a row's
positions counts: there rounding can send a token to another expert, and change one position much.
"""


ONE_ROW = "in one row"
PLAIN_ROWS = "in rows of different lengths"
DRAFTING_ROWS = "in rows that take back different numbers of drafts"
INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position")


@dataclass(frozen=True, slots=True)
class _Found:
    """What trying a cache showed: whether it serves, with holes too, and what was seen if not."""

    length: int
    holes: bool
    cached: bool
    seen: str


_FOUND: dict[tuple[Any, ...], _Found] = {}


def check(cache: KVCache, length: int, *, rows: int = 1) -> None:
    """See whether the cache changes what the model answers, and read without one if it does.

    Done once a process for every class, configuration, precision and device, and for one row
    and several apart; again if a longer text is asked for than was tried, where something is
    known to change. A random text (`CHECK_LENGTH` tokens, or as many as it takes to pass a
    window that the texts pass) is read twice at once, and once in pieces, from a cache, in rows
    of different lengths, some of which take drafts back: some 6 forwards, over 5 times the text
    in all. Distributions are compared in total variation; what counts as rounding follows from
    the precision of the weights, and from how far the two readings at once are apart. Rope
    factors that switch with the length are not tried but known.

    Args:
        length: How long the texts may get.
        rows: How many there are.

    Raises:
        ValueError: The model cannot be read at all, or answers something else than what
            follows a text.
    """
    several = rows > 1
    length = max(length, CHECK_AT_LEAST)
    length = min([length, *(limit for limit in (cache.window, cache.switch) if limit)])
    within = min(length, CHECK_LENGTH)
    within = max([within, *(min(at + 16, length) for at in cache.odd_windows if at < length)])
    if cache.sliding is not None and cache.sliding.length < min(length, CHECK_AT_MOST):
        within = max(within, min(cache.sliding.length + 16, length))
    key = (several, cache.slides(within), cache.static, *_fingerprint(cache))
    found = _FOUND.get(key)
    if found is None or found.length < within:
        with quiet(cache.model):
            found = _FOUND[key] = _examine(cache, within, several)
    if cache.static and not (found.cached and (found.holes or not several)):
        if found.seen:
            warnings.warn(
                f"the {cache.name} ({type(cache.core).__name__}) is read from a dynamic cache: "
                f"{found.seen}.",
                stacklevel=3,
            )
        cache.static = False
        check(cache, length, rows=rows)
    elif not found.cached:
        cache.rereads = True
        if found.seen:
            warnings.warn(
                f"the {cache.name} ({type(cache.core).__name__}) is read anew for every token, "
                f"without a cache, which is exact and slow: {found.seen}.",
                stacklevel=3,
            )
    elif several and not found.holes and not cache.slides(within):
        cache.sliding = Sliding(0, "answers otherwise where its cache has holes")


def _fingerprint(cache: KVCache) -> tuple[Any, ...]:
    """What tells models apart that may treat a cache in different ways."""
    modules = modules_of(cache.model)
    device = cache.device
    autocast = torch.is_autocast_enabled(device.type)
    return (
        cache.window,
        type(cache.model),
        type(cache.core),
        cache.core.config.to_json_string(use_diff=False),
        getattr(cache.core.config, "_attn_implementation", None),
        # Quantised layers, adapters, and layers that answer in another way (`packed`).
        frozenset(map(type, modules)),
        sum("forward" in vars(module) for module in modules),
        frozenset(tensor.dtype for module in modules for tensor in tensors_of(module)),
        device.type,
        torch.get_autocast_dtype(device.type) if autocast else None,
    )


def _examine(cache: KVCache, length: int, several: bool) -> _Found:
    """Read a random text in every way, and compare."""
    text = _random_text(cache, length)
    middle = max(2, length // 2 - 3)
    after = {1, 2, 3, 4, 5, *range(middle, middle + 6), *range(length - 6, length + 1)}
    asked = sorted(n for n in after if 0 < n <= length)
    whole = dict(zip(asked, cache.tried(text, length, asked), strict=True))
    size = whole[length].shape[-1]
    if size != cache.vocab:
        raise ValueError(
            f"the {cache.name} ({type(cache.core).__name__}) answers with {size} "
            f"logits, and its output layer and configuration say {cache.vocab}."
        )
    _check_inputs(cache, text)
    if cache.rereads or length < CHECK_AT_LEAST:
        return _Found(length, False, False, cache.why_anew)
    here = list(range(middle, middle + 5))
    part = cache.tried(text[: here[-1]], here[-1], here)
    noises = _apart(part, torch.stack([whole[n] for n in here])).nan_to_num()
    noise = float(noises.max() if _wide(cache.model) else noises.median())
    floor, ceiling = TOLERANCE[_coarsest(cache.model)]
    if noise > ceiling:
        seen = (
            f"what it answers to {middle} tokens of a text changes by {noise:.1g} in total "
            f"variation with what it reads along with them"
        )
        return _Found(length, False, False, seen)
    allowed = min(max(floor, 30 * noise), ceiling)
    if not several:
        ways = [ONE_ROW]
    elif cache.slides(length):
        ways = [PLAIN_ROWS]
    else:
        ways = [DRAFTING_ROWS, PLAIN_ROWS]
    seen = ""
    for way in ways:
        trouble = _compare(cache, text, whole, way, allowed)
        if not trouble:
            return _Found(length, way == DRAFTING_ROWS, True, seen)
        seen = seen or trouble
    return _Found(length, False, False, seen)


def _compare(
    cache: KVCache, text: Tensor, whole: dict[int, Tensor], way: str, allowed: float
) -> str:
    """What is wrong with distributions that are read in pieces, in words; nothing if nothing is.

    Rows are beginnings of one text, so that one reading at once has all the distributions.
    """
    tried, ids = cache.again(), text.tolist()
    ends = [len(ids) - 5, max(2, len(ids) // 2 - 3), 1][: 1 if way == ONE_ROW else 3]
    # Drafts of each round and row: so many that go on as the text does, so many that do not.
    rounds = {
        ONE_ROW: [[(1, 2)], [(2, 0)]],
        PLAIN_ROWS: [[(0, 0)] * 3] * 3,
        DRAFTING_ROWS: [[(0, 3), (3, 0), (1, 1)], [(0, 0)] * 3, [(0, 0)] * 3],
    }[way]
    rows = list(range(len(ends)))
    gaps: list[list[float]] = [[] for _ in rows]
    try:
        tried.start([ids[:end] for end in ends])
        for turn, plan in enumerate(rounds):
            if turn == 2:  # one row is over
                tried.select([0, 2])
                rows = [0, 2]
            counts = [sum(plan[row]) for row in rows]
            drafts = [
                ids[ends[row] : ends[row] + right]
                + [(ids[0] + 1) % cache.vocab] * (max(counts) - right)
                for row, (right, _) in ((row, plan[row]) for row in rows)
            ]
            answers = tried.feed(
                [ids[tried.lengths[i] : ends[row]] for i, row in enumerate(rows)],
                torch.tensor(drafts, dtype=torch.long) if max(counts) else None,
                counts,
                positions=max(counts) + 1,
            )
            for i, row in enumerate(rows):
                right = plan[row][0]
                expected = torch.stack([whole[ends[row] + j] for j in range(right + 1)])
                gaps[row] += _apart(answers[i, : right + 1], expected).tolist()
                ends[row] += right
            tried.truncate([ends[row] for row in rows])
            for row in rows:
                ends[row] += 1
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"from a cache, {way}, it raised {said(error)}"
    typical = max if _wide(cache.model) else median
    worst = max(typical([gap for gap in row if gap == gap] or [0.0]) for row in gaps)
    if worst <= allowed:
        return ""
    return (
        f"what it answers from a cache, {way}, is {worst:.1g} in total variation away from "
        f"what it answers to the text alone, at once; rounding explains {allowed:.1g}"
    )


def _random_text(cache: KVCache, length: int) -> Tensor:
    """Token ids, none of which stands for an image or the like."""
    odd = re.compile(r"(image|audio|video|vision|speech|modal|placeholder|[be]o[iav])_?.*_i")
    settings = {**vars(cache.core.config), **vars(cache.core.config.get_text_config())}
    barred = {value for key, value in settings.items() if odd.search(key)}
    ids = torch.randint(cache.vocab, (8 * length,), generator=torch.Generator().manual_seed(0))
    kept = [token for token in ids.tolist() if token not in barred] or [0]
    return torch.tensor((kept * length)[:length])


def _check_inputs(cache: KVCache, text: Tensor) -> None:
    """Raise ValueError if the model's own `generate` feeds it something else than the text."""
    try:
        fed = cache.core.prepare_inputs_for_generation(
            text.unsqueeze(0).to(cache.device), use_cache=False
        )
        more = sorted(k for k, v in fed.items() if isinstance(v, Tensor) and k not in INPUTS)
        size = fed["input_ids"].shape[-1]
    except Exception:
        return  # it has no way of its own, or wants more than a text
    if more or size != len(text):
        what = ", ".join(more) or f"{size} tokens for a text of {len(text)}"
        raise ValueError(
            f"the {cache.name} ({type(cache.core).__name__}) does not answer to a text alone "
            f"with what follows it: its own generate feeds it {what} as well. Use a causal "
            f"language model."
        )


def _apart(answers: Tensor, expected: Tensor) -> Tensor:
    """Total variation position by position; nan where nothing can be expected."""
    gap = (answers.double().exp() - expected.double().exp()).abs().sum(-1) / 2
    sound = expected.isfinite().any(-1) & ~expected.isnan().any(-1)
    return torch.where(sound, gap.nan_to_num(nan=1.0), torch.nan)


def _coarsest(model: Any) -> torch.dtype:
    """The precision in which a model works, as far as its weights and autocast say."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = model.device.type
    if torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32 and torch.float32 in kinds:
        kinds.add(torch.float16)  # as many bits as TF32 has
    for kind in (torch.float16, torch.float32, torch.float64):
        if kinds <= {torch.float16, torch.float32, torch.float64} and kind in kinds:
            return kind
    return torch.bfloat16 if kinds else torch.float32


def _wide(model: Any) -> bool:
    return _coarsest(model) in (torch.float32, torch.float64)
