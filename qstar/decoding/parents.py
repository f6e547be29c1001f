"""The models of a decode, each with the cache of what it has read."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .costs import PARENTS
from .kv_cache import PREFILL_WIDTH, KVCache
from .state import Forward, State
from .timing import Timer, timed


class Parents:
    """Policy and teacher, apart or as rows of one batch, and a draft model if there is one.

    Whoever asks need not know which: `read` answers for each model by its name.

    Attributes:
        caches: By model, "both" for one model that reads both parents' texts in one call.
        vocab: The number of token ids that are used.
        device: Where the distributions meet: the policy's.
    """

    def __init__(
        self, caches: Mapping[str, KVCache], *, vocab: int, together: bool = False
    ) -> None:
        """Take the models' caches; `together` lets the one model that is both parents read both."""
        self.caches = dict(caches)
        self.vocab = vocab
        self.device: torch.device = self.caches["policy"].device
        if together:
            self.caches["both"] = self.caches.pop("policy").again()
            del self.caches["teacher"]
        self._timers: list[Timer] = []

    def together(self) -> "Parents":
        """The same, with the one model that is both parents reading for both."""
        return Parents(self.caches, vocab=self.vocab, together=True)

    def start(self, state: State) -> tuple[Forward, ...]:
        """Read what of the prompts is too long for the first forward pass of a round.

        That one reads the rest of its prompt together with whatever else it is asked about.
        """
        forwards: list[Forward] = []
        for name, cache in self.caches.items():
            texts = self._texts(name, state)
            forwards += _prefill(name, cache, [prompt for prompt, _ in texts])
        return tuple(forwards)

    def read(
        self,
        names: Sequence[str],
        state: State,
        drafts: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """What each of some models makes of the texts, and of drafts behind them.

        Whatever a cache holds beyond the texts is taken back first.

        Args:
            names: Whom to ask. Parents that read together are asked together.
            state: The texts.
            drafts: Tokens that are known on the device alone. Shape (rows, width).
            counts: How many of them each row has.

        Returns:
            By name, the distributions after the text and after each draft. Shape (rows, width + 1,
            vocab).
        """
        width = 0 if drafts is None else drafts.shape[-1]
        drafts, counts = (drafts, counts) if width else (None, None)
        if "both" in self.caches and set(names) == set(PARENTS):
            twice = None if drafts is None else drafts.repeat(2, 1)
            both = self._feed(
                "both",
                self.unread("both", state),
                twice,
                None if counts is None else [*counts, *counts],
                width + 1,
                begins=self._begins("both", state),
            )
            return dict(zip(PARENTS, both.split(len(state.rows)), strict=True))
        return {
            name: self._feed(
                name,
                self.unread(name, state),
                drafts,
                counts,
                width + 1,
                begins=self._begins(name, state),
            )
            for name in names
        }

    def read_on(self, name: str, last: Tensor, counts: Sequence[int]) -> Tensor:
        """What follows one more draft of each row, behind what the model has read already.

        Args:
            name: The model.
            last: The draft. Shape (rows,).
            counts: 1 for the rows that have it, else 0.
        """
        return self._feed(name, [[] for _ in counts], last.unsqueeze(-1), counts, 1)

    def take_back(self, state: State, settled: Sequence[int], alive: Sequence[int]) -> None:
        """Forget of each row what lies beyond its first `settled` new tokens, and ended rows.

        Args:
            state: The round's, from before anything was kept.
            settled: For each of its rows.
            alive: Which of its rows go on, as places among them.
        """
        for name, cache in self.caches.items():
            lengths = [len(prompt) for prompt, _ in self._texts(name, state)]
            copies = len(lengths) // len(settled)  # "both" has two rows for each
            kept = [*settled] * copies
            cache.truncate([a + b for a, b in zip(lengths, kept, strict=True)])
            if alive and len(alive) < len(settled):
                rows = [copy * len(settled) + place for copy in range(copies) for place in alive]
                cache.select(rows)

    def forwards(self) -> tuple[Forward, ...]:
        """The forward passes since this was last asked, in order."""
        taken = tuple(timer.forward() for timer in self._timers)
        self._timers = []
        return taken

    def _texts(self, name: str, state: State) -> list[tuple[Sequence[int], Sequence[int]]]:
        """(prompt, new tokens) of each row of a cache."""
        parents: Iterable[str] = PARENTS if name == "both" else (name,)
        return [(state.prompts[p][row], state.new[row]) for p in parents for row in state.rows]

    def unread(self, name: str, state: State) -> list[list[int]]:
        """The tokens of the texts that a model has not read, at least one of each row."""
        cache, texts = self.caches[name], self._texts(name, state)
        cache.truncate([len(prompt) + len(new) - 1 for prompt, new in texts])
        return [
            [*prompt[read:], *new] if read < len(prompt) else [*new[read - len(prompt) :]]
            for (prompt, new), read in zip(texts, cache.lengths, strict=True)
        ]

    def _begins(self, name: str, state: State) -> bool:
        """Whether a model has not read some prompt up to its last token."""
        read = self.caches[name].lengths
        pairs = zip(self._texts(name, state), read, strict=True)
        return any(have < len(prompt) - 1 for (prompt, _), have in pairs)

    def _feed(
        self,
        name: str,
        unread: Sequence[Sequence[int]],
        drafts: Tensor | None,
        counts: Sequence[int] | None,
        positions: int,
        *,
        begins: bool = False,
    ) -> Tensor:
        cache = self.caches[name]
        width = max(map(len, unread)) + (0 if drafts is None else drafts.shape[-1])
        with timed(self._timers, name, width, len(unread), cache.device, begins=begins):
            log_p = cache.feed(unread, drafts, counts, positions=positions)
        if log_p.shape[-1] > self.vocab:
            log_p = log_p[..., : self.vocab].log_softmax(-1)
        return log_p.to(self.device)


def _prefill(name: str, cache: KVCache, prompts: list[Sequence[int]]) -> list[Forward]:
    """Read prompts into a cache, but for the last part; what each forward pass took, on average."""
    begun = time.perf_counter()
    longest = max(map(len, prompts))
    calls = cache.start(prompts, last=(longest - 1) % PREFILL_WIDTH + 1)
    spent = (time.perf_counter() - begun) / max(1, calls)
    return [Forward(name, PREFILL_WIDTH, len(prompts), spent, begins=True)] * calls
