"""`nsa`: what one does with a run, from the shell. Status 0 on success, 2 with one line on stderr for a mistake; 130 after Ctrl-C, and 141 where nobody reads
the output any more."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_transformer.config import GROUPS, Config, ConfigError, ExpertOffloadingConfig, KVCacheConfig, build_config, unknown_key_message
from nsa_transformer.utils.files import expand_home
from nsa_transformer.utils.threads import limit_spinning

if TYPE_CHECKING:  # importing torch takes seconds, which a mistake on the command line need not wait for
    from omegaconf import DictConfig

    from nsa_transformer.data.tokenizer import Tokenizer
    from nsa_transformer.inference.generate import SamplingConfig
    from nsa_transformer.memory.expert_offload import ExpertStore
    from nsa_transformer.models.transformer import Transformer

# Commands that have their place but are not built yet; each refuses by name.
PLANNED = {
    "serve": "serve a run over HTTP",
    "evaluate": "measure a run on benchmarks",
    "export": "write a run as one folder of weights, settings and tokenizer",
    "convert": "turn a Hugging Face model into a checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    limit_spinning()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    told: set[str] = set()

    def tell(message: Warning | str, *_: object, **__: object) -> None:
        """Each once, without the place in the code."""
        if str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning, before = tell, warnings.showwarning
    try:
        if options.command in PLANNED:
            raise ConfigError(f"nsa {options.command} is not built yet")
        if options.command == "plan":  # whose overrides may also come after its options, where argparse takes none
            options.words += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        status = options.call(options)
        print(end="", flush=True)  # here, where what goes wrong is still said
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop_output()
        return 141
    except OSError as error:
        print(f"error: {error}" if error.filename is None else f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        _drop_output()
        return 2
    except ValueError as error:
        text = str(error)
        if isinstance(error, UnicodeEncodeError) and error.encoding.lower() not in ("utf-8", "utf8"):
            text = f"{error.object[error.start]!a} cannot be written in {error.encoding}; set PYTHONIOENCODING=utf-8 in the environment"
        print(f"error: {text}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from nsa_transformer.training.faults import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: out of memory; try --dtype bfloat16, --expert-offloading, a shorter prompt or --device cpu ({detail})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        warnings.showwarning = before


def _drop_output() -> None:
    """What cannot be written is not to be tried, and complained of, again when Python ends."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nsa", description="Long-context language models with Native Sparse Attention.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("run", metavar="RUN", help="a run, one checkpoint of it, or an exported folder")
    generate.add_argument("--prompt", required=True, help="text that the model continues, fed as it is; write --prompt=TEXT where it begins with a dash")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (128)")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    _add_model_options(generate)
    generate.add_argument("--json", action="store_true", help="print one object: prompt_ids, ids, text; expert_offloading where experts are offloaded")
    generate.set_defaults(call=_generate)
    chat = commands.add_parser("chat", help="talk with a run: a line is a message, an empty one is passed over, the end of the input ends it")
    chat.add_argument("run", metavar="RUN", help="a run that learned conversations, one checkpoint of it, or an exported folder")
    chat.add_argument("--system", metavar="TEXT", help="a first message that says how to answer")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens of an answer at most (512)")
    _add_model_options(chat)
    chat.set_defaults(call=_chat)

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer, encode and decode files").add_subparsers(required=True, metavar="ACTION")
    train = tokenizer.add_parser("train", help="train a byte-level BPE, with chat tokens")
    train.add_argument("files", nargs="+", metavar="FILES", help="text, JSONL or parquet: files, folders or globs")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N")
    train.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json")
    train.add_argument("--text-column", default="text", help="column or key of the text in JSONL and parquet")
    train.set_defaults(call=_tokenizer_train)
    encode = tokenizer.add_parser("encode", help="a file to token ids")
    encode.add_argument("tokenizer", metavar="DIR", help="a tokenizer.json, or a folder or run that has one")
    encode.add_argument("file", metavar="FILE")
    encode.add_argument("--output", required=True, metavar="IDS.npy")
    encode.set_defaults(call=_tokenizer_encode)
    decode = tokenizer.add_parser("decode", help="token ids to a file")
    decode.add_argument("tokenizer", metavar="DIR")
    decode.add_argument("file", metavar="IDS.npy")
    decode.add_argument("--output", required=True, metavar="FILE")
    decode.set_defaults(call=_tokenizer_decode)

    inspect = commands.add_parser("inspect", help="what a run is and where it stands")
    inspect.add_argument("run", metavar="RUN", help="the folder of a run")
    inspect.set_defaults(call=_inspect)
    plan = commands.add_parser("plan", help="what generating takes in memory: parameters, weights, cache, and whether they fit")
    plan.add_argument("words", nargs="*", metavar="RUN | KEY=VALUE", help="a run, or overrides as for training, such as model=large")
    plan.add_argument("--length", type=_tokens, metavar="TOKENS", help="of each sequence, such as 64k (the longest the model is built for)")
    plan.add_argument("--batch", type=_count, default=1, metavar="N", help="sequences at once (1)")
    plan.add_argument("--memory", type=_gib, metavar="GIB", help="that there is; by default that of the GPU here")
    plan.add_argument("--kv-cache", choices=["none", "fp8"], help="quantization of the cache; by default the configuration's")
    plan.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of weights and cache (bfloat16)")
    plan.set_defaults(call=_plan)
    doctor = commands.add_parser("doctor", help="what this machine has, and which backends work")
    doctor.set_defaults(call=_doctor)
    for name, what in PLANNED.items():
        commands.add_parser(name, help=f"{what} (not built yet)", add_help=False)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and where and in what the model runs."""
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: always the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that reach probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from tokens with at least P times the most likely one's probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens that were there become less likely (1)")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    parser.add_argument("--kv-cache", choices=["none", "fp8"], help="quantization of the cache; by default the run's own setting")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run (auto: cuda where there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights and cache (bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--expert-offloading", action=argparse.BooleanOptionalAction, help="keep the experts in host memory; by default the run's own setting")
    parser.add_argument("--gpu-budget-gib", type=float, metavar="GIB", help="with offloading: GPU memory for experts; by default the run's own setting")


def _tokens(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(k?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write one such as 64k or 65536")
    return int(match[1]) * (1024 if match[2] else 1)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _gib(text: str) -> float:
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write a number of GiB such as 80")
    return float(text)


def _check_utf8(name: str, text: str) -> None:
    """Of a command line's bytes that are none, Python makes surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not valid UTF-8") from None


def _sampling(options: argparse.Namespace) -> SamplingConfig:
    from nsa_transformer.inference.generate import SamplingConfig

    return SamplingConfig(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty, options.seed)


def _load(options: argparse.Namespace) -> tuple[Transformer, Tokenizer, KVCacheConfig, ExpertStore | None]:
    """The model of RUN as the options want it."""
    import torch

    from nsa_transformer.distributed.world import choose_device
    from nsa_transformer.inference.load import SavedModel
    from nsa_transformer.memory.expert_offload import store_of

    saved = SavedModel(options.run, "RUN")
    kv_cache = saved.config.memory.kv_cache
    if options.kv_cache is not None:
        kv_cache = dataclasses.replace(kv_cache, quantization=options.kv_cache)
    device = choose_device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    offloading = _expert_offloading(options, saved.config.memory.expert_offloading)
    model, tokenizer = saved.load(device, dtype, offloading)
    store = store_of(model)
    if store is not None:
        print(f"expert offloading: {store.describe()}", file=sys.stderr)
    elif offloading.enabled:
        print("expert offloading: the model runs on the CPU, in whose memory its experts are anyway; nothing is moved", file=sys.stderr)
    return model, tokenizer, kv_cache, store


def _say_cache(model: Transformer, kv_cache: KVCacheConfig) -> None:
    from nsa_transformer.models.cache_size import cache_size

    print(f"cache: {cache_size(model.config, kv_cache, model.embedding.weight.dtype).describe()}", file=sys.stderr)


def _chat(options: argparse.Namespace) -> int:
    from nsa_transformer.inference.chat import Chat

    sampling = _sampling(options)
    _check_utf8("--system", options.system or "")
    if sys.stdin is None:
        raise ConfigError("standard input is closed, and messages are read from it; leave it open, or give it a file of messages")
    model, tokenizer, kv_cache, _ = _load(options)
    chat = Chat(model, tokenizer, sampling, options.max_new_tokens, options.system, kv_cache)
    _say_cache(model, kv_cache)
    asked = "> " if sys.stdin.isatty() else ""
    unanswered = False
    while True:
        try:
            message = input(asked)
        except EOFError:  # a person has seen what went wrong; a script has the status
            return 2 if unanswered and not asked else 0
        except UnicodeDecodeError as error:
            raise ConfigError(f"the input is not valid {error.encoding}") from None
        if not message:
            continue
        try:
            _check_utf8("the message", message)
            for piece in chat.say(message):
                print(piece, end="", flush=True)
        except ValueError as error:  # too long a conversation; a shorter message may do
            print(f"error: {error}", file=sys.stderr)
            unanswered = True
        except KeyboardInterrupt:  # of this answer
            if not asked:
                raise
        print(flush=True)


def _generate(options: argparse.Namespace) -> int:
    from nsa_transformer.inference.generate import generate_text

    sampling = _sampling(options)
    for name, text in (("--prompt", options.prompt), *(("--stop", text) for text in options.stop)):
        _check_utf8(name, text)
    model, tokenizer, kv_cache, store = _load(options)
    prompt_ids = tokenizer.encode(options.prompt)
    pieces = generate_text(model, tokenizer, prompt_ids, options.max_new_tokens, sampling, options.stop, kv_cache)
    ids: list[int] = []
    text = ""
    for new_ids, piece in pieces:
        if not options.json:
            print(piece if ids else options.prompt + piece, end="", flush=True)
        ids += new_ids
        text += piece
    answer: dict[str, object] = {"prompt_ids": prompt_ids, "ids": ids, "text": text}
    if store is not None:
        moved = store.statistics()
        answer["expert_offloading"] = dataclasses.asdict(moved) | {"hit_rate": moved.hit_rate, "copied_bytes": moved.copied_bytes}
    print(json.dumps(answer) if options.json else "" if ids else options.prompt)
    _say_cache(model, kv_cache)  # here, since a mistake is one message
    if store is not None and not options.json:
        rate = "–" if moved.hit_rate is None else f"{moved.hit_rate:.1%}"
        print(
            f"expert offloading: {rate} of {moved.hits + moved.misses} lookups found their expert; copied {moved.copied_bytes / 1e9:.3f} GB "
            f"({moved.misses} missing, {moved.prefetched} prefetched, {moved.streamed} streamed)",
            file=sys.stderr,
        )
    return 0


def _expert_offloading(options: argparse.Namespace, found: ExpertOffloadingConfig) -> ExpertOffloadingConfig:
    """The run's own setting, as far as the options do not change it."""
    if options.expert_offloading is not None:
        found = dataclasses.replace(found, enabled=options.expert_offloading)
    if options.gpu_budget_gib is not None:
        if not found.enabled:
            raise ConfigError(f"--gpu-budget-gib {options.gpu_budget_gib:g} needs offloading; add --expert-offloading")
        found = dataclasses.replace(found, gpu_budget_gib=options.gpu_budget_gib)
    return found


def _tokenizer_train(options: argparse.Namespace) -> int:
    from nsa_transformer.data.sources import iter_documents, open_source
    from nsa_transformer.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

    least = MIN_VOCAB_SIZE + 2
    if options.vocab_size < least:
        raise ConfigError(f"--vocab-size {options.vocab_size} is too small: 256 bytes, end of document and two chat tokens need {least}")
    sources = [open_source(path, key="FILES") for path in options.files]
    texts = (document.text for source in sources for document in iter_documents(source, options.text_column))
    tokenizer = train_tokenizer(texts, options.vocab_size, chat_tokens=True)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    print(f"wrote {folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens")
    return 0


def _tokenizer_encode(options: argparse.Namespace) -> int:
    from nsa_transformer.data.token_files import encode_file
    from nsa_transformer.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    with _output(options):
        count, size, meant = encode_file(tokenizer, options.file, options.output)
    print(f"wrote {options.output}: {count} tokens of {size} bytes" + (f"; they stand for {meant}: this tokenizer changes text" if meant != size else ""))
    return 0


def _tokenizer_decode(options: argparse.Namespace) -> int:
    from nsa_transformer.data.token_files import decode_file
    from nsa_transformer.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    with _output(options):
        count = decode_file(tokenizer, options.file, options.output)
    print(f"wrote {options.output}: {count} tokens")
    return 0


@contextlib.contextmanager
def _output(options: argparse.Namespace) -> Iterator[None]:
    """Names --output where it is what cannot be written; what cannot be read has its own name in the error."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename) == Path(options.file):
            raise
        raise ConfigError(f"--output {options.output} cannot be written ({error.strerror})") from None


def _inspect(options: argparse.Namespace) -> int:
    from nsa_transformer.training.inspect import describe_run

    print(describe_run(Path(options.run)))
    return 0


def _plan(options: argparse.Namespace) -> int:
    import torch

    from nsa_transformer.inference.load import SavedModel
    from nsa_transformer.inference.plan import describe_plan
    from nsa_transformer.utils.hardware import GIB

    runs = [word for word in options.words if "=" not in word]
    if runs and len(options.words) > 1:
        raise ConfigError(f"{' '.join(options.words)}: write one run, whose settings are saved, or overrides KEY=VALUE")
    if runs and not expand_home(runs[0]).exists():
        raise ConfigError(f"{runs[0]} does not exist, and is no override; name a run, or write KEY=VALUE such as model=large")
    for word in options.words:
        if "=" in word and re.match(r"[+~]*hydra\b", word):
            raise ConfigError(f"{word} says how Hydra runs a job, and a plan runs none; leave it out")
    config = SavedModel(runs[0], "RUN").config if runs else compose_config(options.words)
    if options.kv_cache is not None:
        kv_cache = dataclasses.replace(config.memory.kv_cache, quantization=options.kv_cache)
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, kv_cache=kv_cache))
    limit = config.model.max_position_embeddings
    length = limit if options.length is None else options.length
    if length > limit:
        more = "" if runs else f", or model.max_position_embeddings={length}"
        raise ConfigError(f"--length {length} passes model.max_position_embeddings={limit}; write --length {limit} or less{more}")
    memory = None
    if options.memory is not None:
        memory = options.memory * GIB, "--memory"
    elif torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name(0)
    print(describe_plan(config, getattr(torch, options.dtype), length, options.batch, memory))
    return 0


# ---------------------------------------------------------------------------------------------------------- composing settings


def configs_folder() -> str:
    """`configs/` of the wheel, or of the checkout."""
    package = Path(__file__).resolve().parent
    return str(next(path for path in (package / "configs", package.parent / "configs") if (path / "config.yaml").exists()))


def compose_config(overrides: Sequence[str]) -> Config:
    """The settings that `training/trainer.py` would take with these overrides, checked. Raises `ConfigError`."""
    try:
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ImportError:
        raise ConfigError("settings are composed by Hydra, which is not installed; pip install -r requirements.txt") from None

    refuse_deletions(overrides)
    try:
        with hydra.initialize_config_dir(configs_folder(), version_base="1.3"):
            return build_config(plain(hydra.compose("config", list(overrides))))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of a group that is no text
        raise ConfigError(explain_hydra(error)) from None


def plain(composed: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=True)
    return values


def refuse_deletions(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.startswith("~"):
            raise ConfigError(f"{override} would delete a setting, and every one is needed; write {override[1:].split('=')[0]}=VALUE")


def explain_hydra(error: Exception) -> str:
    """A complaint of Hydra or OmegaConf as one message; of an unknown key or group, the ones that exist."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist; write {' or '.join(f'{group}={option}' for option in error.options)}"
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is not KEY=VALUE as Hydra reads it ({text.splitlines()[0]}); put quotes around a value with special characters: \"KEY='VALUE'\""
        )
    if several := re.match(r"Ambiguous value for argument '(.+)'\n", text):
        return f"{several.group(1)} has several values; write one, KEY=[A,B] for a list, or quotes around text with a comma: \"KEY='A,B'\""
    unknown = re.search(r"Could not override '([^']+)'", text)
    if not isinstance(error, HydraException | OmegaConfBaseException) or (unknown and unknown.group(1) in GROUPS):
        return f"a group ({', '.join(GROUPS)}) takes the name of one of its files in configs/, such as model=tiny; set its keys one by one"
    return unknown_key_message(unknown.group(1)) if unknown else re.sub(r"\n\s*(full_key:|object_type=).*", "", text)


def _doctor(_options: argparse.Namespace) -> int:
    from nsa_transformer.training.doctor import doctor_report

    print(doctor_report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
