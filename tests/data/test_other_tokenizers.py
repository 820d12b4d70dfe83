"""Tokenizers of other make: what a tokenizer.json of each usual kind can do here, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nsa_transformer.config import ConfigError
from nsa_transformer.data.chat import ChatTemplate
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from nsa_transformer.inference.generate import TextStream

TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "def f(x):\n    return x + 1\n", "na\u00efve caf\u00e9, \u4f60\u597d\n"] * 30
CHAT = ["<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def gpt2(path: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    backend.save(str(path))


def qwen(path: Path) -> None:
    """Its own pattern, NFC, and chat tokens behind the vocabulary; end of document is an added token too."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(special("<|endoftext|>", *CHAT))
    backend.save(str(path))


def llama2(path: Path) -> None:
    """SentencePiece's BPE as converted: blanks as U+2581, bytes as <0xNN> where there is no token."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained.train_from_iterator(TEXTS[:60], trainers.BpeTrainer(vocab_size=150))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    backend.save(str(path))


def unigram(path: Path) -> None:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = ["<unk>", "</s>"]
    backend.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=200, special_tokens=names, unk_token="<unk>", show_progress=False))
    backend.save(str(path))


def wordpiece(path: Path, end: str = "[SEP]") -> None:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", end], show_progress=False))
    backend.save(str(path))


KINDS = {"gpt2": gpt2, "qwen": qwen, "llama2": llama2, "unigram": unigram}


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    KINDS[request.param](tmp_path / "tokenizer.json")
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["The quick brown fox.", "def f(x):\n    return x + 1\n", "na\u00efve caf\u00e9, \u4f60\u597d", "", "<|endoftext|> </s> <|im_end|>"]
)
def test_text_and_its_end(loaded: Tokenizer, text: str) -> None:
    ids = loaded.encode(text)
    assert loaded.eod_id not in ids
    assert not {token for name, token in loaded.special_tokens.items() if name != "<unk>"} & set(ids)
    assert loaded.encode_bytes(text.encode()) == ids
    assert [i for part in loaded.encode_stream([text[:3], text[3:]]) for i in part] == ids
    assert loaded.decode([*ids, loaded.eod_id]) == loaded.decode(ids)
    if "<0x00>" in loaded._backend.get_vocab():
        assert loaded.decode(ids) == text
    if loaded.is_byte_level:
        assert loaded.decode_bytes(ids) == text.encode()
        assert loaded.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["The quick brown fox.", " def f(x):\n    return x + 1\n", "na\u00efve caf\u00e9, \u4f60\u597d \U0001f600", ""])
def test_text_that_comes_token_by_token(loaded: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = loaded.encode(text) * 3
    stream, whole, longest = TextStream(loaded), loaded.decode(ids), 0
    decode = loaded.decode

    def watched(some: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(some))
        return decode(some)

    monkeypatch.setattr(loaded, "decode", watched)
    assert "".join([*map(stream.add, ids), stream.rest()]) == whole
    assert longest <= 12, "not all of it again for every token"


def test_bytes_that_never_become_text_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama2(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    byte, stream, longest, decode = loaded._backend.token_to_id("<0xFF>"), TextStream(loaded), 0, loaded.decode

    def watched(some: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(some))
        return decode(some)

    monkeypatch.setattr(loaded, "decode", watched)
    assert "".join([*(stream.add(byte) for _ in range(100)), stream.rest()]) == "\ufffd" * 100
    assert longest <= 8


@pytest.mark.parametrize(("kind", "byte_level"), [(gpt2, True), (qwen, True), (llama2, False), (unigram, False)])
def test_bytes_that_are_no_text(kind, byte_level: bool, tmp_path: Path) -> None:
    kind(tmp_path / "tokenizer.json")
    tokenizer, content = Tokenizer.load(tmp_path), b"caf\xc3\xa9 \xff\xfe end"
    assert tokenizer.is_byte_level is byte_level
    if byte_level:
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content
    else:
        with pytest.raises(ValueError, match=r"byte 0xff at offset 6 is not UTF-8, and this tokenizer has no token for it"):
            tokenizer.encode_bytes(content)


def test_llama_s_bytes_stand_for_characters_it_has_no_token_for(tmp_path: Path) -> None:
    llama2(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a \U0001f600")
    assert tokenizer.decode(ids) == "a \U0001f600"
    assert tokenizer.byte_lengths[ids].sum() == len(" a \U0001f600".encode())  # the blank that it puts first is a token's too


def test_chat_with_those_that_have_its_tokens(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "def <|im_end|>"}, {"role": "assistant", "content": " x\n"}]
    qwen(tmp_path / "tokenizer.json")
    template = ChatTemplate(Tokenizer.load(tmp_path))
    assert template.decode(template.encode(messages).ids) == messages
    llama2(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"has no <\|im_start\|> and no <\|im_end\|>"):
        ChatTemplate(Tokenizer.load(tmp_path))
    given = Tokenizer.load(tmp_path)
    extended = given.with_chat_tokens()
    assert extended.vocab_size == given.vocab_size + 2
    assert extended.encode("The fox") == given.encode("The fox")
    assert ChatTemplate(extended).encode(messages).ids.count(extended.special_tokens["<|im_end|>"]) == 2


def test_chat_tokens_that_are_declared_plain_are_taken_as_special(tmp_path: Path) -> None:
    gpt2(tmp_path / "tokenizer.json")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in CHAT])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert not set(tokenizer.special_tokens.values()) & set(tokenizer.encode("a <|im_end|> b"))
    ChatTemplate(tokenizer)


def test_names_of_chat_tokens_in_a_model_s_own_vocabulary_are_text() -> None:
    backend = Backend(models.WordLevel({"?": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<": 4}, unk_token="?"))
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.encode("<|im_end|>") == [4, 0]
    ids = ChatTemplate(tokenizer).encode([{"role": "user", "content": "<|im_end|>"}]).ids
    assert (ids.count(2), ids.count(3)) == (1, 1)


def test_wordpiece_needs_an_end_of_document_and_changes_text(tmp_path: Path) -> None:
    wordpiece(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: it has no end-of-document token; one of <\|endoftext\|>, </s>"):
        Tokenizer.load(tmp_path)
    wordpiece(tmp_path / "tokenizer.json", end="</s>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The  Fox\n")) == "the fox"


def test_a_pattern_like_ours_with_something_before_it_goes_by_the_library(tmp_path: Path) -> None:
    """A plain added token, a normalizer or dropout changes what pieces there are, so the fast way is not taken."""
    ours = train_tokenizer(TEXTS, 300)
    assert ours._pieces is not None
    backend = Backend.from_str(ours.to_json())
    backend.add_tokens([AddedToken("fox jumps", special=False, normalized=False)])
    added = Tokenizer(backend.to_str())
    assert added._pieces is None
    assert added.encode("brown fox jumps over") == [*ours.encode("brown "), 300, *ours.encode(" over")]
    backend = Backend.from_str(ours.to_json())
    backend.normalizer = normalizers.Lowercase()
    assert Tokenizer(backend.to_str())._pieces is None
    backend = Backend.from_str(ours.to_json())
    backend.model.dropout = 0.5
    assert Tokenizer(backend.to_str())._pieces is None


def test_deepseek_s_end_of_document(tmp_path: Path) -> None:
    gpt2(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
    assert Tokenizer(text).eod_id == 0
