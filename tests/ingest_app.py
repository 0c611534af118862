"""A stand-in for the real server: FastAPI, pydantic's own 422s, SQLite. Run it with

    python -m uvicorn --app-dir tests ingest_app:app

Like the real one it knows nothing of gzip bodies, and it stores a batch before it answers, however late it answers.
Its moods come from the environment (`delay` also from the query: `POST /ingest?delay=2`):

    INGEST_DB                database file; default: ingest.sqlite3 beside this file
    INGEST_KEYS              "off": Idempotency-Key is ignored, every repeat is stored again
    INGEST_DELAY             seconds before a stored batch is answered; a repeat under a known key is answered at once
    INGEST_DELAY_PER_PACKET  seconds for each packet, on top
    INGEST_POISON            status of the answer to a batch with a packet whose http_path is "/poison"; default: 400
    INGEST_REQUIRE           a field every packet must have: pydantic answers 422 where it is missing
    INGEST_MAX_BYTES         bodies longer than this are answered with 413
"""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, Optional

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse
from ingest_server import DEFAULT_DB, PacketStore
from pydantic import AfterValidator
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import Response

DB = Path(os.environ.get("INGEST_DB", DEFAULT_DB))
KEYS = os.environ.get("INGEST_KEYS", "on") != "off"
DELAY = float(os.environ.get("INGEST_DELAY", 0))
DELAY_PER_PACKET = float(os.environ.get("INGEST_DELAY_PER_PACKET", 0))
POISON = int(os.environ.get("INGEST_POISON", 400))
REQUIRE = os.environ.get("INGEST_REQUIRE")
MAX_BYTES = float(os.environ.get("INGEST_MAX_BYTES", "inf"))


def _check_schema(packet: dict[str, Any]) -> dict[str, Any]:
    if REQUIRE and REQUIRE not in packet:
        raise ValueError(f"field {REQUIRE} is required")
    return packet


Packet = Annotated[dict[str, Any], AfterValidator(_check_schema)]

PacketStore(DB).close()  # made now, so that the first requests do not race for it
app = FastAPI()


@app.middleware("http")
async def limit_body(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """As a reverse proxy does it: by the announced length, before a byte of the body is read."""
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        return JSONResponse({"detail": "Request Entity Too Large"}, status_code=413)
    return await call_next(request)


def refuse_poison(packets: list[dict[str, Any]]) -> None:
    """Fail like a database column that is too short, and like the real server tell everything about it."""
    for packet in packets:
        if packet.get("http_path") == "/poison":
            sql = "INSERT INTO packets (http_path) VALUES (%(http_path)s)"
            detail = f"value too long for type character varying(64)\n[SQL: {sql}]\n[parameters: {packet}]"
            raise HTTPException(status_code=POISON, detail=detail)


@app.post("/ingest")
def ingest(
    packets: list[Packet],
    delay: float = DELAY,
    idempotency_key: Annotated[Optional[str], Header()] = None,
) -> dict[str, Any]:
    refuse_poison(packets)
    with PacketStore(DB) as store:
        receipt = store.add([json.dumps(packet) for packet in packets], idempotency_key if KEYS else None)
    if not receipt.duplicate:
        time.sleep(delay + DELAY_PER_PACKET * len(packets))
    return {"status": "success", "packets_received": receipt.packets_received}


@app.get("/health")
def health() -> dict[str, Any]:
    with PacketStore(DB) as store:
        return {"status": "ok", "packets": store.count(), "repeats": store.repeats()}
