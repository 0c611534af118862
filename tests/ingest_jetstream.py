"""A stateless receiver for many senders: a batch becomes one message of a replicated NATS JetStream stream. Run it with

    python tests/ingest_jetstream.py --servers nats://127.0.0.1:4221 nats://127.0.0.1:4222 nats://127.0.0.1:4223

JetStream drops a message whose Nats-Msg-Id it has seen within the stream's window, and the Idempotency-Key is that id.
So it does not matter which receiver gets a repeat: any number of them runs behind any load balancer, and none keeps
anything. What POST /ingest?sensor=NAME answers, for the subject STREAM.NAME:

    200  the stream has acknowledged the batch, now or earlier
    413  the batch is longer than a message may be
    422  it is not a JSON array of objects, or has no key
    503  no quorum, no leader, or no answer in time: it may be stored or not; Retry-After says when to repeat it
"""

import argparse
import asyncio
import contextlib
import logging
import random
from typing import Annotated, Any

import nats
import nats.errors
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Query, Request
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, StreamConfig
from nats.js.errors import NotFoundError

LONGEST, HEADERS = 8 << 20, 4096  # bytes of a message, and what of them is left for its headers
logger = logging.getLogger("uvicorn.error")


def make_app(jetstream: JetStreamContext, stream: str, longest: int) -> FastAPI:
    app = FastAPI()

    @app.post("/ingest")
    async def ingest(
        request: Request,
        packets: list[dict[str, Any]],
        idempotency_key: Annotated[str, Header(min_length=1)],
        sensor: Annotated[str, Query(pattern="^[A-Za-z0-9_-]{1,64}$")] = "unnamed",
    ) -> dict[str, int]:
        batch = await request.body()  # the bytes as they came
        if len(batch) > longest:
            raise HTTPException(413, f"{len(batch)} bytes; a batch may have {longest}")
        try:
            stored = await jetstream.publish(f"{stream}.{sensor}", batch, headers={"Nats-Msg-Id": idempotency_key})
        except (nats.errors.Error, OSError) as error:
            again = str(random.randint(1, 10))  # seconds, not the same for all: or all would be back at once
            raise HTTPException(503, f"not acknowledged: {error}", {"Retry-After": again}) from error
        if stored.duplicate:
            logger.info("A repeat from %s, dropped: %s", sensor, idempotency_key)
        return {"packets_received": len(packets)}

    return app


async def find_or_make(jetstream: JetStreamContext, wanted: StreamConfig) -> StreamConfig:
    """The stream's settings, once there is a cluster to have it. One that exists keeps the settings it has."""
    while True:
        try:
            try:
                return (await jetstream.stream_info(wanted.name or "")).config
            except NotFoundError:
                return (await jetstream.add_stream(wanted)).config
        except nats.errors.Error as error:
            logger.warning("Waiting for JetStream: %s", error)
            await asyncio.sleep(1)


async def tell(error: Exception) -> None:
    logger.warning("NATS: %s", error)


async def serve(options: argparse.Namespace) -> None:
    connection = await nats.connect(options.servers, error_cb=tell, max_reconnect_attempts=-1, reconnect_time_wait=1)
    wanted = StreamConfig(
        name=options.stream,
        subjects=[f"{options.stream}.*"],
        num_replicas=options.replicas,
        duplicate_window=options.window * 3600,
        max_msg_size=LONGEST,
        discard=DiscardPolicy.NEW,  # for whoever limits it later: a full stream is a 503, and loses nothing
    )
    jetstream = connection.jetstream(timeout=5)  # seconds for an acknowledgement; a sender waits for 30
    stream = await find_or_make(jetstream, wanted)
    longest = min(size for size in (stream.max_msg_size or 0, connection.max_payload) if size > 0) - HEADERS
    facts = f"{stream.num_replicas} replicas, window {stream.duplicate_window / 3600:g} h, batches of {longest:,} bytes"
    logger.info("Stream %s: %s", stream.name, facts)
    app = make_app(jetstream, options.stream, longest)
    # A sender gives a connection up that has been idle for a minute: closed later than that, no request meets the close
    await uvicorn.Server(uvicorn.Config(app, options.host, options.port, timeout_keep_alive=65)).serve()
    await connection.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description="Receives batches of packets into a NATS JetStream stream.")
    parser.add_argument("--servers", nargs="+", required=True, metavar="URL", help="the NATS servers")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; 0.0.0.0: all addresses")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--stream", default="packets", help="made where it is missing, with the following")
    parser.add_argument("--replicas", type=int, default=3, help="servers that hold it (default: 3)")
    parser.add_argument("--window", type=float, default=24, help="hours for which it knows a key (default: 24)")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))
