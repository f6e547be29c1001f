"""Text from q* of two language models: prompts or chats in, text out, all at once or as it comes.

    decoder = OptimalSpeculativeDecoder(policy, teacher, tokenizer=tokenizer, max_new_tokens=80)
    decoder.complete(messages, system="You are a pirate.", teacher_system="You are a chemist.").text

Everything is `qstar.generate`; this keeps the pair, its tokenizer and its options together.

What the text of new tokens is: a text that is continued gets what decoding prompt and new tokens
together adds to the decoded prompt, so that the two can be written one behind the other (a token
may stand for a word with the space before it, for a part of a word, or for one byte of a
character). The answer in a chat is a text of its own, decoded alone: it may be put into a message,
and begins without the space that a SentencePiece tokenizer would put between it and the prompt.
Text that is given piece by piece (`Pieces`) joins to the same, with any tokenizer.
"""

import contextvars
import inspect
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..decoding import generate as decode
from ..decoding.generate import Generation, Prompts
from ..decoding.kv_cache import KVCache
from .checkpoints import Messages, chat_ids, check_same_vocabulary

Prompt = str | Messages
"""A text to be continued as it stands, or the messages of a chat (`checkpoints.chat_ids`)."""

OPTIONS = frozenset(
    name
    for name, parameter in inspect.signature(decode.generate).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
KEPT = 32
"""Tokens that are decoded again for those that come after them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """New text, and the tokens it was decoded from.

    Attributes:
        text: The new text; a stop string that ended it is its end.
        generation: The tokens and what was known where each was drawn. The last one may reach
            beyond a stop string.
    """

    text: str
    generation: Generation


class OptimalSpeculativeDecoder:
    """Two language models with one vocabulary, whose q* is decoded.

    Attributes:
        policy: A causal language model of transformers.
        teacher: Another one, or the policy itself, which then wants a prompt of its own.
        tokenizer: The policy's; without one only `generate` works.
        teacher_tokenizer: The teacher's: of the same vocabulary, with its own chat template.
        options: Options of `qstar.generate` for every call; a call's own come first.

    Source: the class of this name in the analysis, problem 1, with exact acceptance.
    """

    def __init__(
        self,
        policy: Any,
        teacher: Any,
        *,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """Look at the pair: what cannot be decoded is refused here, before any prompt is read.

        Where the models' output layers are padded to different sizes, `vocab` is taken from the
        tokenizer.

        Raises:
            TypeError: An option is none of `qstar.generate`.
            ValueError: A model's cache cannot take tokens back, or the vocabularies differ.
        """
        _check_options(options)
        sizes = [
            KVCache(model, name=name).vocab
            for name, model in (("policy", policy), ("teacher", teacher))
        ]
        if tokenizer is not None and teacher_tokenizer is not None:
            check_same_vocabulary(tokenizer, teacher_tokenizer)
        if tokenizer is not None and sizes[0] != sizes[1]:
            options = {"vocab": min(len(tokenizer), *sizes)} | options
        self.policy = policy
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.teacher_tokenizer = tokenizer if teacher_tokenizer is None else teacher_tokenizer
        self.options = options

    def generate(
        self, policy_ids: Prompts, teacher_ids: Prompts | None = None, **options: Any
    ) -> Generation:
        """Draw tokens: `qstar.generate` of the pair, with its options and these."""
        _check_options(options)
        options = self.options | options
        return decode.generate(self.policy, self.teacher, policy_ids, teacher_ids, **options)

    __call__ = generate

    def complete(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Completion:
        """Continue a text, or answer a chat.

        Args:
            prompt: What the policy reads: a text, or messages.
            teacher_prompt: What the teacher reads; None for the policy's.
            system: The policy's system prompt, put before its messages.
            teacher_system: The teacher's; None for the policy's. The empty string is none at all.
            stop: Strings that end the new text as soon as one is in it, and behind that string.
            skip_special_tokens: Leave the tokenizer's special tokens out of the text.
            options: Of `qstar.generate`.

        Raises:
            ValueError: There is no tokenizer, or no chat template; the template refuses the
                messages; a system prompt came with a text in place of messages; or as
                `qstar.generate` raises.

        Warns:
            UserWarning: The chat template drops the system prompt, or both parents read one text
                though different ones were asked for.
        """
        _check_stop(stop)
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        context = ids[0].tolist() if isinstance(prompt, str) else []
        pieces = Pieces(self.tokenizer, context, skip_special_tokens=skip_special_tokens)
        result = self.generate(*ids, **self._stopping(stop, pieces, len(ids[0]), options))
        tokens = result.tokens[: int(result.lengths)].tolist()
        text = new_text(self.tokenizer, context, tokens, skip_special_tokens=skip_special_tokens)
        return Completion(text[: _end_of_stop(text, stop)], result)

    def stream(
        self,
        prompt: Prompt,
        *,
        teacher_prompt: Prompt | None = None,
        system: str | None = None,
        teacher_system: str | None = None,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """The pieces of the text of `complete`, each as soon as its round is over.

        The models run in a thread; closing the iterator ends it with its current round. Whatever
        `complete` would raise is raised here, at the first piece at the latest that it concerns.
        """
        _check_options(options)
        _check_stop(stop)
        ids = self._prompts(prompt, teacher_prompt, system, teacher_system)
        context = ids[0].tolist() if isinstance(prompt, str) else []
        pieces, seen = (
            Pieces(self.tokenizer, context, skip_special_tokens=skip_special_tokens)
            for _ in range(2)
        )
        options = self._stopping(stop, seen, len(ids[0]), options)
        return _up_to_stop(self._pieces(ids, pieces, options), stop)

    def _pieces(
        self, ids: tuple[Tensor, Tensor], pieces: "Pieces", options: dict[str, Any]
    ) -> Iterator[str]:
        rounds: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()
        listener = options.pop("on_tokens", self.options.get("on_tokens"))

        def on_tokens(tokens: Tensor) -> None:
            if listener is not None:
                listener(tokens)
            rounds.put(tokens[0].tolist())
            if left.is_set():
                raise _UnreadError

        def run() -> None:
            try:
                with _autocast_as(precision):
                    self.generate(*ids, on_tokens=on_tokens, **options)
                rounds.put(None)
            except _UnreadError:
                pass
            except BaseException as error:  # raised where the text is read, which else waits
                rounds.put(error)

        precision = _autocast_here(self.policy, self.teacher)
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: context.run(run), name="qstar-stream", daemon=True)
        worker.start()
        try:
            while isinstance(new := rounds.get(), list):
                if piece := pieces.put(new):
                    yield piece
            if new is not None:
                raise new
            if piece := pieces.end():
                yield piece
        finally:
            left.set()
            worker.join()

    # --- Text and tokens

    def _prompts(
        self,
        prompt: Prompt,
        teacher_prompt: Prompt | None,
        system: str | None,
        teacher_system: str | None,
    ) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: pass tokenizer=... when making the decoder.")
        teacher_prompt = prompt if teacher_prompt is None else teacher_prompt
        teacher_system = system if teacher_system is None else teacher_system
        ids = (
            _ids(self.tokenizer, prompt, system),
            _ids(self.teacher_tokenizer, teacher_prompt, teacher_system),
        )
        asked_alike = teacher_prompt == prompt and (teacher_system or None) == (system or None)
        if not asked_alike and torch.equal(*ids):
            warnings.warn(
                "policy and teacher read the same text, though different prompts or system prompts "
                "were asked for: to the tokenizer and its chat template they are one.",
                stacklevel=3,
            )
        return ids

    def _stopping(
        self, stop: Sequence[str], pieces: "Pieces", read: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        if not stop:
            return dict(options)
        criteria = options.get("stopping_criteria", self.options.get("stopping_criteria", ()))
        return options | {"stopping_criteria": [*criteria, _StopInText(stop, pieces, read)]}


# --- Text from tokens ----------------------------------------------------------------------------


def new_text(
    tokenizer: Any, context: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool
) -> str:
    """What tokens add to the text of those before them; without any, what they decode to alone."""
    before, whole = (
        tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens) if ids else ""
        for ids in (context, [*context, *tokens])
    )
    return str(whole[_common(before, whole) :])


class Pieces:
    """The text of tokens that come one after another, each piece as soon as it cannot change.

    The pieces join to `new_text` of all the tokens. Held back are characters whose bytes are not
    all there, runs of byte tokens (one bad byte spoils a run as a whole), and spaces that the
    tokenizer may yet clean up. A piece costs the decoding of some `KEPT` tokens, however long the
    text is.
    """

    def __init__(
        self, tokenizer: Any, context: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Begin behind `context`, the tokens of a text that is continued."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._special = _special_ids(tokenizer) if skip_special_tokens else set()
        self._context, self._tokens = list(context), list[int]()
        self._given = list[str]()
        self._window = list(context)  # the last tokens, from one whose text is known to fit
        self._text = self._before = self._decode(self._window)
        self._done: int | None = None  # how much of the window's text is given; None: nothing new
        self._retry = 2 * KEPT
        self._shorten(len(self._text) - len(self._certain()))
        self._before = self._text

    def put(self, tokens: Sequence[int]) -> str:
        """Take in what follows, and return what is certain now and has not been returned yet."""
        self._tokens += tokens
        self._window += tokens
        self._text = self._decode(self._window)
        certain = self._certain()
        if self._done is None:
            common = _common(self._before, certain)
            if common == len(certain):
                return ""
            self._done = common
        piece = certain[self._done :]
        self._done = max(self._done, len(certain))
        self._given.append(piece)
        self._shorten(len(self._text) - self._done)
        return piece

    @property
    def pending(self) -> str:
        """What the tokens so far decode to beyond what was returned, if none came after them."""
        done = _common(self._before, self._text) if self._done is None else self._done
        return self._text[done:]

    def end(self) -> str:
        """The rest, when there are no more tokens."""
        whole = new_text(
            self._tokenizer, self._context, self._tokens, skip_special_tokens=self._skip
        )
        given = "".join(self._given)
        if whole.startswith(given):
            return whole[len(given) :]
        warnings.warn(
            f"the pieces that were given do not join to the text as a whole: this tokenizer "
            f"({type(self._tokenizer).__name__}) changes text by what comes long after it. Decode "
            f"the tokens together.",
            stacklevel=2,
        )
        return self.pending

    def _decode(self, tokens: list[int], **options: bool) -> str:
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, **options))

    def _certain(self) -> str:
        """The window's text but for what may change with the tokens that come."""
        end, run = len(self._window), False
        while end > 0 and (
            self._window[end - 1] in self._special or self._is_byte(self._window[end - 1])
        ):
            run = run or self._window[end - 1] not in self._special
            end -= 1
        text = self._decode(self._window[:end]) if run else self._text
        if not self._cleans:
            return BROKEN.sub("", text)
        raw = self._decode(self._window[:end], clean_up_tokenization_spaces=False)
        certain = LOOSE.sub("", BROKEN.sub("", raw))
        return certain if raw == text else str(self._tokenizer.clean_up_tokenization(certain))

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and BYTE.fullmatch(name) is not None

    def _shorten(self, open_: int) -> None:
        """Let the window begin later, where what it decodes to is the end of the text as it is."""
        if len(self._window) < self._retry:
            return
        for start in range(len(self._window) - KEPT, max(0, len(self._window) - 2 * KEPT), -4):
            text = self._decode(self._window[start:])
            if len(text) >= open_ + KEPT // 4 and self._text.endswith(text):
                if self._done is not None:
                    self._done -= len(self._text) - len(text)
                self._window, self._text = self._window[start:], text
                break
        self._retry = len(self._window) + KEPT


BROKEN = re.compile("\N{REPLACEMENT CHARACTER}{1,4}\\Z")
"""What a tokenizer writes for the bytes of a character that has not come to its end."""

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""The name of a token that is one byte, in tokenizers that fall back to bytes."""

LOOSE = re.compile(r"(?: +(?:n|'|n'))* +n?'?[vr]?\Z")
"""What `clean_up_tokenization_spaces` may yet pull together, as in "do n't" and "they ' re"."""


class PieceStreamer(BaseStreamer):  # type: ignore[misc]
    """A streamer for transformers' `generate` or the adapter's: iterate over it for pieces.

    transformers' own TextStreamer decodes new tokens without what stands before them, and begins
    anew after each line: with a SentencePiece tokenizer it loses a space each time.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        continues: bool = True,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Say how to decode.

        Args:
            tokenizer: The policy's.
            continues: Whether the new text continues the prompt; False for the answer in a chat.
            skip_special_tokens: Leave the tokenizer's special tokens out of the text.
            timeout: The seconds to wait for a piece, then `queue.Empty` is raised; None waits for
                as long as it takes.
        """
        self._make: Callable[[Sequence[int]], Pieces] = lambda prompt: Pieces(
            tokenizer, prompt if continues else (), skip_special_tokens=skip_special_tokens
        )
        self._timeout = timeout
        self._pieces: Pieces | None = None
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        """The prompt first, then new tokens. Shape (1, length) or (length,)."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer follows one row: got {len(value)}.")
        tokens = value.reshape(-1).tolist()
        if self._pieces is None:
            self._pieces = self._make(tokens)
        elif piece := self._pieces.put(tokens):
            self._queue.put(piece)

    def end(self) -> None:
        """No more tokens."""
        if self._pieces is not None and (piece := self._pieces.end()):
            self._queue.put(piece)
        self._pieces = None
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get(timeout=self._timeout)) is not None:
            yield piece


def _special_ids(tokenizer: Any) -> set[int]:
    """The tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


# --- Where the text ends -------------------------------------------------------------------------


class _StopInText:
    """A criterion: whether a string is in the new text, asked once after each new token."""

    def __init__(self, stop: Sequence[str], pieces: Pieces, read: int) -> None:
        self._stop = stop
        self._pieces = pieces
        self._read = read
        self._tail = ""  # of what is certain, as much as a string may begin in

    def __call__(self, ids: Tensor, scores: Any) -> bool:
        new = ids[0, self._read :].tolist()
        self._read = ids.shape[-1]
        certain = self._tail + self._pieces.put(new)
        found = _end_of_stop(certain + self._pieces.pending, self._stop) is not None
        self._tail = certain[-max(map(len, self._stop)) :]
        return found


def _up_to_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the end of the first stop string in them."""
    tail, longest = "", max(map(len, stop), default=0)
    try:
        for piece in pieces:
            end = _end_of_stop(tail + piece, stop)
            if end is not None:
                if rest := piece[: max(0, end - len(tail))]:
                    yield rest
                return
            yield piece
            tail = (tail + piece)[-longest:]
    finally:
        pieces.close()  # type: ignore[attr-defined]


def _end_of_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first ends, None without any."""
    return min((text.index(s) + len(s) for s in stop if s in text), default=None)


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise ValueError(f"stop holds strings, in a list: got {stop!r} alone.")
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop holds strings of at least one character: got {string!r}.")


# --- The thread of a stream ----------------------------------------------------------------------

_Autocast = list[tuple[str, torch.dtype]]


def _autocast_here(*models: Any) -> _Autocast:
    """Where torch computes in another precision now; a new thread would not know."""
    kinds = sorted({"cpu", *(model.device.type for model in models)})
    return [
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    ]


def _autocast_as(precision: _Autocast) -> ExitStack:
    stack = ExitStack()
    for kind, dtype in precision:
        stack.enter_context(torch.autocast(kind, dtype=dtype))
    return stack


class _UnreadError(Exception):
    """Nobody reads the stream any more."""


def _ids(tokenizer: Any, prompt: Prompt, system: str | None) -> Tensor:
    """A prompt as token ids: a chat by the template, ready for the assistant's answer."""
    if not isinstance(prompt, str):
        return chat_ids(tokenizer, prompt, system=system or None)
    if system:
        raise ValueError(
            "a system prompt goes before messages, and the prompt is a text, which is continued as "
            'it stands: pass [{"role": "user", "content": ...}].'
        )
    return torch.tensor(tokenizer(prompt).input_ids, dtype=torch.long)


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise TypeError(
            f"qstar.generate has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(OPTIONS))}."
        )
