"""Text from tokens that come one after another: pieces that join to the text as a whole.

transformers' TextStreamer and TextIteratorStreamer, and the DecodeStream of tokenizers, do not
serve here. Over the tokenizers of the tests: TextStreamer decodes new tokens without what stands
before them, so that a continuation loses its first space unless the tokenizer is byte-level, and it
begins anew after each line, which loses a space with SentencePiece. Both change their mind about
text that `clean_up_tokenization_spaces` pulls together later ("do n't"), whatever the prompt.
DecodeStream never gives the end of a text that ends in broken bytes, and stops with an error at
some that come before.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _quiet  # noqa: F401 - before transformers

# isort: split
from transformers.generation.streamers import TextIteratorStreamer

KEPT = 32
"""Tokens that are decoded again for those that come after them."""

BROKEN = re.compile("\N{REPLACEMENT CHARACTER}{1,4}\\Z")
"""What a tokenizer writes for the bytes of a character that has not come to its end."""

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""The name of a token that is one byte, in tokenizers that fall back to bytes."""

LOOSE = re.compile(r"(?: +(?:n|'|n'))* +n?'?[vr]?\Z")
"""What `clean_up_tokenization_spaces` may yet pull together, as in "do n't" and "they ' re"."""


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
        self._window = list(context)  # the last tokens, from one whose text is known to fit
        self._before = self._decode(self._window)  # their text, as far as it is given
        self._shorten(len(self._certain()))

    def put(self, tokens: Sequence[int]) -> str:
        """Take in what follows, and return what is certain now and has not been returned yet."""
        self._window += tokens
        certain = self._certain()
        piece = certain[_common(self._before, certain) :]
        if piece:
            self._before = certain
            self._shorten(len(certain))
        return piece

    def rest(self) -> str:
        """What the tokens so far decode to beyond what was returned, if none come after them."""
        text = self._decode(self._window)
        return text[_common(self._before, text) :]

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
        known = self._window[:end] if run else self._window
        text = self._decode(known)
        if not self._cleans:
            return BROKEN.sub("", text)
        raw = self._decode(known, clean_up_tokenization_spaces=False)
        certain = LOOSE.sub("", BROKEN.sub("", raw))
        return certain if raw == text else str(self._tokenizer.clean_up_tokenization(certain))

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and BYTE.fullmatch(name) is not None

    def _shorten(self, certain: int) -> None:
        """Let the window begin later, where what it decodes to is the end of the text as it is."""
        length = len(self._window)
        if length < 3 * KEPT:
            return
        text = self._decode(self._window)
        for start in range(length - KEPT, length - 2 * KEPT, -4):
            kept = self._decode(self._window[start:])
            cut = len(text) - len(kept)
            if cut <= certain - KEPT // 4 and text.endswith(kept):
                self._window, self._before = self._window[start:], self._before[cut:]
                return


class PieceStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """A streamer for transformers' `generate` or the adapter's: iterate over it for pieces."""

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
        super().__init__(tokenizer, timeout=timeout, skip_special_tokens=skip_special_tokens)
        self._continues = continues
        self._pieces: Pieces | None = None

    def put(self, value: Tensor) -> None:
        """The prompt first, then new tokens. Shape (1, length) or (length,)."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"a streamer follows one row: got {len(value)}.")
        tokens = value.reshape(-1).tolist()
        if self._pieces is None:
            context = tokens if self._continues else ()
            self._pieces = Pieces(self.tokenizer, context, **self.decode_kwargs)
        elif piece := self._pieces.put(tokens):
            self.on_finalized_text(piece)

    def end(self) -> None:
        """No more tokens."""
        rest = "" if self._pieces is None else self._pieces.rest()
        self._pieces = None
        self.on_finalized_text(rest, stream_end=True)


def _special_ids(tokenizer: Any) -> set[int]:
    """The tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
