"""Tiny tokenizers of every kind that decodes in its own way, with one special token each."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "cat", "sat", "on", "don", "we", "it", "rock", "do", "x"]
ENDS = ["s", "ing", "ed", "n", "t", "ve", "re", "m"]
MARKS = [".", ",", "!", "?", "'"]
LETTERS = list("acehiknortuvwxdsm")
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def finished(backend, **options):
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    options = {"eos_token": "<end>", "clean_up_tokenization_spaces": False} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def index(tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def byte_level(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(index([*alphabet, "th", "the", "Ġt"]), [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend, **options)


def llama_like(**options):
    """BPE over ▁, falling back to bytes: the kind of Llama 2, Mistral and Gemma."""
    words = ["▁" + word for word in WORDS] + WORDS + ENDS + MARKS + LETTERS + ["▁", "\n", "中"]
    backend = Tokenizer(
        models.BPE(index(["<unk>", *BYTES, *words]), [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finished(backend, **options)


def unigram(**options):
    pieces = ["<unk>", *("▁" + word for word in WORDS), *ENDS, *MARKS, *LETTERS, "▁", "é"]
    scores = [(piece, -1.0 / len(piece)) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return finished(backend, **options)


def word_piece(**options):
    words = ["[UNK]", *WORDS, *ENDS, *("##" + end for end in ENDS), *MARKS, *LETTERS]
    backend = Tokenizer(models.WordPiece(index(words), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return finished(backend, **{"clean_up_tokenization_spaces": True} | options)


def word_ends(**options):
    """A word ends with </w>, as in the first GPT."""
    letters = sorted({*LETTERS, *"".join(WORDS + MARKS)})
    tokens, merges = ["<unk>", *letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            suffix = "</w>" if end == len(word) else ""
            merges.append((word[: end - 1], word[end - 1] + suffix))
            tokens.append(word[:end] + suffix)
    backend = Tokenizer(
        models.BPE(
            index(tokens), list(dict.fromkeys(merges)), unk_token="<unk>", end_of_word_suffix="</w>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder("</w>")
    return finished(backend, **options)


KINDS = {
    "byte-level": byte_level,
    "SentencePiece BPE with bytes": llama_like,
    "Unigram": unigram,
    "Unigram, cleaned up": lambda **options: unigram(clean_up_tokenization_spaces=True, **options),
    "WordPiece, cleaned up": word_piece,
    "WordPiece": lambda **options: word_piece(clean_up_tokenization_spaces=False, **options),
    "word ends": word_ends,
}
