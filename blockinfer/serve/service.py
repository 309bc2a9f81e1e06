"""The layer between HTTP and the engine: admission, and each HTTP request's engine requests."""

import asyncio
import functools
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from blockinfer.async_llm import AsyncLLM, Generation
from blockinfer.engine.engine import Prompt
from blockinfer.outputs import RequestOutput
from blockinfer.sampling_params import SamplingParams
from blockinfer.serve.errors import ApiError
from blockinfer.serve.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """model: the name that requests give. max_queue: answers that may wait besides those that run. api_key: the key
    that /v1 requires, None for none. receive_timeout: seconds for a request's headers, and for its body.
    shutdown_timeout: seconds for running requests to finish."""

    model: str
    max_queue: int
    api_key: str | None
    max_request_bytes: int
    receive_timeout: float
    shutdown_timeout: float


class Service:
    """The engine and the options of one server."""

    def __init__(self, engine: AsyncLLM, options: ServeOptions) -> None:
        self.engine = engine
        self.options = options
        self.metrics = Metrics(engine.llm)
        self.created = int(time.time())
        self.draining = False
        self.in_flight = 0
        self.capacity = engine.llm.config.max_num_seqs + options.max_queue
        # for a canvas, token by token
        self.token_text: Callable[[int], str] = functools.cache(self._token_text)

    def _token_text(self, token_id: int) -> str:
        return self.engine.llm.tokenizer.decode([token_id], skip_special_tokens=True)

    def check_key(self, authorization: str | None) -> None:
        key = self.options.api_key
        if key is None:
            return
        # the header's bytes, which Starlette reads as Latin-1
        given = (authorization or "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            message = "this server asks for its key: send the header Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    def check_model(self, name: str) -> None:
        if name != self.options.model:
            message = f"there is no model {name[:100]!r} here, only {self.options.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def admit(self, count: int) -> "Job":
        """Reserves places for `count` answers, which the job's `close` frees. Raises ApiError if there is no room."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close"})
        if count > self.capacity:
            raise ApiError(400, f"{count} answers at once are more than the {self.capacity} that may run and wait here")
        if self.in_flight + count > self.capacity:
            message = f"the queue is full: {self.in_flight} answers run and wait, at most {self.capacity} may"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        return Job(self, count)


class Job:
    """The engine's requests of one HTTP request; `close` aborts what is left of them."""

    def __init__(self, service: Service, count: int) -> None:
        self._service, self._count = service, count
        self._generations: list[Generation] = []
        service.in_flight += count

    async def start(self, prompts: Sequence[Prompt], params: SamplingParams, stream: str | None) -> None:
        """Adds the prompts. Raises ApiError if the engine refuses one."""
        try:
            for prompt in prompts:
                self._generations.append(await self._service.engine.add(prompt, params, stream=stream))
        except ValueError as error:
            number = f"prompt {len(self._generations)}: " if len(prompts) > 1 else ""
            raise ApiError(400, f"{number}{error}") from error
        except RuntimeError as error:  # the engine is closed
            raise ApiError(503, str(error)) from error

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """All prompts' outputs as they come, each with its prompt's number."""
        metrics, last = self._service.metrics, dict.fromkeys(range(len(self._generations)), 0.0)
        waited = {asyncio.ensure_future(anext(one)): i for i, one in enumerate(self._generations)}
        try:
            while waited:
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waited.get):
                    i = waited.pop(task)
                    output = task.result()
                    if output.finished:
                        metrics.finished(output)
                    else:
                        waited[asyncio.ensure_future(anext(self._generations[i]))] = i
                    if all(one.canvas is None for one in output.outputs):
                        now = time.perf_counter()
                        if last[i]:
                            metrics.between_blocks(now - last[i])
                        last[i] = now
                    yield i, output
        finally:
            for task in waited:
                task.cancel()

    async def finished(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
        """`start`, then the finished outputs in the order of the prompts."""
        await self.start(prompts, params, None)
        outputs = {i: output async for i, output in self.outputs() if output.finished}
        return [outputs[i] for i in sorted(outputs)]

    def close(self) -> None:
        for generation in self._generations:
            generation.abort()
        self._service.in_flight -= self._count
        self._count = 0


async def unless_gone(receive: Callable[[], Awaitable[dict]], work: Awaitable[list[RequestOutput]]) -> list | None:
    """The result of `work`; if the client goes away first, `work` is cancelled and the result is None."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
