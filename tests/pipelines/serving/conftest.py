"""A tiny fused model behind a real server in a thread of the tests."""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import meteora
from meteora.model.chat import Chat
from pipelines.serving import server
from pipelines.serving.host_names import names_of
from tests.pipelines.conftest import CHAT_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


@pytest.fixture(scope="module")
def chat(world, tmp_path_factory):
    base = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(world.base, base)
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Chat(*meteora.load(world.checkpoint, base_folder=base))


@contextmanager
def serving(chat: Chat, page: str = "", allowed: Sequence[str] = ()) -> Generator[str]:
    """Serve the model as `tiny`; yields the server's address."""
    with server.listen("127.0.0.1", 0) as listening:
        running = server.make_server(chat, "tiny", names_of("127.0.0.1", allowed), page)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()
