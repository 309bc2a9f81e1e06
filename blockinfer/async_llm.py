"""AsyncLLM: the engine on a thread of its own, for asyncio."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import torch

from blockinfer.engine.prompts import Prompt, ReadPrompt
from blockinfer.engine.sequence import BLOCKS
from blockinfer.llm import LLM
from blockinfer.outputs import RequestOutput
from blockinfer.sampling_params import SamplingParams

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Generation:
    """A running request: an asynchronous iterator over its outputs. To leave it early, call `abort`.

    The outputs are those of `LLM.stream`; if the request fails, its exception is raised instead.
    """

    def __init__(self, owner: "AsyncLLM") -> None:
        self.request_id: int | None = None
        self.done = False
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> RequestOutput:
        if self.done and self._outputs.empty():
            raise StopAsyncIteration
        output = await self._outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    def abort(self) -> None:
        """Frees what the request holds before the engine's next step. Does nothing if the request is done."""
        if not self.done:
            self.done = True
            self._owner._forget(self)

    def _put(self, output: RequestOutput | Exception) -> None:
        """Runs in the loop's thread."""
        if self.done:
            return
        self._outputs.put_nowait(output)
        if isinstance(output, Exception) or output.finished:
            self.done = True
            self._owner._unfinished -= 1


class AsyncLLM:
    """Takes over an LLM, whose own methods are refused until `close`. Use it from one event loop.

    Requests of all coroutines share the engine's batches. A request that fails does not affect the others: after an
    error that names no request, the requests that were running restart one at a time, until the one at fault is found.
    """

    def __init__(self, llm: LLM) -> None:
        if not isinstance(llm, LLM):
            raise ValueError(f"llm must be an LLM, got {type(llm).__name__}")
        self._engine = llm.take_over()
        self.llm = llm
        self._unfinished = 0
        # tokenizes texts and runs chat templates, one at a time, beside the engine's steps
        self.helper: Executor = ThreadPoolExecutor(1, "blockinfer-text")
        # a new thread's current GPU is the first one
        self._gpu = torch.cuda.current_device() if llm.config.device.type == "cuda" else None
        # the following belong to the engine's thread
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._generations: dict[int, Generation] = {}
        self._suspects: set[int] = set()
        self._errors_in_a_row = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="blockinfer-engine", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Requests that were added and are neither finished nor aborted."""
        return self._unfinished

    @property
    def healthy(self) -> bool:
        """False once the thread has ended or the last three steps have failed."""
        return self._thread.is_alive() and not self._closing and self._errors_in_a_row < 3

    async def add(
        self, prompt: Prompt, params: SamplingParams | None = None, *, stream: str | None = BLOCKS
    ) -> Generation:
        """Queues a request and returns once the engine has accepted it. Raises what `Engine.add_request` raises, and
        RuntimeError if this is closed. stream: as there; None gives only the finished output."""
        if not self._thread.is_alive() or self._closing:
            raise RuntimeError("this AsyncLLM is closed")
        generation = Generation(self)
        self._unfinished += 1
        try:
            read = await self.help(self._engine.prompts.read, prompt)
            added: asyncio.Future[None] = generation._loop.create_future()
            self._commands.put(lambda: self._add(generation, added, read, params, stream))
            await added
        except BaseException:
            generation.abort()
            raise
        return generation

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, stream: str | None = BLOCKS
    ) -> AsyncIterator[RequestOutput]:
        """Adds a request and yields its outputs. Closing the generator, or cancelling its task, aborts the request."""
        generation = await self.add(prompt, params, stream=stream)
        try:
            async for output in generation:
                yield output
        finally:
            generation.abort()

    async def help(self, function: Callable[..., _T], *args: object) -> _T:
        """Runs a slow function on the thread for texts and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self.helper, function, *args)

    async def abort(self, request_id: int) -> None:
        """Drops an unfinished request; its generator raises RuntimeError. Raises ValueError if there is none with that
        id."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        error = RuntimeError(f"request {request_id} was aborted")
        self._commands.put(lambda: _resolve(done, self._fail([request_id], error)))
        if not await done:
            raise ValueError(f"there is no unfinished request {request_id}")

    def abort_all(self, error: Exception) -> None:
        """Drops every unfinished request; their generators raise `error`."""
        self._commands.put(lambda: self._fail(list(self._generations), error))

    def close(self) -> None:
        """Aborts all requests, ends the thread, and releases the LLM. Closing twice is allowed."""
        if not self._closing:
            self._closing = True
            self.abort_all(RuntimeError("this AsyncLLM was closed"))
        self._thread.join()
        self.helper.shutdown(cancel_futures=True)
        self.llm.give_back()

    def _forget(self, generation: Generation) -> None:
        self._unfinished -= 1
        self._commands.put(lambda: self._drop(generation))

    # the methods below run in the engine's thread

    def _run(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        try:
            while not self._closing or self._generations:
                self._obey(wait=not self._engine.has_unfinished())
                if self._engine.has_unfinished():
                    self._step()
        finally:
            self._closing = True
            self._fail(list(self._generations), RuntimeError("the engine's thread has ended"))
            self._obey(wait=False)

    def _obey(self, wait: bool) -> None:
        """Runs the queued commands; wait: first waits for one."""
        try:
            if wait:
                self._commands.get()()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _add(
        self,
        generation: Generation,
        added: "asyncio.Future[None]",
        prompt: ReadPrompt,
        params: SamplingParams | None,
        stream: str | None,
    ) -> None:
        if generation.done or self._closing:
            _resolve(added, RuntimeError("this AsyncLLM is closed"))
            return
        try:
            generation.request_id = self._engine.add_request(prompt, params, stream=stream)
        except Exception as error:
            _resolve(added, error)
            return
        self._generations[generation.request_id] = generation
        _resolve(added, None)

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._errors_in_a_row += 1
            self._blame(error)
        else:
            self._errors_in_a_row = 0
            self._give([(self._generations[output.request_id], output) for output in outputs])
            self._settle({output.request_id for output in outputs if output.finished})

    def _blame(self, error: Exception) -> None:
        """Fails the requests that an error names; if it names none, starts the search for the one at fault."""
        named = getattr(error, "request_ids", None)
        if named is None:
            _log.error("a step failed", exc_info=error)
            ran = self._engine.restart(alone=True)
            named = ran if len(ran) == 1 else []
            self._suspects |= set(ran)
            if not ran:  # no request is at fault
                self._engine.restart()
                named = list(self._generations)
            error = RuntimeError(f"the engine failed: {type(error).__name__}: {error}")
        self._fail(named, error)

    def _fail(self, request_ids: list[int], error: Exception) -> bool:
        """Ends these with an error -> whether any of them was unfinished."""
        there = [(i, self._generations[i]) for i in request_ids if i in self._generations]
        for i, _ in there:
            self._engine.abort(i)
        self._give([(generation, error) for _, generation in there])
        self._settle({i for i, _ in there})
        return bool(there)

    def _drop(self, generation: Generation) -> None:
        if self._generations.get(generation.request_id) is generation:
            self._engine.abort(generation.request_id)
            self._settle({generation.request_id})

    def _settle(self, request_ids: set[int]) -> None:
        """These have left the engine; once the last suspect is gone, requests run side by side again."""
        for i in request_ids:
            del self._generations[i]
        if self._suspects:
            self._suspects -= request_ids
            if not self._suspects:
                self._engine.restart()

    def _give(self, outputs: list[tuple[Generation, RequestOutput | Exception]]) -> None:
        """Wakes the loop once for all of them."""
        if outputs:
            _call(outputs[0][0]._loop, lambda: [generation._put(output) for generation, output in outputs])


def _resolve(future: asyncio.Future, result: object) -> None:
    def set_it() -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    _call(future.get_loop(), set_it)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop was closed: nobody waits
        pass
