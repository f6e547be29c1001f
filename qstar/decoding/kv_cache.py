"""A causal language model that reads many texts at once, remembers them, and can take back.

A speculative decoder feeds drafts and takes the rejected ones back, each row of a batch its own
number of them. Nothing is moved for that: the cache keeps one slot per column that was fed, a mask
says which slots are part of a row's text, and every token carries its own position. Slots at the
end that no row needs are cut off, so that one row alone never leaves a hole; when more than half
of the slots are holes they are squeezed out.

What a model answers to a text is what it answers when it reads that text alone, at once, without a
cache, and works the positions out itself. A cache must not change that, and not every model is
built so that it does not: `Reader.check` tries it before it is trusted. Where it fails, each text
is read anew for every token, which is slow and right.
"""

import copy
import inspect
import operator
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

PREFILL_WIDTH = 512
"""Tokens of a prompt that are read in one forward; it bounds the memory of a long prompt."""

SQUEEZE_FROM = 64
"""Slots from which holes are squeezed out, once they are more than half."""

CHECK_LENGTH = 48
"""Tokens of the text on which a cache is tried, unless something changes at a greater length."""

CHECK_AT_LEAST = 8
"""Tokens below which there is nothing to try: such short texts are read anew."""

CHECK_AT_MOST = 1040
"""Tokens of the longest text on which a window that transformers knows is tried."""

TOLERANCE = {
    torch.float64: (1e-6, 1e-5),  # eager attention has its softmax in float32
    torch.float32: (1e-4, 1e-3),
    torch.float16: (4e-3, 0.03),
    torch.bfloat16: (0.02, 0.15),
}
"""Total variation that rounding may always explain, and that it never does, by precision.

In between, 30 times what two readings at once are apart. Of narrow weights the median over a row's
positions counts: there rounding can send a token to another expert, and change one position much.
"""


class Reader:
    """A causal language model and the key-value cache of the texts it has read, row by row.

    The model is shared (two readers may read two prompts with one model); the cache is the
    reader's own.

    Attributes:
        model: A causal language model of transformers, in eval mode.
        vocab: The number of token ids that the model gives a probability to.
        window: The most tokens of a text it can hold, None if it does not say.
        lengths: How many tokens of each row's text it has read.
        rereads: Whether it reads each text anew for every token, without a cache.
    """

    _cache: Any
    _slots: Tensor
    _ids: Tensor

    def __init__(
        self, model: Any, *, name: str = "model", context_length: int | None = None
    ) -> None:
        """Look at a model; `name` is what errors call it.

        Args:
            model: A causal language model of transformers, maybe compiled, quantised, or with
                adapters.
            name: What errors call it.
            context_length: The most tokens of a text, in place of what the configuration says. A
                table of positions keeps its end.

        Raises:
            ValueError: It is no causal language model, or its cache cannot take tokens back.
        """
        self.model = bare(model)
        self.name = name
        self._core = _core(self.model, name)
        text = self._core.config.get_text_config(decoder=True)
        _check_cache(self._core, text, name)
        self._parameters = frozenset(inspect.signature(self._core.forward).parameters)
        self._ropes = _ropes(text, self._core)
        self._limit = _limit(text, self._core, self._ropes)
        self.window = self._limit.allowing(context_length)
        self._switch = _switch(text, self._ropes)
        told, self._odd = _windows(text, self._core)
        self._sliding = _sliding(text, [*told, *self._odd])
        names = [name for name in ("past_key_values", "cache") if name in self._parameters]
        self._cache_name = names[0] if names else None  # transformers 5.24 renamed it
        self._why_anew = _shares_scales(self._core)
        self.rereads = not names or bool(self._why_anew)
        self.vocab = self._count_tokens()
        self.lengths: list[int] = []
        self._reset(0)

    def again(self) -> "Reader":
        """Another reader of the same model, about which the same is known."""
        other = copy.copy(self)
        other._reset(0)
        return other

    def check_room(self, length: int) -> None:
        """Raise ValueError if a text of so many tokens exceeds the model's context window."""
        if self.window is not None and length > self.window:
            raise ValueError(
                f"the {self.name}'s context window holds {self.window} tokens, and this text would "
                f"have {length}. Shorten the prompt or ask for fewer new tokens{self._limit.why}."
            )

    def slides(self, length: int) -> bool:
        """Whether rows of a text of so many tokens may not take back different numbers of drafts.

        So it is once a text is longer than a window that the model looks back through: windows are
        counted in slots of the cache, holes among them too.
        """
        return not self.rereads and self._sliding is not None and length > self._sliding.length

    @property
    def minds_holes(self) -> str:
        """What the model does for which its cache may have no holes; empty if nothing."""
        return "" if self._sliding is None else self._sliding.does

    def check(self, length: int, *, rows: int = 1) -> None:
        """See whether the cache changes what the model answers, and read without one if it does.

        Done once a process for every class, configuration, precision and device, and for one row
        and several apart; again if a longer text is asked for than was tried, where something is
        known to change. A random text (`CHECK_LENGTH` tokens; as many more as it takes to pass a
        window that the texts pass, up to `CHECK_AT_MOST` where transformers knows the window) is
        read twice at once, and once in pieces, from a cache, in rows of different lengths, some of
        which take drafts back. This costs some 6 forwards, over 5 times the text in all. Hooks on
        the model see them, traces do not. The state of torch's generators and the mode of each
        module are what they were. Rope factors that switch with the length are not tried but known:
        texts are read with those of their length (longrope), or refused (dynamic).

        Distributions are compared in total variation. What counts as rounding follows from the
        precision of the weights, and from how far the two readings at once are apart.

        Args:
            length: How long the texts may get.
            rows: How many there are.

        Raises:
            ValueError: The model cannot be read at all, or answers something else than what
                follows a text.
        """
        several = rows > 1
        length = max(length, CHECK_AT_LEAST)
        length = min([length, *(limit for limit in (self.window, self._switch) if limit)])
        within = min(length, CHECK_LENGTH)
        within = max([within, *(min(at + 16, length) for at in self._odd if at < length)])
        if self._sliding is not None and self._sliding.length < min(length, CHECK_AT_MOST):
            within = max(within, min(self._sliding.length + 16, length))
        key = (several, self.slides(within), *self._fingerprint())
        found = _FOUND.get(key)
        if found is None or found.length < within:
            with _quiet(self.model):
                found = _FOUND[key] = self._examine(within, several)
        if not found.cached:
            self.rereads = True
            if found.seen:
                warnings.warn(
                    f"the {self.name} ({type(self._core).__name__}) is read anew for every token, "
                    f"without a cache, which is exact and slow: {found.seen}.",
                    stacklevel=3,
                )
        elif several and not found.holes and not self.slides(within):
            self._sliding = _Sliding(0, "answers otherwise where its cache has holes")

    def start(self, texts: Sequence[Sequence[int]]) -> int:
        """Forget everything, and read all but the last token of each text.

        The last one is left for the first `feed`, whose answer is the law after it.

        Returns:
            The number of forwards that it took.
        """
        self._reset(len(texts))
        heads = [list(text[:-1]) for text in texts]
        longest = max(map(len, heads))
        # Rope factors that switch with the length of a text are for all of it: read it at once.
        later = self.rereads or (self._switch is not None and longest >= self._switch)
        step = longest if later else PREFILL_WIDTH
        for start in range(0, longest, max(1, step)):
            # Right-aligned as a whole: a short text begins late.
            stop = min(start + step, longest)
            shifts = [len(head) - longest for head in heads]
            cut = [
                head[max(0, start + shift) : max(0, stop + shift)]
                for head, shift in zip(heads, shifts, strict=True)
            ]
            if later:
                self._note(cut, None, [0] * len(texts), stop - start)
            else:
                self._forward(cut, None, [0] * len(texts), stop - start, 1)
        return 0 if later else -(-longest // PREFILL_WIDTH)

    def feed(
        self,
        unread: Sequence[Sequence[int]],
        drafts: Tensor | None = None,
        counts: Sequence[int] | None = None,
        *,
        positions: int = 1,
    ) -> Tensor:
        """Read on, and return log-probabilities of what follows the last `positions` columns.

        Columns are each row's unread tokens, right-aligned, then its drafts, left-aligned. So with
        `positions = drafts + 1` entry j is the law of what follows the row's text and its first j
        drafts; entries beyond its own number of drafts mean nothing.

        Args:
            unread: Tokens that are known here, per row; rows may have none.
            drafts: Tokens that are only known on the device. Shape (batch, drafts).
            counts: How many drafts of each row are to be read; all of them if not given.
            positions: How many columns, from the last one, to return laws for.

        Returns:
            Laws in float32, or in float64 if the weights are that wide.
            Shape (batch, positions, vocab).

        Raises:
            ValueError: Holes in a ragged batch meet a sliding window.
        """
        width = max(map(len, unread))
        num_drafts = 0 if drafts is None else drafts.shape[-1]
        counts = [num_drafts] * len(unread) if counts is None else list(counts)
        return self._forward(unread, drafts, counts, width, positions)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Take back what was read of each row beyond its length; shorter rows stay as they are."""
        if all(have <= keep for have, keep in zip(self.lengths, lengths, strict=True)):
            return
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]
        rank = self._slots.cumsum(-1)
        self._slots = self._slots & (rank <= torch.tensor(self.lengths).unsqueeze(-1))
        used = self._slots.any(0)
        end = int(used.nonzero()[-1]) + 1 if used.any() else 0
        if end < self._slots.shape[-1]:
            if end == 0:
                self._cache = DynamicCache()
            elif self._held:
                self._cache.crop(end - self._slots.shape[-1])
            self._slots, self._ids = self._slots[:, :end], self._ids[:, :end]
        elif self._slots.shape[-1] >= SQUEEZE_FROM and 2 * max(self.lengths) < end:
            self._squeeze()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self._slots, self._ids = self._slots[list(rows)], self._ids[list(rows)]
        if self._slots.shape[-1] > 0 and self._held:
            self._cache.batch_select_indices(torch.tensor(list(rows), device=self.model.device))

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take at this moment."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self._cache.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )

    # --- Reading

    def _reset(self, rows: int) -> None:
        """Nothing is read."""
        self.lengths = [0] * rows
        self._cache = DynamicCache()
        self._slots = torch.zeros(rows, 0, dtype=torch.bool)  # which are of a row's text
        self._ids = torch.zeros(rows, 0, dtype=torch.long, device=self.model.device)
        self._held = not self.rereads  # whether the cache holds these slots
        self._long = False  # whether it was read with the rope factors of long texts

    def _note(
        self,
        unread: Sequence[Sequence[int]],
        drafts: Tensor | None,
        counts: Sequence[int],
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Write down what is read: which new columns are of the text, and where in it they are."""
        device = self.model.device
        num_drafts = 0 if drafts is None else drafts.shape[-1]
        held = self._slots.shape[-1]
        if held > max(self.lengths) and self.slides(held + width + num_drafts):
            self._squeeze()  # a window must not be filled with holes
        known = torch.tensor([len(tokens) for tokens in unread]).unsqueeze(-1)
        padded = [[0] * (width - len(tokens)) + list(tokens) for tokens in unread]
        ids = torch.tensor(padded, dtype=torch.long).reshape(len(unread), width)
        column = torch.arange(width + num_drafts)
        ends = width + torch.tensor(counts).unsqueeze(-1)
        fresh = (column >= width - known) & (column < ends)
        place = torch.tensor(self.lengths).unsqueeze(-1) + column - (width - known)
        slots = torch.cat([self._slots, fresh], dim=-1)
        if self._sliding and self.slides(slots.shape[-1]) and not _solid(slots):
            raise ValueError(
                f"the {self.name} {self._sliding.does}, and this batch leaves holes there, since "
                f"its rows take back different numbers of drafts. Decode the rows one at a time, "
                f"or with scheme='plain'."
            )
        fed = ids.to(device, non_blocking=True)
        if drafts is not None:
            fed = torch.cat([fed, drafts.to(device).clamp(min=0)], dim=-1)
        self._slots = slots
        self._ids = torch.cat([self._ids, fed], dim=-1)
        self.lengths = [
            read + len(tokens) + count
            for read, tokens, count in zip(self.lengths, unread, counts, strict=True)
        ]
        return fresh, torch.where(fresh, place, 0)

    @torch.no_grad()
    def _forward(
        self,
        unread: Sequence[Sequence[int]],
        drafts: Tensor | None,
        counts: Sequence[int],
        width: int,
        positions: int,
    ) -> Tensor:
        fresh, place = self._note(unread, drafts, counts, width)
        wanted = fresh[:, -positions:]
        if self.rereads:
            return self._read_anew(wanted)
        if self._switch is not None:
            # How long the texts are that are asked about.
            sizes = self._slots.cumsum(-1)[:, -positions:][wanted]
            long = bool((sizes > self._switch).any())
            fits = self._held and long == self._long
            # One forward reads all its rows with the factors of the longest.
            if (long and bool((sizes <= self._switch).any())) or (
                not long and not fits and max(self.lengths) > self._switch
            ):
                self._held = False
                return self._read_anew(wanted)
            if not fits:
                self._held = True
                self._cache, self._long = DynamicCache(), long
                self._squeeze(place.shape[-1])  # and read all there is
                place = torch.where(self._slots, self._slots.cumsum(-1) - 1, 0)
        return self._read_on(place, positions)

    def _read_on(self, place: Tensor, positions: int) -> Tensor:
        """Read the last columns, which stand there in their texts; the cache has those before."""
        device, slots = self.model.device, self._slots
        # Without holes no mask is needed, which leaves the faster kernels to the model.
        mask = None if bool(slots.all()) else slots.long().to(device, non_blocking=True)
        options: dict[str, Any] = {}
        if "position_ids" in self._parameters:
            options["position_ids"] = place.to(device, non_blocking=True)
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = positions
        if "use_cache" in self._parameters:
            options["use_cache"] = True
        assert self._cache_name is not None
        options[self._cache_name] = self._cache
        out = self.model(self._ids[:, -place.shape[-1] :], attention_mask=mask, **options)
        if self._cache.get_seq_length() != slots.shape[-1]:
            raise ValueError(
                f"the {self.name} ({type(self._core).__name__}) does not keep what it reads in the "
                f"cache that it is given: {self._cache.get_seq_length()} tokens in place of "
                f"{slots.shape[-1]}. qstar.generate reads such a model without a cache."
            )
        return _laws(out, positions)

    def _read_anew(self, wanted: Tensor) -> Tensor:
        """The laws of the last columns, each by reading the text up to it, alone and at once."""
        rows, positions = wanted.shape
        beyond, laws = self._slots.shape[-1] - positions, None
        for row, column in wanted.nonzero().tolist():
            here = self._slots[row, : beyond + column + 1].nonzero()[:, 0].to(self._ids.device)
            law = self._whole(self._ids[row].index_select(0, here), 1)[0]
            if laws is None:
                laws = law.new_zeros(rows, positions, law.shape[-1]).log_softmax(-1)
            laws[row, column] = law
        if laws is None:
            return torch.zeros(rows, positions, self.vocab, device=self._ids.device).log_softmax(-1)
        return laws

    def _whole(self, text: Tensor, positions: int, after: list[int] | None = None) -> Tensor:
        """The model's own laws after the last tokens of one text, or some of them."""
        options: dict[str, Any] = {}
        if "use_cache" in self._parameters:
            options["use_cache"] = False
        if "logits_to_keep" in self._parameters and not self._why_anew:
            options["logits_to_keep"] = positions
        return _laws(self.model(text.unsqueeze(0), **options), positions, after)[0]

    def _squeeze(self, new: int = 0) -> None:
        """Move each row's slots together, to the right, and drop what is then before all rows.

        The last columns, of which the cache knows nothing yet, stay where they are.
        """
        held = self._slots.shape[-1] - new
        longest = int(self._slots[:, :held].sum(-1).max())
        order = self._slots[:, :held].int().argsort(dim=-1, stable=True)[:, held - longest :]
        rest = torch.arange(held, held + new).expand(len(order), -1)
        whole = torch.cat([order, rest], dim=-1)
        self._slots = self._slots.gather(-1, whole)
        self._ids = self._ids.gather(-1, whole.to(self._ids.device))
        for layer in self._cache.layers:
            if layer.keys is None:
                continue
            index = order.to(layer.keys.device)[:, None, :, None]
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                batch, heads, _, size = tensor.shape
                setattr(layer, name, tensor.gather(2, index.expand(batch, heads, -1, size)))

    # --- Trying the cache

    def _count_tokens(self) -> int:
        """How many tokens the model gives a probability to: what its answer has, if in doubt."""
        stated = getattr(self._core.config.get_text_config(decoder=True), "vocab_size", None)
        try:
            weight = self._core.get_output_embeddings().weight
            if weight.is_floating_point() and weight.ndim == 2 and weight.shape[0] == stated:
                return int(stated)
        except (AttributeError, NotImplementedError):
            pass  # a head that is quantised, or that goes by another name
        with _quiet(self.model):
            return self._tried(torch.zeros(1, dtype=torch.long), 1, [1]).shape[-1]

    def _tried(self, text: Tensor, positions: int, after: list[int]) -> Tensor:
        """The model's own laws after so many tokens of one text each."""
        try:
            return self._whole(text.to(self.model.device), positions, after)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"the {self.name} ({type(self._core).__name__}) cannot be read: a forward over "
                f"{len(text)} token ids raised {_said(error)}. It must be a causal language model "
                f"that answers model(ids) with logits, in the precision it has now."
            ) from error

    def _fingerprint(self) -> tuple[Any, ...]:
        """What tells models apart that may treat a cache in different ways."""
        modules = list(self.model.modules())
        device = self.model.device
        autocast = torch.is_autocast_enabled(device.type)
        return (
            self.window,
            type(self.model),
            type(self._core),
            self._core.config.to_json_string(use_diff=False),
            getattr(self._core.config, "_attn_implementation", None),
            # Quantised layers, adapters, and layers that answer in another way (`packed`).
            frozenset(map(type, modules)),
            sum("forward" in vars(module) for module in modules),
            frozenset(parameter.dtype for parameter in self.model.parameters()),
            device.type,
            torch.get_autocast_dtype(device.type) if autocast else None,
        )

    def _examine(self, length: int, several: bool) -> "_Found":
        """Read a random text in every way, and compare."""
        text = self._random_text(length)
        middle = max(2, length // 2 - 3)
        after = {1, 2, 3, 4, 5, *range(middle, middle + 6), *range(length - 6, length + 1)}
        asked = sorted(n for n in after if 0 < n <= length)
        whole = dict(zip(asked, self._tried(text, length, asked), strict=True))
        size = whole[length].shape[-1]
        if size != self.vocab:
            raise ValueError(
                f"the {self.name} ({type(self._core).__name__}) answers with {size} "
                f"logits, and its output layer and configuration say {self.vocab}."
            )
        self._check_inputs(text)
        if self.rereads or length < CHECK_AT_LEAST:
            return _Found(length, False, False, self._why_anew)
        here = list(range(middle, middle + 5))
        part = self._tried(text[: here[-1]], here[-1], here)
        noises = _apart(part, torch.stack([whole[n] for n in here])).nan_to_num()
        noise = float(noises.max() if _wide(self.model) else noises.median())
        floor, ceiling = TOLERANCE[_coarsest(self.model)]
        if noise > ceiling:
            seen = (
                f"what it answers to {middle} tokens of a text changes by {noise:.1g} in total "
                f"variation with what it reads along with them"
            )
            return _Found(length, False, False, seen)
        allowed = min(max(floor, 30 * noise), ceiling)
        if not several:
            ways = [ONE_ROW]
        elif self.slides(length):
            ways = [PLAIN_ROWS]
        else:
            ways = [DRAFTING_ROWS, PLAIN_ROWS]
        seen = ""
        for way in ways:
            trouble = self._compare(text, whole, way, allowed)
            if not trouble:
                return _Found(length, way == DRAFTING_ROWS, True, seen)
            seen = seen or trouble
        return _Found(length, False, False, seen)

    def _compare(self, text: Tensor, whole: dict[int, Tensor], way: str, allowed: float) -> str:
        """What is wrong with laws that are read in pieces, in words; nothing if nothing is.

        Rows are beginnings of one text, so that one reading at once has all the laws.
        """
        reader, ids = self.again(), text.tolist()
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
            reader.start([ids[:end] for end in ends])
            for turn, plan in enumerate(rounds):
                if turn == 2:  # one row is over
                    reader.select([0, 2])
                    rows = [0, 2]
                counts = [sum(plan[row]) for row in rows]
                drafts = [
                    ids[ends[row] : ends[row] + right]
                    + [(ids[0] + 1) % self.vocab] * (max(counts) - right)
                    for row, (right, _) in ((row, plan[row]) for row in rows)
                ]
                laws = reader.feed(
                    [ids[reader.lengths[i] : ends[row]] for i, row in enumerate(rows)],
                    torch.tensor(drafts, dtype=torch.long) if max(counts) else None,
                    counts,
                    positions=max(counts) + 1,
                )
                for i, row in enumerate(rows):
                    right = plan[row][0]
                    expected = torch.stack([whole[ends[row] + j] for j in range(right + 1)])
                    gaps[row] += _apart(laws[i, : right + 1], expected).tolist()
                    ends[row] += right
                reader.truncate([ends[row] for row in rows])
                for row in rows:
                    ends[row] += 1
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"from a cache, {way}, it raised {_said(error)}"
        typical = max if _wide(self.model) else median
        worst = max(typical([gap for gap in row if gap == gap] or [0.0]) for row in gaps)
        if worst <= allowed:
            return ""
        return (
            f"what it answers from a cache, {way}, is {worst:.1g} in total variation away from "
            f"what it answers to the text alone, at once; rounding explains {allowed:.1g}"
        )

    def _random_text(self, length: int) -> Tensor:
        """Token ids, none of which stands for an image or the like."""
        odd = re.compile(r"(image|audio|video|vision|speech|modal|placeholder|[be]o[iav])_?.*_i")
        settings = {**vars(self._core.config), **vars(self._core.config.get_text_config())}
        barred = {value for key, value in settings.items() if odd.search(key)}
        ids = torch.randint(self.vocab, (8 * length,), generator=torch.Generator().manual_seed(0))
        kept = [token for token in ids.tolist() if token not in barred] or [0]
        return torch.tensor((kept * length)[:length])

    def _check_inputs(self, text: Tensor) -> None:
        """Raise ValueError if the model's own `generate` feeds it something else than the text."""
        try:
            fed = self._core.prepare_inputs_for_generation(
                text.unsqueeze(0).to(self.model.device), use_cache=False
            )
            more = sorted(k for k, v in fed.items() if isinstance(v, Tensor) and k not in INPUTS)
            size = fed["input_ids"].shape[-1]
        except Exception:
            return  # it has no way of its own, or wants more than a text
        if more or size != len(text):
            what = ", ".join(more) or f"{size} tokens for a text of {len(text)}"
            raise ValueError(
                f"the {self.name} ({type(self._core).__name__}) does not answer to a text alone "
                f"with what follows it: its own generate feeds it {what} as well. Use a causal "
                f"language model."
            )


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


@dataclass(frozen=True, slots=True)
class _Sliding:
    """From which length on a cache may have no holes, and what such a model does."""

    length: int
    does: str


@dataclass(frozen=True, slots=True)
class _Limit:
    """The most tokens of a text, if there is such a number, whether it is firm, and why."""

    stated: int | None
    firm: bool
    why: str = ""

    def allowing(self, context_length: int | None) -> int | None:
        """The limit where the caller says how long texts may be."""
        if context_length is None:
            return self.stated
        if isinstance(context_length, bool) or operator.index(context_length) < 1:
            raise ValueError(
                f"context_length is the most tokens of a text, at least 1: got {context_length}. "
                f"None takes what the models' configurations say."
            )
        if self.firm and self.stated is not None:
            return min(self.stated, context_length)
        return context_length


# --- What a model is -----------------------------------------------------------------------------


def bare(model: Any) -> Any:
    """The model that `torch.nn.DataParallel` and its like run: a text is read in one place."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return bare(model.module) if isinstance(model, wrappers) else model


def _core(model: Any, name: str) -> Any:
    """The model under a compiler's or an adapter's wrapper, whose own signature says nothing."""
    core = model
    while True:
        if hasattr(core, "_orig_mod"):
            core = core._orig_mod
        elif hasattr(core, "get_base_model"):
            core = core.get_base_model()
        else:
            break
    if not isinstance(core, nn.Module) or not hasattr(
        getattr(core, "config", None), "get_text_config"
    ):
        raise ValueError(
            f"the {name} must be a causal language model of transformers, loaded: got "
            f"{type(model).__name__}."
        )
    device = getattr(model, "device", None)
    if device is None or device.type == "meta":
        raise ValueError(
            f"the {name} ({type(core).__name__}) must have its weights on a device: got {device}. "
            f"Load it without offloading its first layer."
        )
    return core


def _check_cache(core: Any, text: Any, name: str) -> None:
    """Raise ValueError for models whose cache has no way back."""
    if getattr(core.config, "is_encoder_decoder", False):
        raise ValueError(f"the {name} must be a decoder-only language model: got an encoder too.")
    kinds = {
        kind
        for kind in getattr(text, "layer_types", None) or []
        if re.search("linear|conv|mamba|recurrent|hybrid|ssm", kind)
    }
    states = any(hasattr(layer, "conv_states") for layer in _layers(core.config))
    if kinds or states or getattr(core, "_is_stateful", False):
        what = ", ".join(sorted(kinds)) or "a recurrent state"
        raise ValueError(
            f"the {name} ({type(core).__name__}) keeps {what} in its cache, which cannot take "
            f"rejected drafts back exactly. Use a model whose layers all attend to keys and values."
        )


def _shares_scales(core: Any) -> str:
    """Whether what a model answers to one text depends on what it reads beside it, in words."""
    kind = "torch.ao.nn.quantized.dynamic"
    if any(type(module).__module__.startswith(kind) for module in core.modules()):
        return "its layers, quantised dynamically, round by the largest number of all they read"
    return ""


def _layers(config: Any) -> list[Any]:
    """The layers of the cache that transformers makes for a configuration, if it knows how."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception:  # kinds of layers that it has no cache for
        return []


def _windows(text: Any, core: Any) -> tuple[list[int], list[int]]:
    """Lengths from which on layers do not see a whole text: of layers, and by other names.

    What sliding layers do is told by the cache that transformers makes for them; numbers that are
    called a window anywhere else are taken for one.
    """
    layers = _layers(core.config)
    told = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    known = ("sliding_window", "attention_chunk_size") if layers else ()
    window = re.compile(r"window|chunk|local_attention|attention_span|block_size")
    other = re.compile(r"layers|pattern|feed_forward|lm_head|use_|mamba|num_|index_")
    odd = {
        value
        for settings in (vars(text), *map(vars, core.modules()))
        for key, value in settings.items()
        if type(value) is int
        and value > 1
        and window.search(key)
        and not other.search(key)
        and not (settings is vars(text) and key in known)
    }
    return [int(length) for length in told if length], sorted(odd - set(told))


def _sliding(text: Any, lengths: list[int]) -> _Sliding | None:
    if not lengths:
        return None
    least = min(lengths)
    chunks = "chunked_attention" in (getattr(text, "layer_types", None) or [])
    does = f"attends within chunks of {least}" if chunks else f"sees only its last {least}"
    return _Sliding(least, f"{does} tokens, counted in cache slots")


def _ropes(text: Any, core: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: what they are called, and their parameters."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    ropes = [dict(rope) for rope in nested or [given] if rope]
    for rope in ropes:
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for module in core.modules():
        kinds = vars(module).get("rope_type")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and all(kind != rope["rope_type"] for rope in ropes):
                ropes.append({"rope_type": kind})
    if any("dynamic_ntk" in key and value is True for key, value in vars(text).items()):
        ropes.append({"rope_type": "dynamic"})
    return ropes


def _limit(text: Any, core: Any, ropes: list[dict[str, Any]]) -> _Limit:
    """How many tokens a model can read, as far as it says."""
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None or stated < 1 or getattr(text, "alibi", False):
        return _Limit(None, False)
    if any("dynamic" in rope["rope_type"] for rope in ropes):
        return _Limit(
            stated,
            True,
            "; beyond that its rope scaling is dynamic, which makes what it answers depend on what "
            "it has read before",
        )
    if not any("inv_freq" in key for key, _ in core.named_buffers()):
        return _Limit(stated, True)
    reach = []
    for rope in ropes:
        first = rope.get("original_max_position_embeddings")
        if first is None and rope["rope_type"] == "linear":
            first = stated
        reach.append(max(stated, int((first or 0) * (rope.get("factor") or 1))))
    return _Limit(
        min(reach, default=stated),
        False,
        ", or pass context_length=... to let it read longer texts than its configuration says",
    )


def _switch(text: Any, ropes: list[dict[str, Any]]) -> int | None:
    """The length beyond which all of a text is read with other rope factors."""
    found = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in ropes
        if rope["rope_type"] == "longrope"
    ]
    return min(found, default=None)


# --- Small things --------------------------------------------------------------------------------


def _laws(out: Any, positions: int, after: list[int] | None = None) -> Tensor:
    """The last log-probabilities of a forward, or those after so many tokens, in float32 or wider.

    Shape (batch, positions, vocab).
    """
    logits = out[0] if isinstance(out, tuple) else out.logits
    logits = logits[:, -positions:] if after is None else logits[:, [n - 1 for n in after]]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=wide)


def _solid(slots: Tensor) -> bool:
    """Whether each row's slots are in one piece that reaches to the end."""
    return bool((slots[:, 1:] >= slots[:, :-1]).all())


def _apart(laws: Tensor, expected: Tensor) -> Tensor:
    """Total variation position by position; nan where nothing can be expected."""
    gap = (laws.double().exp() - expected.double().exp()).abs().sum(-1) / 2
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


def _said(error: Exception) -> str:
    """An exception in a few words."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + words[0][:200] if words else ''}"


_MODES: dict[Any, tuple[int, bool]] = {}
"""Of each module that somebody decodes with: how many do, and the mode to give it back in."""

_MODES_LOCK = threading.Lock()


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Dropout off while inside; every module gets its mode back when the last user has left."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    with _MODES_LOCK:
        for module in modules:
            users, training = _MODES.get(module, (0, module.training))
            _MODES[module] = users + 1, training
        for model in models:
            model.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            for module in modules:
                users, training = _MODES.pop(module)
                if users > 1:
                    _MODES[module] = users - 1, training
                else:
                    module.training = training


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Dropout off, no gradients, and torch's generators as they were afterwards."""
    devices = [model.device] if model.device.type == "cuda" else []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
