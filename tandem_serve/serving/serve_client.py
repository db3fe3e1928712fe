"""interfaces.Primary at a replica of a Ray Serve deployment, reached by its handle."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from tandem_serve.errors import Overloaded, RequestAborted, TandemError, Unavailable
from tandem_serve.types import (
    BlockLengths,
    DraftingCosts,
    GenerationRequest,
    GenerationStep,
    PrimaryInfo,
    PrimaryStatus,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class ServePrimary:
    """One replica of the primary deployment. Raises what the replica raises; Unavailable where it is gone."""

    def __init__(self, handle: DeploymentHandle[Any], replica_id: str) -> None:
        self._handle = handle
        self._streaming: Any = handle.options(stream=True)  # typed as if it might not stream
        self._replica_id = replica_id  # discovery.DiscoveryRouter sends the calls there

    async def info(self) -> PrimaryInfo:
        info: PrimaryInfo = await self._call(self._handle.info)
        return info

    async def status(self) -> PrimaryStatus:
        status: PrimaryStatus = await self._call(self._handle.status)
        return status

    async def direct(self, lengths: BlockLengths | None) -> DraftingCosts | None:
        """See interfaces.Directable."""
        costs: DraftingCosts | None = await self._call(self._handle.direct, lengths)
        return costs

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Streams the sequence; closing the generator cancels the call, which aborts the request over there."""
        steps = self._streaming.generate.remote(request, replica_id=self._replica_id)
        is_finished = False
        try:
            async for step in steps:
                yield step
            is_finished = True
        except Exception as error:
            is_finished = True
            raise _translated(error) from error
        finally:
            if not is_finished:
                steps.cancel()

    async def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return await method.remote(*arguments, replica_id=self._replica_id)
        except Exception as error:
            raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """The exception as the replica raised it, or what Serve's own one means. Others are bugs and stay as they are."""
    cause = getattr(error, "cause", error)  # of a RayTaskError
    if isinstance(cause, TandemError):
        return cause
    if isinstance(error, BackPressureError):
        return Overloaded(str(error))
    if isinstance(error, RequestCancelledError | ray.exceptions.TaskCancelledError):
        return RequestAborted("the primary's replica cancelled the request")
    if isinstance(error, DeploymentUnavailableError | ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
        return Unavailable(f"the primary's replica is gone: {type(error).__name__}")
    return error
