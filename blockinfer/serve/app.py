"""The HTTP application: paths, bodies, streams."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from blockinfer.engine.sequence import BLOCKS, DENOISE
from blockinfer.serve.answers import DONE, Answer, event
from blockinfer.serve.errors import ApiError, json_response, of_exception, on_api_error, on_http_error
from blockinfer.serve.protocol import ChatRequest, CompletionRequest, parse
from blockinfer.serve.service import Job, Service, unless_gone

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("page.html")
# the page is one file that loads nothing and talks only to this server
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# nginx's status for a client that went away; nobody reads it
_GONE = 499
# Up to this multiple of max_request_bytes is read before a body is refused: a client that still sends reads no answer.
_READ_ON = 16


def create_app(service: Service) -> FastAPI:
    """The application; its shutdown closes the service's engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.engine.close()

    # FastAPI's own pages load scripts from other hosts
    app = FastAPI(title="BlockInfer", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, _on_any_error)
    for path, endpoint in (("/", page), ("/health", health), ("/metrics", metrics), ("/v1/models", models)):
        app.add_api_route(path, endpoint, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    return app


async def _on_any_error(request: Request, error: Exception) -> Response:
    return ApiError(500, f"the server failed: {type(error).__name__}").response()


def _service(request: Request) -> Service:
    return request.app.state.service


async def page(request: Request) -> Response:
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})


async def health(request: Request) -> Response:
    """200 while requests are accepted and steps succeed."""
    service = _service(request)
    if service.draining or not service.engine.healthy:
        return json_response({"status": "shutting down" if service.draining else "the engine fails"}, 503)
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(_service(request).metrics.registry), headers={"Content-Type": media_type})


async def models(request: Request) -> Response:
    service = _service(request)
    service.check_key(request.headers.get("authorization"))
    return json_response({"object": "list", "data": [_card(service)]})


async def model(request: Request, name: str) -> Response:
    service = _service(request)
    service.check_key(request.headers.get("authorization"))
    service.check_model(name)
    return json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    length = service.engine.llm.config.max_model_len
    card = {"id": service.options.model, "object": "model", "created": service.created, "owned_by": "blockinfer"}
    return card | {"max_model_len": length}


async def chat_completions(request: Request) -> Response:
    return await _counted(request, _chat)


async def completions(request: Request) -> Response:
    return await _counted(request, _complete)


async def _counted(request: Request, answer: Callable) -> Response:
    """The answer, counted by status, as are refusals and clients that went away; streams count themselves."""
    counted = _service(request).metrics.answered
    try:
        response = await answer(request)
    except ApiError as error:
        counted(request.url.path, "aborted" if error.status == _GONE else error.status)
        raise
    except Exception:
        counted(request.url.path, 500)
        raise
    if not isinstance(response, _Events):
        counted(request.url.path, response.status_code)
    return response


async def _chat(request: Request) -> Response:
    service = _service(request)
    asked = parse(ChatRequest, await _body(request))
    service.check_model(asked.model)
    params = asked.sampling_params()
    job = service.admit(params.n)
    try:
        prompts = await service.engine.help(service.engine.llm.chat_prompts, asked.messages)
    except ValueError as error:
        job.close()
        raise ApiError(400, str(error).removeprefix("conversation 0: "), param="messages") from error
    except BaseException:
        job.close()
        raise
    return await _answer(request, job, asked, prompts, params)


async def _complete(request: Request) -> Response:
    service = _service(request)
    asked = parse(CompletionRequest, await _body(request))
    service.check_model(asked.model)
    params = asked.sampling_params()
    return await _answer(request, service.admit(len(asked.prompt) * params.n), asked, asked.prompt, params)


async def _answer(request: Request, job: Job, asked: Any, prompts: list, params: Any) -> Response:
    """Owns the job from now on."""
    service = _service(request)
    options = asked.stream_options
    chat, usage = isinstance(asked, ChatRequest), bool(options and options.include_usage)
    answer = Answer(chat, service.options.model, service.token_text, usage)
    if asked.stream:
        try:
            await job.start(prompts, params, DENOISE if asked.stream_mode == DENOISE else BLOCKS)
        except BaseException:
            job.close()
            raise
        return _Events(job, service, request.url.path, answer, len(prompts) * params.n)
    try:
        outputs = await unless_gone(request.receive, job.finished(prompts, params))
    except Exception as error:
        raise of_exception(error) from error
    finally:
        job.close()
    if outputs is None:
        raise ApiError(_GONE, "the client went away before its answer was there")
    return json_response(answer.whole(outputs))


class _Events(StreamingResponse):
    """A stream that closes its job when it ends, in whatever way."""

    def __init__(self, job: Job, service: Service, path: str, answer: Answer, count: int) -> None:
        self._job, self._service, self._path = job, service, path
        self._status: int | str = "aborted"
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(answer, count), headers=headers, media_type="text/event-stream")

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._job.close()
            self._service.metrics.answered(self._path, self._status)

    async def _events(self, answer: Answer, count: int) -> AsyncIterator[bytes]:
        try:
            for chunk in answer.begin(count):
                yield event(chunk)
            async for index, output in self._job.outputs():
                for chunk in answer.chunks(index, output):
                    yield event(chunk)
            for chunk in answer.end():
                yield event(chunk)
            self._status = 200
            yield DONE
        except Exception as error:
            self._status = "failed"
            yield event(of_exception(error).body)


async def _body(request: Request) -> bytes:
    """The JSON body, after a check of the key; raises ApiError if it is too large, too slow or not JSON by its type."""
    service = _service(request)
    options = service.options
    service.check_key(request.headers.get("authorization"))
    kind = request.headers.get("content-type", "")
    close = {"Connection": "close"}
    if kind.partition(";")[0].strip().lower() != "application/json":
        message = f"the body must come with Content-Type: application/json, got {kind[:100]!r}"
        raise ApiError(415, message, headers=close)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(options.receive_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= options.max_request_bytes:
                    body += chunk
                elif size > _READ_ON * options.max_request_bytes:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {options.receive_timeout:g} s"
        raise ApiError(408, message, headers=close) from None
    except ClientDisconnect:
        raise ApiError(_GONE, "the client went away before its body was there") from None
    if size > options.max_request_bytes:
        raise ApiError(413, f"the body has more than {options.max_request_bytes} bytes", headers=close)
    return bytes(body)
