"""A causal language model that reads many texts at once, remembers them, and can take back.

A speculative decoder feeds drafts and takes the rejected ones back, each row of a batch its own
number of them. Nothing is moved for that: the cache keeps one slot per column that was fed, a mask
says which slots are part of a row's text, and every token carries its own position. Slots at the
end that no row needs are cut off, so that one row alone never leaves a hole; when more than half
of the slots are holes they are squeezed out.

A cache must not change what a model answers, and not every model is built so that it does not:
`cache_check.check` tries it before it is trusted. Where it fails, each text is read anew for every
token, which is slow and right.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers import DynamicCache

from .captured import FixedCache, why_not
from .eval_mode import quiet
from .state import tensor_on
from .traits import (
    bare,
    cache_name,
    check_cache,
    core_of,
    layers_of_cache,
    limit_of,
    log_p_of,
    ropes_of,
    shares_scales,
    sliding,
    switch_of,
    windows,
)

PREFILL_WIDTH = 512
"""Tokens of a prompt that are read in one forward; it bounds the memory of a long prompt."""

SQUEEZE_FROM = 64
"""Slots from which holes are squeezed out, once they are more than half."""


class KVCache:
    """A causal language model and the key-value cache of the texts it has read, row by row.

    The model is shared (two readers may read two prompts with one model); the cache is the
    reader's own.

    Attributes:
        model: A causal language model of transformers, in eval mode.
        device: Where it reads.
        vocab: The number of token ids that the model gives a probability to.
        window: The most tokens of a text it can hold, None if it does not say.
        lengths: How many tokens of each row's text it has read.
        rereads: Whether it reads each text anew for every token, without a cache.
        static: Whether its cache has a fixed size (`qstar.decoding.captured`).
        reserved: The most tokens that a text will have, as far as is known: a fixed size.
    """

    _cache: Any
    _slots: Tensor
    _ids: Tensor

    def __init__(
        self,
        model: Any,
        *,
        name: str = "model",
        context_length: int | None = None,
        implementation: str | None = None,
    ) -> None:
        """Look at a model, which may be compiled, quantised, or have adapters.

        Args:
            model: A causal language model of transformers.
            name: What errors call it.
            context_length: As in `Sampling`.
            implementation: As `cache_implementation` there.

        Raises:
            ValueError: It is no causal language model, or its cache cannot take tokens back, or
                cannot be static as was asked.
        """
        self.model = bare(model)
        self.name = name
        self.core = core_of(self.model, name)
        text = self.core.config.get_text_config(decoder=True)
        layers = layers_of_cache(self.core.config)
        check_cache(self.core, text, name, layers)
        self.device: torch.device = self.model.device  # which a model looks up anew each time
        self._parameters = frozenset(inspect.signature(self.core.forward).parameters)
        self._ropes = ropes_of(text, self.core)
        self._limit = limit_of(text, self.core, self._ropes)
        self.window = self._limit.allowing(context_length)
        self.switch = switch_of(text, self._ropes)
        told, self.odd_windows = windows(text, self.core, layers)
        self.sliding = sliding(text, [*told, *self.odd_windows])
        self._cache_name = cache_name(self.core)
        self.why_anew = shares_scales(self.core)
        self.rereads = self._cache_name is None or bool(self.why_anew)
        self.static = self._can_be_static(implementation)
        self.reserved = 0
        self.lengths: list[int] = []
        self.vocab = self._count_tokens()
        self._reset(0)

    def again(self) -> "KVCache":
        """Another reader of the same model, about which the same is known."""
        other = copy.copy(self)
        other._reset(0)
        return other

    def _can_be_static(self, implementation: str | None) -> bool:
        """Whether the cache has a fixed size; ValueError if it must and cannot."""
        on_cpu = self.device.type == "cpu"
        if implementation == "dynamic" or (implementation is None and on_cpu):
            return False
        seen = why_not(self.model, self.core)
        if self._cache_name is None or not {"position_ids", "attention_mask"} <= self._parameters:
            seen = seen or "its forward does not say that it takes positions, a mask and a cache"
        if self.rereads or self.sliding is not None or self.switch is not None or self._ropes_move:
            seen = seen or self.why_anew or "what it answers depends on how much it has read"
        if seen and implementation == "static":
            raise ValueError(
                f"the {self.name} ({type(self.core).__name__}) cannot be read from a static cache: "
                f"{seen}. Leave cache_implementation out: it is then read from a dynamic one."
            )
        return not seen

    @property
    def _ropes_move(self) -> bool:
        return any("dynamic" in rope["rope_type"] for rope in self._ropes)

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
        return not self.rereads and self.sliding is not None and length > self.sliding.length

    @property
    def minds_holes(self) -> str:
        """What the model does for which its cache may have no holes; empty if nothing."""
        return "" if self.sliding is None else self.sliding.does

    def start(self, texts: Sequence[Sequence[int]], *, last: int = 1) -> int:
        """Forget everything, and read all but the `last` tokens of each text.

        These are left for the first `feed`, whose answer is the distribution after them. A model
        that is read anew for each token takes note of all but one.

        Returns:
            The number of forwards that it took.
        """
        self._reset(len(texts))
        longest = max(map(len, texts)) - 1
        # Rope factors that switch with the length of a text are for all of it: read it at once.
        later = self.rereads or (self.switch is not None and longest >= self.switch)
        heads = [list(text[: max(0, len(text) - (1 if later else last))]) for text in texts]
        longest = max(map(len, heads))
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
        `positions = drafts + 1` entry j is the distribution of what follows the row's text and its
        first j drafts; entries beyond its own number of drafts mean nothing.

        Args:
            unread: Tokens that are known here, per row; rows may have none.
            drafts: Tokens that are only known on the device. Shape (batch, drafts).
            counts: How many drafts of each row are to be read; all of them if not given.
            positions: How many columns, from the last one, to return distributions for.

        Returns:
            Distributions in float32, or in float64 if the weights are that wide.
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
            if end == 0 and not self.static:
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
        if self.static:
            self._cache.keep_rows(rows)
        elif self._slots.shape[-1] > 0 and self._held:
            self._cache.batch_select_indices(tensor_on(self.device, list(rows)))

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take at this moment; a fixed size, its empty slots too."""
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
        self._cache = None  # whose memory the next one may take
        if self.static and rows:
            self._cache = FixedCache(self.model, self.core, rows, self.reserved)
        else:
            self._cache = DynamicCache()
        self._slots = torch.zeros(rows, 0, dtype=torch.bool)  # which are of a row's text
        self._ids = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
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
        device = self.device
        num_drafts = 0 if drafts is None else drafts.shape[-1]
        held = self._slots.shape[-1]
        if held > max(self.lengths) and self.slides(held + width + num_drafts):
            self._squeeze()  # a window must not be filled with holes
        padded = [[0] * (width - len(tokens)) + list(tokens) for tokens in unread]
        ids = torch.tensor(padded, dtype=torch.long).reshape(len(unread), width)
        column = torch.arange(width + num_drafts)
        place = torch.tensor(self.lengths).unsqueeze(-1) + column
        fresh = torch.ones(place.shape, dtype=torch.bool)
        if min(map(len, unread)) < width or min(counts) < num_drafts:
            known = torch.tensor([len(tokens) for tokens in unread]).unsqueeze(-1)
            ends = width + torch.tensor(counts).unsqueeze(-1)
            fresh = (column >= width - known) & (column < ends)
            place = torch.where(fresh, place - (width - known), 0)
        slots = torch.cat([self._slots, fresh], dim=-1)
        if self.sliding and self.slides(slots.shape[-1]) and not _solid(slots):
            raise ValueError(
                f"the {self.name} {self.sliding.does}, and this batch leaves holes there, since "
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
        return fresh, place

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
        if self.switch is not None:
            # How long the texts are that are asked about.
            sizes = self._slots.cumsum(-1)[:, -positions:][wanted]
            long = bool((sizes > self.switch).any())
            fits = self._held and long == self._long
            # One forward reads all its rows with the factors of the longest.
            if (long and bool((sizes <= self.switch).any())) or (
                not long and not fits and max(self.lengths) > self.switch
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
        if self.static:
            width = place.shape[-1]
            if not self._cache.has_room(width) and not bool(self._slots.all()):
                self._squeeze(width)
            return self._cache.read(self._ids[:, -width:], place, self._slots, positions)
        device, slots = self.device, self._slots
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
                f"the {self.name} ({type(self.core).__name__}) does not keep what it reads in the "
                f"cache that it is given: {self._cache.get_seq_length()} tokens in place of "
                f"{slots.shape[-1]}. qstar.generate reads such a model without a cache."
            )
        return log_p_of(out, positions)

    def _read_anew(self, wanted: Tensor) -> Tensor:
        """What follows the last columns, each by reading the text up to it, alone and at once."""
        rows, positions = wanted.shape
        beyond, answers = self._slots.shape[-1] - positions, None
        for row, column in wanted.nonzero().tolist():
            here = self._slots[row, : beyond + column + 1].nonzero()[:, 0].to(self._ids.device)
            answer = self._whole(self._ids[row].index_select(0, here), 1)[0]
            if answers is None:
                answers = answer.new_zeros(rows, positions, answer.shape[-1]).log_softmax(-1)
            answers[row, column] = answer
        if answers is None:
            return torch.zeros(rows, positions, self.vocab, device=self._ids.device).log_softmax(-1)
        return answers

    def _whole(self, text: Tensor, positions: int, after: list[int] | None = None) -> Tensor:
        """The model's own distributions after the last tokens of one text, or some of them."""
        options: dict[str, Any] = {}
        if "use_cache" in self._parameters:
            options["use_cache"] = False
        if "logits_to_keep" in self._parameters and not self.why_anew:
            options["logits_to_keep"] = positions
        return log_p_of(self.model(text.unsqueeze(0), **options), positions, after)[0]

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
        self._ids = self._ids.gather(-1, whole.to(self._ids.device, non_blocking=True))
        if self.static:
            self._cache.reorder(order)
            return
        for layer in self._cache.layers:
            if layer.keys is None:
                continue
            index = order.to(layer.keys.device, non_blocking=True)[:, None, :, None]
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                batch, heads, _, size = tensor.shape
                setattr(layer, name, tensor.gather(2, index.expand(batch, heads, -1, size)))

    # --- Trying the cache

    def _count_tokens(self) -> int:
        """How many tokens the model gives a probability to: what its answer has, if in doubt."""
        stated = getattr(self.core.config.get_text_config(decoder=True), "vocab_size", None)
        try:
            weight = self.core.get_output_embeddings().weight
            if weight.is_floating_point() and weight.ndim == 2 and weight.shape[0] == stated:
                return int(stated)
        except (AttributeError, NotImplementedError):
            pass  # a head that is quantised, or that goes by another name
        with quiet(self.model):
            return self.tried(torch.zeros(1, dtype=torch.long), 1, [1]).shape[-1]

    def tried(self, text: Tensor, positions: int, after: list[int]) -> Tensor:
        """The model's own distributions after so many tokens of one text each."""
        try:
            return self._whole(text.to(self.device), positions, after)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"the {self.name} ({type(self.core).__name__}) cannot be read: a forward over "
                f"{len(text)} token ids raised {said(error)}. It must be a causal language model "
                f"that answers model(ids) with logits, in the precision it has now."
            ) from error


# --- Small things --------------------------------------------------------------------------------


def _solid(slots: Tensor) -> bool:
    """Whether each row's slots are in one piece that reaches to the end."""
    return bool((slots[:, 1:] >= slots[:, :-1]).all())


def said(error: Exception) -> str:
    """An exception in a few words."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + words[0][:200] if words else ''}"
