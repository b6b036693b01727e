"""Assembles the HTTP API: the endpoints, the gate before them and the handlers for what goes wrong."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from router.api.access_log import AccessLog
from router.api.admin import admin_routes
from router.api.admin_keys import key_routes
from router.api.bodies import OpenBodies
from router.api.callers import Callers
from router.api.chat import chat_routes
from router.api.completions import completion_routes
from router.api.desk import desk_routes
from router.api.document import document_routes
from router.api.door import MONITOR_PATHS
from router.api.grammar_check import GrammarChecks
from router.api.health import health_routes
from router.api.messages import message_routes
from router.api.metrics import Metrics
from router.api.middleware import Draining, DrainingGate, Gate
from router.api.models import model_routes
from router.api.plain_route import PlainRoutes
from router.api.problems import answer_problem
from router.api.requests import request_routes
from router.api.responses import response_routes
from router.api.services import Services
from router.api.tenant_metrics import TenantMetrics
from router.api.tokenization import tokenization_routes
from router.api.turns import Turns
from router.api.web import Cors, PlainMethods, Prefix
from router.backend import Backend
from router.config import ApiConfig
from router.tenants.config import TenantsConfig
from router.tenants.tenancy import Tenancy
from router.tenants.usage_log import UsageLog
from workers.errors import BatonError
from workers.text.tokenizer import Tokenizer


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    config: ApiConfig,
    draining: Draining | None = None,
    tenancy: Tenancy | None = None,
    usage_log: UsageLog | None = None,
    expected_output_tokens: int = 256,
) -> FastAPI:
    """The OpenAI-style API over a backend. Several apps may live in one process; each has its own metrics.

    Whoever ends the app without cutting answers hands in a `draining`. `app.state.metrics` are its Metrics; whoever ends the app
    closes `app.state.access_log`. Without a `tenancy` the keys of `config` are all there are. Raises InvalidConfig when the log cannot
    be written.
    """
    draining = draining or Draining()
    tenancy = tenancy or Tenancy(TenantsConfig(), config.api_keys)
    metrics = Metrics(backend, config.metrics_compat)
    tenant_metrics = TenantMetrics(metrics.registry, tenancy.config.metric_labels, lambda: tenancy.is_alone)
    callers = Callers(tenancy, tenant_metrics, expected_output_tokens, usage_log)
    turns = Turns(tokenizer, config.turn_memory_bytes)
    services = Services(
        backend, tokenizer, config, metrics, OpenBodies(config), GrammarChecks(tokenizer), turns, callers
    )
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.metrics = services.metrics
    for routes in (
        chat_routes(services),
        completion_routes(services),
        message_routes(services),
        response_routes(services),
        request_routes(services),
        model_routes(services),
        tokenization_routes(services),
        health_routes(services, draining),
        document_routes(config),
        admin_routes(services, draining),
        key_routes(services),
        desk_routes(),
    ):
        app.include_router(routes)
    for kind in (BatonError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_problem)
    app.state.access_log = AccessLog(config)
    app.add_middleware(PlainRoutes, routes=app.router)  # the innermost layer first
    app.add_middleware(PlainMethods)
    app.add_middleware(DrainingGate, draining=draining, open_paths=MONITOR_PATHS)
    log = app.state.access_log
    app.add_middleware(Gate, config=config, metrics=services.metrics, tenancy=tenancy, access_log=log)
    if config.cors.origins:
        app.add_middleware(Cors, config=config.cors)
    if config.root_path:
        app.add_middleware(Prefix, prefix=config.root_path)
    return app
