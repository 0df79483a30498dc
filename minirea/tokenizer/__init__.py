"""Text to token ids and back: tokenizer.json, Mistral's tekken.json and SentencePiece behind one Tokenizer.

Two libraries encode: `tokenizers` for both JSON formats, `sentencepiece` for tokenizer.model. Decoding is done here,
one token at a time: a token is text, or raw bytes that may be part of a character, and StreamDecoder joins them.
`decode` is a stream read to its end, so the two cannot differ.
"""

from minirea.tokenizer.stream import StreamDecoder
from minirea.tokenizer.tokenizer import NoTokenizerError, Tokenizer, load_tokenizer

__all__ = ["NoTokenizerError", "StreamDecoder", "Tokenizer", "load_tokenizer"]
