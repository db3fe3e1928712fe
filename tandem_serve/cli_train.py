"""`tandem-serve train primary|drafter|router`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem_serve.cli_errors import reported
from tandem_serve.cli_options import JsonOption, write_json
from tandem_serve.errors import ConfigError

if TYPE_CHECKING:
    from tandem_serve.training.corpus import Document

app = typer.Typer(help="Train a primary, or drafters for one.", no_args_is_help=True)

Data = Annotated[
    str, typer.Option(help="stdlib, a text file, a folder, or a Hugging Face dataset owner/name[:split[:column]].")
]
Out = Annotated[Path, typer.Option(help="The run's folder: state, log, provenance; models beneath it.")]
Tokens = Annotated[str, typer.Option(help="Training budget in tokens, e.g. 500k or 5M.")]
Threads = Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves torch's choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto, bf16 (autocast) or fp32.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share every batch, by Ray Train; 1: this one.")]
Size = Annotated[int | None, typer.Option(help="Default: a small one; with --init-from, that model's.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the state in --out, if there is one.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile: needs a C++ compiler on a CPU.")]


@app.callback()
def train() -> None:
    """Keeps `primary` and `drafter` as subcommands, however many there are."""


@app.command()
def primary(
    out: Out,
    data: Data = "stdlib",
    tokens: Tokens = "5M",
    tokenizer_from: Annotated[
        Path | None, typer.Option(help="Take that model's tokenizer, so that figures of both compare.")
    ] = None,
    vocab_size: int = 4096,
    layers: int = 16,
    hidden_size: int = 256,
    intermediate_size: int = 768,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 1024,
    sequence_length: int = 512,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
    embedding_learning_rate: float = 3e-3,
    muon: bool = True,
    seed: int = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Precision = "auto",
    compile: Compile = False,
    resume: Resume = True,
    checkpoint_interval_s: float = 45.0,
    num_workers: Workers = 1,
    quiet: bool = False,
) -> None:
    """Train a Llama-style primary from scratch, its tokenizer included."""
    from tandem_serve.models.decoder import DecoderConfig
    from tandem_serve.training.corpus import corpus_hash
    from tandem_serve.training.optimizer import OptimizerConfig
    from tandem_serve.training.primary import BatchConfig, train_primary
    from tandem_serve.training.tokenizer import END_OF_TEXT_ID
    from tandem_serve.training.trainer import TrainerConfig

    with reported():
        _set_threads(threads)
        training, held_out = _split(data)
        shape = DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden_size // heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            eos_token_ids=(END_OF_TEXT_ID,),
        )
        batches = BatchConfig(sequence_length, batch_size, seed)
        config = TrainerConfig(
            num_steps=max(1, parse_tokens(tokens) // (sequence_length * batch_size)),
            optimizer=OptimizerConfig(learning_rate, embedding_learning_rate, muon=muon),
            precision=precision,
            device=device,
            checkpoint_interval_s=checkpoint_interval_s,
            quiet=quiet,
        )
        details = {**_origin_of_text(data, training, held_out), "held_out_hash": corpus_hash(held_out)}
        work = partial(
            train_primary,
            out.resolve(),
            training,
            shape,
            batches,
            config,
            resume=resume,
            compiled=compile,
            tokenizer_from=tokenizer_from.resolve() if tokenizer_from else None,
            details=details | _origin(num_workers),
        )
        _run(work, num_workers, device, out)
        typer.echo(f"primary written to {out / 'model'}")


@app.command()
def drafter(
    primary: Annotated[Path, typer.Option(help="Folder of the primary.")],
    out: Out,
    data: Data = "stdlib",
    tokens: Tokens = "3M",
    plain: Annotated[bool, typer.Option("--plain", help="The baseline: the same MS without taps.")] = False,
    both: Annotated[
        bool, typer.Option("--both", help="Tandem and baseline side by side, on the same batches.")
    ] = False,
    kinds: Annotated[
        str, typer.Option(help="Of drafter, plain-drafter and peers: medusa, eagle, deep-tandem; same batches for all.")
    ] = "drafter",
    layer_map: Annotated[
        str,
        typer.Option(help="last, uniform, or each drafter layer's primary layers: 4,8, or 2+8 for several at once."),
    ] = "uniform",
    other_layer_map: Annotated[
        list[str], typer.Option(help="A further tandem drafter with that map, beside the others; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    block_lengths: Annotated[str, typer.Option(help="One length or a range, drawn per batch. 2: the paper's.")] = "1-8",
    other_block_lengths: Annotated[
        list[str], typer.Option(help="A further tandem drafter trained at those, beside the others; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    layers: int = 2,
    hidden_size: Size = None,
    intermediate_size: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    train_primary: Annotated[
        str, typer.Option(help="The paper's three: frozen; drafter-loss and both-losses train the primary along.")
    ] = "frozen",
    primary_rate: Annotated[
        float, typer.Option(min=0, max=1, help="The primary's learning rate, as a share of the drafter's.")
    ] = 0.1,
    init_from: Annotated[str, typer.Option(help="Cut the drafter out of that model: the primary, or another.")] = "",
    init_layers: Annotated[str, typer.Option(help="Its layers to take, from 0: 0,15. Default: evenly spread.")] = "",
    distillation_weight: Annotated[float, typer.Option(min=0, max=1, help="Stage 2's share of ML's softmax.")] = 0.5,
    cross_entropy_share: Annotated[float, typer.Option(min=0, max=1, help="Stage 1's share of the steps.")] = 0.15,
    sampled_tokens: Annotated[str, typer.Option(help="Tokens that the primary writes as further text; 0: none.")] = "0",
    sampled_share: Annotated[float, typer.Option(min=0, max=1, help="Share of steps on the primary's text.")] = 0.5,
    start_from: Annotated[Path | None, typer.Option(help="Begin with the drafters of that finished run.")] = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    learning_rate: float = 5e-3,
    embedding_learning_rate: float = 3e-3,
    muon: bool = True,
    seed: int = 0,
    threads: Threads = 0,
    device: Device = "cpu",
    precision: Precision = "auto",
    compile: Compile = False,
    resume: Resume = True,
    checkpoint_interval_s: float = 45.0,
    num_workers: Workers = 1,
    shard_primary: Annotated[
        bool, typer.Option("--shard-primary", help="Spread a frozen primary's layers over the workers (FSDP).")
    ] = False,
    quiet: bool = False,
) -> None:
    """Train drafters: Tandem-CE, then Tandem-Distil; with the primary frozen or trained along."""
    from tandem_serve.training.data import parse_block_lengths
    from tandem_serve.training.drafter_task import FROZEN, PLAIN, PRIMARY, TANDEM, DrafterConfig
    from tandem_serve.training.drafters import train_drafters
    from tandem_serve.training.initial import chosen_shape, init_layers_of
    from tandem_serve.training.optimizer import OptimizerConfig
    from tandem_serve.training.peers.catalog import PEERS
    from tandem_serve.training.primary import BatchConfig
    from tandem_serve.training.trainer import TrainerConfig

    with reported():
        _set_threads(threads)
        if (both or plain) and kinds != TANDEM:
            raise ConfigError("--kinds says which drafters to train, and so do --both and --plain: give one of them")
        training, held_out = _split(data)
        sizes = {"num_layers": layers, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        config = DrafterConfig(
            shape=chosen_shape(sizes | {"num_heads": heads, "num_kv_heads": kv_heads}, init_from),
            layer_map=layer_map,
            other_layer_maps=tuple(other_layer_map),
            block_lengths=parse_block_lengths(block_lengths),
            other_block_lengths=tuple(map(parse_block_lengths, other_block_lengths)),
            kinds=(TANDEM, PLAIN) if both else (PLAIN,) if plain else _names(kinds, {TANDEM, PLAIN, *PEERS}),
            train_primary=train_primary,
            init_from=str(Path(init_from).resolve()) if Path(init_from or "-").is_dir() else init_from,
            init_layers=init_layers_of(init_layers),
            distillation_weight=distillation_weight,
            cross_entropy_share=cross_entropy_share,
            sampled_tokens=0 if sampled_tokens == "0" else parse_tokens(sampled_tokens),
            sampled_share=sampled_share,
        )
        trainer = TrainerConfig(
            num_steps=max(1, parse_tokens(tokens) // (sequence_length * batch_size)),
            optimizer=OptimizerConfig(learning_rate, embedding_learning_rate, muon=muon),
            rate_scales={PRIMARY: primary_rate},
            precision=precision,
            device=device,
            checkpoint_interval_s=checkpoint_interval_s,
            quiet=quiet,
        )
        work = partial(
            train_drafters,
            out.resolve(),
            primary.resolve(),
            training,
            config,
            BatchConfig(sequence_length, batch_size, seed),
            trainer,
            resume=resume,
            compiled=compile,
            shard_primary=shard_primary,
            start_from=start_from.resolve() if start_from else None,
            details={**_origin_of_text(data, training, held_out), **_origin(num_workers)},
        )
        _run(work, num_workers, device, out)
        if train_primary != FROZEN:
            typer.echo(f"primary written to {out / PRIMARY}")
        typer.echo("drafters written to " + ", ".join(str(out / name) for name in config.names))


@app.command()
def router(
    primary: Annotated[Path, typer.Option(help="Folder of the primary.")],
    drafter: Annotated[Path, typer.Option(help="Folder of its drafter.")],
    out: Annotated[
        Path | None, typer.Option(help="Where router.safetensors goes. Default: the drafter's folder, to be used.")
    ] = None,
    data: Data = "stdlib",
    limit: Annotated[
        int, typer.Option(min=6, help="Texts to learn from; half as many more, held out, are measured on.")
    ] = 64,
    target: Annotated[str, typer.Option(help="accept: was the draft right? tv: the paper's soft label.")] = "accept",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of every other text; the rest is greedy.")] = 0.8,
    block_length: Annotated[int, typer.Option(min=2, max=64, help="Drafts a block.")] = 12,
    threads: Threads = 0,
    json_file: JsonOption = None,
) -> None:
    """Train the router MLP of a drafter: run the pair, learn when its drafts are right, choose thresholds by cost.

    Give the --data that the pair was trained on, so that what is held out of it is what the pair has not seen either.
    """
    from tandem_serve.training.fit_router import REPORT_FILE, RouterConfig, fit_router

    with reported():
        _set_threads(threads)
        if target not in ("accept", "tv"):
            raise ConfigError(f"--target {target}: expected accept or tv")
        config = RouterConfig(
            target="tv" if target == "tv" else "accept",
            num_texts=limit,
            temperature=temperature,
            block_length=block_length,
        )
        file = fit_router(primary, drafter, *_split(data), config, out)
        report = json.loads((file.parent / REPORT_FILE).read_text("utf-8"))
        write_json(json_file, report)
        typer.echo(json.dumps(report["policies"], indent=2))
        typer.echo(f"router written to {file}")


@app.command()
def demo(
    runs: Annotated[Path, typer.Option(help="Folder of the two runs' states and logs.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Where the finished pair goes.")] = Path("models/demo"),
    primary_tokens: Tokens = "6M",
    drafter_tokens: Tokens = "9M",
    threads: Threads = 0,
    compile: Compile = True,
    quiet: bool = False,
) -> None:
    """Train the committed demo pair again, from nothing or from where a killed run stopped."""
    from tandem_serve.training.demo import assemble_demo

    primary(
        runs / "primary",
        tokens=primary_tokens,
        learning_rate=4e-3,
        threads=threads,
        compile=compile,
        quiet=quiet,
    )
    drafter(
        runs / "primary" / "model",
        runs / "drafters",
        tokens=drafter_tokens,
        both=True,
        layer_map="2+9+16",
        other_layer_map=[],
        other_block_lengths=[],
        hidden_size=192,
        intermediate_size=512,
        heads=6,
        kv_heads=6,
        sampled_tokens="1M",
        threads=threads,
        compile=compile,
        quiet=quiet,
    )
    with reported():
        report = assemble_demo(runs / "primary", runs / "drafters", out)
    typer.echo(json.dumps(report["tandem_against_plain"], indent=2))


def _split(data: str) -> tuple[list[Document], list[Document]]:
    """(training, held out) of a source. The standard library's held-out modules are fixed, so that figures compare."""
    from tandem_serve.training.corpus import STDLIB, STDLIB_HELD_OUT, read_documents, split_held_out

    return split_held_out(read_documents(data), STDLIB_HELD_OUT if data == STDLIB else None)


def _origin_of_text(data: str, training: list[Document], held_out: list[Document]) -> dict[str, Any]:
    """For the provenance: what was held out, whole documents or (`cut`) the ends of those that were trained on."""
    names = [d.name for d in held_out]
    return {"data": data, "held_out": names, "cut": bool({*names} & {d.name for d in training})}


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _origin(num_workers: int) -> dict[str, Any]:
    """This command's provenance, where others run it: a worker's command line says nothing."""
    from tandem_serve.training.run_folder import provenance

    return {**provenance(), "num_workers": num_workers} if num_workers > 1 else {}


def _run(work: Callable[[], Any], num_workers: int, device: str, out: Path) -> None:
    """Runs the training here, or on several workers."""
    if num_workers == 1:
        work()
        return
    from tandem_serve.training.scale_out import run_on_workers

    run_on_workers(work, num_workers, device=device, folder=out)


def _names(text: str, known: set[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := sorted({*names} - known):
        raise ConfigError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return names


def parse_tokens(text: str) -> int:
    """`500k`, `5M`, `1200000` as a number.

    Raises:
        ConfigError: for anything else.
    """
    scale = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}.get(text[-1:].lower(), 1)
    try:
        count = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"tokens {text!r}: expected a number such as 500k or 5M")
    return int(count)


if __name__ == "__main__":
    app()
