"""A causal language model that reads many texts at once, remembers them, and can take back.

A speculative decoder feeds drafts and takes the rejected ones back, each row of a batch its own
number of them. Nothing is moved for that: the cache keeps one slot per column that was fed, a mask
says which slots are part of a row's text, and every token carries its own position. Slots at the
end that no row needs are cut off, so that one row alone never leaves a hole; when more than half
of the slots are holes they are squeezed out.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

PREFILL_WIDTH = 512
"""Tokens of a prompt that are read in one forward; it bounds the memory of a long prompt."""

SQUEEZE_FROM = 64
"""Slots from which holes are squeezed out, once they are more than half."""


class Reader:
    """A causal language model and the key-value cache of the texts it has read, row by row.

    The model is shared (two readers may read two prompts with one model); the cache is the
    reader's own.

    Attributes:
        model: A causal language model of transformers, in eval mode.
        vocab: The number of token ids that the model gives a probability to.
        window: The most tokens of a text it can hold, None if it does not say.
        lengths: How many tokens of each row's text it has read.
    """

    def __init__(self, model: Any, *, name: str = "model") -> None:
        """Look at a model; `name` is what errors call it.

        Raises:
            ValueError: Its cache cannot take tokens back, or it takes no positions.
        """
        self.model = model
        self.name = name
        self.vocab: int = model.get_output_embeddings().weight.shape[0]
        text = model.config.get_text_config()
        self.window: int | None = getattr(text, "max_position_embeddings", None)
        self.lengths: list[int] = []
        self._sliding: int | None = _check_cache(model, text, name)
        parameters = inspect.signature(_base(model).forward).parameters
        if "position_ids" not in parameters:
            raise ValueError(
                f"the {name} ({type(model).__name__}) takes no position_ids, which rows of "
                f"different lengths need. Use a model whose forward does."
            )
        self._keeps_logits = "logits_to_keep" in parameters
        self._cache: Any = DynamicCache()
        self._slots: Tensor = torch.zeros(0, 0, dtype=torch.bool)

    def check_room(self, length: int) -> None:
        """Raise ValueError if a text of so many tokens exceeds the model's context window."""
        if self.window is not None and length > self.window:
            raise ValueError(
                f"the {self.name}'s context window holds {self.window} tokens, and this text would "
                f"have {length}. Shorten the prompt or ask for fewer new tokens."
            )

    def slides(self, length: int) -> bool:
        """Whether a text of so many tokens is longer than a window that it looks back through."""
        return self._sliding is not None and length > self._sliding

    def start(self, texts: Sequence[Sequence[int]]) -> int:
        """Forget everything, and read all but the last token of each text.

        The last one is left for the first `feed`, whose answer is the law after it.

        Returns:
            The number of forwards that it took.
        """
        self.lengths = [0] * len(texts)
        self._cache = DynamicCache()
        self._slots = torch.zeros(len(texts), 0, dtype=torch.bool)
        heads = [list(text[:-1]) for text in texts]
        longest = max(map(len, heads))
        for start in range(0, longest, PREFILL_WIDTH):
            # Right-aligned as a whole: a short text begins late.
            stop = min(start + PREFILL_WIDTH, longest)
            shifts = [len(head) - longest for head in heads]
            cut = [
                head[max(0, start + shift) : max(0, stop + shift)]
                for head, shift in zip(heads, shifts, strict=True)
            ]
            self._forward(cut, None, [0] * len(texts), stop - start, 1)
        return -(-longest // PREFILL_WIDTH)

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
            else:
                self._cache.crop(end - self._slots.shape[-1])
            self._slots = self._slots[:, :end]
        elif self._slots.shape[-1] >= SQUEEZE_FROM and 2 * max(self.lengths) < end:
            self._squeeze()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self._slots = self._slots[list(rows)]
        if self._slots.shape[-1] > 0:
            self._cache.batch_select_indices(torch.tensor(list(rows), device=self.model.device))

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take at this moment."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self._cache.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )

    @torch.no_grad()
    def _forward(
        self,
        unread: Sequence[Sequence[int]],
        drafts: Tensor | None,
        counts: Sequence[int],
        width: int,
        positions: int,
    ) -> Tensor:
        device = self.model.device
        num_drafts = 0 if drafts is None else drafts.shape[-1]
        held = self._slots.shape[-1]
        known = torch.tensor([len(tokens) for tokens in unread]).unsqueeze(-1)
        padded = [[0] * (width - len(tokens)) + list(tokens) for tokens in unread]
        ids = torch.tensor(padded, dtype=torch.long).reshape(len(unread), width)
        column = torch.arange(width + num_drafts)
        ends = width + torch.tensor(counts).unsqueeze(-1)
        fresh = (column >= width - known) & (column < ends)
        place = torch.tensor(self.lengths).unsqueeze(-1) + column - (width - known)
        place = place.clamp(min=0)
        if self.window is not None:
            place = place.clamp(max=self.window - 1)  # what lies beyond is padding
        slots = torch.cat([self._slots, fresh], dim=-1)
        outgrown = self._sliding is not None and slots.shape[-1] > self._sliding
        if outgrown and held > max(self.lengths):
            self._squeeze()  # the window must not be filled with holes
            held = self._slots.shape[-1]
            slots = torch.cat([self._slots, fresh], dim=-1)
        if self._sliding is not None and slots.shape[-1] > self._sliding and not _solid(slots):
            raise ValueError(
                f"the {self.name} sees only its last {self._sliding} tokens, counted in cache "
                f"slots, and this batch leaves holes among them once texts are longer. Decode its "
                f"rows one at a time, or with scheme='plain' and prompts of equal length."
            )
        fed = ids.to(device, non_blocking=True)
        if drafts is not None:
            fed = torch.cat([fed, drafts.to(device).clamp(min=0)], dim=-1)
        keep = {"logits_to_keep": positions} if self._keeps_logits else {}
        # Without holes no mask is needed, which leaves the faster kernels to the model.
        mask = None if bool(slots.all()) else slots.long().to(device, non_blocking=True)
        out = self.model(
            fed,
            attention_mask=mask,
            position_ids=place.to(device, non_blocking=True),
            past_key_values=self._cache,
            use_cache=True,
            **keep,
        )
        self._slots = slots
        self.lengths = [
            read + len(tokens) + count
            for read, tokens, count in zip(self.lengths, unread, counts, strict=True)
        ]
        assert self._cache.get_seq_length() == held + width + num_drafts
        logits = out.logits[:, -positions:]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits, dim=-1, dtype=wide)

    def _squeeze(self) -> None:
        """Move each row's slots together, to the right, and drop what is then before all rows."""
        longest = max(self.lengths)
        order = self._slots.int().argsort(dim=-1, stable=True)[:, -longest:]
        self._slots = self._slots.gather(-1, order)
        for layer in self._cache.layers:
            index = order.to(layer.keys.device)[:, None, :, None]
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                batch, heads, _, size = tensor.shape
                setattr(layer, name, tensor.gather(2, index.expand(batch, heads, -1, size)))


def _base(model: Any) -> Any:
    """The model under an adapter's wrapper, whose own signature says nothing."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _solid(slots: Tensor) -> bool:
    """Whether each row's slots are in one piece that reaches to the end."""
    return bool((slots[:, 1:] >= slots[:, :-1]).all())


def _check_cache(model: Any, text: Any, name: str) -> int | None:
    """The width of the sliding window, if there is one; ValueError for caches without way back."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"the {name} must be a decoder-only language model: got an encoder too.")
    kinds = set(getattr(text, "layer_types", None) or [])
    recurrent = kinds - {"full_attention", "sliding_attention"}
    if recurrent or getattr(_base(model), "_is_stateful", False):
        what = ", ".join(sorted(recurrent)) or "a recurrent state"
        raise ValueError(
            f"the {name} ({type(model).__name__}) keeps {what} in its cache, which cannot take "
            f"rejected drafts back exactly. Use a model whose layers all attend to keys and values."
        )
    window = getattr(text, "sliding_window", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)
