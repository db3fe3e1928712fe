"""OpenAI's HTTP API over a TextService: completions, chat, models, health, metrics.

Routes parse, a TextService works, Responses shape the answer. Everything a request may contain and every way it may
fail is in openai_protocol.py and openai_errors.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest

from tandem_serve.config import RouterLimits
from tandem_serve.errors import Unavailable
from tandem_serve.interfaces import TextService
from tandem_serve.serving.api_keys import ApiKeys, RequireApiKey
from tandem_serve.serving.chat import ChatTemplate
from tandem_serve.serving.exposition import Target, http_sd
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.openai_errors import ApiError, api_error, install_error_handlers
from tandem_serve.serving.openai_protocol import ChatBody, CompletionBody, GenerationBody, parse_body, prompts_of
from tandem_serve.serving.openai_responses import ChatResponses, CompletionResponses, Responses, Tally
from tandem_serve.serving.request_ids import HEADER, request_id_of, sequence_prefix
from tandem_serve.serving.router import ClusterOverview
from tandem_serve.serving.sse import EventStream, read_body, unless_gone
from tandem_serve.serving.streams import merge
from tandem_serve.types import TextDelta, TextRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLIENT_GONE = Response(status_code=499)  # nobody reads it


@dataclass(frozen=True)
class FrontEnd:
    """What the endpoints stand on."""

    service: TextService
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model_name: str
    limits: Callable[[], RouterLimits]  # as they are now
    metrics: RouterMetrics
    overview: Callable[[], Awaitable[ClusterOverview]]
    metrics_targets: Callable[[], Sequence[Target]]  # where the replicas that it knows serve their metrics
    api_keys: ApiKeys | None = None  # None: open to all
    capacity_changed: Callable[[], None] = lambda: None  # to be called when there may be room for who waits


def create_app(front: FrontEnd) -> FastAPI:
    """The ASGI application. Serves no documentation pages: OpenAI's reference is the documentation."""
    app = FastAPI(title="tandem-serve", openapi_url=None)
    install_error_handlers(app)
    if front.api_keys is not None:
        app.add_middleware(RequireApiKey, keys=front.api_keys)
    endpoints = _Endpoints(front)
    app.post("/v1/completions")(endpoints.completions)
    app.post("/v1/chat/completions")(endpoints.chat_completions)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{model:path}")(endpoints.model)
    app.get("/health")(endpoints.health)
    app.get("/status")(endpoints.status)
    app.get("/metrics")(endpoints.metrics)
    app.get("/metrics/targets")(endpoints.metrics_targets)
    return app


class _Endpoints:
    def __init__(self, front: FrontEnd) -> None:
        self._front = front

    async def completions(self, request: Request) -> Response:
        body = parse_body(CompletionBody, await self._read(request))
        self._check_model(body)
        if body.echo and body.logprobs is not None:
            message = "echo with logprobs is not supported: log-probabilities of the prompt are not computed"
            raise ApiError(400, message, param="echo", code="unsupported_parameter")
        prompts = prompts_of(body.prompt, self._front.limits().max_prompts)
        response_id = f"cmpl-{request_id_of(request.headers.get(HEADER))}"
        prefix, traceparent = sequence_prefix(response_id), request.headers.get("traceparent")
        requests = [
            self._text_request(f"{prefix}-{index}", prompt, body, body.max_tokens or 16, body.logprobs, traceparent)
            for index, prompt in enumerate(prompts)
        ]
        echoes = [self._text_of(prompt) for prompt in prompts for _ in range(body.n or 1)] if body.echo else []
        responses = CompletionResponses(
            response_id,
            self._front.model_name,
            self._front.tokenizer,
            return_token_ids=body.return_token_ids,
            echoes=echoes,
        )
        return await self._respond(request, body, requests, responses)

    async def chat_completions(self, request: Request) -> Response:
        body = parse_body(ChatBody, await self._read(request))
        self._check_model(body)
        template = self._front.chat_template
        if template is None:
            message = (
                f"the model {self._front.model_name!r} has no chat template: it completes text and was not made to "
                "chat; use /v1/completions"
            )
            raise ApiError(400, message, param="messages", code="no_chat_template")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if None not in (body.max_tokens, body.max_completion_tokens):
            message = "max_tokens is the old name of max_completion_tokens; give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        prompt = template.token_ids([message.model_dump(exclude_none=True) for message in body.messages])
        response_id = f"chatcmpl-{request_id_of(request.headers.get(HEADER))}"
        prefix, traceparent = sequence_prefix(response_id), request.headers.get("traceparent")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_completion_tokens or body.max_tokens
        requests = [self._text_request(f"{prefix}-0", prompt, body, max_tokens, logprobs, traceparent)]
        responses = ChatResponses(
            response_id, self._front.model_name, self._front.tokenizer, return_token_ids=body.return_token_ids
        )
        return await self._respond(request, body, requests, responses)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": await self._model_list()})

    async def model(self, model: str) -> Response:
        for known in await self._model_list():
            if known["id"] == model:
                return JSONResponse(known)
        raise _unknown_model(model)

    async def health(self) -> Response:
        """200 where a request would find a primary."""
        overview = await self._front.overview()
        if not any(primary.status is not None for primary in overview.primaries):
            raise Unavailable("no primary answers")
        return JSONResponse({"status": "ok"})

    async def status(self) -> Response:
        return JSONResponse({"model": self._front.model_name, **asdict(await self._front.overview())})

    async def metrics(self) -> Response:
        """Of the router that answers; each replica's own are at the addresses in /metrics/targets."""
        text = generate_latest(self._front.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def metrics_targets(self) -> Response:
        return JSONResponse(http_sd(self._front.metrics_targets()))

    async def _read(self, request: Request) -> bytes:
        limit = self._front.limits().max_body_bytes
        body = await read_body(request, limit)
        if body is None:
            raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
        return body

    def _check_model(self, body: GenerationBody) -> None:
        if body.model not in ("", self._front.model_name):
            raise _unknown_model(body.model)

    async def _model_list(self) -> list[dict[str, Any]]:
        return [
            {
                "id": card.id,
                "object": "model",
                "created": 0,
                "owned_by": "tandem-serve",
                "max_model_len": card.max_model_len,
            }
            for card in await self._front.service.models()
        ]

    def _text_of(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._front.tokenizer.decode(list(prompt))

    def _text_request(
        self,
        request_id: str,
        prompt: str | tuple[int, ...],
        body: GenerationBody,
        max_tokens: int | None,
        logprobs: int | None,
        traceparent: str | None,
    ) -> TextRequest:
        return TextRequest(
            request_id=request_id,
            model=self._front.model_name,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            seed=body.seed,
            n=body.n or 1,
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            traceparent=traceparent,
            **body.speculating(),
        )

    async def _respond(
        self, http: Request, body: GenerationBody, requests: Sequence[TextRequest], responses: Responses
    ) -> Response:
        """Runs the requests. What is wrong with them is known before the first byte of a stream is sent."""
        n, client = body.n or 1, _client_of(http)
        requests = [replace(request, timeout_s=body.timeout, client=client) for request in requests]
        deltas = merge([self._front.service.complete(request) for request in requests])
        if body.stream:
            first = await unless_gone(anext(deltas), http.receive)
            if first is None:
                return _CLIENT_GONE
            events = _events(_chain(first, deltas), responses, n, n * len(requests), body.include_usage)
            return EventStream(events, source=deltas)
        async with aclosing(deltas):
            whole = await unless_gone(_collect(deltas, responses, n, n * len(requests)), http.receive)
        return _CLIENT_GONE if whole is None else Response(whole, media_type="application/json")


async def _collect(deltas: AsyncIterator[tuple[int, TextDelta]], responses: Responses, n: int, num_choices: int) -> str:
    tally = Tally()
    by_choice: list[list[TextDelta]] = [[] for _ in range(num_choices)]
    async for prompt_index, delta in deltas:
        tally.add(prompt_index, delta)
        by_choice[prompt_index * n + delta.index].append(delta)
    return responses.whole(by_choice, tally).model_dump_json(exclude_unset=True)


async def _events(
    deltas: AsyncIterator[tuple[int, TextDelta]],
    responses: Responses,
    n: int,
    num_choices: int,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """The events of a stream, [DONE] included. An error that comes late becomes an event of its own."""
    tally = Tally()
    try:
        for chunk in responses.first_chunks(num_choices):
            yield chunk.model_dump_json(exclude_unset=True)
        async for prompt_index, delta in deltas:
            tally.add(prompt_index, delta)
            for chunk in responses.chunks(prompt_index * n + delta.index, delta):
                yield chunk.model_dump_json(exclude_unset=True)
        if include_usage:
            yield responses.last_chunk(tally).model_dump_json(exclude_unset=True)
    except Exception as error:
        yield json.dumps(api_error(error).body())
    yield "[DONE]"


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    yield first
    async for item in rest:
        yield item


def _client_of(request: Request) -> str:
    """Whose a request is: its API key, or without one the address that it comes from."""
    return request.headers.get("authorization") or (request.client.host if request.client else "")


def _unknown_model(model: str) -> ApiError:
    message = f"the model {model!r} does not exist; /v1/models lists what is served"
    return ApiError(404, message, param="model", code="model_not_found")
