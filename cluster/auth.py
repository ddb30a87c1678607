"""Who may ask: finds the tenant of each request by its API key, and says what is left of the tenant's limits."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.key_ring import KeyRing
from cluster.openai_errors import ApiError
from cluster.rate_limit import Tenant, Tenants
from cluster.slot import TENANT

OPEN_PATHS = frozenset({"/health", "/metrics"})  # probes and scrapers carry no key


class KeyCheck:
    """ASGI middleware that answers 401 to who has no key, and tells the routes who has which.

    Args:
        app: what it protects; finds the ``Tenant`` in the scope's state.
        ring: the keys accepted; with none, everybody may ask, as one tenant.
        tenants: by the name of their key.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, *, tenants: Tenants) -> None:
        self._app = app
        self._ring = ring
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._tenants.get(self._find_name(scope))
        except ApiError as error:
            await error.to_response()(scope, receive, send)
            return
        scope.setdefault("state", {})[TENANT] = tenant
        await self._app(scope, receive, _with_limits(send, tenant) if tenant.has_buckets else send)

    def _find_name(self, scope: Scope) -> str:
        """Of the tenant; raises ``ApiError`` 401."""
        if self._ring.is_open:
            return ""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        if not header:
            raise _refuse("an API key is missing; send it as Authorization: Bearer KEY")
        if scheme.lower() != b"bearer":
            raise _refuse("the Authorization header must be Bearer KEY")
        name = self._ring.find(key.strip())
        if name is None:
            raise _refuse("the API key is not known here")
        return name


def _with_limits(send: Send, tenant: Tenant) -> Send:
    """``send`` that adds the tenant's limits to the headers, as they are when the answer begins."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *tenant.headers()]
        await send(message)

    return send_with_limits


def _refuse(problem: str) -> ApiError:
    return ApiError(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
