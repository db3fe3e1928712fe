"""Everything behind the endpoints of one router, from its configuration and a Primary."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from tandem_serve.config import RouterPool
from tandem_serve.models.folder import eos_token_ids, load_tokenizer, resolve_folder
from tandem_serve.serving.chat import load_chat_template
from tandem_serve.serving.completion import TextCompletion
from tandem_serve.serving.metrics import MeteredTextService, ServingMetrics
from tandem_serve.serving.openai_api import FrontEnd
from tandem_serve.serving.router import PairingRouter

ReplicaMetrics = Callable[[], Awaitable[Mapping[str, str]]]


async def no_replica_metrics() -> Mapping[str, str]:
    """Of replicas that export their own figures elsewhere."""
    return {}


def build_front_end(
    pool: RouterPool, model: str, router: PairingRouter, replica_metrics: ReplicaMetrics = no_replica_metrics
) -> FrontEnd:
    """The text service and what the HTTP endpoints need beside it. Reads the tokenizer of `model`, no weights.

    Raises:
        CheckpointError: where the tokenizer cannot be loaded.
    """
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    metrics = ServingMetrics(pool.model_name)
    service = TextCompletion(
        router,
        tokenizer,
        model_name=pool.model_name,
        eos_token_ids=eos_token_ids(folder),
        limits=pool.limits,
    )
    return FrontEnd(
        service=MeteredTextService(service, metrics),
        tokenizer=tokenizer,
        chat_template=load_chat_template(folder, tokenizer),
        model_name=pool.model_name,
        limits=pool.limits,
        metrics=metrics,
        overview=router.overview,
        replica_metrics=replica_metrics,
    )
