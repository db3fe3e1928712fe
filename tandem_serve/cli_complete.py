"""`tandem-serve complete`: one completion, streamed, coloured by where each piece of text came from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tandem_serve.cli_errors import reported

if TYPE_CHECKING:
    import openai

    from tandem_serve.engine.async_primary import AsyncPrimary
    from tandem_serve.serving.completion import TextCompletion
    from tandem_serve.types import TextDelta, TextRequest


API_KEY = "TANDEM_API_KEY"


def complete(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")],
    url: Annotated[str | None, typer.Option(help="A router's HTTP address. Default: http://127.0.0.1:8000")] = None,
    grpc: Annotated[str | None, typer.Option(help="A router's gRPC address, host:port, instead.")] = None,
    pair: Annotated[
        str | None, typer.Option(help="No cluster: run `demo`, or a pair's folder, in this process.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be given several times.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Drafts a round; 0 is plain decoding.")] = None,
    policy: Annotated[str | None, typer.Option(help="Who decides how many: fixed, entropy, router or optimal.")] = None,
    mode: Annotated[
        str, typer.Option(help="plain, speculative; tandem, tandem-representations: drafts stand unverified.")
    ] = "speculative",
    num_threads: Annotated[int, typer.Option(min=1, help="torch threads, with --pair.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="The same as --block-length 0.")] = False,
) -> None:
    """Complete a prompt. Green text was drafted and accepted; the rest is the primary's own.

    Where the router wants an API key, it is taken from the environment: TANDEM_API_KEY.
    """
    import sys

    from tandem_serve.types import DecodingMode, PolicyName, TextRequest

    for option, value, kind in (("--policy", policy, PolicyName), ("--mode", mode, DecodingMode)):
        if value is not None and value not in list(kind):
            raise typer.BadParameter(f"{value!r}: expected one of {', '.join(kind)}", param_hint=option)
    if sum(source is not None for source in (url, grpc, pair)) > 1:
        raise typer.BadParameter("give one of --url, --grpc and --pair")
    request = TextRequest(
        request_id="cli",
        model="",
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        block_length=0 if plain else block_length,
        policy=PolicyName(policy) if policy else None,
        mode=DecodingMode(mode),
    )
    with reported():
        if pair is not None:
            deltas = _from_pair(request, pair, num_threads)
        elif grpc is not None:
            deltas = _from_grpc(request, grpc)
        else:
            deltas = _from_http(request, with_scheme(url or "127.0.0.1:8000"))
        _show(request, deltas)


def authorization_header() -> dict[str, str]:
    """With the key in the environment, where there is one: never an argument, which other users could see."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def with_scheme(url: str) -> str:
    """A router's HTTP address as a URL, however short it was given."""
    return (url if "://" in url else f"http://{url}").rstrip("/")


def _show(request: TextRequest, deltas: Iterator[TextDelta]) -> None:
    """Prints the prompt once there is an answer to it, text as it comes, then what it took."""
    start = first = None
    started = time.perf_counter()
    num_tokens = num_accepted = num_drafted = num_rounds = 0
    for delta in deltas:
        if start is None:
            start, first = time.perf_counter(), len(delta.token_ids)
            typer.secho(request.prompt, dim=True, nl=False)
        typer.secho(delta.text[: delta.num_accepted_chars], fg=typer.colors.GREEN, nl=False)
        typer.secho(delta.text[delta.num_accepted_chars :], nl=False)
        num_tokens += len(delta.token_ids)
        num_accepted += delta.num_accepted_tokens
        num_drafted += delta.num_draft_tokens
        num_rounds += delta.num_draft_tokens > 0
    typer.echo()
    seconds = time.perf_counter() - (start or started)
    summary = f"{num_tokens} tokens, first after {((start or started) - started) * 1e3:.0f} ms"
    if seconds > 0 and num_tokens > (first or 0):
        summary += f", then {(num_tokens - (first or 0)) / seconds:.0f} tokens/s"
    if num_drafted:
        summary += (
            f"; {num_accepted} of {num_drafted} drafts accepted, {1 + num_accepted / num_rounds:.2f} tokens a round"
        )
    typer.secho(summary, dim=True, err=True)


def _from_http(request: TextRequest, url: str) -> Iterator[TextDelta]:
    import openai

    return _read_http(
        request, url, openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get(API_KEY, "none"), max_retries=0)
    )


def _read_http(request: TextRequest, url: str, client: openai.OpenAI) -> Iterator[TextDelta]:
    """Over OpenAI's API; `return_token_ids` tells drafted text from the rest."""
    import openai

    from tandem_serve.errors import InvalidRequest, Unavailable
    from tandem_serve.types import FinishReason, TextDelta

    try:
        chunks = client.completions.create(
            model="",
            prompt=str(request.prompt),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=list(request.stop) or None,
            stream=True,
            extra_body={
                "return_token_ids": True,
                "speculation": {
                    "block_length": request.block_length,
                    "policy": request.policy,
                    "mode": request.mode,
                },
            },
        )
        for chunk in chunks:
            choice = chunk.choices[0]
            extra = choice.model_extra or {}
            yield TextDelta(
                index=0,
                text=choice.text,
                token_ids=tuple(extra["token_ids"]),
                num_accepted_tokens=extra["num_accepted_tokens"],
                num_draft_tokens=extra["num_draft_tokens"],
                num_accepted_chars=extra["num_accepted_chars"],
                finish_reason=FinishReason(choice.finish_reason) if choice.finish_reason else None,
            )
    except openai.APIConnectionError as error:
        raise Unavailable(f"nobody answers at {url}; `tandem-serve up FILE` starts a cluster") from error
    except openai.APIError as error:
        raise InvalidRequest(error.message) from error


def _from_grpc(request: TextRequest, address: str) -> Iterator[TextDelta]:
    from tandem_serve.rpc.inference_client import InferenceClient

    with InferenceClient(address, api_key=os.environ.get(API_KEY)) as client:
        yield from client.complete(request)


def _from_pair(request: TextRequest, pair: str, num_threads: int) -> Iterator[TextDelta]:
    """Both models on one thread of this process: the drafter steps when the primary asks."""
    import torch

    from tandem_serve.config import DrafterEngineConfig, PrimaryEngineConfig, RouterLimits
    from tandem_serve.engine.local_link import local_link_factory
    from tandem_serve.models.folder import eos_token_ids, load_tokenizer
    from tandem_serve.models.pairs import pair_folder
    from tandem_serve.serving.completion import TextCompletion
    from tandem_serve.serving.engines import build_drafter, build_primary

    torch.set_num_threads(num_threads)
    folder = pair_folder(pair)
    links = local_link_factory(
        {"here": build_drafter(str(folder / "drafter"), DrafterEngineConfig())}, synchronous=True
    )
    primary = build_primary(str(folder / "primary"), PrimaryEngineConfig(), link_factory=links)
    service = TextCompletion(
        primary,
        load_tokenizer(folder / "primary"),
        model_name=pair,
        eos_token_ids=eos_token_ids(folder / "primary"),
        limits=RouterLimits,
    )
    primary.set_drafters(["here"])
    return _run_here(request, service, primary)


def _run_here(request: TextRequest, service: TextCompletion, primary: AsyncPrimary) -> Iterator[TextDelta]:
    import asyncio

    primary.start()
    with asyncio.Runner() as runner:
        deltas = service.complete(request)
        try:
            while (delta := runner.run(anext(deltas, None))) is not None:
                yield delta
        finally:
            runner.run(deltas.aclose())
            runner.run(primary.close())
