"""The live page: who may see it, what it tells, and that its buttons act, in a real browser too."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import CHROMIUM, Page
from test_deploy_recording import JOINTS, tick

from robopolicy.deploy.contract import Plan
from robopolicy.deploy.live import LivePage


class Panel:
    """What the page commands."""

    def __init__(self) -> None:
        self.phase, self.reason = "moving", ""

    def stop(self, reason: str) -> None:
        self.phase, self.reason = "stopped", reason

    def rearm(self) -> str:
        if self.phase != "stopped":
            return "nothing to re-arm: it is not stopped"
        self.phase, self.reason = "waiting", ""
        return ""

    def snapshot(self) -> dict[str, Any]:
        policy = {"missing": "objects", "diagnostics": {"doubt_objects": 4.25, "energy": None}}
        return {
            "phase": self.phase,
            "reason": self.reason,
            "ping_s": float("inf"),
            "clamps": {"velocity": 12},
            **policy,
        }


@pytest.fixture
def panel() -> Panel:
    return Panel()


@pytest.fixture
def live(panel: Panel) -> Iterator[LivePage]:
    page = LivePage(panel, joints=JOINTS)
    page.start()
    yield page
    page.close()


def ask(
    live: LivePage, path: str, *, method: str = "GET", token: str | None = None, host: str = ""
) -> tuple[int, bytes, http.client.HTTPResponse]:
    url = urlsplit(live.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    query = url.query if token is None else f"token={token}"
    connection.request(method, f"{path}?{query}", headers={"Host": host or url.netloc})
    answer = connection.getresponse()
    body = answer.readline() if path == "/updates" and answer.status == 200 else answer.read()
    connection.close()
    return answer.status, body, answer


def test_the_buttons_act(live: LivePage, panel: Panel) -> None:
    assert json.loads(ask(live, "/stop", method="POST")[1]) == {"problem": ""}
    assert (panel.phase, panel.reason) == ("stopped", "STOP on the live page")
    assert json.loads(ask(live, "/rearm", method="POST")[1]) == {"problem": ""}
    assert "not stopped" in json.loads(ask(live, "/rearm", method="POST")[1])["problem"]


@pytest.mark.parametrize("path", ["/", "/updates", "/picture", "/stop", "/rearm"])
def test_without_the_token_or_from_another_name_nothing_is_told_or_done(
    live: LivePage, panel: Panel, path: str
) -> None:
    for method in ("GET", "POST"):
        assert ask(live, path, method=method, token="wrong")[0] == 403
        assert ask(live, path, method=method, token="")[0] == 403
        assert ask(live, path, method=method, host="evil.example:80")[0] == 403
    assert panel.phase == "moving"


def test_buttons_do_not_act_on_a_link_that_is_only_followed(live: LivePage, panel: Panel) -> None:
    assert ask(live, "/stop")[0] == 404
    assert panel.phase == "moving"


def test_only_this_computer_is_served(live: LivePage) -> None:
    assert live._server.server_address[0] == "127.0.0.1"


def test_updates_tell_the_newest_state_and_stay_json(live: LivePage) -> None:
    for i in range(300):
        live.tick(tick(i, time_s=i * 0.01, sent=None))
    live.event("start", "mode live")
    status, line, _ = ask(live, "/updates")
    assert status == 200
    update = json.loads(line.removeprefix(b"data: "))
    assert update["snapshot"] == {**live._commands.snapshot(), "ping_s": None}
    assert update["joints"] == list(JOINTS)
    assert 70 <= len(update["ticks"]) <= 76, "three seconds at one turn per 40 ms"
    assert update["ticks"][-1][1] == pytest.approx(list(tick(int(update["ticks"][-1][0] * 100)).measured), abs=1e-4)
    assert update["ticks"][-1][2] is None
    assert update["events"][0]["text"] == "mode live"
    number, later = live.update(live.update(0)[0])
    assert later["ticks"] == []
    assert number == live.update(number)[0]


def test_the_newest_picture_is_shown(live: LivePage) -> None:
    assert ask(live, "/picture")[0] == 404
    values = {"proprio": np.zeros((2, 3), np.float32), "rgb.base": np.full((2, 3, 4, 5), 200, np.uint8)}
    numbers = {"time_s": 0.0, "observed_s": 0.0, "inference_s": 0.0, "spread_s": 0.0}
    live.plan(Plan(**numbers, observation=values, chunk=np.zeros((4, 2), np.float32), shift=0, generator_state=b""))
    status, body, answer = ask(live, "/picture")
    assert (status, answer.headers["Content-Type"]) == (200, "image/png")
    import imageio.v3 as iio

    assert np.array_equal(iio.imread(body), np.full((4, 5, 3), 200, np.uint8))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [900, 500])
def test_a_click_on_stop_in_a_browser_stops(live: LivePage, panel: Panel, width: int, tmp_path: Path) -> None:
    with Page(live.url, width=width) as page:
        page.wait_until("document.querySelector('#phase b').textContent == 'moving'")
        for i in range(100):
            live.tick(tick(i, time_s=i * 0.05))
        page.wait_until("document.querySelectorAll('#plots canvas').length == 2")
        assert page.evaluate("document.querySelector('#said').innerText").split() == [
            "doubt",
            "objects",
            "4.25",
            "energy",
            "–",
        ]
        assert "objects" in page.evaluate("document.querySelector('#numbers').innerText").split()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over the side"
        page.click("#stop")
        deadline = time.monotonic() + 30
        while panel.phase != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.005)
        page.wait_until("document.querySelector('#reason').textContent == 'STOP on the live page'")
        page.click("#rearm")
        page.wait_until("document.querySelector('#phase b').textContent == 'waiting'")
        page.click("#rearm")
        page.wait_until("document.querySelector('#problem').textContent.includes('not stopped')")
